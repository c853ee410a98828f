"""Networks whose code comes with the checkpoint: read a little when they are loaded, row by row and plainly.

``models.support`` knows transformers' own networks. What others do with positions, masks and caches cannot be told from their
configuration, but it can be seen: rows in pieces, of different lengths, with a fork, must give what a pass over each alone gives.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ivg.errors import ModelError
from ivg.models.runner import ModelRunner
from ivg.models.support import body_of

TOLERANCE = {torch.float32: 0.02}
"""How far outputs may be from plain ones, as a part of their spread; rounding grows it in other types, and switches experts."""
_ROUNDED = 0.3
_LONG, _SHORT = (1, 4, 2, 5, 3, 7, 6), (6, 2)


def cached(network: nn.Module, name: str) -> ModelRunner:
    """``network`` with a cache; one whose code is not transformers' is tried first.

    Raises:
        ModelError: it cannot be read row by row.
    """
    model = ModelRunner(network, name)
    if not type(body_of(network)).__module__.startswith("transformers."):
        _try(model)
    return model


def _try(model: ModelRunner) -> None:
    what = f"{model.name}: {type(body_of(model.network)).__name__}"
    expected = "  expected a decoder that reads each row by positions and caches every token"
    try:
        pairs = _outputs(model)
    except Exception as e:  # whatever somebody's code raises
        said = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise ModelError(f"{what} cannot be read row by row: {said}\n{expected}") from e
    finally:
        model.reset_cache()
    apart = max(_apart(got.float(), plain.float()) for got, plain in pairs)
    if not apart <= TOLERANCE.get(pairs[0][0].dtype, _ROUNDED):  # NaN is refused, too
        raise ModelError(f"{what} gives other outputs when rows are read in pieces beside others ({apart:.1g} of their spread)\n{expected}")


@torch.no_grad()
def _outputs(model: ModelRunner) -> list[tuple[Tensor, Tensor]]:
    """Pairs of outputs behind the same tokens: through the cache, and in a pass over them alone."""
    size = int(model.config.vocab_size)
    long, short = ([token % size for token in tokens] for tokens in (_LONG, _SHORT))
    rows = [model.open(long), model.open(short)]
    model.last_outputs(rows[:1], [long[:4]])
    got = [*model.last_outputs(rows, [long[4:], short])]
    rows.append(model.fork(rows[0]))
    got += [*model.last_outputs(rows, [[1], [2], [0]])]
    texts = [long, short, [*long, 1], [*short, 2], [*long, 0]]
    network = cast("Any", model.network)
    plain = [network(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1] for ids in texts]
    return list(zip(got, plain, strict=True))


def _apart(got: Tensor, plain: Tensor) -> float:
    """Root mean square of the difference, in units of the outputs' own spread (of the output, where there is one)."""
    spread = plain.std() if plain.numel() > 1 else plain.abs().amax()
    return float((got - plain).square().mean().sqrt() / spread.clamp(min=1e-6))
