"""Weights of value networks, rewards and language models: every architecture and layout, nothing missing, nothing left over."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ivg.errors import ModelError
from ivg.models.loading import LoadOptions, load_causal
from ivg.models.value_head import ValueModel
from ivg.testing import byte_tokenizer, hypothesis, tiny_lm, tiny_model
from ivg.values.explicit import ExplicitValue
from ivg.values.reward import RewardModel

FLOAT32 = LoadOptions(dtype="float32")
TEXT = "The movie was"
COMMON = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
CONFIGS = {
    "mixtral": COMMON | {"num_local_experts": 2},
    "qwen2_moe": COMMON | EXPERTS | {"num_experts": 2, "shared_expert_intermediate_size": 16},
    "qwen3_moe": COMMON | EXPERTS | {"num_experts": 2},
    "deepseek_v3": COMMON | EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gemma3": {"text_config": COMMON, "vision_config": VISION, "mm_tokens_per_image": 4, "pad_token_id": 0},
    "gemma3_text": COMMON,
    "gpt2": {"vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0, "initializer_range": 0.3},
}
"""Mixtures of experts, whose files hold other tensors than the network does, and networks made of several."""


def classifier(architecture, seed=0, **settings):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **CONFIGS.get(architecture, COMMON), num_labels=1, **settings)
    return AutoModelForSequenceClassification.from_config(config).float().eval()


def last_logit(network, text=TEXT):
    with torch.no_grad():
        return network(input_ids=torch.tensor([byte_tokenizer()(text).input_ids])).logits[0].flatten()[-1].item()


def read(folder, text=TEXT):
    value = ExplicitValue.from_pretrained(folder, options=FLOAT32)
    return value.score([hypothesis(text[:4], text[4:], tiny_lm("base"))])[0]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_classifier_of_any_architecture_is_a_value_and_goes_round(tmp_path, architecture):
    network = classifier(architecture)
    network.save_pretrained(tmp_path / "one", max_shard_size="50GB")
    network.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    for name in ("one", "shards"):
        byte_tokenizer().save_pretrained(tmp_path / name)
        assert read(tmp_path / name) == pytest.approx(last_logit(network), abs=1e-4)
    ValueModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    byte_tokenizer().save_pretrained(tmp_path / "again")
    reward = RewardModel.from_pretrained(tmp_path / "again", options=FLOAT32)  # a scalar value without bias is a sequence classifier
    assert last_logit(reward.network) == pytest.approx(last_logit(network), abs=1e-5)


@pytest.mark.parametrize("head", ["vocabulary", "scalar"])
@pytest.mark.parametrize("architecture", ["mixtral", "gemma3"])
def test_heads_with_bias_go_round(tmp_path, architecture, head):
    value = ValueModel(classifier(architecture).base_model, head, bias=True).eval()
    torch.nn.init.normal_(value.head.weight)
    torch.nn.init.normal_(value.head.bias)
    value.notes = {"target": "fudge"}
    value.save_pretrained(tmp_path)
    again = ValueModel.from_pretrained(tmp_path)
    assert (again.kind, again.notes) == (head, {"target": "fudge"})
    assert last_logit(again) == pytest.approx(last_logit(value), abs=1e-6)
    assert not (tmp_path / "generation_config.json").exists()
    if head == "scalar":  # a sequence classifier has no bias: its numbers would be other ones
        byte_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"is a value network, not a sequence classifier"):
            RewardModel.from_pretrained(tmp_path)


def test_a_configuration_with_infinity_is_valid_json_and_goes_round(tmp_path):
    network = classifier("llama")
    network.config.time_step_limit = [0.0, float("inf")]  # as Mamba 2 has it
    ValueModel(network.base_model, "vocabulary").save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
    assert ValueModel.from_pretrained(tmp_path).config.time_step_limit == [0.0, float("inf")]


@pytest.mark.parametrize("wrapper", ["", "pretrained_model.", "backbone."])
def test_older_files_and_wrapped_backbones(tmp_path, wrapper):
    """PyTorch's older format, and TRL's names of a mixture of experts."""
    network = classifier("mixtral")
    network.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    head = {"v_head.summary.weight": tensors.pop("score.weight"), "v_head.summary.bias": torch.tensor([4.91])}
    language = {wrapper + "lm_head.weight": torch.zeros(257, 16)}
    torch.save({wrapper + k: v for k, v in tensors.items()} | head | language, tmp_path / "pytorch_model.bin")
    byte_tokenizer().save_pretrained(tmp_path)
    assert read(tmp_path) == pytest.approx(last_logit(network) + 4.91, abs=1e-4)


def spoil(folder, drop=(), add=None, rename=()):
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    for name in drop:
        del tensors[name]
    for old, new in rename:
        tensors[new] = tensors.pop(old)
    save_file(tensors | (add or {}), folder / "model.safetensors", metadata={"format": "pt"})


BIAS = {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change,named",
    [
        ({"drop": [LAYER]}, r"lacks 1 weight \(\S*layers\.1\.mlp\.up_proj\.weight\) of Llama.*, which would be random"),
        ({"rename": [(LAYER, "model.layers.1.mlp.upward.weight")]}, r"lacks 1 weight \(\S*layers\.1\.mlp\.up_proj\.weight\)"),
        ({"add": BIAS}, r"holds 1 weight \(\S*layers\.0\.self_attn\.q_proj\.bias\) that Llama.* does not use"),
    ],
    ids=["missing", "renamed", "left over"],
)
@pytest.mark.parametrize("role", ["value", "reward", "base"])
def test_missing_and_unexpected_weights_are_errors_that_name_them(tmp_path, role, change, named):
    network = tiny_model("llama", hidden=16) if role == "base" else classifier("llama")
    network.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    spoil(tmp_path, **change)
    with pytest.raises(ModelError, match=named):
        if role == "base":
            load_causal(tmp_path, "base", FLOAT32)
        else:
            (ExplicitValue if role == "value" else RewardModel).from_pretrained(tmp_path, options=FLOAT32)


def test_a_language_model_needs_its_head_unless_it_is_tied(tmp_path):
    network = tiny_model("llama")
    network.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    spoil(tmp_path, drop=["lm_head.weight"])
    with pytest.raises(ModelError, match=r"base '.*' lacks 1 weight \(lm_head\.weight\) of LlamaForCausalLM, which would be random"):
        load_causal(tmp_path, "base", FLOAT32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    load_causal(tmp_path, "base", FLOAT32)


def test_a_classifier_is_no_base_and_a_policy_with_a_value_head_is(tmp_path):
    classifier("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"(?s)score\.weight.*config\.json says LlamaForSequenceClassification"):
        load_causal(tmp_path, "base", FLOAT32)
    spoil(tmp_path, rename=[("score.weight", "v_head.summary.weight")])  # of PPO: beside the language model
    load_causal(tmp_path, "base", FLOAT32)


def test_what_older_versions_wrote_is_left_out(tmp_path):
    """Buffers, and the pooler of an encoder whose classifier has none: no network reads them."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {k: COMMON[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    network = RobertaForSequenceClassification(RobertaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=66, num_labels=1))
    network.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    pooler = {"roberta.pooler.dense.weight": torch.zeros(16, 16), "roberta.pooler.dense.bias": torch.zeros(16)}
    spoil(tmp_path, add=pooler | {"roberta.embeddings.position_ids": torch.arange(66)[None]})
    loaded = RewardModel.from_pretrained(tmp_path, options=FLOAT32)
    assert last_logit(loaded.network) == pytest.approx(last_logit(network.eval()), abs=1e-5)


def test_a_reward_can_be_trained_from_a_language_model_but_not_from_half_of_one(tmp_path):
    from transformers import AutoModelForSequenceClassification

    from ivg.training.trainer import load_for_training

    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    load_for_training(AutoModelForSequenceClassification, tmp_path, "model", num_labels=1)
    spoil(tmp_path, drop=[LAYER])
    with pytest.raises(ModelError, match="up_proj"):
        load_for_training(AutoModelForSequenceClassification, tmp_path, "model", num_labels=1)
