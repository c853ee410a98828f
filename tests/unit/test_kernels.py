"""PyTorch's private kernels: where they do not work, or are not there, everything is computed without them, and comes out the same."""

import os
import pickle
import random
import subprocess
import sys

import pytest
import torch

import naive
from ivg.errors import ConfigError
from ivg.models import kernels
from ivg.models.packed_linear import PackedLinear, can_pack, pack, packed_layers
from ivg.models.placement import pick_dtype
from ivg.models.runner import ModelRunner
from ivg.testing import tiny_model

pytestmark = [pytest.mark.numerics, pytest.mark.cpu]

PROBES = (kernels.has_packed_linear, kernels.has_packed_gelu, kernels.has_flash_attention, kernels.has_native_bfloat16)
CPU = torch.device("cpu")
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture
def anew():
    """Probes ask again, now and afterwards."""
    for probe in PROBES:
        probe.cache_clear()
    yield
    for probe in PROBES:
        probe.cache_clear()


def fails(*_args, **_kwargs):
    raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq")


class Lacks:
    """A namespace of operators without any."""

    def __getattr__(self, name):
        raise AttributeError(f"no operator {name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fault", ["raises", "is missing", "multiplies wrong"])
def test_what_does_not_pack_is_left_as_it_is(fault, dtype, anew, monkeypatch):
    if fault == "raises":
        monkeypatch.setattr(kernels, "pack_weight", fails)
    elif fault == "is missing":
        monkeypatch.setattr(torch.ops, "mkldnn", Lacks())
    else:
        monkeypatch.setattr(kernels, "pack_weight", lambda weight: weight)
        monkeypatch.setattr(kernels, "packed_linear", lambda x, weight, bias: 1.1 * torch.nn.functional.linear(x, weight, bias))
    network = tiny_model("llama").to(dtype)
    before = naive.outputs(network, [1, 2, 3])
    assert not can_pack(network)
    assert not packed_layers(pack(network))
    assert torch.equal(naive.outputs(network, [1, 2, 3]), before)
    layer = PackedLinear(torch.randn(4, 6).to(dtype), None)  # as one of another machine's pickle would be made
    x = torch.randn(2, 6).to(dtype)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fault", ["raises", "is left out"])
def test_a_gelu_that_does_not_work_is_not_joined(fault, dtype, anew, monkeypatch):
    real = kernels.packed_linear

    def faulty(x, weight, bias, gelu=None):
        if gelu is not None and fault == "raises":
            raise RuntimeError("no such operation")
        return real(x, weight, bias)

    monkeypatch.setattr(kernels, "packed_linear", faulty)
    assert not any(kernels.has_packed_gelu(dtype, gelu) for gelu in ("none", "tanh"))
    network = pack(tiny_model("gpt2").to(dtype))
    assert {type(block.mlp.act) for block in network.transformer.h} == {torch.nn.GELU}
    assert all(layer.activation is None for layer in packed_layers(network))


@pytest.mark.parametrize("fault", ["raises", "is missing", "attends wrong"])
def test_flash_attention_that_does_not_work_is_not_used(fault, anew, monkeypatch):
    real = kernels.flash_attention
    if fault == "raises":
        monkeypatch.setattr(kernels, "flash_attention", fails)
    elif fault == "is missing":
        monkeypatch.setattr(torch.ops, "aten", Lacks())
    else:
        monkeypatch.setattr(kernels, "flash_attention", lambda q, keys, values, mask, scaling: real(q, keys, values, None, scaling))
    assert not any(kernels.has_flash_attention(dtype) for dtype in (torch.float32, torch.bfloat16))
    model = ModelRunner(tiny_model("llama", seed=3), "tiny")
    naive.wander(model, random.Random(0), 256, 2e-3)
    assert model.cache.network.groups_prefixes


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 0.5)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("flash", [True, False])
def test_attention_with_and_without_flash(dtype, tolerance, flash, monkeypatch):
    monkeypatch.setattr(kernels, "has_flash_attention", lambda _: flash)
    for architecture in ("mistral", "gpt2"):
        naive.wander(ModelRunner(tiny_model(architecture, seed=3).to(dtype), "tiny"), random.Random(1), 256, tolerance)


def test_probes_draw_no_random_numbers(anew):
    state = torch.random.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kernels.has_packed_linear(dtype), kernels.has_flash_attention(dtype)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("limit", "flags", "mkldnn", "expected"),
    [
        (None, "avx512f avx512_bf16", True, torch.bfloat16),
        ("AVX512_CORE_BF16", "avx512f avx512_bf16", True, torch.bfloat16),
        ("avx512_core_amx", "avx512f amx_bf16", True, torch.bfloat16),
        (None, "fp asimd bf16", True, torch.bfloat16),
        (None, "avx512f avx512bw", True, torch.float32),
        ("AVX512_CORE", "avx512f avx512_bf16", True, torch.float32),
        ("avx2", "avx512f avx512_bf16", True, torch.float32),
        (None, "avx512f avx512_bf16", False, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_onednn_multiplies_in_it(limit, flags, mkldnn, expected, anew, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(kernels, "CPU_INFO", tmp_path / "cpuinfo")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(kernels, "onednn_has_bfloat16", lambda: mkldnn)
    assert pick_dtype("auto", CPU) is expected


def test_auto_is_float32_without_an_answer_from_onednn(anew, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("flags : avx512_bf16\n")
    monkeypatch.setattr(kernels, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.ops, "mkldnn", Lacks())
    assert pick_dtype("auto", CPU) is torch.float32
    assert pick_dtype("bfloat16", CPU) is torch.bfloat16
    with pytest.raises(ConfigError, match="unknown dtype"):
        pick_dtype("float8", CPU)


def run(code, **env):
    done = subprocess.run([sys.executable, *code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_processor_with_avx2_alone():
    """Whatever this one has: bfloat16 is not native there, and a layer of another machine works."""
    code = """
import torch
from ivg.models import kernels
from ivg.models.packed_linear import PackedLinear, pack
assert not kernels.has_native_bfloat16()
network = torch.nn.Sequential(torch.nn.Linear(16, 8)).to(torch.bfloat16)
layer, x = PackedLinear(network[0].weight, network[0].bias), torch.ones(2, 16, dtype=torch.bfloat16)
assert torch.equal(layer(x), network(x)) or kernels.has_packed_linear(torch.bfloat16)
assert torch.allclose(pack(network)(x).float(), layer(x).float(), atol=0.05)
"""
    run(["-c", code], **AVX2)


@pytest.mark.long
def test_the_embedded_pair_answers_in_bfloat16_with_avx2_alone():
    arguments = ["-m", "ivg", "generate", "The movie was", "--dtype", "bfloat16", "--max-new-tokens", "8", "--device", "cpu"]
    assert run(arguments, **AVX2).strip()
