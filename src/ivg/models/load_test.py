"""A test at load time for networks whose code comes with the checkpoint (``trust_remote_code``): are outputs through the cache exact?

``models.support`` knows transformers' own networks. What others do with positions, masks and caches cannot be read from their
configuration, so it is tried: rows in pieces, of different lengths, with a fork, must give the outputs of a pass over each alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ivg.errors import ModelError
from ivg.models.runner import ModelRunner
from ivg.models.support import body_of

TOLERANCE = {torch.float32: 0.02}
"""Root mean square of the error allowed, in units of the outputs' standard deviation."""
_LOW_PRECISION_TOLERANCE = 0.3
"""In other dtypes: rounding is larger, and may switch experts."""
_LONG, _SHORT = (1, 4, 2, 5, 3, 7, 6), (6, 2)


def make_runner(network: nn.Module, name: str) -> ModelRunner:
    """A runner for ``network``; one whose code is not transformers' is tested first.

    Raises:
        ModelError: it cannot be read row by row.
    """
    model = ModelRunner(network, name)
    if not type(body_of(network)).__module__.startswith("transformers."):
        _test(model)
    return model


def _test(model: ModelRunner) -> None:
    title = f"{model.name}: {type(body_of(model.network)).__name__}"
    expected = "  expected a decoder that reads each row by positions and caches every token"
    try:
        pairs = _outputs(model)
    except Exception as e:  # code of the checkpoint may raise anything
        message = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise ModelError(f"{title} cannot be read row by row: {message}\n{expected}") from e
    finally:
        model.reset_cache()
    error = max(_error(got.float(), plain.float()) for got, plain in pairs)
    if not error <= TOLERANCE.get(pairs[0][0].dtype, _LOW_PRECISION_TOLERANCE):  # NaN fails, too
        raise ModelError(f"{title} gives other outputs when rows share a batch (error {error:.1g} standard deviations)\n{expected}")


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


def _error(got: Tensor, plain: Tensor) -> float:
    """Root mean square of the difference, in units of the outputs' standard deviation (of the output itself, where there is one)."""
    scale = plain.std() if plain.numel() > 1 else plain.abs().amax()
    return float((got - plain).square().mean().sqrt() / scale.clamp(min=1e-6))
