"""Model runner V2: guidance weights reach their rows, also those of draft tokens."""

from __future__ import annotations

from collections import Counter

import pytest
import runner_v2
import torch
from making import make_adapter, models, prompts, trio

from ivg.errors import ConfigError, ModelError

GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
SEVERAL = [(text, {"method": "eft", "beta": beta, **GREEDY}) for text, beta in zip(prompts(5), (0.0, 0.5, 1.0, 2.0, -1.0), strict=True)]
GRAMMAR = (prompts(1)[0], {"method": "eft", "beta": 1.0, "regex": "[ab]{7}", **GREEDY})
SCORED = (prompts(2)[1], {"method": "eft", "beta": 1.0, "temperature": 0.7, "seed": 1, "max_new_tokens": 3, "alternatives": 2})


def in_chunks(request):
    """The same, of a search that asks for three tokens at a time."""
    text, settings = request
    return text, {**settings, "method": "custom", "token": "implicit", "chunk_length": 3}


def tokens_of(model, requests):
    return [list(model.generate(text, **settings).token_ids) for text, settings in requests]


def check_scores(model, scores):
    text, settings = SCORED
    given = model.logprobs(text, [token for token, _, _ in scores], "eft", beta=settings["beta"], temperature=settings["temperature"])
    expected = [number for t in given.tokens for number in (t.logprob, t.base_logprob)]
    assert [number for _, *pair in scores for number in pair] == pytest.approx(expected, abs=2e-4)


def test_weights_reach_their_rows(folder, tmp_path):
    paths, text = trio(folder, "llama"), prompts(2)[1]
    with models("transformers", models=paths) as slow:
        plain = slow.generate(text, "eft", beta=1.0, **GREEDY).token_ids
        words = [slow.base.tokenizer.decode(plain[2:4])]  # on both sides of the end of a chunk
        looking = (text, {"method": "eft", "beta": 1.0, "bad_words": words, "frequency_penalty": 0.9, "repetition_penalty": 1.1, **GREEDY})
        requests = [*SEVERAL, in_chunks(GRAMMAR), in_chunks(looking), looking]
        found = runner_v2.run(tmp_path, models=paths, vllm={"max_num_seqs": 8}, requests=requests, scored=SCORED)
        assert found["tokens"] == tokens_of(slow, [*SEVERAL, GRAMMAR, looking, looking]) and found["tokens"][-1] != list(plain)
        check_scores(slow, found["scores"])


def test_drafts_change_no_answer(folder, tmp_path):
    """Drafts by the tuned model, each row of which is guided by the weight of its request."""
    paths = trio(folder, "llama") | {"tuned": trio(folder, "llama", "llama")["tuned"]}
    paths["untuned"] = paths["base"]  # with beta = 1 the guided model is the tuned one, and all its drafts are accepted
    drawn = [(prompts(2)[1], {"method": "eft", "beta": 0.5, "temperature": 1.0, "max_new_tokens": 2, "seed": i}) for i in range(96)]
    requests = [*SEVERAL, GRAMMAR, in_chunks(GRAMMAR), *drawn]
    vllm = {"max_num_seqs": 64, "draft_tokens": 3, "arguments": {"disable_log_stats": False}}
    found = runner_v2.run(tmp_path, models=paths, vllm=vllm, requests=requests, scored=SCORED)
    assert not any(found["errors"])
    drafted, accepted = found["drafts"]
    assert 0 < accepted < drafted
    with models("transformers", models=paths) as slow:
        assert found["tokens"][:7] == tokens_of(slow, [*SEVERAL, GRAMMAR, GRAMMAR])
        check_scores(slow, found["scores"])
        likely, order = second_token(slow, prompts(2)[1], 0.5).sort(descending=True)
    parts = (likely.cumsum(0) * 8).long().clamp(max=7)  # tokens by probability, an eighth of it in each part
    expected = torch.zeros(8, dtype=likely.dtype).index_add(0, parts, likely) * len(drawn)
    part_of = dict(zip(order.tolist(), parts.tolist(), strict=True))
    seen = Counter(part_of[ids[1]] for ids in found["tokens"][7:] if len(ids) == 2)
    ended = len(drawn) - sum(seen.values())  # at the first token
    statistic = sum((seen[i] - e) ** 2 / e for i, e in enumerate(expected.tolist()))
    assert ended < 5 and statistic < 26.1 + ended, (seen, expected)  # chi squared, 7 degrees of freedom, p = 0.0005


@torch.no_grad()
def second_token(model, text, beta):
    """The probability of each second token, over all first ones."""
    base, tuned = model.base.network, model.values["implicit"].tuned.network
    prompt = model.base.tokenizer(text).input_ids

    def guided(rows):
        z, shift = (network(input_ids=rows).logits[:, -1].double() for network in (base, tuned))
        return (z + beta * (shift - z)).softmax(-1)

    first = guided(torch.tensor([prompt]))[0]
    return sum(
        first[some] @ guided(torch.cat([torch.tensor([prompt]).expand(len(some), -1), some[:, None]], 1))
        for some in torch.arange(len(first)).split(512)
    )


def test_what_cannot_draft_is_refused(folder):
    paths = trio(folder, "llama") | {"tuned": trio(folder, "llama", "llama")["tuned"]}
    adapter = {"path": paths["base"], "adapter": make_adapter(folder, "llama", 5)}
    for given, vllm, why in (
        (paths, {"arguments": {"speculative_config": {}}}, "both say what drafts"),
        ({"base": paths["base"]}, {}, "there is no pair"),
        (paths | {"tuned": adapter}, {}, "tuned has an adapter"),
    ):
        with pytest.raises(ConfigError, match=why), models("vllm", models=given, vllm={"draft_tokens": 2, **vllm}):
            pass
    with (
        pytest.raises(ModelError, match="model runner V2"),
        models("vllm", models=paths, vllm={"draft_tokens": 2}, search={"method": "eft"}),
    ):
        pass
