"""The sweep of beta: estimates against the enumeration of all texts of a tiny vocabulary."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_pair_accuracy import implicit

from ivg.diagnostics.logits import GuidanceLogits, response_beam
from ivg.diagnostics.sweep import SampledTexts, SweepSettings, sample_texts, sweep, sweep_rows, text_logps_and_kls
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.testing import tiny_lm
from ivg.types import Prompt, SamplingParams, Value

# A vocabulary so small that all texts can be listed

WORDS = ["<eos>", "good", "bad", "so", "not"]
LIMIT = 3
SETTINGS = SweepSettings((0.0, 0.5, 1.5), samples=300, sampling=SamplingParams(temperature=0.8, max_new_tokens=LIMIT), batch=600)
PROMPTS = [Prompt("so good"), Prompt("not")]


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<eos>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>", pad_token="<eos>")


class Words(Value):
    """A judge that reads tokens, so that no text hides from it."""

    name = "words"
    worth = (0.5, 2.0, -1.0, 0.2, -0.3)

    def score(self, hypotheses):
        return [sum(self.worth[t] for t in h.token_ids) * (1 + 0.3 * len(h.token_ids)) for h in hypotheses]


def all_texts():
    out, open_ = [], [()]
    for n in range(1, LIMIT + 1):
        longer = [(*y, t) for y in open_ for t in range(len(WORDS))]
        out += [y for y in longer if y[-1] == 0 or n == LIMIT]
        open_ = [y for y in longer if y[-1] != 0]
    return out


@pytest.fixture(scope="module")
def small():
    tok = word_tokenizer()
    return GuidedModel(tiny_lm("base", seed=0, tokenizer=tok), {"implicit": implicit(tok)})


@functools.cache
def slow_logits(model, prompt, y):
    """(base's logits, shift) behind a text, one full pass of every network."""
    pair, ids = model.values["implicit"], torch.tensor([[*model.base.prompt_ids(prompt), *y]])
    with torch.no_grad():
        z, t, u = (r.network(input_ids=ids).logits[0, -1] for r in (model.base, pair.tuned, pair.untuned))
    return z, t - u


def slow_logp(model, prompt, y, beta, temperature):
    """log pi_beta(y), token by token."""
    total = 0.0
    for n, token in enumerate(y):
        z, shift = slow_logits(model, prompt, y[:n])
        total += float(((z + beta * shift) / temperature).log_softmax(-1)[token])
    return total


@pytest.fixture(scope="module")
def listed(small):
    """Every text of every prompt: (texts, exact log pi [texts, betas] per prompt)."""
    ys = all_texts()
    exact = [np.array([[slow_logp(small, p, y, b, 0.8) for b in SETTINGS.betas] for y in ys]) for p in PROMPTS]
    return ys, exact


def worth(ys):
    """The judge's scores of listed texts."""
    return np.array(Words().score([SimpleNamespace(token_ids=y) for y in ys]))


def exact_numbers(listed):
    """(gain, KL) of every beta, by enumeration."""
    ys, exact = listed
    scores = worth(ys)
    reward = np.mean([np.exp(e).T @ scores for e in exact], axis=0)
    kl = np.mean([(np.exp(e) * (e - e[:, :1])).sum(0) for e in exact], axis=0)
    return reward - reward[0], kl


def test_one_pass_gives_every_policy_exactly(small, listed):
    ys, exact = listed
    shift = GuidanceLogits.from_value(small.values["implicit"], small.base)
    for p, e in zip(PROMPTS, exact, strict=True):
        read = [text_logps_and_kls(small, shift, response_beam(small.base, p, "", y), SETTINGS) for y in ys]
        logps, kls = np.stack([r[0] for r in read]), np.stack([r[1] for r in read])
        assert logps == pytest.approx(e, abs=1e-4)
        assert np.exp(logps).sum(0) == pytest.approx(np.ones(3), abs=1e-4)
        # the mean of summed exact KLs is the KL of whole texts
        assert (np.exp(e) * kls).sum(0) == pytest.approx((np.exp(e) * (e - e[:, :1])).sum(0), abs=1e-4)
        assert kls[:, 0] == pytest.approx(np.zeros(len(ys)), abs=1e-6)
        assert kls[:, 2].max() > 0.5


@pytest.mark.parametrize("sampled_at", [(0,), (0, 1, 2)], ids=["from the base", "from every beta"])
def test_estimates_converge_to_enumeration(small, listed, sampled_at):
    """Texts drawn from the listed distributions: the error shrinks as their number grows."""
    ys, exact = listed
    gain, kl = exact_numbers(listed)
    shift = GuidanceLogits.from_value(small.values["implicit"], small.base)
    kls = [np.stack([text_logps_and_kls(small, shift, response_beam(small.base, p, "", y), SETTINGS)[1] for y in ys]) for p in PROMPTS]
    scores = worth(ys)
    beams = [response_beam(small.base, PROMPTS[0], "", y) for y in ys]

    def errors(n):
        rng = np.random.default_rng(n)
        chances = [np.exp(e) / np.exp(e).sum(0) for e in exact]
        jobs = [(p, k, i) for p in range(2) for k in sampled_at for i in rng.choice(len(ys), n, p=chances[p][:, k])]
        texts = SampledTexts([beams[i] for _, _, i in jobs], np.array([p for p, _, _ in jobs]), np.array([k for _, k, _ in jobs]))
        logps, summed = np.stack([exact[p][i] for p, _, i in jobs]), np.stack([kls[p][i] for p, _, i in jobs])
        got = sweep_rows(SETTINGS.betas, texts, logps, summed, np.array([scores[i] for _, _, i in jobs]))
        return [abs(r.gain.mean - g) + abs(r.kl.mean - k) for r, g, k in zip(got, gain, kl, strict=True)][1:]

    assert max(errors(20000)) < 0.06
    assert np.mean(errors(20000)) < 0.5 * np.mean([errors(n) for n in range(60, 70)])
    assert abs(gain[2]) > 0.3  # there is something to find


def test_drawn_sweep_agrees_with_enumeration(small, listed):
    gain, kl = exact_numbers(listed)
    texts = sample_texts(small, "implicit", PROMPTS, SETTINGS)
    assert len(texts.beams) == 2 * 300 * 3
    assert np.bincount(texts.sampled_at).tolist() == [600] * 3
    scores = np.array(Words().score(texts.beams))
    got = sweep(small, "implicit", texts, scores, SETTINGS)
    for r, g, k in zip(got, gain, kl, strict=True):
        assert r.gain.mean == pytest.approx(g, abs=0.2)
        assert r.kl.mean == pytest.approx(k, rel=0.1, abs=1e-6)
        assert r.effective_size >= 590
    assert small.base.model.live_rows == 0


def test_effective_size_warns_where_the_base_alone_says_nothing(small):
    far = SweepSettings((0.0, 8.0), (0.0,), samples=50, sampling=SETTINGS.sampling)
    texts = sample_texts(small, "implicit", PROMPTS, far)
    assert set(texts.sampled_at) == {0}
    got = sweep(small, "implicit", texts, None, far)
    assert got[0].effective_size == pytest.approx(100)
    assert got[1].effective_size < 40
    assert got[1].gain is None


def test_invalid_sweep_settings():
    with pytest.raises(ConfigError, match="0 among them"):
        SweepSettings((0.0, 1.0), (1.0,))
    with pytest.raises(ConfigError, match="at least 2 samples"):
        SweepSettings(samples=1)
    with pytest.raises(ConfigError, match="temperature"):
        SweepSettings(sampling=SamplingParams(temperature=0))
    assert SweepSettings((2, 0.5)).betas == (0.0, 0.5, 2.0)
