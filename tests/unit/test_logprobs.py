"""What is shown of every token, against logits computed without any cache."""

import pytest
import torch

from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.search.methods import get_method
from ivg.testing import tiny_lm, tiny_value
from ivg.values.implicit import ImplicitValue
from naive import Implicit, QHead, guided, outputs


@pytest.fixture(scope="module")
def model():
    tokens = tiny_lm("base").tokenizer
    pair = ImplicitValue(tiny_lm("tuned", seed=1, tokenizer=tokens), tiny_lm("untuned", seed=2, tokenizer=tokens))
    return GuidedModel(tiny_lm("base", tokenizer=tokens), {"implicit": pair, "explicit": tiny_value(seed=3, tokenizer=tokens)})


def look(model, s, prompt, y, temperature):
    """(log-probabilities with guidance, without) behind ``y``."""
    base = model.base.network
    values = {
        "implicit": Implicit(model.values["implicit"].tuned.network, model.values["implicit"].untuned.network),
        "explicit": QHead(model.values["explicit"].network),
    }
    z = outputs(base, prompt + y)[-1]
    moved = guided(z, s, values[s.token], prompt, y) if s.token else z
    return (moved / temperature).log_softmax(-1), (z / temperature).log_softmax(-1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("base", {}),
        ("eft", {"temperature": 0.7}),
        ("eft", {"temperature": 0.0, "beta": 0.5}),
        ("eft", {"draft": 4}),
        ("ivg", {"width": 2, "successors": 2, "chunk_length": 3, "temperature": 1.3}),
        ("args", {}),
    ],
)
def test_details_are_the_distributions(model, method, settings):
    sampling = {"temperature": 1.0, **{k: v for k, v in settings.items() if k == "temperature"}}
    rest = {k: v for k, v in settings.items() if k != "temperature"}
    done = model.generate("Film", method, alternatives=4, max_new_tokens=9, seed=3, **sampling, **rest)
    s, prompt = get_method(method, **rest), list(model.base.tokenizer("Film").input_ids)
    assert [d.token for d in done.details] == list(done.token_ids)
    assert "".join(d.text for d in done.details) == done.text
    for i, d in enumerate(done.details):
        moved, base = look(model, s, prompt, list(done.token_ids[:i]), sampling["temperature"] or 1.0)
        assert d.logprob == pytest.approx(float(moved[d.token]), abs=2e-4)
        assert d.base_logprob == pytest.approx(float(base[d.token]), abs=2e-4)
        assert [p for _, p in d.top] == pytest.approx(torch.topk(moved, 4).values.tolist(), abs=2e-4)
        assert [p for _, p in d.top_base] == pytest.approx(torch.topk(base, 4).values.tolist(), abs=2e-4)
        assert all(p == pytest.approx(float(base[t]), abs=2e-4) for t, p in d.top_base)


def test_logprobs_are_computed_only_on_request(model):
    asked = model.request("Film", "eft", alternatives=0, max_new_tokens=5, record=True)
    plain = model.request("Film", "eft", max_new_tokens=5, record=True)
    (_, with_details), (_, without) = sorted(model.run([asked, plain]))
    assert without.details == () and without.text == with_details.text
    assert all(d.top == d.top_base == () for d in with_details.details)
    shifts = [d.logprob - d.base_logprob for d in with_details.details]
    assert shifts == pytest.approx(without.guide_shift, abs=1e-5)


def test_the_stride_changes_no_token(model):
    from dataclasses import replace

    for method in ("eft", "ivg", "bon"):
        request = model.request("Film", method, max_new_tokens=20, seed=5)
        texts = {stride: next(model.run([replace(request, stride=stride)]))[1].token_ids for stride in (1, 3, 16)}
        assert len(set(texts.values())) == 1, method


@pytest.mark.parametrize("wrong", [{"alternatives": -1}, {"stride": 0}])
def test_impossible(model, wrong):
    from dataclasses import replace

    with pytest.raises(ConfigError, match=next(iter(wrong))):
        model.searcher().add(replace(model.request("Film", "base"), **wrong))
