"""From recipes to models of other engines: what is refused before anything starts, and what is stopped when a later step fails."""

import json
import shutil

import pytest

from ivg.embedded import path
from ivg.engines.vllm.value import VLLMGuide
from ivg.errors import ConfigError, ModelError
from ivg.factory import engines
from ivg.factory.recipe import load_options
from ivg.model import GuidedModel
from ivg.models.loading import LoadOptions
from ivg.settings.recipe import Recipe
from ivg.testing import FakeEngine, tiny_lm, tiny_value
from ivg.types import Prompt

PAIR = {"tuned": str(path("tuned")), "untuned": str(path("untuned"))}


def guides(base=None, *, wanted=None, **models):
    """Names of the guides inside the composite of these models; a model is a path or (path, template)."""
    given = {"base": (str(path("base")), base), **models}
    refs = {k: {"path": v} if isinstance(v, str) else {"path": v[0], "template": v[1]} for k, v in given.items()}
    recipe = Recipe.parse({"models": refs, "vllm": {} if wanted is None else {"guides": wanted}})
    return [guide.name for guide in engines.inner_guides(recipe, LoadOptions(), every_guide=True)[1]]


def test_guides_inside_read_prompts_as_the_base_does():
    """The base's very tokens: a guide that the transformers engine would have read prompts otherwise would guide otherwise."""
    assert guides(**PAIR) == ["implicit"]
    one = {role: (place, "Q: {prompt}") for role, place in PAIR.items()}
    assert guides("Q: {prompt}", **one) == ["implicit"]
    assert guides("Q: {prompt}", **{**one, "untuned": PAIR["untuned"]}) == ["implicit"]  # the tuned one's serves for both
    for base, pair in ((None, one), ("Q: {prompt}", PAIR), ("chat", PAIR)):
        with pytest.raises(ConfigError, match=r"reads prompts by .* the base by"):
            guides(base, **pair)


def test_a_value_network_reads_as_it_was_trained(tmp_path):
    trained = tmp_path / "value"
    shutil.copytree(path("value"), trained)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"ivg_value": {**config.get("ivg_value", {}), "template": "Q: {prompt}"}}))
    assert guides("Q: {prompt}", wanted=["explicit"], value=str(trained)) == ["explicit"]
    assert guides(wanted=["explicit"], value=str(path("value"))) == ["explicit"]
    with pytest.raises(ConfigError, match=r"value of explicit reads prompts by 'Q: \{prompt\}', the base by None"):
        guides(wanted=["explicit"], value=str(trained))


@pytest.fixture
def cores(monkeypatch):
    """vLLM that only remembers that it was started and stopped."""
    made = []

    class EngineClient:
        max_model_len = 64

        def __init__(self, folder, options, **_):
            self.closed = False
            made.append(self)

        def close(self):
            self.closed = True

    monkeypatch.setattr("ivg.engines.vllm.versions.check_vllm", lambda: None)
    monkeypatch.setattr("ivg.engines.vllm.client.EngineClient", EngineClient)
    return made


def test_an_engine_is_stopped_when_a_value_does_not_load(cores, tmp_path, monkeypatch):
    recipe = Recipe.parse({"run": {"engine": "vllm"}, "vllm": {"cache": str(tmp_path)}})

    def make(name, value, options):
        raise ModelError(f"no {name}")

    monkeypatch.setattr(engines, "make_value", make)
    with pytest.raises(ModelError, match="no explicit-other"):
        engines.vllm_model(recipe, LoadOptions())
    assert [core.closed for core in cores] == [True]  # and the second engine was not even started


def test_what_vllm_would_ignore_is_refused(cores):
    recipe = Recipe.parse({"run": {"engine": "vllm", "quantization": {"load_in_4bit": True}}})
    with pytest.raises(ConfigError, match="quantization is how transformers loads"):
        engines.vllm_model(recipe, LoadOptions(quantization={"load_in_4bit": True}))
    assert not cores


@pytest.mark.parametrize(
    ("models", "run", "line"),
    [
        ({"tuned": {"device": "cuda:1"}}, {}, "tuned of implicit is to be loaded otherwise than the base"),
        ({"untuned": {"dtype": "float32"}}, {"dtype": "float16"}, "untuned of implicit is to be loaded otherwise"),
        ({"base": {"revision": "v2"}}, {}, "tuned of implicit is to be loaded otherwise"),  # it would be read from the base's branch
        ({"base": {"device": "auto"}}, {}, "device 'auto' is for transformers\n  in vLLM: tensor_parallel_size"),
        ({"base": {"attention": "eager"}}, {}, "attention is how transformers loads models"),
        ({"value": {"quantization": {"load_in_8bit": True}}}, {}, "quantization is how transformers loads models"),
    ],
)
def test_models_that_are_one_in_vllm_are_loaded_alike(cores, tmp_path, models, run, line):
    refs = {role: {"path": str(path(role)), **models.get(role, {})} for role in ("base", "tuned", "untuned", "value")}
    recipe = Recipe.parse({"models": refs, "run": {"engine": "vllm", **run}, "vllm": {"cache": str(tmp_path)}})
    with pytest.raises(ConfigError, match=line):
        engines.vllm_model(recipe, load_options(recipe))
    assert all(core.closed for core in cores)


def test_a_base_behind_an_endpoint_is_not_loaded_here():
    recipe = Recipe.parse({"models": {"base": {"path": "m", "dtype": "float16"}}, "run": {"engine": "http://localhost:1/v1"}})
    with pytest.raises(ConfigError, match="base runs on http://localhost:1/v1, which has loaded it"):
        engines.endpoint_model(recipe, load_options(recipe))


def test_reset_caches_includes_a_value_that_guides_and_selects():
    """Its models run here once they are asked for: caches that only it has would never be emptied, nor counted."""
    outside = tiny_value()
    inner = VLLMGuide("explicit", lambda: outside)
    model = GuidedModel(tiny_lm(), {"explicit": inner}, engine=FakeEngine())
    assert model.readers == [model.base]
    inner.score([model.base.make_beam(Prompt("a"), "bc")])
    assert model.readers == [model.base, outside.model] and outside.model.model.live_rows == 1
    model.reset_caches()
    assert outside.model.model.live_rows == 0
