"""A byte tokenizer and tiny random models. Imports torch when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ivg.types import Beam, Hypothesis, Prompt, TokenCounter, new_key

EOS = "<eos>"


def byte_tokenizer(merges: Sequence[tuple[str, str]] = (), permute: bool = False, chat: bool = False, bos: bool = False) -> Any:
    """A transformers tokenizer over bytes, with a few ``merges``; ``permute`` gives the same tokens other ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [EOS, *alphabet, *(a + b for a, b in merges)]
    if permute:
        tokens = [EOS, *reversed(tokens[1:])]
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, list(merges)))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    if bos:
        tok.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", pair=f"{EOS} $A $B", special_tokens=[(EOS, 0)])
    out = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=EOS, pad_token=EOS, bos_token=EOS, clean_up_tokenization_spaces=False)
    if chat:
        out.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        )
    return out


ARCHITECTURES = ("gpt2", "llama", "mistral", "mixtral", "qwen3", "gemma3_text")
"""What :func:`tiny_model` can make. Windows are 6 tokens, so that they matter."""


DEVICE = "cpu"
"""Where the tiny models lie; a test run on a GPU sets it. Their weights are drawn on the CPU, so they are the same everywhere."""


def tiny_model(architecture: str = "llama", seed: int = 0, vocab_size: int = 257, hidden: int = 32, context: int = 256) -> Any:
    """A random causal language model in float32 whose distributions are far from flat."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "initializer_range": 0.3,
    }
    if architecture != "gpt2":
        settings |= {"intermediate_size": 2 * hidden, "num_key_value_heads": 2, "head_dim": hidden // 4}
    if architecture in ("mistral", "mixtral"):
        settings["sliding_window"] = 6
    if architecture == "mixtral":
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if architecture == "gemma3_text":
        settings |= {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": hidden // 4}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **settings, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    model.generation_config.pad_token_id = 0
    return model.to(DEVICE)


def tiny_lm(name: str = "base", architecture: str = "llama", seed: int = 0, tokenizer: Any = None, **settings: Any) -> Any:
    """A :class:`~ivg.models.cached_lm.CachedLM` of a :func:`tiny_model`."""
    from ivg.models.cached_lm import CachedLM
    from ivg.models.runner import ModelRunner

    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    network = tiny_model(architecture, seed, vocab_size=len(tokenizer), **settings)
    return CachedLM(ModelRunner(network, name), tokenizer)


def tiny_value(head: str = "vocabulary", architecture: str = "llama", seed: int = 0, tokenizer: Any = None, name: str = "explicit") -> Any:
    """An :class:`~ivg.values.explicit.ExplicitValue` with a random head over the body of a :func:`tiny_model`."""
    import torch

    from ivg.models.cached_lm import CachedLM
    from ivg.models.runner import ModelRunner
    from ivg.models.value_head import ValueModel
    from ivg.values.explicit import ExplicitValue

    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    model = ValueModel(tiny_model(architecture, seed, vocab_size=len(tokenizer)).base_model, head)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.weight, std=0.3)
    model.to(DEVICE)
    return ExplicitValue(CachedLM(ModelRunner(model, name), tokenizer), name)


def hypothesis(prompt: str, text: str, reader: Any, parent: Hypothesis | None = None, *, end: bool = False) -> Beam:
    """A beam with ``text`` as response, in the tokens of ``reader``; ``end`` adds the end-of-sequence token."""
    ids = tuple(reader.vocabulary.response_ids(reader.prompt_ids(Prompt(prompt)), text)) if text else ()
    ids += (reader.vocabulary.eos_id,) if end else ()
    return Beam(
        new_key(),
        parent.key if parent else None,
        Prompt(prompt),
        ids,
        text,
        "stop" if end else None,
        TokenCounter(),
        vocabulary=reader.vocabulary,
    )
