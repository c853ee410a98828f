"""Drafts of a model with another vocabulary than the base's: text is exchanged, and the tokens are those of the naive implementation."""

import math

import pytest
import torch

import naive
from ivg import GuidedModel
from ivg.errors import ConfigError, VocabularyError
from ivg.search.methods import METHODS
from ivg.testing import byte_tokenizer, tiny_lm
from ivg.utils.rng import child_rng_path, mix, uniform
from ivg.values.implicit import ImplicitValue

pytestmark = pytest.mark.numerics

PROMPT = "The movie was"
LETTERS = "abcdefghth "


class Spelling(torch.nn.Module):
    """The output layer of a network that writes nothing but some tokens."""

    def __init__(self, head, ids):
        super().__init__()
        self.head = head
        self.register_buffer("ids", torch.tensor(ids))

    def forward(self, hidden):
        out = self.head(hidden)
        return torch.full_like(out, -1e4).index_copy(-1, self.ids, out.index_select(-1, self.ids))


def speller(name, seed, tokenizer, *, ends):
    lm = tiny_lm(name, seed=seed, tokenizer=tokenizer)
    ids = {tokenizer(x, add_special_tokens=False).input_ids[0] for x in (*LETTERS, "th", "ab")} | ({0} if ends else set())
    lm.network.lm_head = Spelling(lm.network.lm_head, sorted(ids))
    return lm


def vowels(prompt, text):
    return sum(0.5 * (x in "ae") - 0.2 * (x == "b") for x in text)


@pytest.fixture(scope="module", params=[False, True], ids=["endless", "ending"])
def model(request):
    other = byte_tokenizer(merges=[("t", "h"), ("a", "b")], permute=True)
    pair = ImplicitValue(*(speller(name, seed, other, ends=request.param) for name, seed in (("tuned", 2), ("untuned", 3))))
    return GuidedModel(speller("base", 1, byte_tokenizer(), ends=request.param), {"implicit": pair, "vowels": vowels})


def exchanged(model, *, seed, length, limit, threshold, temperature=1.0):
    """RSD with K = 1 and acceptance sigmoid: (text, tokens of the base, those that the draft model wrote)."""
    base, draft = model.reader, model.values["implicit"].tuned
    seed, y, path, drafted, done = mix(seed, 0), [], 0, 0, False
    prompts = [lm.tokenizer(PROMPT).input_ids for lm in (base, draft)]
    while not done:
        text = base.tokenizer.decode([t for t in y if t])
        own = draft.tokenizer(text).input_ids if text else []
        line = child_rng_path(path, len(y), 1)
        new, ends = naive.grow(draft.network, {}, METHODS["base"], prompts[1], own, line, length, temperature, seed, 10**6, 0)
        piece = draft.tokenizer.decode([t for t in new[len(own) :] if t])
        written = (y + base.tokenizer(piece).input_ids + [0] * ends)[:limit]
        ends = (ends and written[-1] == 0) or len(written) == limit
        x = (vowels(PROMPT, base.tokenizer.decode([t for t in written if t])) - threshold) / 0.7
        if uniform(seed, len(y), 0xD4ACC) < 1 / (1 + math.exp(-x)):
            drafted += len(written) - len(y)
            y, path, done = written, line, ends
        else:
            y, done = naive.grow(base.network, {}, METHODS["base"], prompts[0], y, path, length, temperature, seed, limit, 0)
    return base.tokenizer.decode([t for t in y if t]), y, drafted


@pytest.mark.parametrize("length,limit", [(4, 26), (20, 45)], ids=["short chunks", "chunks longer than a round"])
def test_text_is_exchanged_as_in_the_naive_implementation(model, length, limit):
    settings = {"select": "vowels", "acceptance": "sigmoid", "accept_threshold": 0.7, "temperature": 1.0}
    settings |= {"chunk_length": length, "max_new_tokens": limit}
    shares = []
    for seed in range(8):
        got = model.generate(PROMPT, "rsd", seed=seed, **settings)
        text, tokens, drafted = exchanged(model, seed=seed, length=length, limit=limit, threshold=0.7)
        assert (got.text, list(got.token_ids), got.usage.drafted_tokens) == (text, tokens, drafted)
        assert got.score == pytest.approx(vowels(PROMPT, text))
        shares.append(drafted / len(tokens))
    assert len(set(shares)) > 2
    assert all(reader.model.live_rows == 0 for reader in model.readers)


def test_company_stop_strings_and_the_pair_as_judge(model):
    """Alone and in a batch the same; a stop string ends a draft; the pair that drafts also judges, with rows of its own."""
    settings = {"acceptance": "sigmoid", "accept_threshold": 0.0, "chunk_length": 6, "max_new_tokens": 24, "stop": ("fe",), "successors": 2}
    for select in ("vowels", "implicit"):
        prompts = [PROMPT, "I", "What a long prompt this one is"]
        together = model.generate(prompts, "rsd", select=select, seed=4, **settings)
        for prompt, got in zip(prompts, together, strict=True):
            alone = model.generate(prompt, "rsd", select=select, seed=4, **settings)
            assert (got.token_ids, got.usage.forward_tokens) == (alone.token_ids, alone.usage.forward_tokens)
            assert got.error is None and "fe" not in got.text
            if select == "implicit":
                beam = _beam(model, prompt, got)
                assert got.score == pytest.approx(model.values["implicit"].score([beam])[0], abs=1e-3)
                model.values["implicit"].release([beam.key])
    assert all(reader.model.live_rows == 0 for reader in model.readers)


def test_requests_of_other_methods_share_the_rounds(model):
    """A chunk that is drafted whole beside chunks that are cut into rounds: the same texts as alone."""
    plans = [
        ("rsd", {"select": "vowels", "chunk_length": 21, "acceptance": "sigmoid", "accept_threshold": 0.5}),
        ("base", {}),
        ("custom", {"select": "vowels", "width": 2, "successors": 2, "chunk_length": 5}),
        ("mcts", {"select": "vowels", "width": 2, "successors": 2, "chunk_length": 19}),
        ("rsd", {"select": "vowels", "chunk_length": 3, "accept_threshold": 0.2}),
    ]
    requests = [model.request(PROMPT, method, seed=i, max_new_tokens=40, **settings) for i, (method, settings) in enumerate(plans)]
    together = dict(model.run(requests))
    for i, request in enumerate(requests):
        ((_, alone),) = model.run([request])
        assert (together[i].token_ids, together[i].usage.forward_tokens) == (alone.token_ids, alone.usage.forward_tokens), plans[i]
    assert all(reader.model.live_rows == 0 for reader in model.readers)


def _beam(model, prompt, completion):
    from dataclasses import replace

    from ivg.types import Prompt

    beam = model.reader.make_beam(Prompt(prompt), completion.text)
    return replace(beam, token_ids=completion.token_ids, finish=completion.finish_reason, inherits=True)


def test_what_needs_the_bases_tokens_is_refused(model):
    with pytest.raises(VocabularyError, match="tilt"):
        model.generate(PROMPT, "gsi", select="vowels")
    with pytest.raises(ConfigError, match=r"repetition_penalty: about the base's tokens, and tuned, which drafts, has others"):
        model.generate(PROMPT, "rsd", select="vowels", repetition_penalty=1.2)
    assert "rsd" not in model.methods  # no value explicit
    assert model.generate(PROMPT, "rsd", select="vowels", temperature=0, max_new_tokens=9).text


def test_bytes_that_are_no_characters_are_replaced():
    """A draft model that writes any bytes: what is no character reaches the base as U+FFFD, and every request ends."""
    other = byte_tokenizer(permute=True)
    pair = ImplicitValue(tiny_lm("tuned", seed=2, tokenizer=other), tiny_lm("untuned", seed=3, tokenizer=other))
    model = GuidedModel(tiny_lm("base", seed=1), {"implicit": pair, "flat": lambda p, r: 0.0})
    for length in (1, 5):
        for seed in range(4):
            done = model.generate(PROMPT, "rsd", select="flat", seed=seed, chunk_length=length, max_new_tokens=30)
            assert done.error is None and done.usage.drafted_tokens == len(done.token_ids) <= 30
            assert done.text.rstrip("\ufffd") in model.reader.tokenizer.decode(done.token_ids, skip_special_tokens=True)
