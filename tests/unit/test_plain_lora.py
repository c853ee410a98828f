"""LoRA adapters that are read without peft: what they add equals what peft merges, and everything beyond that is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ivg.errors import ModelError
from ivg.models.plain_lora import check_plain_lora, lora_digest, read_plain_lora
from ivg.testing import tiny_model

peft = pytest.importorskip("peft", reason="no peft: pip install -c constraints.txt -e '.[train]'")

PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def write(folder, kind="llama", **settings):
    """(the network, the same with the adapter merged, the adapter's directory)."""
    network = tiny_model(kind, 1, context=64).float()
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    made = peft.get_peft_model(network, peft.LoraConfig(**PLAIN | settings))
    torch.manual_seed(2)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(folder, save_embedding_layers=False)
    return weights, made.merge_and_unload().state_dict(), folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 24}},
        {"layers_to_transform": [1], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
)
def test_the_changes_are_those_that_peft_merges(tmp_path, settings):
    before, after, folder = write(tmp_path / "adapter", **settings)
    changed = {name.removesuffix(".weight"): after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}
    assert changed
    for scale in (1.0, 0.5, -2.0):
        found = read_plain_lora(folder, "tuned", scale)
        assert found.keys() == changed.keys()
        for module, change in found.items():
            torch.testing.assert_close(change.up @ change.down, scale * changed[module], atol=1e-6, rtol=1e-5)


def test_an_older_file_is_read_too(tmp_path):
    _, _, folder = write(tmp_path / "adapter")
    old = shutil.copytree(folder, tmp_path / "old")
    (old / "adapter_model.safetensors").unlink()
    torch.save(load_file(folder / "adapter_model.safetensors"), old / "adapter_model.bin")
    one, two = (read_plain_lora(place, "tuned") for place in (folder, old))
    assert one.keys() == two.keys() and all(torch.equal(one[name].up, two[name].up) for name in one)
    assert lora_digest(folder) == lora_digest(folder) != lora_digest(old)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "has use_dora=True"),
        ({"bias": "lora_only"}, r"trained biases \(bias='lora_only'\)"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "changes the output layer lm_head"),
        ({"target_modules": ["embed_tokens"]}, "has the tensor .*lora_embedding_A"),
        ({"trainable_token_indices": [1, 2]}, "has trainable_token_indices"),
    ],
)
def test_what_is_more_than_lora_is_refused(tmp_path, settings, message):
    _, _, folder = write(tmp_path / "adapter", **settings)
    with pytest.raises(ModelError, match=rf"tuned: the adapter .* {message}.*; here an adapter is plain LoRA of linear layers\n  merge it"):
        check_plain_lora(folder, "tuned")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_bias": True}, "has lora_bias=True"),
        ({"peft_type": "IA3"}, "is of the kind IA3"),
        ({"something_new": 7}, "has something_new=7"),
        ({"alora_invocation_tokens": [5]}, r"has alora_invocation_tokens=\[5\]"),
        ({"r": None}, "has r=None"),
        ({"r": 8}, r"expected lora_A and lora_B of rank 8"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, change, message):
    _, _, folder = write(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        read_plain_lora(folder, "tuned")


def test_files_that_are_broken_are_named(tmp_path):
    _, _, folder = write(tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"has lora_A \[4, \d+\] for .*\n  expected lora_A and lora_B of rank 4"):
        read_plain_lora(folder, "tuned")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot be read: .*\n  expected adapter_model\.safetensors beside adapter_config\.json"):
        check_plain_lora(folder, "tuned")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        check_plain_lora(folder, "tuned")
