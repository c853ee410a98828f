"""Guidance weights of the rows of the current batch.

The model runner sets them before a forward pass, the composite pops them when it mixes logits. There is one object for each engine
(``VllmConfig.instance_id``), several of which may live in one process.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class BatchBetas:
    """Guidance weights of the rows of the next pass, and the temperature of their log-probabilities: [rows, groups + 1] float32."""

    def __init__(self) -> None:
        self._weights: Tensor | None = None

    def set(self, weights: Tensor) -> None:
        """The next pass has these rows, in this order."""
        self._weights = weights

    def pop(self, rows: int) -> Tensor | None:
        """Weights of ``rows`` logits rows; None where none were set: profiling, warm-up, log-probabilities of prompts.

        Raises:
            RuntimeError: another number of rows was set; guessing would guide one request by another's weights.
        """
        weights, self._weights = self._weights, None
        if weights is not None and len(weights) != rows:
            raise RuntimeError(
                f"guidance weights of {len(weights)} rows for {rows} rows of logits; please report this with the vLLM version"
            )
        return weights


_OF: dict[str, BatchBetas] = {}


def batch_betas(vllm_config: Any) -> BatchBetas:
    """Those of an engine."""
    return _OF.setdefault(vllm_config.instance_id, BatchBetas())
