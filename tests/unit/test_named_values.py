"""Values by name: weights of several, [values.NAME] of a recipe, and every setting from every edge."""

import json
import warnings
from dataclasses import fields

import pytest

from ivg import GuidedModel
from ivg.cli.recipe_options import RecipeOptions
from ivg.errors import ConfigError
from ivg.factory.recipe import load_models
from ivg.search.methods import METHODS, Method
from ivg.settings.recipe import Recipe, SearchConfig
from ivg.testing import byte_tokenizer, tiny_lm, tiny_model, tiny_value
from ivg.types import Prompt
from ivg.values.base import CompositeValue
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue
from ivg.values.reward import RewardModel

SHORT = {"max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Tiny models in hub layout: base, tuned, untuned, plain-tuned, plain-untuned, value, reward."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    folder = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(("base", "tuned", "untuned", "plain-tuned", "plain-untuned")):
        tiny_model("llama", seed, context=128).save_pretrained(folder / name)
        byte_tokenizer(chat=True).save_pretrained(folder / name)
    tiny_value("vocabulary", seed=7, tokenizer=byte_tokenizer(chat=True)).save_pretrained(folder / "value")
    config = DistilBertConfig(vocab_size=257, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=1, max_position_embeddings=128)
    DistilBertForSequenceClassification(config).save_pretrained(folder / "reward")
    byte_tokenizer().save_pretrained(folder / "reward")
    return folder


RECIPE = """
[models]
base = "base"
tuned = "tuned"
untuned = "untuned"

[values.plain]
tuned = { path = "plain-tuned", template = "Q: {prompt}" }
untuned = "plain-untuned"

[values.second]
value = "value"

[values.judge]
reward = { path = "reward", template = "{prompt} {response}" }

[values.writer]
arm = "plain-tuned"

[search]
method = "ivg"
weights = { implicit = 1.0, plain = 0.5 }
select_weights = { second = 1.0, judge = -0.5 }
width = 2
successors = 2

[sampling]
max_new_tokens = 6
ignore_eos = true

[run]
dtype = "float32"
device = "cpu"
"""


@pytest.fixture
def recipe(hub):
    (hub / "recipe.toml").write_text(RECIPE)
    return hub / "recipe.toml"


def test_named_values_of_a_recipe(recipe):
    """Paths are found beside the recipe, templates and kinds are as told, and weights use them."""
    read = Recipe.load(recipe)
    model = load_models(read)
    kinds = {"plain": ImplicitValue, "second": ExplicitValue, "judge": RewardModel, "writer": AutoregressiveReward}
    assert {name: type(model.values[name]) for name in kinds} == kinds
    plain = model.values["plain"]
    assert plain.tuned.template == plain.untuned.template == "Q: {prompt}"
    assert plain.tuned.name == "plain.tuned"
    settings = {**read.search.settings(), **read.sampling.settings()}
    done = model.generate("The movie", read.search.method, seed=3, **settings)
    assert {"base", "tuned", "untuned", "plain.tuned", "plain.untuned", "second", "judge"} <= set(done.usage.forward_tokens)
    assert "writer" not in done.usage.forward_tokens
    model.add_value("guide", {"implicit": 1.0, "plain": 0.5})
    model.add_value("selector", {"second": 1.0, "judge": -0.5})
    by_name = {k: v for k, v in settings.items() if "weights" not in k}
    assert model.generate("The movie", "ivg", seed=3, token="guide", select="selector", **by_name).token_ids == done.token_ids


def test_named_values_stand_beside_the_embedded_models(hub, tmp_path):
    recipe = Recipe.parse({"values": {"mine": {"reward": str(hub / "reward")}}, "run": {"dtype": "float32"}})
    assert set(load_models(recipe).values) == {"implicit", "explicit", "explicit-other", "mine"}


@pytest.mark.parametrize(
    "table", [{}, {"tuned": "x"}, {"value": "x", "reward": "y"}, {"tuned": "x", "untuned": "y", "arm": "z"}, {"base": "x"}]
)
def test_a_named_value_is_one_value(table):
    with pytest.raises(ConfigError, match=r"values\.mine"):
        Recipe.parse({"values": {"mine": table}})


@pytest.mark.parametrize("name", ["none", "a=b", "a,b", "mine.head"])
def test_names_that_mean_something_else(name):
    with pytest.raises(ConfigError, match="cannot be called"):
        load_models(Recipe.parse({"values": {name: {"value": "x"}}}))


def test_composites_of_equal_requests_are_one_object():
    """So that the loop scores and guides them in one call."""
    pair = ImplicitValue(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3))
    model = GuidedModel(tiny_lm("base"), {"implicit": pair, "explicit": tiny_value()})
    a, b = (model.request(p, "eft", weights="implicit=1,explicit=0.5").search.guidance for p in ("x", "y"))
    assert isinstance(a.value, CompositeValue)
    assert a == b
    other = model.request("x", "eft", weights="implicit=1,explicit=0.25").search.guidance
    assert other != a
    model.add_value("explicit", tiny_value(seed=9), replace=True)
    assert model.request("x", "eft", weights="implicit=1,explicit=0.5").search.guidance != a


def test_several_samples_of_a_prompt():
    """Sample i is the request with index i, whatever else is drawn."""
    model = GuidedModel(tiny_lm("base"))
    one = model.generate("The", "base", seed=5, **SHORT)
    three = model.generate("The", "base", seed=5, n=3, **SHORT)
    assert [c.token_ids for c in three] == [model.generate("The", "base", seed=5, index=i, **SHORT).token_ids for i in range(3)]
    assert three[0].token_ids == one.token_ids != three[1].token_ids
    both = model.generate(["The", "A"], "base", seed=5, n=2, **SHORT)
    assert [c.token_ids for c in both[0]] == [c.token_ids for c in three[:2]]
    assert [len(samples) for samples in both] == [2, 2]
    assert [len(samples) for samples in model.generate(["The"], "base", n=1, **SHORT)] == [1]
    with pytest.raises(ConfigError, match="n must be at least 1 sample, got 0"):
        model.generate("The", "base", n=0)


def test_a_value_is_not_replaced_silently():
    model = GuidedModel(tiny_lm("base"), {"length": lambda prompt, response: len(response)})
    assert model.score("The", ["abc"], "length") == [3.0]
    with pytest.warns(UserWarning, match="add_value replaces the value 'length'"):
        model.add_value("length", lambda prompt, response: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_value("length", lambda prompt, response: 2, replace=True)
        model.add_value("other", lambda prompt, response: 0)
    assert model.score("The", ["abc"], "length") == [2.0]


def test_record_from_the_library():
    model = GuidedModel(tiny_lm("base"), {"implicit": ImplicitValue(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3))})
    done = model.generate("The", "eft", record=True, **SHORT)
    assert len(done.guide_shift) == 6
    assert model.generate("The", "base", record=True, **SHORT).guide_shift == (0.0,) * 6
    assert model.generate("The", "eft", **SHORT).guide_shift == ()


def test_every_setting_can_be_given_at_the_edge():
    settings = {f.name for f in fields(Method)} - {"name", "summary"}
    assert settings == set(SearchConfig.model_fields) - {"method"}
    texts = {
        "select_weights": "a=1",
        "select_combine": "min",
        "select_reference": "a=0.5",
        "token": "none",
        "select": "explicit",
        "transform": "centered",
        "rule": "top",
    }
    texts |= {"drafter": "arm", "acceptance": "clip", "chunk_until": ";", "step_aggregation": "mean", "step_separator": ";"}
    texts |= {"chunk_length": "4", "weights": "a=1,contrast=2", "contrast": "Be kind.", "negative": "Be rude."}
    texts |= {"guide_after": "</think>", "thinking_budget": "4", "values_read": "all", "draft": "0"}
    given = [f"{name}={texts.get(name, {bool: 'false', int: '4', float: '0.5'}.get(type(f.default), '0.5'))}" for name, f in _fields()]
    read = RecipeOptions("search").build({"search_method": "custom", "set": given})
    assert set(read.search.settings()) == settings
    made = METHODS["cbs-explicit"].with_settings(**read.search.settings())
    assert (made.weights, made.gate, made.tries, made.original) == ((("a", 1.0), ("contrast", 2.0)), 0.5, 4, False)


def _fields():
    return [(f.name, f) for f in fields(Method) if f.name not in ("name", "summary")]


def test_options(ivg, recipe, tmp_path):
    arguments = ["generate", "The movie", "--recipe", recipe, "--output", tmp_path / "out.jsonl", "--weights", "plain=2.0"]
    arguments += ["--gate", "1.5", "--decay", "0.5", "--set", "soft_scale=0.25", "--set", "rule=soft"]
    assert ivg(*arguments)[0] == 0
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    wanted = {"weights": "plain=2.0", "gate": 1.5, "decay": 0.5, "soft_scale": 0.25, "rule": "soft"}
    assert wanted | {"select_weights": {"second": 1.0, "judge": -0.5}, **SHORT, "width": 2, "successors": 2} == row["settings"]
    assert set(row["values"]) == {"plain", "second", "judge", "writer"}
    assert "tuned" not in row["usage"]["forward_tokens"]


@pytest.mark.parametrize("bad,words", [
    (["--set", "widht=3"], "KEY one of"), (["--set", "tries"], "KEY=VALUE"), (["--set", "tries=many"], "tries"),
    (["--weights", "plain"], "weights must be names"), (["--weights", "nobody=1"], "nobody"), (["--gate", "-1"], "gate must be"),
])  # fmt: skip
def test_bad_options_are_errors(ivg, recipe, bad, words):
    code, _, err = ivg("generate", "x", "--recipe", recipe, *bad)
    assert code == 2
    assert words in err


def test_compare_leaves_other_methods_what_they_are(ivg, recipe):
    """Weights of the recipe's method do not guide the base."""
    code, out, _ = ivg("compare", "The movie", "--recipe", recipe, "--methods", "base,ivg", "--set", "gate=0.5")
    assert code == 0
    model = load_models(Recipe.load(recipe))
    plain = model.generate(Prompt("The movie"), "base", **SHORT)
    assert f"{plain.usage.total_forward_tokens:,}" in out
