"""Penalties and biases inside vLLM: on the guided logits, as the transformers engine's."""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from making import models, prompts, trio

from ivg.types import Prompt

GREEDY = {"temperature": 0.0, "max_new_tokens": 32, "beta": 1.0}


def looking_back(model, plain):
    """Penalties, and a bad word whose tokens ``plain`` has on both sides of the end of a chunk of 4 tokens."""
    spell, decode = model.base.vocabulary.word_ids, model.base.tokenizer.decode
    pairs = [ids[i - 1 : i + 1] for ids in plain for i in range(4, len(ids), 4)]
    word, pair = next((decode(pair), pair) for pair in pairs if decode(pair).strip() and tuple(pair) in spell([decode(pair)]))
    return [
        {"bad_words": [word]},
        {"bad_words": [word], "repetition_penalty": 1.1},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"logit_bias": {plain[0][4]: 4.0}, "repetition_penalty": 1.2, "frequency_penalty": 0.7, "bad_words": [decode(pair[:1])]},
    ]


def test_settings_are_those_of_the_transformers_engine(folder):
    paths, texts = trio(folder, "llama"), prompts(3)
    with models("transformers", models=paths) as slow, models("vllm", models=paths, search={"method": "eft"}) as fast:
        plain = [c.token_ids for c in slow.generate(texts, "eft", **GREEDY)]
        often = plain[0][4]
        for settings in (
            {"frequency_penalty": 1.5, "presence_penalty": 0.5},
            {"logit_bias": {often: -20.0}, "repetition_penalty": 1.2, "frequency_penalty": -0.3},
            {"stop_token_ids": [often]},
            {"stop_token_ids": [often], "min_new_tokens": 12},
            {
                "stop_token_ids": [often],
                "ignore_eos": True,
                "logit_bias": {fast.base.tokenizer.eos_token_id: 90.0},
            },  # nearly every token, were it allowed
        ):
            expected = [(c.token_ids, c.text) for c in slow.generate(texts, "eft", **GREEDY, **settings)]
            assert [(c.token_ids, c.text) for c in fast.generate(texts, "eft", **GREEDY, **settings)] == expected
            assert [ids for ids, _ in expected] != plain
        words = dict.fromkeys(slow.base.tokenizer(" was . long").input_ids, 30.0)
        ended = {"logit_bias": words, "frequency_penalty": 2.0, "ignore_eos": True, "end_at_sentence": 5}
        expected = [(c.token_ids, c.finish_reason) for c in slow.generate(texts, "eft", **GREEDY, **ended)]
        assert all(reason == "stop" and 5 <= len(ids) < 20 for ids, reason in expected)
        assert [(c.token_ids, c.finish_reason) for c in fast.generate(texts, "eft", **GREEDY, **ended)] == expected
        whole, chunks = {"method": "eft"}, {"method": "custom", "token": "implicit", "chunk_length": 4}
        for settings in looking_back(slow, plain):
            expected = [c.token_ids for c in slow.generate(texts, "eft", **GREEDY, **settings)]
            assert expected != plain
            for method in (whole, chunks, {**chunks, "chunk_length": 1}):
                assert [c.token_ids for c in fast.generate(texts, **method, **GREEDY, **settings)] == expected, (method, settings)


def test_the_distribution_of_a_base_alone_in_chunks(folder):
    """Without a composite there are no guides' weights; of three tokens the third depends on both before it."""
    paths = {"base": trio(folder, "llama")["base"]}
    with models("transformers", models=paths) as slow, models("vllm", models=paths, vllm={"max_num_seqs": 256}) as fast:
        tokenizer = slow.base.tokenizer
        first, second = (tokenizer(text, add_special_tokens=False).input_ids[0] for text in (" a", " b"))
        settings = {
            "logit_bias": {first: 60.0, second: 60.5},  # of either: the rest is out of reach
            "presence_penalty": 1.0,
            "frequency_penalty": -0.5,
            "bad_words": [" b a b"],
            "max_new_tokens": 3,
        }
        given, z = slow.base.prompt_ids(Prompt("The film")), {}
        for text in ((), (first,), (second,), *itertools.product((first, second), repeat=2)):
            ids = torch.tensor([[*given, *text]])
            z[text] = slow.base.network(ids).logits[0, -1, [first, second]] + torch.tensor([60.0, 60.5])
        expected = {}
        for text in itertools.product((first, second), repeat=3):
            weight = 1.0
            for i in range(3):
                so_far = text[:i]
                changed = z[so_far] - torch.tensor([(t in so_far) * 1.0 - 0.5 * so_far.count(t) for t in (first, second)])
                if so_far == (second, first):
                    changed[1] = -torch.inf
                weight *= changed.softmax(-1)[int(text[i] == second)].item()
            expected[text] = weight
        draws = 2000
        for length in (1, 2):
            answers = fast.generate("The film", "custom", chunk_length=length, n=draws, seed=length, temperature=1.0, **settings)
            found = Counter(c.token_ids for c in answers)
            assert set(found) <= set(expected) and (second, first, second) not in found
            statistic = sum((found[t] - draws * p) ** 2 / (draws * p) for t, p in expected.items() if p * draws > 5)
            assert statistic < 26.1, (found, expected)  # chi squared, 7 degrees of freedom, p = 0.0005
