"""Metrics of held-out rows that do not depend on which rows share a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_TOKENS = {"entropy": "tokens", "mean_token_accuracy": "chosen", "logits/chosen": "chosen", "logits/rejected": "rejected"}
"""Metrics of TRL that are means over tokens of a batch, and which tokens; the others are means over its rows."""
_EXTREMES = {"min_reward": min, "max_reward": max}
_COUNTS = ("rows", "tokens", "chosen", "rejected", "loss")


class WeightedMetrics:
    """A trainer of TRL whose evaluation counts each row, and each token, once.

    TRL averages over batches, so that the one row of a last batch would count as much as all rows of another.
    """

    accelerator: Any
    model: Any
    _metrics: dict[str, dict[str, list[float]]]
    _evaluated: list[dict[str, float]]

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Of transformers: one batch of an evaluation."""
        counts = batch_counts(inputs)
        out = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        loss = out[0].detach().float() * counts["tokens" if "labels" in inputs else "rows"]  # MPS has no float64
        here = torch.stack([*(loss.new_tensor(float(counts[name])) for name in _COUNTS[:-1]), loss])
        found = self.accelerator.gather(here[None]).sum(0).tolist()  # of all processes
        self.__dict__.setdefault("_evaluated", []).append({**dict(zip(_COUNTS, found, strict=True)), "mean": float("labels" in inputs)})
        return out

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Of transformers; TRL adds the metrics of the batches since the last time."""
        batches = [] if self.model.training else self.__dict__.pop("_evaluated", [])
        if batches:
            for name, values in self._metrics["eval"].items():
                if len(values) == len(batches):
                    values[:] = [overall(name, values, batches)]
            if "eval_loss" in logs:
                unit = "tokens" if batches[0]["mean"] else "rows"
                logs["eval_loss"] = sum(b["loss"] for b in batches) / max(1.0, sum(b[unit] for b in batches))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def batch_counts(inputs: Mapping[str, Any]) -> dict[str, int]:
    """Rows of a batch, and the tokens that its loss reads: all, and of pairs those of the chosen and of the rejected responses.

    Args:
        inputs: of SFT, with ``labels`` [rows, tokens]; of pairs with both responses [2 * rows, tokens], of DPO with ``completion_mask``.
    """
    if "labels" in inputs:
        read: Tensor = inputs["labels"][:, 1:] != -100
        tokens = int(read.sum())
        return {"rows": len(read), "tokens": tokens, "chosen": tokens, "rejected": 0}
    rows = len(inputs["input_ids"]) // 2
    mask = inputs.get("completion_mask", inputs["input_ids"][:, :0])[:, 1:].bool()
    chosen, rejected = int(mask[:rows].sum()), int(mask[rows:].sum())
    return {"rows": rows, "tokens": chosen + rejected, "chosen": chosen, "rejected": rejected}


def overall(name: str, values: Sequence[float], batches: Sequence[Mapping[str, float]]) -> float:
    """A metric of all rows from its values in the batches."""
    if name in _EXTREMES:
        return float(_EXTREMES[name](values))
    weights = [batch[_TOKENS.get(name, "rows")] for batch in batches]
    return sum(v * w for v, w in zip(values, weights, strict=True)) / (sum(weights) or 1.0)
