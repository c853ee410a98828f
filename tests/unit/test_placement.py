"""Where each model runs: settings of one model over those of ``[run]``, in recipes, on the command line and in Python."""

from dataclasses import replace

import pytest

from ivg import GuidedModel, LoadOptions
from ivg.cli.recipe_options import RecipeOptions
from ivg.errors import ConfigError
from ivg.factory.recipe import load_models, load_options
from ivg.jobs.provenance import answer_provenance, device_kind, differences
from ivg.jobs.ray.resources import plan_workers, reconcile_gpus
from ivg.settings.models import ModelRef
from ivg.settings.ray import RaySettings
from ivg.settings.recipe import Recipe

PAIR = {"tuned": "embedded:tuned", "untuned": "embedded:untuned"}


def typed(**given):
    """The recipe of these options of ``ivg generate``, by the names of their parameters."""
    options = RecipeOptions("models", "search", "sampling", "run")
    assert set(given) <= {p.name for p in options.parameters()}
    return options.build({p.name: given.get(p.name) for p in options.parameters()})


def test_what_a_model_sets_itself_counts_before_run():
    recipe = Recipe.parse({
        "models": {
            "base": {"path": "b", "device_map": "auto", "max_memory": {"0": "2GiB", "cpu": "9GiB"}},
            "tuned": {"path": "t", "device": "cuda:1", "dtype": "float32", "revision": "v2", "attention": "eager"},
            "untuned": {"path": "u", "quantization": {"load_in_4bit": True}},
        },
        "run": {"device": "cuda:0", "dtype": "bfloat16", "attention": "sdpa", "trust_remote_code": True},
    })  # fmt: skip
    every, models = load_options(recipe), recipe.models
    assert every == LoadOptions("cuda:0", "bfloat16", None, True, attention="sdpa")
    assert every.of(models.base) == replace(every, device="auto", max_memory={"0": "2GiB", "cpu": "9GiB"})
    assert every.of(models.tuned) == replace(every, device="cuda:1", dtype="float32", revision="v2", attention="eager")
    assert every.of(models.untuned) == replace(every, quantization={"load_in_4bit": True})
    assert recipe.devices == {"base": "auto", "tuned": "cuda:1", "untuned": "cuda:0"}


@pytest.mark.parametrize(("device", "placed"), [("cpu", {}), ("auto", {"device_map": "auto"}), ({"": "cpu"}, {"device_map": {"": "cpu"}})])
def test_how_a_model_is_placed_reaches_transformers(device, placed):
    options = LoadOptions(device, "float16", attention="eager", quantization=None)
    found = options.placed()
    assert {k: v for k, v in found.items() if k not in ("dtype", "attn_implementation")} == placed
    assert (str(found["dtype"]), found["attn_implementation"]) == ("torch.float16", "eager")


def test_memory_is_for_models_over_several_devices():
    assert LoadOptions("auto", max_memory={"0": "1GiB", "cpu": "2GiB"}).placed()["max_memory"] == {0: "1GiB", "cpu": "2GiB"}
    with pytest.raises(ConfigError, match="max_memory"):
        LoadOptions("cpu", max_memory={"cpu": "1GiB"}).placed()


# The command line


def test_a_bare_value_is_for_all_models_and_the_last_of_two_counts():
    recipe = typed(
        **{f"models_{role}": path for role, path in PAIR.items()},
        run_device=["cuda", "tuned=cuda:1", "cpu", "tuned=cuda:2"],
        run_dtype=["base=float32"],
        run_revision=["v1", "untuned=v0"],
        template=["tuned=chat"],
    )
    assert (recipe.run.device, recipe.run.dtype, recipe.run.revision) == ("cpu", "auto", "v1")
    assert recipe.models.base == ModelRef(path="embedded:base", dtype="float32")  # guides alone guide the embedded base
    assert recipe.models.tuned == ModelRef(path="embedded:tuned", device="cuda:2", template="chat")
    assert recipe.models.untuned == ModelRef(path="embedded:untuned", revision="v0")


def test_options_stand_over_the_recipe_and_another_model_keeps_its_place(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(
        '[models]\nbase = { path = "embedded:base", device = "auto", revision = "v1", dtype = "float32" }\n'
        'reward = { path = "r", template = "chat" }\n[run]\ndevice = "cuda"\n'
    )
    recipe = typed(file=file, models_base="other", run_dtype=["base=float16"], run_device=["reward=cpu"])
    assert recipe.models.base == ModelRef(path="other", device="auto", dtype="float16")  # the revision was the first model's
    assert recipe.models.reward == ModelRef(path="r", template="chat", device="cpu")
    assert recipe.run.device == "cuda"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"run_device": ["tunde=cuda:1"]}, r"--device 'tunde=cuda:1': no model has the role 'tunde'; did you mean tuned\?"),
        ({"run_dtype": ["=float32"]}, "--dtype '=float32': no model has the role ''"),
        ({"run_device": ["tuned=cpu"]}, "--device 'tuned=cpu', but no model is given for tuned"),
        ({"run_device": ["base=cpu"]}, "--device 'base=cpu', but no model is given for base"),
        ({"models_base": "embedded:base", "run_dtype": ["base=float8"]}, "models.base.dtype: expected 'auto', 'float32'"),
        ({"template": ["chat"]}, "--template 'chat': no role"),
    ],
)
def test_what_is_mistyped_is_said(given, line):
    with pytest.raises(ConfigError, match=line):
        typed(**given)


def test_verbs_without_models_have_one_device():
    options = RecipeOptions(only={"run": ("device", "dtype")}, bare=True)
    assert options.build({"run_device": "cpu", "run_dtype": "float32"}).run.device == "cpu"


# In Python


def test_roles_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="options for unknown role tunde\n  expected base, tuned"):
        GuidedModel.from_pretrained("embedded:base", options={"tunde": LoadOptions()})


def test_each_model_is_loaded_with_its_own_options():
    recipe = Recipe.parse({
        "models": {"base": {"path": "embedded:base", "dtype": "float32"}, **PAIR, "reward": {"path": "embedded:gold", "dtype": "float16"}},
        "values": {"more": {"value": {"path": "embedded:value", "dtype": "float32"}}},
        "run": {"dtype": "bfloat16", "device": "cpu"},
    })  # fmt: skip
    model = load_models(recipe)
    found = {name: str(next(network.parameters()).dtype)[6:] for value in model.values.values() for name, network in value.networks()}
    found["base"] = str(next(model.reader.network.parameters()).dtype)[6:]
    assert found == {"base": "float32", "tuned": "bfloat16", "untuned": "bfloat16", "reward": "float16", "more": "float32"}


# What answers depend on, and what workers need


def test_answers_depend_on_the_dtype_of_each_model_but_not_on_which_gpu_has_it():
    def about(**tuned):
        recipe = Recipe.parse({"models": {**PAIR, "tuned": {"path": "embedded:tuned", **tuned}}})
        return answer_provenance(recipe, "cuda")

    assert about(device="cuda:0") == about(device="cuda:1", max_memory={"0": 5})
    assert differences(about(), about(dtype="float16")) == ['loaded is {"tuned": {"dtype": "float16"}}, was not set']
    for more in ({"attention": "eager"}, {"revision": "x"}, {"quantization": {"load_in_8bit": True}}, {"device": "cpu"}):
        assert differences(about(device="cuda:0"), about(**more))
    assert device_kind(Recipe.parse({"models": {"base": {"path": "b", "device": "cuda:1"}}, "run": {"device": "cpu"}})) == "cuda"


def test_a_worker_has_the_gpus_that_its_models_name():
    nodes = [{"CPU": 8.0, "GPU": 4.0}]
    recipe = Recipe.parse({"models": {"base": {"path": "b", "device": "cuda:0"}, "reward": {"path": "r", "device": "cuda:1"}}})
    _, settings = reconcile_gpus(recipe, RaySettings("auto"))
    plan = plan_workers(settings, nodes, 9, tuple(recipe.devices.values()))
    assert (plan.workers, plan.gpus) == (2, 2.0)
    with pytest.raises(ConfigError, match="a model is on cuda:1"):
        reconcile_gpus(recipe, RaySettings("auto", gpus=1.0))
    with pytest.raises(ConfigError, match="uses 2 GPUs"):
        reconcile_gpus(recipe, RaySettings("auto", gpus=3.0))
    spread = Recipe.parse({"models": {"base": {"path": "b", "device": "auto"}}})
    assert reconcile_gpus(spread, RaySettings("auto", gpus=4.0))[1].gpus == 4.0
