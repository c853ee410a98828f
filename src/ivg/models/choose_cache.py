"""Which cache a network gets, tried out where its configuration does not tell: slots, or transformers' own cache for each row.

``models.support`` knows which of transformers' networks the slot cache reads exactly. All others get transformers' own cache, and what
those and networks whose code comes with the checkpoint (``trust_remote_code``) do is tried: rows in pieces, of different
lengths, with a fork, must give the outputs of a pass over each alone. What does not is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ivg.errors import ModelError
from ivg.models.cache import CacheRow, PassLimits, RowCache
from ivg.models.image_prompts import ImageInputs
from ivg.models.image_support import plain_output, untaken
from ivg.models.placement import compute_dtype, input_device
from ivg.models.slot_cache import SlotCache
from ivg.models.state_cache import STATE_NAMES, StateCache
from ivg.models.support import NetworkSupport, body_of
from ivg.models.trial import output_error

TOLERANCE = {torch.float32: 0.02}
"""Root mean square of the error allowed, in units of the outputs' standard deviation."""
_LOW_PRECISION_TOLERANCE = 0.3
"""In other dtypes: rounding is larger, and may switch experts."""
_TEXTS = ((1, 4, 2, 5, 3, 7, 6, 8), (6, 2, 9, 1, 5, 5, 3, 2), (4, 3))
_NO_CACHE = f"takes no cache ({', '.join(STATE_NAMES)})"
_PIECES = ((3, 3, 0), (1, 1, 2), (4, 4, 0))
"""How many tokens of each text the passes read, the last of them behind a fork of the first."""


def choose_cache(network: nn.Module, support: NetworkSupport, limits: PassLimits, name: str, *, trial: bool = True) -> RowCache:
    """The cache for ``network``, whose rows are then exact as far as a trial tells.

    Args:
        network: a causal network.
        support: how it is read.
        limits: of one pass.
        name: for errors.
        trial: try networks whose code is not transformers'; False: trust them.

    Raises:
        ModelError: no cache gives the outputs of a plain pass; says which and how far off they are.
    """
    known = type(body_of(network)).__module__.startswith("transformers.")
    if support.state_reason is None and (known or not trial):
        return SlotCache(network, support, limits)
    fault: str | None = _NO_CACHE
    for cache in _candidates(network, support, limits):
        fault = _fault(cache, network)
        if fault is None:
            return cache
    title = f"{name}: {type(body_of(network)).__name__}"
    if not _is_causal(network):
        raise ModelError(f"{title} is not causal: its outputs behind a text change with the tokens after it\n  expected a decoder")
    reason = f"{support.state_reason}, and " if support.state_reason else ""
    raise ModelError(f"{title} {reason}{fault}\n  expected a decoder whose cache gives the outputs of a pass over the whole text")


def images_fault(network: nn.Module, images: ImageInputs, limits: PassLimits) -> str | None:
    """Why rows that begin with the pictures of ``images`` are not exact on ``network``; None: they are."""
    if names := untaken(network, images):
        return f"does not take {', '.join(names)}, which its processor gives"
    if not StateCache.takes(network):
        return _NO_CACHE
    cache = StateCache(network, limits)
    try:
        pairs = list(_image_outputs(cache, network, images))
    except Exception as e:  # the network's code may raise anything
        message = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        return f"cannot read them: {message}"
    error = max(output_error(got.float(), plain.float()) for got, plain in pairs)
    if error <= tolerance_of(network):
        return None
    return f"gives other outputs when the answer is read behind a cached prompt (error {error:.1g} standard deviations)"


@torch.no_grad()
def _image_outputs(cache: StateCache, network: nn.Module, images: ImageInputs) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of outputs behind the prompt and some tokens: through the cache, with a fork, and in a pass without cache."""
    ids = list(images.ids)
    row = cache.open_with_images(ids, 0, images)
    for new in (ids, ids[-1:], ids[-1:]):
        outputs, _ = cache.forward([row], [new], 1)
        yield outputs[0, -1], plain_output(network, row.ids, images)
        row = cache.fork(row)


def tolerance_of(network: nn.Module) -> float:
    """The error allowed, by the dtype that the network computes in: its outputs may be float32 all the same (Mamba's are)."""
    return TOLERANCE.get(compute_dtype(network), _LOW_PRECISION_TOLERANCE)


def _candidates(network: nn.Module, support: NetworkSupport, limits: PassLimits) -> Iterator[RowCache]:
    if support.state_reason is None:
        yield SlotCache(network, support, limits)
    if StateCache.takes(network):
        for alone in (False, True):
            for one_by_one in (False, True):
                yield StateCache(network, limits, one_by_one=one_by_one, alone=alone)


@torch.no_grad()
def _is_causal(network: nn.Module) -> bool:
    """Are the outputs behind a text the same, whatever follows it in the pass?"""
    size = int(cast("Any", network).config.get_text_config().vocab_size)
    device = input_device(network)
    ids = torch.tensor([[token % size for token in _TEXTS[0]]], device=device)
    try:
        whole, begin = (network(input_ids=part, use_cache=False).logits[0, 3].float() for part in (ids, ids[:, :4]))
    except Exception:  # the network's code may raise anything
        return True  # not known to be otherwise
    return output_error(whole, begin) <= tolerance_of(network)


def _fault(cache: RowCache, network: nn.Module) -> str | None:
    """What is wrong with the outputs through ``cache``; None: nothing."""
    try:
        pairs = _outputs(cache, network)
    except Exception as e:  # the network's code may raise anything
        message = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        if "no attribute 'past_key_values'" in message:
            return "returns no cache"
        return f"cannot be read in pieces behind its own cache: {message}"
    finally:
        cache.clear()
    error = max(output_error(got.float(), plain.float()) for got, plain in pairs)
    if error <= tolerance_of(network):  # NaN is none
        return None
    return f"gives other outputs when rows share a batch or are read in pieces (error {error:.1g} standard deviations)"


@torch.no_grad()
def _outputs(cache: RowCache, network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pairs of outputs behind the same tokens: through the cache, and in a pass over them alone."""
    size = int(cast("Any", network).config.get_text_config().vocab_size)
    texts = [[token % size for token in text] for text in _TEXTS]
    rows = [cache.open(text, 0) for text in texts]
    pairs: list[tuple[Tensor, Tensor]] = []
    for counts in _PIECES:
        new = [text[len(row.ids) :][:n] for text, row, n in zip(texts, rows, counts, strict=True)]
        pairs += _read(cache, network, rows, new)
    rows.append(cache.fork(rows[0]))
    for new in ([[1], [], [2], [3]], [[5], [7], [], [4]]):
        pairs += _read(cache, network, rows, [[token % size for token in tokens] for tokens in new])
    return pairs


def _read(cache: RowCache, network: nn.Module, rows: Sequence[CacheRow], new: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    cache.prepare(rows)
    for batch in cache.batches(rows, {i: len(tokens) for i, tokens in enumerate(new) if tokens}, {}, 1):
        outputs, order = cache.forward([rows[i] for i in batch], [new[i] for i in batch], 1)
        for k, place in enumerate(order):
            ids = torch.tensor([rows[batch[place]].ids], device=outputs.device)
            yield outputs[k, -1], network(input_ids=ids, use_cache=False).logits[0, -1]
