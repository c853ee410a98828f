"""Model runner V2: guidance weights reach their rows, also those of draft tokens."""

from __future__ import annotations

import pytest
import runner_v2
import torch
from making import make_adapter, mix, models, prompts, trio

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


def agreeing(folder):
    """Untuned is the base, tuned is near it: some drafts are accepted and others not; with beta = 1 all greedy ones are."""
    paths = trio(folder, "llama", "llama")
    return {"base": paths["base"], "untuned": paths["base"], "tuned": mix(folder, paths["base"], paths["tuned"], 0.2)}


def test_drafts_change_no_answer(folder, tmp_path):
    """Drafts by the tuned model, each row of which is guided by the weight of its request."""
    paths, text = agreeing(folder), prompts(2)[1]
    words = (text, {"method": "eft", "beta": 1.0, "regex": "[A-Za-z ]{1,60}", **GREEDY, "max_new_tokens": 16})
    penalties = (text, {"method": "eft", "beta": 1.0, "frequency_penalty": 0.9, "repetition_penalty": 1.1, **GREEDY, "max_new_tokens": 16})
    greedy = [*SEVERAL, GRAMMAR, words, penalties]
    drawn = [(text, {"method": "eft", "beta": 2.0, "temperature": 1.0, "max_new_tokens": 2, "seed": i}) for i in range(96)]
    vllm = {"max_num_seqs": 64, "num_speculative_tokens": 3, "arguments": {"disable_log_stats": False}}
    found = runner_v2.run(tmp_path, models=paths, vllm=vllm, requests=[*greedy, in_chunks(words), *drawn], scored=SCORED)
    assert not any(found["errors"])
    drafted, accepted = found["drafts"]
    assert 0 < accepted < drafted
    with models("transformers", models=paths) as slow:
        assert found["tokens"][: len(greedy) + 1] == tokens_of(slow, [*greedy, words])
        check_scores(slow, found["scores"])
        p, of_draft = second_token(slow, text, 2.0, 2.0), second_token(slow, text, 2.0, 1.0)
    order = (p / of_draft).argsort()  # where the draft is too likely, and where it is not likely enough
    parts = torch.empty_like(order).index_copy(0, order, (p[order].cumsum(0) * 6).long().clamp(max=5))
    expected = torch.zeros(6, dtype=p.dtype).index_add(0, parts, p) * len(drawn)
    seconds = [ids[1] for ids in found["tokens"][len(greedy) + 1 :] if len(ids) == 2]  # the others ended at the first token
    seen = torch.bincount(parts[seconds], minlength=6)
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert len(drawn) - len(seconds) < 3 and statistic < 24.0, (seen, expected)  # chi squared, 5 degrees of freedom, p = 0.0002


@torch.no_grad()
def second_token(model, text, beta, beta_second):
    """The probability of each second token, guided by ``beta_second``, over all first ones, guided by ``beta``."""
    base, tuned = model.base.network, model.values["implicit"].tuned.network
    prompt = torch.tensor([model.base.tokenizer(text).input_ids])

    def guided(rows, weight):
        z, shift = (network(input_ids=rows).logits[:, -1].double() for network in (base, tuned))
        return (z + weight * (shift - z)).softmax(-1)

    first, found = guided(prompt, beta)[0], torch.zeros(model.base.vocabulary.size, dtype=torch.float64)
    for some in torch.arange(len(first)).split(512):
        found += first[some] @ guided(torch.cat([prompt.expand(len(some), -1), some[:, None]], 1), beta_second)
    return found


def test_what_cannot_draft_is_refused(folder):
    paths = agreeing(folder)
    adapter = {"path": paths["base"], "adapter": make_adapter(folder, "llama", 5)}
    pair = {"tuned": paths["tuned"], "untuned": paths["untuned"]}
    base = {"models": {"base": paths["base"]}}
    for tables, vllm, why in (
        ({"models": paths}, {"arguments": {"speculative_config": {}}}, "both say what drafts"),
        (base, {}, "there is no pair"),
        (base | {"values": {"one": pair, "two": pair}}, {}, "several pairs .*: one, two"),
        ({"models": paths | {"tuned": adapter}}, {}, "tuned has an adapter"),
    ):
        with pytest.raises(ConfigError, match=why), models("vllm", vllm={"num_speculative_tokens": 2, **vllm}, **tables):
            pass
    with (
        pytest.raises(ModelError, match=r"not supported when speculative.*\n.*model runner V2"),
        models("vllm", models=paths, vllm={"num_speculative_tokens": 2}, search={"method": "eft"}),
    ):
        pass
