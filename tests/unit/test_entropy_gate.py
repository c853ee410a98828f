"""Guidance gated by entropy, and recorded shifts: the formulas, and their cost."""

import pytest
import torch

import naive
from ivg.engines.transformers.engine import TransformersEngine
from ivg.integrations.transformers import GuidanceLogitsProcessor
from ivg.search.searcher import Request, Search, Searcher
from ivg.testing import byte_tokenizer, tiny_lm
from ivg.types import Prompt, SamplingParams, TokenGuidance
from ivg.values.implicit import ImplicitValue


def run(base, requests):
    done = dict(Searcher(TransformersEngine(base)).run(requests))
    return [done[i] for i in range(len(requests))]


@pytest.mark.parametrize("temperature", [0.7, 0.0])
@pytest.mark.parametrize("gate", [0.0, 4.3])
def test_recorded_shift_is_the_formula(temperature, gate):
    """log pi_guided - log pi_base at the temperature (greedy: at 1), before top-k; nothing but with ``record`` or ``trace``."""
    base, value = tiny_lm("base"), ImplicitValue(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3))
    sampling = SamplingParams(temperature=temperature, top_k=4, max_new_tokens=20, ignore_eos=True)
    search = Search(guidance=TokenGuidance(value, 0.5, gate=gate))
    silent, recorded, traced = run(
        base, [Request(Prompt("I am"), search, sampling, 1, record=r, trace=t) for r, t in ((False, False), (True, False), (False, True))]
    )
    assert silent.token_ids == recorded.token_ids == traced.token_ids
    assert (silent.guide_shift, recorded.trace) == ((), ())
    assert traced.guide_shift == pytest.approx(recorded.guide_shift, abs=1e-4)
    ids = base.tokenizer("I am").input_ids
    for token, shift in zip(recorded.token_ids, recorded.guide_shift, strict=True):
        z, t, u = (naive.outputs(r.network, ids)[-1] for r in (base, value.tuned, value.untuned))
        moved = z + 0.5 * (t - u) if naive.entropy(z) >= gate else z.clone()
        moved[0] = z[0] = -torch.inf
        both = [(x / (temperature or 1)).log_softmax(-1)[token] for x in (moved, z)]
        assert shift == pytest.approx(float(both[0] - both[1]), abs=1e-3)
        ids.append(token)
    assert any(recorded.guide_shift)


def test_a_gated_guide_reads_less():
    """A gated guide reads each token at most once, and none after the last position where it guides."""
    base, value = tiny_lm("base"), ImplicitValue(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3))
    passes = []
    value.tuned.network.register_forward_pre_hook(lambda *_: passes.append(1))
    sampling, read, calls = SamplingParams(max_new_tokens=40, ignore_eos=True), [], []
    for gate in (0.0, 4.4, 100.0):
        passes.clear()
        (done,) = run(base, [Request(Prompt("I am"), Search(guidance=TokenGuidance(value, gate=gate)), sampling, 2)])
        read.append(done.usage.forward_tokens.get("tuned", 0))
        calls.append(len(passes))
        assert done.usage.forward_tokens.get("untuned", 0) == read[-1]
    assert read[0] == calls[0] + 3 == 4 + 39
    assert 0 < read[1] <= read[0]
    assert 0 < calls[1] < calls[0]
    assert (read[2], calls[2]) == (0, 0)
    assert value.tuned.model.live_rows == 0


def test_logits_processor_with_a_gate_equals_engine():
    base, value = tiny_lm("base"), ImplicitValue(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3))
    guidance = TokenGuidance(value, 1.0, gate=4.4)
    (expected,) = run(base, [Request(Prompt("The"), Search(guidance=guidance), SamplingParams(temperature=0, max_new_tokens=12))])
    inputs = byte_tokenizer()(["The"], return_tensors="pt")
    processor = GuidanceLogitsProcessor(guidance, byte_tokenizer())
    out = base.network.generate(**inputs, max_new_tokens=12, do_sample=False, logits_processor=[processor])
    assert out[0, 3:].tolist()[: len(expected.token_ids)] == list(expected.token_ids)
