"""Small random models of several architectures, with the embedded tokenizer, and engines over them."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ivg.embedded import path
from ivg.factory.recipe import load_models
from ivg.models.value_head import ValueModel
from ivg.settings.recipe import Recipe

VOCABULARY = 4096
_SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ARCHITECTURES = {
    "llama": _WIDE,
    "qwen2": {k: v for k, v in _WIDE.items() if k != "head_dim"},
    "qwen3": _WIDE | {"tie_word_embeddings": True},
    "mistral-window": _WIDE | {"model_type": "mistral", "sliding_window": 24},
    "gpt2": {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "small-llama": _WIDE
    | {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    "padded-llama": _WIDE | {"model_type": "llama", "vocab_size": VOCABULARY + 64},
    "granite": _WIDE | {"logits_scaling": 4.0, "tie_word_embeddings": False},
    "experts": _WIDE
    | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "bloom": {"hidden_size": 128, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def make(folder: Path, kind: str, seed: int) -> str:
    """A directory with a random network; the same for the same arguments."""
    place = folder / f"{kind}-{seed}"
    if not place.exists():
        settings = {**_SIZES, **ARCHITECTURES[kind]}
        config = AutoConfig.for_model(settings.pop("model_type", kind), **settings)
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # the logits of a fresh network hardly differ
            network.get_output_embeddings().weight.mul_(1.0 if config.tie_word_embeddings else 8.0)
        network.save_pretrained(place)
        AutoTokenizer.from_pretrained(path("base")).save_pretrained(place)
    return str(place)


def mix(folder: Path, one: str, other: str, share: float) -> str:
    """A network whose weights are (1 - ``share``) times those of ``one`` and ``share`` times those of ``other``."""
    place = folder / f"{Path(one).name}-{Path(other).name}-{share}"
    if not place.exists():
        shutil.copytree(one, place)
        network, more = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (one, other))
        with torch.no_grad():
            for weight, added in zip(network.parameters(), more.parameters(), strict=True):
                weight.lerp_(added, share)
        network.save_pretrained(place)
    return str(place)


def with_loud_padding(source: str, factor: float) -> str:
    """A copy whose rows behind the vocabulary have logits ``factor`` times as large, so that they are chosen if nothing prevents it."""
    place = Path(f"{source}-loud-{factor}")
    if not place.exists():
        shutil.copytree(source, place)
        network = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        with torch.no_grad():
            network.get_output_embeddings().weight[VOCABULARY:].mul_(factor)
        network.save_pretrained(place)
    return str(place)


def with_added_tokens(source: str) -> str:
    """A copy with two likely tokens more, ``<|im_end|>``, which ends a response, and ``<|tool|>``."""
    place = Path(f"{source}-added")
    if not place.exists():
        network, tokenizer = (kind.from_pretrained(source) for kind in (AutoModelForCausalLM, AutoTokenizer))
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
        tokenizer.add_tokens(["<|tool|>"])
        network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            head = network.get_output_embeddings().weight
            head[-2:] = 1.2 * head[[1001, 979]]
        network.config.eos_token_id = network.generation_config.eos_token_id = tokenizer.eos_token_id
        network.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return str(place)


def with_vocabulary_head(folder: Path, kind: str, seed: int) -> str:
    """A value network with a random vocabulary head over the body of a random network."""
    place = folder / f"value-{kind}-{seed}"
    if not place.exists():
        value = ValueModel(AutoModelForCausalLM.from_pretrained(make(folder, kind, seed), dtype=torch.float32).base_model, "vocabulary")
        torch.manual_seed(seed)
        torch.nn.init.normal_(value.head.weight, std=0.5)
        value.save_pretrained(place)
        AutoTokenizer.from_pretrained(path("base")).save_pretrained(place)
    return str(place)


def with_biased_head(folder: Path, source: str) -> str:
    """A copy of a value network with a vocabulary head that has a random bias, large beside its logits."""
    place = folder / "biased-head"
    if not place.exists():
        shutil.copytree(source, place)
        tensors = load_file(place / "model.safetensors")
        weight = tensors["score_head.weight"]
        noise = torch.randn(len(weight), generator=torch.Generator().manual_seed(1))
        save_file(tensors | {"score_head.bias": (6 * noise).to(weight.dtype)}, place / "model.safetensors", metadata={"format": "pt"})
    return str(place)


def make_adapter(folder: Path, kind: str, seed: int, **settings) -> str:
    """A LoRA adapter with random weights of the network ``make(folder, kind, 1)``."""
    import peft

    place = folder / f"{kind}-adapter-{seed}"
    if not place.exists():
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_pretrained(make(folder, kind, 1), dtype=torch.float32)
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings})
        made = peft.get_peft_model(network, config)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        made.save_pretrained(place)
    return str(place)


def merge(source: str, adapter: str, scale: float) -> str:
    """A copy of a network with ``scale`` times the change of an adapter in its weights."""
    import peft

    place = Path(f"{adapter}-merged-{scale}")
    if not place.exists():
        made = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), adapter)
        for module in made.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scaling = {name: value * scale for name, value in module.scaling.items()}
        made.merge_and_unload().save_pretrained(place)
        AutoTokenizer.from_pretrained(source).save_pretrained(place)
    return str(place)


def trio(folder: Path, base: str, guides: str = "small-llama") -> dict[str, str]:
    """Paths of base, tuned and untuned."""
    return {"base": make(folder, base, 1), "tuned": make(folder, guides, 2), "untuned": make(folder, guides, 3)}


@contextmanager
def models(engine: str, *, every_guide: bool = False, **tables):
    """A guided model over ``engine``, float32, stopped in the end."""
    settings = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 64} | tables.pop("vllm", {})
    run = {"engine": engine, "dtype": "float32", "device": "cpu"} | tables.pop("run", {})
    model = load_models(Recipe.parse({"run": run, "vllm": settings, **tables}), every_guide=every_guide)
    try:
        yield model
    finally:
        model.close()


def prompts(count: int = 8) -> list[str]:
    """Of different lengths."""
    words = [
        "The",
        "film",
        "was",
        "long",
        "and",
        "nobody",
        "in",
        "the",
        "cinema",
        "laughed",
        "until",
        "the",
        "very",
        "last",
        "scene",
        "when",
        "the",
        "old",
        "man",
        "came",
        "back",
    ]
    return [" ".join((words * 4)[: 1 + 7 * i]) for i in range(count)]
