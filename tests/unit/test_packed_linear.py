"""Packed weights: the same products, read back exactly, saved and loaded; nothing else is touched."""

import copy

import pytest
import torch

from ivg.diagnostics.cost import active_parameters
from ivg.embedded import path
from ivg.models.loading import LoadOptions, load_causal, load_value
from ivg.models.packed_linear import PackedLinear, can_pack, pack, packed_layers
from ivg.testing import ARCHITECTURES, tiny_model, tiny_value

pytestmark = [pytest.mark.numerics, pytest.mark.cpu]

needs_onednn = pytest.mark.skipif(not can_pack(torch.nn.Linear(1, 1).to(torch.bfloat16)), reason="this PyTorch packs nothing on this CPU")


@needs_onednn
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_networks_give_the_same_outputs(architecture):
    plain, packed = (tiny_model(architecture, seed=3).to(torch.bfloat16) for _ in range(2))
    size = active_parameters(packed)
    assert pack(packed) is packed
    assert packed_layers(packed)
    assert active_parameters(packed) == size
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        a, b = plain(ids).logits.float(), packed(ids).logits.float()
    assert (a - b).abs().max() <= 0.06 * a.abs().max()
    exact, kept = plain.state_dict(), packed.state_dict()
    assert set(exact) == set(kept)
    assert all(torch.equal(exact[name], kept[name]) for name in exact)


@needs_onednn
def test_state_goes_in_as_it_comes_out():
    source, target = (pack(tiny_model("gpt2", seed=s).to(torch.bfloat16)) for s in (1, 2))
    target.load_state_dict(source.state_dict())
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(source(ids).logits, target(ids).logits)
        assert torch.equal(copy.deepcopy(source)(ids).logits, source(ids).logits)
    state = source.state_dict()
    del state["lm_head.weight"]
    assert "lm_head.weight" in target.load_state_dict(state, strict=False).missing_keys
    assert not any(p.requires_grad for p in source.parameters())


@needs_onednn
def test_a_packed_value_is_saved_as_it_was_loaded(tmp_path):
    value = tiny_value("vocabulary")
    value.network.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    loaded = load_value(tmp_path / "plain", "value", LoadOptions("cpu", "bfloat16"), tokenizer=value.model.tokenizer)
    assert isinstance(loaded.model.network.head, PackedLinear)
    loaded.model.network.save_pretrained(tmp_path / "again")
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_only_bfloat16_on_a_cpu_is_packed_and_only_if_wanted():
    assert not packed_layers(pack(tiny_model("llama")))
    assert not packed_layers(load_causal(path("base"), "base", LoadOptions("cpu", "float32")).model.network)
    assert not packed_layers(load_causal(path("base"), "base", LoadOptions("cpu", "bfloat16", pack=False)).model.network)


@needs_onednn
def test_other_types_pass_through_a_packed_layer():
    plain = torch.nn.Linear(8, 4).to(torch.bfloat16)
    layer = PackedLinear(plain.weight, plain.bias)
    x = torch.randn(3, 8)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, plain.weight.float(), plain.bias.float()), atol=1e-5)
    assert torch.equal(layer(x.to(torch.bfloat16)[:, None])[:, 0], layer(x.to(torch.bfloat16)))
