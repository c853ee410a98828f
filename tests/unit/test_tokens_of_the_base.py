"""Tokens that only the base has, beside guides that do not know them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivg import GuidedModel, LoadOptions
from ivg.errors import ConfigError
from ivg.models.added_tokens import AddedTokens, add_known, added_tokens
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.models.vocabulary import Vocabulary
from ivg.testing import byte_tokenizer, tiny_model, tiny_value
from ivg.types import Prompt
from ivg.values.implicit import ImplicitValue

pytestmark = pytest.mark.numerics
KNOWN = 6


def guided(logits, deltas, beta, added):
    return add_known(logits.clone(), deltas, beta, KNOWN, added).log_softmax(-1)


@given(st.integers(0, 10**6), st.floats(-3, 3), st.integers(0, 2), st.integers(0, 3), st.floats(-20, 20))
def test_the_rule_by_hand(seed, beta, ends, others, constant):
    """Others keep their probability; an end moves as the guide's end does; a constant of the guide changes nothing."""
    torch.manual_seed(seed)
    logits, deltas = 3 * torch.randn(2, KNOWN + ends + others), 3 * torch.randn(2, KNOWN)
    order = (KNOWN + torch.randperm(ends + others)).tolist()
    added = AddedTokens(KNOWN, tuple(order[:ends]), 2, others > 0)
    got, base = guided(logits, deltas, beta, added), logits.log_softmax(-1)
    for i in order[ends:]:
        assert torch.allclose(got[:, i], base[:, i], atol=1e-4)
    for i in added.eos_ids:
        assert torch.allclose(got[:, i] - got[:, 0], base[:, i] - base[:, 0] + beta * (deltas[:, 2] - deltas[:, 0]), atol=1e-4)
    assert torch.allclose(got[:, 1] - got[:, 0], base[:, 1] - base[:, 0] + beta * (deltas[:, 1] - deltas[:, 0]), atol=1e-4)
    assert torch.allclose(guided(logits, deltas + constant, beta, added), got, atol=1e-3)
    assert AddedTokens.from_dict(added.to_dict()) == added


def test_where_all_the_rest_is_forbidden():
    """As behind a grammar: nothing becomes NaN."""
    logits = torch.full((1, KNOWN + 1), -math.inf)
    logits[0, KNOWN] = 1.0
    assert guided(logits, torch.randn(1, KNOWN), 2.0, AddedTokens(KNOWN, (), 0, True))[0].tolist() == [-math.inf] * KNOWN + [0.0]


def test_what_counts_as_unknown():
    """Tokens with a column that the guide does not move; padding alone is none."""
    base, guide = (Vocabulary(byte_tokenizer()) for _ in range(2))
    size = guide.size
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|tool|>"]})
    base = Vocabulary(base.tokenizer, [size, guide.eos_id])
    assert added_tokens(guide, guide, size, size + 64) is None, "rows that pad"
    assert added_tokens(base, guide, size, size + 64) == AddedTokens(size, (size,), guide.eos_id, True)
    assert added_tokens(base, guide, size, size + 1) == AddedTokens(size, (size,), guide.eos_id, False), "<|tool|> has no column"
    assert added_tokens(base, guide, size, size) is None, "nor has any"
    assert added_tokens(base, base, size, size + 2) == AddedTokens(size, (size,), guide.eos_id, True), "a pair whose untuned model is older"


def test_a_pair_and_a_sum_know_what_all_their_models_know(model):
    """In either order: tuned knows the base's tokens, untuned does not."""
    implicit = model.values["implicit"]
    newer = ImplicitValue(model.base, implicit.untuned)
    plain, older = (value.deltas([model.base.make_beam(Prompt("good"), "")]) for value in (newer, implicit))
    assert plain.shape == older.shape == (1, 257)
    model.add_value("newer", newer, replace=True)
    end = model.base.vocabulary.tokenizer.eos_token_id
    base = [t.logprob for t in model.logprobs("good", [end + 1], "base").tokens]
    for token in ("newer", newer + implicit, implicit + newer):
        assert [t.logprob for t in model.logprobs("good", [end + 1], "eft", token=token).tokens] == pytest.approx(base, abs=1e-4)
    rows = ModelRunner(tiny_model("llama", 2, vocab_size=model.base.vocab_size), "untuned")
    padded = ImplicitValue(model.base, CachedLM(rows, byte_tokenizer()))  # with rows that its tokenizer does not know
    model.add_value("padded", padded, replace=True)
    assert padded.deltas([model.base.make_beam(Prompt("good"), "")]).shape == (1, 259)
    assert [t.logprob for t in model.logprobs("good", [end + 1], "eft", token="padded").tokens] == pytest.approx(base, abs=1e-4)
    sums = newer + implicit, implicit + newer
    one, other = ([t.logprob for t in model.logprobs("good", [104, end], "eft", token=value).tokens] for value in sums)
    assert one == pytest.approx(other, abs=1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base with two tokens that its guides lack: one that ends a response, likely, and another."""
    folder = tmp_path_factory.mktemp("added")
    more = byte_tokenizer()
    own_end = more.eos_token_id
    more.add_special_tokens({"eos_token": "<|im_end|>"})
    more.add_tokens(["<|tool|>"])
    base = tiny_model("llama", 0, vocab_size=len(more))
    with torch.no_grad():  # a likely end and a likely other
        base.get_output_embeddings().weight[-2:] = base.get_output_embeddings().weight[[65, 66]] * 1.5
    base.config.eos_token_id = base.generation_config.eos_token_id = more.eos_token_id
    networks = {"base": (base, more)}
    for i, name in enumerate(("tuned", "untuned"), 1):
        network = tiny_model("llama", i)
        network.config.eos_token_id = network.generation_config.eos_token_id = own_end
        networks[name] = (network, byte_tokenizer())
    for name, (network, tokenizer) in networks.items():
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    roles = {"tuned": folder / "tuned", "untuned": folder / "untuned", "arm": folder / "tuned"}
    model = GuidedModel.from_pretrained(
        str(folder / "base"), **{k: str(v) for k, v in roles.items()}, options=LoadOptions("cpu", "float32")
    )
    model.values["explicit"] = tiny_value(seed=4, tokenizer=networks["tuned"][1])
    return model


def by_transformers(model, method, beta, prompt, ids):
    """Guided log-probabilities of ``ids``, from plain forward passes."""
    out = []
    for t in range(len(ids)):
        place = [*model.base.prompt_ids(model.request(prompt, "base").prompt), *ids[:t]]
        with torch.no_grad():
            base, tuned, untuned = (
                lm.network(input_ids=torch.tensor([place])).logits[0, -1]
                for lm in (model.base, model.values["implicit"].tuned, model.values["implicit"].untuned)
            )
        delta = beta * (tuned.log_softmax(-1) if method == "genarm" else tuned - untuned)
        z = base.clone()
        z[: len(delta)] += delta
        end, other = len(delta), len(delta) + 1
        z[end] += delta[model.values["implicit"].tuned.vocabulary.tokenizer.eos_token_id]
        rest = [i for i in range(len(z)) if i != other]
        p = base.softmax(-1)[other]
        logp = z[rest].log_softmax(-1) + (1 - p).log()
        out.append(float(p.log()) if ids[t] == other else float(logp[rest.index(ids[t])]))
    return out


@pytest.mark.parametrize(("method", "beta"), [("eft", 1.0), ("eft", -0.5), ("genarm", 1.0), ("genarm", 2.0)])
def test_log_probabilities_are_those_of_plain_passes(model, method, beta):
    end = model.base.vocabulary.tokenizer.eos_token_id
    for ids in ([104, 105, end], [104, 98], [end]):
        got = model.logprobs("good", ids, method, beta=beta)
        assert [t.logprob for t in got.tokens] == pytest.approx(by_transformers(model, method, beta, "good", ids), abs=2e-4)


def test_drafts_know_the_rule(model):
    """Drafting changes no greedy answer."""
    for beta in (0.5, 1.0):
        settings = {"beta": beta, "temperature": 0.0, "max_new_tokens": 12}
        plain = model.generate(["good", "bad", "so"], "eft", **settings)
        assert [c.token_ids for c in model.generate(["good", "bad", "so"], "eft", draft=4, **settings)] == [c.token_ids for c in plain]


@pytest.mark.parametrize("draws", ["drawn", "given"])
@pytest.mark.parametrize("value", ["implicit", "padded"])
def test_candidates_know_the_rule(model, value, draws):
    """All tokens as candidates: as without; a few: another token keeps its probability among them, whatever rows pad the guide's."""
    implicit = model.values["implicit"]
    wide = CachedLM(ModelRunner(tiny_model("llama", 2, vocab_size=model.base.vocab_size), "untuned"), byte_tokenizer())
    model.add_value("padded", ImplicitValue(model.base, wide), replace=True)
    end = model.base.vocabulary.tokenizer.eos_token_id

    def logps(method, tokens, **settings):
        if draws == "given":
            return [model.logprobs("good", [i], method, **settings).tokens[0].logprob for i in tokens]
        done = model.generate("good", method, alternatives=model.base.vocab_size, max_new_tokens=1, temperature=1.0, **settings)
        top = dict(done.details[0].top)
        return [top[i] for i in tokens]

    every = [end, end + 1, 104, 65]
    assert implicit.vocabulary.size == end
    guided = logps("eft", every, token=value, candidates=0)
    assert logps("eft", every, token=value, candidates=model.base.vocab_size) == pytest.approx(guided, abs=1e-3)
    base = logps("base", range(model.base.vocab_size))
    best = sorted(base, reverse=True)[: sum(p >= base[end + 1] for p in base) + 2]
    assert len(best) < len(base)
    share = base[end + 1] - math.log(sum(map(math.exp, best)))
    assert logps("eft", [end + 1], token=value, candidates=len(best), beta=3.0) == pytest.approx([share], abs=1e-3)


def test_what_is_no_candidate_need_not_be_a_number(model):
    """A guide may forbid tokens, so that the difference of two is none: it counts where the token is a candidate."""
    plain, end = GuidedModel(model.base, {"implicit": model.values["implicit"]}), model.values["implicit"].tuned.vocabulary.eos_id
    expected = plain.generate(["good", "so"], "eft", candidates=3, max_new_tokens=4, temperature=0.0)

    class Holes(ImplicitValue):
        def deltas(self, hypotheses):
            out = super().deltas(hypotheses)
            with_holes = torch.full_like(out, math.nan)
            top = torch.stack([model.base.outputs([h])[0].float() for h in hypotheses]).topk(3).indices
            known = top.clamp(max=out.shape[1] - 1)
            with_holes.scatter_(1, known, out.gather(1, known))
            with_holes[:, end] = out[:, end]  # by which the base's end moves, if that is a candidate
            return with_holes

    implicit = model.values["implicit"]
    holes = GuidedModel(model.base, {"implicit": Holes(implicit.tuned, implicit.untuned)})
    found = holes.generate(["good", "so"], "eft", candidates=3, max_new_tokens=4, temperature=0.0)
    assert [c.error for c in found] == [None, None]
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_a_transform_of_candidates_wants_candidates(model):
    with pytest.raises(ConfigError, match="transform=log-sigmoid is of candidates' values, got candidates=0 with explicit"):
        model.generate("good", "fudge", candidates=0, max_new_tokens=2)
