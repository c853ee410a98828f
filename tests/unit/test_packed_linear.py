"""Packed weights: the same products, read back exactly, saved and loaded; nothing else is touched."""

import copy
import pickle

import pytest
import torch
from transformers.activations import ACT2FN

from ivg.diagnostics.cost import active_parameters
from ivg.embedded import path
from ivg.models import kernels
from ivg.models.loading import LoadOptions, load_causal, load_value
from ivg.models.packed_linear import MIN_WEIGHTS, PackedLinear, can_pack, pack, packed_layers, unpack
from ivg.testing import ARCHITECTURES, tiny_model, tiny_value

pytestmark = [pytest.mark.numerics, pytest.mark.cpu]

DTYPES = (torch.bfloat16, torch.float32)
PACKABLE = [dtype for dtype in DTYPES if can_pack(torch.nn.Linear(1, 1).to(dtype))]
needs_onednn = pytest.mark.skipif(not PACKABLE, reason="this PyTorch packs nothing on this CPU")


@pytest.fixture(autouse=True)
def a_dtype_that_is_packed(request):
    """Skip what asks for a dtype that this processor does not pack."""
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    if dtype in DTYPES and dtype not in PACKABLE:
        pytest.skip(f"this PyTorch does not pack {dtype} on this CPU")


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    for dtype in MIN_WEIGHTS:
        monkeypatch.setitem(MIN_WEIGHTS, dtype, 0)


@needs_onednn
@pytest.mark.parametrize(("dtype", "tolerance"), zip(DTYPES, (0.06, 1e-5), strict=True), ids=map(str, DTYPES))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_networks_give_the_same_outputs(architecture, dtype, tolerance):
    plain, packed = (tiny_model(architecture, seed=3).to(dtype) for _ in range(2))
    size = active_parameters(packed)
    assert pack(packed) is packed
    assert packed_layers(packed)
    assert active_parameters(packed) == size
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        a, b = plain(ids).logits.float(), packed(ids).logits.float()
    assert (a - b).abs().max() <= tolerance * a.abs().max()
    exact, kept = plain.state_dict(), packed.state_dict()
    assert set(exact) == set(kept)
    assert all(torch.equal(exact[name], kept[name]) for name in exact)


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_goes_in_as_it_comes_out(dtype):
    source, target = (pack(tiny_model("gpt2", seed=s).to(dtype)) for s in (1, 2))
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_value_is_saved_as_it_was_loaded(dtype, tmp_path):
    value = tiny_value("vocabulary")
    value.network.to(dtype).save_pretrained(tmp_path / "plain")
    options = LoadOptions("cpu", str(dtype).removeprefix("torch."))
    loaded = load_value(tmp_path / "plain", "value", options, tokenizer=value.model.tokenizer)
    assert isinstance(loaded.network.head, PackedLinear)
    loaded.network.save_pretrained(tmp_path / "again")
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_unpacked_networks_are_as_before(architecture, dtype):
    network = tiny_model(architecture, seed=3).to(dtype)
    tied = network.config.tie_word_embeddings
    state = copy.deepcopy(network.state_dict())
    unpack(pack(network))
    assert not packed_layers(network)
    kept = network.state_dict()
    assert set(state) == set(kept)
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) == tied
    assert torch.equal(state["lm_head.weight"], kept["lm_head.weight"])


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES, ids=map(str, DTYPES))
def test_a_head_of_its_own_stays_whatever_the_config_says(dtype):
    """transformers keeps a head that differs from the embeddings, also where config.json calls them tied."""
    network = tiny_model("llama", seed=3).to(dtype)
    network.config.tie_word_embeddings = True
    network.lm_head.weight = torch.nn.Parameter(torch.randn_like(network.lm_head.weight))
    before = network.lm_head.weight.detach().clone()
    unpack(network)
    assert torch.equal(network.lm_head.weight, before)
    unpack(copy.deepcopy(pack(network)))
    unpack(network)
    assert torch.equal(network.lm_head.weight, before)


@needs_onednn
def test_small_matrices_in_float32_stay_as_they_are(monkeypatch):
    monkeypatch.setitem(MIN_WEIGHTS, torch.float32, 64 * 64)
    network = torch.nn.Sequential(torch.nn.Linear(64, 63), torch.nn.Linear(64, 64))
    assert [type(layer) for layer in pack(network)] == [torch.nn.Linear, PackedLinear]


def test_nothing_else_is_packed_and_only_if_wanted():
    assert not packed_layers(pack(tiny_model("llama").to(torch.float16)))
    for dtype in ("float32", "bfloat16"):
        assert not packed_layers(load_causal(path("base"), "base", LoadOptions("cpu", dtype, pack=False)).network)


def test_the_activation_of_gpt2_is_one_operation_everywhere():
    plain, fast = (tiny_model("gpt2", seed=3).double() for _ in range(2))  # of a dtype that is not packed
    kinds = {type(m) for m in pack(fast).modules()}
    assert torch.nn.GELU in kinds
    assert kinds - {torch.nn.GELU} < {type(m) for m in plain.modules()}
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, fast(ids).logits, rtol=0, atol=1e-12)


@needs_onednn
def test_other_types_pass_through_a_packed_layer():
    plain = torch.nn.Linear(8, 4).to(torch.bfloat16)
    layer = PackedLinear(plain.weight, plain.bias)
    x = torch.randn(3, 8)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, plain.weight.float(), plain.bias.float()), atol=1e-5)
    assert torch.equal(layer(x.to(torch.bfloat16)[:, None])[:, 0], layer(x.to(torch.bfloat16)))
    layer = PackedLinear(plain.weight.float(), None)
    assert torch.allclose(layer(x.double()), torch.nn.functional.linear(x.double(), plain.weight.double()), atol=1e-5)


class Layers(torch.nn.Module):
    """Two layers with an activation, in an order of its own."""

    def __init__(self, order, act, dtype):
        super().__init__()
        self.order, self.act = order, act
        self.up, self.down = torch.nn.Linear(8, 32).to(dtype), torch.nn.Linear(32, 8).to(dtype)

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "order", [("up", "act", "down"), ("up", "down", "act"), ("act", "up", "down"), ("up", "act", "down", "act"), ("up", "down")]
)
@pytest.mark.parametrize(
    "act", [torch.nn.GELU(), torch.nn.GELU(approximate="tanh"), ACT2FN["gelu"], ACT2FN["gelu_pytorch_tanh"], torch.nn.SiLU()]
)
def test_gelu_is_part_of_the_product_before_it_only_where_that_is_the_same(order, act, dtype):
    torch.manual_seed(0)
    plain = Layers(order, act, dtype).eval()
    packed = pack(copy.deepcopy(plain))
    joined = order == ("up", "act", "down") and not isinstance(act, torch.nn.SiLU)
    assert (type(packed.act) is torch.nn.Identity) == joined == (packed.up.activation is not None)
    x = torch.randn(5, 8)
    with torch.no_grad():
        for some in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            near = 16 * torch.finfo(dtype).eps
            assert torch.allclose(some(x.to(dtype)), plain(x.to(dtype)), rtol=near, atol=near)
            assert torch.allclose(some(x.double()), copy.deepcopy(plain).double()(x.double()), atol=1e-6)
        unpack(packed)
        assert type(packed.act) is type(act)
        assert torch.equal(packed(x.to(dtype)), plain(x.to(dtype)))


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pickle_of_a_machine_with_more_kernels(dtype, monkeypatch):
    """A processor that packs weights but gives no GELU, and one that packs nothing."""
    packed = pack(Layers(("up", "act", "down"), torch.nn.GELU(), dtype).eval())
    kept, x = pickle.dumps(packed), torch.randn(5, 8).to(dtype)
    with torch.no_grad():
        expected = packed(x)
    for missing in ("has_packed_gelu", "has_packed_linear"):
        monkeypatch.setattr(kernels, missing, lambda *_: False)
        other = pickle.loads(kept)
        for _ in range(2):
            with torch.no_grad():
                assert torch.allclose(other(x), expected, rtol=0.02, atol=0.02)
            assert other.up.packed.layout is torch.strided
            other.load_state_dict(other.state_dict())


class Clipped(torch.nn.GELU):
    def forward(self, x):
        return super().forward(x).clamp(max=10)


class Residual(Layers):
    """Most of its output is not of its layers, so that a trial of the whole module can hardly see them."""

    def forward(self, x):
        return 1000 * x + self.down(self.up(self.act(x)))


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_trial_cannot_tell_is_not_joined(dtype):
    order = ("up", "act", "down")
    hooked, trained, silent = (Layers(order, torch.nn.GELU(), dtype) for _ in range(3))
    hooked.act.register_forward_hook(lambda module, given, out: None)  # it looks, and would see nothing any more
    torch.nn.init.zeros_(silent.down.weight)
    for network in (Layers(order, Clipped(), dtype), Residual(order, torch.nn.GELU(), dtype), hooked, silent, trained.train()):
        if network is not trained:
            network.eval()
        act = network.act
        assert pack(network).act is act
        assert isinstance(network.up, PackedLinear)
        assert network.up.activation is None


@needs_onednn
def test_gpt2_computes_its_activation_in_the_product():
    packed = pack(tiny_model("gpt2", seed=3).eval().to(PACKABLE[0]))
    assert {type(block.mlp.act) for block in packed.transformer.h} == {torch.nn.Identity}
    unpack(packed)
    assert {type(block.mlp.act) for block in packed.transformer.h} == {torch.nn.GELU}
