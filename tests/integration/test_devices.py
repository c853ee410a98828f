"""Models on several devices, over several devices, offloaded, and in several dtypes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration

import naive
from conftest import DEVICE
from ivg import GuidedModel, LoadOptions
from ivg.embedded import path
from ivg.errors import ConfigError
from ivg.factory.recipe import load_models
from ivg.models.loading import load_causal
from ivg.models.placement import input_device
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, hypothesis, tiny_lm, tiny_model
from ivg.types import Prompt
from ivg.values.base import CompositeValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue

pytestmark = pytest.mark.numerics
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("long", [pytest.param(DEVICE == "cpu", marks=[pytest.mark.long] if DEVICE == "cpu" else [])])
def test_models_on_several_devices(long):
    """All of device_checks.py, in its own process: on devices that are made up, or on the GPUs that there are."""
    if DEVICE == "cpu" and not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch cannot make up devices")
    devices = "fake:0,fake:1" if DEVICE == "cpu" else "cuda:0,cuda:1" if torch.cuda.device_count() > 1 else "cuda:0,cpu"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "device_checks.py")]
    env = {**os.environ, "IVG_CHECK_DEVICES": devices, "IVG_TEST_DEVICE": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


# Weights that lie elsewhere than their layers compute


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tiny_model(seed=1).cpu().save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def offloaded(place):
    """The second layer is read from disk for each pass."""
    main = "cpu" if DEVICE == "cpu" else 0
    devices = {"model.embed_tokens": main, "model.layers.0": main, "model.layers.1": "disk", "model.norm": main, "lm_head": main}
    return LoadOptions({**devices, "model.rotary_emb": main}, "float32", extra={"offload_folder": str(place)})


def test_weights_on_disk_give_the_same_outputs(folder, tmp_path):
    plain, model = load_causal(folder, "base", LoadOptions(DEVICE, "float32")), load_causal(folder, "base", offloaded(tmp_path))
    assert any(p.is_meta for p in model.network.parameters())
    assert input_device(model.network).type == DEVICE
    hypotheses = [[hypothesis("The film", text, lm) for text in ("", " is", " is good")] for lm in (plain, model)]
    expected, got = (lm.outputs(some) for lm, some in zip((plain, model), hypotheses, strict=True))
    assert got.device == expected.device
    naive.compare(got, expected.cpu(), 1e-5)


def test_a_value_and_a_reward_by_device_map(folder, tmp_path):
    where = "cpu" if DEVICE == "cpu" else "cuda"
    recipe = {
        "models": {
            "base": {"path": str(folder), "device_map": "auto"},
            "value": {"path": str(path("value")), "device": "auto", "max_memory": {"cpu" if DEVICE == "cpu" else "0": "1GiB"}},
            "reward": {"path": str(path("gold")), "device": {"": where}},
        },
        "run": {"dtype": "float32", "device": where},
    }
    spread, plain = (
        load_models(Recipe.parse(recipe)),
        load_models(Recipe.parse({**recipe, "models": {k: v["path"] for k, v in recipe["models"].items()}})),
    )
    settings = {"method": "cbs-explicit", "width": 2, "successors": 2, "chunk_length": 4, "max_new_tokens": 8, "seed": 1}
    assert spread.generate("It", **settings).token_ids == plain.generate("It", **settings).token_ids
    assert spread.score("It", [" is good"], "reward") == pytest.approx(plain.score("It", [" is good"], "reward"))


def test_a_map_that_names_no_module_is_an_error(folder):
    with pytest.raises(ConfigError, match=r"base: its table of devices names none for model.embed_tokens"):
        load_causal(folder, "base", LoadOptions({"model.layers": "cpu"}, "float32"))
    with pytest.raises(ConfigError, match=r"base: its table of devices names layers.1, which is no module of it"):
        load_causal(folder, "base", LoadOptions({"": "cpu", "layers.1": "cpu"}, "float32"))


# Dtypes


def test_guides_in_another_dtype_than_the_base():
    """Each step against formulas: the base in float32, the guides in bfloat16, which is what their plain passes give, up to rounding."""
    base, tuned, untuned = tiny_lm("base", seed=0), tiny_lm("tuned", seed=1), tiny_lm("untuned", seed=2)
    for lm in (tuned, untuned):
        lm.network.to(torch.bfloat16)
    value = ImplicitValue(tuned, untuned)
    oracle = naive.Implicit(tuned.network, untuned.network)
    model = GuidedModel(base, {"implicit": value})
    completion = model.generate("The film", "eft", beta=1.5, max_new_tokens=20, temperature=0)
    prompt, margin = list(base.prompt_ids(Prompt("The film"))), 0.0
    for n, token in enumerate(completion.token_ids):
        y = list(completion.token_ids[:n])
        z = naive.outputs(base.network, prompt + y)[-1] + 1.5 * oracle.deltas(prompt, y)
        margin = max(margin, float((z.max() - z[token]) / z.std()))
    assert margin < 0.1
    some = [hypothesis("The film", text, base) for text in (" is", " was")]
    assert value.deltas(some).dtype == torch.float32
    naive.compare(model.base.outputs(some)[0], naive.outputs(base.network, base.ids(some[0])[0])[-1], 1e-4)


def test_pairs_of_two_dtypes_and_composites_of_three():
    lms = {name: tiny_lm(name, seed=i) for i, name in enumerate(("base", "tuned", "untuned", "arm"))}
    lms["tuned"].network.to(torch.bfloat16)
    lms["arm"].network.to(torch.float16 if DEVICE != "cpu" else torch.bfloat16)
    pair, arm = ImplicitValue(lms["tuned"], lms["untuned"]), AutoregressiveReward(lms["arm"])
    both = CompositeValue([(0.5, pair), (2.0, arm)], "both")
    h = hypothesis("The film", " is", lms["base"])
    ids = lms["base"].ids(h)[0]
    plain = {name: naive.outputs(lm.network, ids)[-1] for name, lm in lms.items()}
    expected = 0.5 * (plain["tuned"] - plain["untuned"]) + 2.0 * plain["arm"].log_softmax(-1)
    naive.compare(both.deltas([h])[0], expected, 0.03)
