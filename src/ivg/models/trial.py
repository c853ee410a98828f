"""How far outputs are from those that are known to be right, when a network is tried before it is used.

Whatever reads otherwise than by a plain pass (caches, adapters, shared passes, hidden states) is tried so when models are loaded.
"""

from __future__ import annotations

from torch import Tensor


def output_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference in the worst row, in units of the standard deviation of what is expected.

    Args:
        got: [..., size].
        expected: likewise; of a single number its size is the unit.

    Returns:
        NaN where either is: no comparison holds for it.
    """
    scale = expected.std() if expected.numel() > 1 else expected.abs().amax()
    return float((got - expected).square().mean(-1).sqrt().amax() / scale.clamp(min=1e-6))
