"""Checkpoints of older versions of transformers: masks that no network needs are left out, weights that it lacks are refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures import tiny
from ivg.errors import ModelError
from ivg.models.loading import LoadOptions, load_causal
from ivg.models.value_head import ValueModel
from ivg.testing import byte_tokenizer

OPTIONS = LoadOptions(device="cpu", dtype="float32")
CAUSAL = torch.ones(16, 16).tril()[None, None]
WINDOW = CAUSAL - CAUSAL.tril(-4)
MASKED = torch.tensor(-1e9)
OLD = {
    "gptj": {"transformer.h.0.attn.bias": CAUSAL.bool(), "transformer.h.0.attn.masked_bias": MASKED},
    "gpt2": {"transformer.h.0.attn.bias": CAUSAL.to(torch.uint8), "transformer.h.0.attn.masked_bias": MASKED},
    "gpt_neo": {"transformer.h.1.attn.attention.bias": WINDOW, "transformer.h.1.attn.attention.masked_bias": MASKED[None]},
    "bert": {"cls.seq_relationship.weight": torch.ones(2, 16), "cls.seq_relationship.bias": torch.ones(2)},
    "llama": {"model.layers.0.self_attn.bias": CAUSAL, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
}
REAL = {
    "a bias": ("gptj", {"transformer.h.0.attn.bias": torch.ones(16)}),
    "a bias for each two tokens": ("gptj", {"transformer.h.0.attn.bias": torch.randn(1, 1, 16, 16).tril()}),
    "a mask that is not causal": ("gptj", {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}),
    "many numbers": ("gpt2", {"transformer.h.0.attn.masked_bias": torch.ones(16)}),
    "another bias": ("llama", {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}),
}


def saved(folder, name, more, *, form="safetensors", cut=""):
    network = tiny(name, **({"is_decoder": True} if name == "bert" else {}))
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = {key.removeprefix(cut): t.contiguous() for key, t in {**load_file(folder / "model.safetensors"), **more}.items()}
    (folder / "model.safetensors").unlink()
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return network


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_masks_of_older_versions_are_left_out(tmp_path, name, form):
    network = saved(tmp_path, name, OLD[name], form=form)
    lm = load_causal(str(tmp_path), "base", OPTIONS)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        torch.testing.assert_close(lm.network(input_ids=ids).logits, network(input_ids=ids).logits)


def test_also_of_a_body_that_was_saved_alone(tmp_path):
    network, ids = saved(tmp_path, "gpt2", OLD["gpt2"], cut="transformer."), torch.tensor([[3, 1, 4]])
    lm = load_causal(str(tmp_path), "base", OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(lm.network(input_ids=ids).logits, network(input_ids=ids).logits)


def test_also_of_a_value_network(tmp_path):
    value = ValueModel(tiny("gpt2").base_model, "vocabulary")
    value.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    prefix = next(key for key in before if ".h.0." in f".{key}").partition("h.0.")[0]
    masks = {f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4), f"{prefix}h.0.attn.bias": CAUSAL}
    save_file({**before, **masks}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, ids = ValueModel.from_pretrained(str(tmp_path)), torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, value.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("case", REAL)
def test_weights_that_the_network_lacks_are_refused(tmp_path, case):
    name, more = REAL[case]
    saved(tmp_path, name, more)
    with pytest.raises(ModelError, match=r"holds 1 weight .*that .* does not use"):
        load_causal(str(tmp_path), "base", OPTIONS)
