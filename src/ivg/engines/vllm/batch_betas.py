"""Which row of the batch that is on its way has which guidance weights.

A model runner *arms* the rows before a forward pass, the composite *takes* them when it mixes logits. Rows are kept for each
engine (``VllmConfig.instance_id``), several of which may live in one process.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class BatchBetas:
    """Guidance weights of the rows of the next pass, [rows, groups] float32."""

    def __init__(self) -> None:
        self._armed: Tensor | None = None

    def arm(self, weights: Tensor) -> None:
        """The next pass has these rows, in this order."""
        self._armed = weights

    def take(self, rows: int) -> Tensor | None:
        """Weights of ``rows`` logits rows; None where nothing was armed: profiling, warm-up, log-probabilities of prompts.

        Raises:
            RuntimeError: another number of rows was armed; guessing would steer one request by another's weights.
        """
        armed, self._armed = self._armed, None
        if armed is not None and len(armed) != rows:
            raise RuntimeError(f"guidance weights of {len(armed)} rows for {rows} rows of logits; please report this with the vLLM version")
        return armed


_OF: dict[str, BatchBetas] = {}


def rows_of(vllm_config: Any) -> BatchBetas:
    """Those of an engine."""
    return _OF.setdefault(vllm_config.instance_id, BatchBetas())
