"""Models of named shapes with random weights, to measure time and memory: no download, any device, any dtype.

Random weights give nearly flat next-token distributions and meaningless texts; the cost of a forward pass does not depend on either.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ivg.bench.named_shapes import EMBEDDED, Shape, shape
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.models.cached_lm import CachedLM
from ivg.models.chat_template import encode
from ivg.models.loading import LoadOptions
from ivg.models.packed_linear import pack
from ivg.models.placement import pick_device, pick_dtype
from ivg.models.runner import ModelRunner
from ivg.models.shared_passes import share_passes
from ivg.models.value_head import ValueModel
from ivg.testing import byte_tokenizer
from ivg.types import Prompt
from ivg.utils.rng import mix
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import ImplicitValue

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_BYTES = 257
"""Tokens of the byte tokenizer without merges: 256 bytes and the end-of-sequence token."""
_WORDS = "the of and to in is that for it was on are as with they be at this have from or one had by word but not what all we".split()  # noqa: SIM905


def build_model(
    base: str, guide: str | None = None, *, dtype: str = "auto", device: str | None = None, seed: int = 0, packed: bool = True
) -> GuidedModel:
    """A base with the values ``implicit`` (two guides) and ``explicit`` (a vocabulary head), created in ``dtype`` on ``device``.

    Args:
        base: name of a shape, or ``embedded``.
        guide: shape of the guides and of the value's body, which take the base's vocabulary; None: the base's usual one.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: None: the best available.
        seed: of the weights.
        packed: pack linear layers as ivg does at load time (:mod:`ivg.models.packed_linear`); False: as transformers loads models.

    Raises:
        ConfigError: unknown shape, dtype or device.
    """
    if base == EMBEDDED:
        if guide is not None:
            raise ConfigError(f"the embedded models have guides of their own, got --guide {guide}\n  leave it out")
        model = GuidedModel.embedded(LoadOptions(device=device, dtype=dtype, pack=packed))
        _never_ends(model.reader.network)
        return model
    large, small = shape(base), shape(guide or shape(base).guide)
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    tokenizer = tokenizer_of_size(large.vocabulary)

    def network(auto: Any, what: Shape, number: int) -> Any:
        torch.manual_seed(seed + number)
        with where:
            return auto.from_config(model_config(what, large.vocabulary), dtype=kind, attn_implementation="sdpa").eval()

    def reader(network: nn.Module, name: str) -> CachedLM:
        return CachedLM(ModelRunner(pack(network) if packed else network, name), tokenizer)

    def language_model(what: Shape, name: str, number: int) -> CachedLM:
        return reader(_never_ends(network(AutoModelForCausalLM, what, number)), name)

    body = network(AutoModel, small, 3)
    with where:
        head = ValueModel(body, "vocabulary").eval()
        nn.init.normal_(head.head.weight, std=0.02)
    value = ExplicitValue(reader(head, "explicit"))
    implicit = ImplicitValue(language_model(small, "tuned", 1), language_model(small, "untuned", 2))
    share_passes(implicit.untuned, implicit.tuned)
    return GuidedModel(language_model(large, "base", 0), {"implicit": implicit, "explicit": value})


def networks(model: GuidedModel) -> dict[str, Any]:
    """``base``, ``tuned``, ``untuned`` and ``value``, as plain networks."""
    implicit, explicit = model.values["implicit"], model.values["explicit"]
    assert isinstance(implicit, ImplicitValue)
    assert isinstance(explicit, ExplicitValue)
    return {
        "base": model.reader.network,
        "tuned": implicit.tuned.network,
        "untuned": implicit.untuned.network,
        "value": explicit.model.network,
    }


def model_config(what: Shape, vocabulary: int) -> Any:
    """The configuration of a shape with ``vocabulary`` tokens."""
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": what.hidden,
        "num_hidden_layers": what.layers,
        "num_attention_heads": what.heads,
        "max_position_embeddings": what.context,
    }
    if what.inner:
        sizes |= {"intermediate_size": what.inner, "num_key_value_heads": what.kv_heads}
    return AutoConfig.for_model(what.architecture, **sizes, **what.more, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def _never_ends(network: Any) -> Any:
    """Make transformers' ``generate`` ignore the end-of-sequence token, so that all answers have the same length."""
    network.generation_config.eos_token_id = None
    network.generation_config.pad_token_id = 0
    return network


def tokenizer_of_size(size: int) -> Any:
    """A byte-level BPE tokenizer of exactly ``size`` tokens: bytes, then pairs of letters, then triples, and so on.

    Raises:
        ConfigError: fewer tokens than bytes.
    """
    if size < _BYTES:
        raise ConfigError(f"a byte tokenizer has at least {_BYTES} tokens, got {size}")
    return byte_tokenizer(list(itertools.islice(_merges(), size - _BYTES)))


def _merges() -> Iterator[tuple[str, str]]:
    level: Sequence[str] = _LETTERS
    while True:
        yield from itertools.product(level, _LETTERS)
        level = ["".join(pair) for pair in itertools.product(level, _LETTERS)]


def make_prompts(tokenizer: Any, count: int, tokens: int, seed: int = 0) -> list[Prompt]:
    """``count`` different texts of exactly ``tokens`` tokens each.

    Raises:
        ConfigError: no text of that length was found.
    """
    out: list[Prompt] = []
    taken: set[str] = set()
    for attempt in range(1000 * count):
        words = (_WORDS[mix(seed, attempt, i) % len(_WORDS)] for i in range(tokens))
        ids = encode(Prompt(" ".join(words)), tokenizer, None)[:tokens]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.strip() and text not in taken and encode(Prompt(text), tokenizer, None) == ids and len(ids) == tokens:
            taken.add(text)
            out.append(Prompt(text, tuple(ids)))
            if len(out) == count:
                return out
    raise ConfigError(f"found {len(out)} different prompts of {tokens} tokens, wanted {count}\n  give other --prompt-tokens")
