"""What settings of a model reach transformers' ``from_pretrained``."""

import sys

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, BitsAndBytesConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ivg import GuidedModel, LoadOptions
from ivg.embedded import path
from ivg.errors import ConfigError, MissingDependencyError, ModelError
from ivg.factory.recipe import load_models
from ivg.models.loading import load_causal, load_value
from ivg.models.slot_cache import SlotCache
from ivg.models.state_cache import StateCache
from ivg.settings.recipe import Recipe
from ivg.testing import hypothesis


@pytest.fixture
def asked(monkeypatch):
    """What each model was loaded with, by its folder; what cannot be done here is left out."""
    seen = {}
    for name in ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"):
        kind = getattr(transformers, name)
        real = kind.from_pretrained

        def load(place, real=real, **kwargs):
            seen[str(place)] = {
                k: v for k, v in kwargs.items() if k not in ("output_loading_info", "ignore_mismatched_sizes", "trust_remote_code")
            }
            left_out = ("quantization_config", "device_map", "max_memory")
            return real(place, **{k: v for k, v in kwargs.items() if k not in left_out})

        monkeypatch.setattr(kind, "from_pretrained", load)
    return seen


def place(role):
    return str(path(role))


def test_every_setting_of_every_role_reaches_transformers(asked):
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    recipe = Recipe.parse({
        "models": {
            "base": {"path": place("base"), "quantization": four_bits, "dtype": "bfloat16"},
            "tuned": {"path": place("tuned"), "dtype": "float16", "attention": "eager", "revision": "v3"},
            "untuned": {"path": place("untuned"), "device": "auto", "max_memory": {"0": "1GiB", "cpu": "2GiB"}},
            "value": {"path": place("value"), "quantization": {"load_in_8bit": True}, "attention": "eager"},
            "reward": {"path": place("gold"), "device": {"": "cpu"}},
        },
        "run": {"dtype": "float32", "device": "cpu", "revision": "v1"},
    })  # fmt: skip
    load_models(recipe)
    cpu = {"": torch.device("cpu")}
    value = asked[place("value")]
    assert asked == {
        place("base"): {"dtype": torch.bfloat16, "quantization_config": four_bits, "device_map": cpu, "revision": "v1"},
        place("tuned"): {"dtype": torch.float16, "attn_implementation": "eager", "revision": "v3"},
        place("untuned"): {"dtype": torch.float32, "device_map": "auto", "max_memory": {0: "1GiB", "cpu": "2GiB"}, "revision": "v1"},
        place("value"): {
            "dtype": torch.float32, "attn_implementation": "eager", "revision": "v1", "device_map": cpu,
            "quantization_config": {"load_in_8bit": True}, "config": value["config"], "key_mapping": value["key_mapping"],
        },
        place("gold"): {"dtype": torch.float32, "device_map": {"": "cpu"}, "revision": "v1"},
    }  # fmt: skip


def test_a_configuration_object_reaches_transformers(asked):
    config = BitsAndBytesConfig(load_in_8bit=True)
    GuidedModel.from_pretrained(place("base"), options={"base": LoadOptions("cpu", quantization=config)})
    assert asked[place("base")]["quantization_config"] is config


def test_quantization_whose_package_is_missing_names_it():
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ModelError, match=r"cannot load base .*bitsandbytes"):
            GuidedModel.from_pretrained(place("base"), options={"base": LoadOptions("cpu", quantization={"load_in_4bit": True})})
    else:
        pytest.skip("bitsandbytes is installed")


def test_torchao_weights_of_eight_bits():
    """A quantised guide through the cache gives what its own plain pass gives."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    lm = load_causal(place("tuned"), "tuned", LoadOptions("cpu", "float32", quantization=config))
    plain = load_causal(place("tuned"), "tuned", LoadOptions("cpu", "float32"))
    h = hypothesis("The film", " is", lm)
    ids = lm.ids(h)[0]
    with torch.no_grad():
        expected = lm.network(input_ids=torch.tensor([ids])).logits[0, -1]
    got = lm.outputs([h])[0]
    assert torch.allclose(got, expected, atol=1e-3)
    assert 1e-4 < float((got - plain.outputs([h])[0]).abs().max()) < 2.0  # quantised, and still that model


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (LoadOptions("cuda:99"), "tuned: device 'cuda:99' is not usable here"),
        (LoadOptions("nothing"), "tuned: device 'nothing' is not usable here"),
        (LoadOptions("cpu", "float8"), "tuned: unknown dtype 'float8'"),
        (LoadOptions("cpu", max_memory={"cpu": "1GiB"}), "tuned: max_memory is for a model over several devices"),
    ],
)
def test_a_place_that_does_not_exist_names_the_model(options, line):
    with pytest.raises(ConfigError, match=line):
        load_causal(place("tuned"), "tuned", options)


def test_a_model_over_several_devices_needs_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingDependencyError, match=r"need the package accelerate.*\n  pip install accelerate"):
        load_causal(place("base"), "base", LoadOptions("auto"))


# Attention


def test_the_attention_of_the_network_is_the_one_that_was_asked_for():
    for attention in ("eager", "sdpa"):
        lm = load_causal(place("base"), "base", LoadOptions("cpu", "float32", attention=attention))
        assert lm.network.config._attn_implementation == attention
        assert isinstance(lm.model.cache, SlotCache)
    value = load_value(place("value"), "explicit", LoadOptions("cpu", "float32", attention="eager"))
    assert value.network.config._attn_implementation == "eager"


def test_other_attention_has_transformers_own_cache():
    """Its mask may be of another form than the slot cache's (flash_attention_2 takes none for each token)."""
    AttentionInterface.register("of_a_test", lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs))
    AttentionMaskInterface.register("of_a_test", sdpa_mask)
    plain = load_causal(place("base"), "base", LoadOptions("cpu", "float32"))
    lm = load_causal(place("base"), "base", LoadOptions("cpu", "float32", attention="of_a_test"))
    assert isinstance(lm.model.cache, StateCache)
    some = [[hypothesis("The film", text, m) for text in ("", " is")] for m in (plain, lm)]
    assert torch.allclose(plain.outputs(some[0]), lm.outputs(some[1]), atol=1e-3)


def test_attention_that_does_not_exist_is_an_error():
    with pytest.raises(ModelError, match="cannot load base"):
        load_causal(place("base"), "base", LoadOptions("cpu", attention="no_such_thing"))
