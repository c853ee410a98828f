"""Log-probabilities of labels on a CPU, for TRL's ``SFTTrainer`` and ``DPOTrainer``.

TRL computes them from the hidden states in tiles of 128 MB, made for GPUs, and outside a GPU at every position, also of the prompt.
Here only positions with a label are read, in blocks of a few megabytes that stay in the processor's cache. Same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

BLOCK_BYTES = 8 << 20
"""Size of a block of float32 logits. Its memory is kept from block to block: to ask the system for it anew takes longer than the work."""
BACKWARD_ROWS = 256
"""Positions of a block in the backward pass. A part of the vocabulary at once: its gradient stays in the cache."""
SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Settings of models that change their logits behind the head; such models keep TRL's own forward."""
ELSEWHERE = ("output_router_logits", "shift_labels", "num_items_in_batch")
"""Arguments of TRL's forward that this one does not know."""


class LabelLogProbs(torch.autograd.Function):
    """(log p(label), entropy, mean logit, label is the likeliest token) of the softmax of ``hidden @ weight.T``, each [positions].

    Only the first is differentiable. The logits of a block are made anew for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shapes: hidden [positions, width], weight [vocabulary, width], bias [vocabulary], labels [positions]; products are ``dtype``."""
        rows = max(1, BLOCK_BYTES // (4 * len(weight)))
        tile = _Tile(hidden, weight, bias, dtype, min(rows, len(hidden)), len(weight))
        spare = torch.empty_like(tile.logits)
        out = torch.zeros(5, len(hidden))
        for start in range(0, len(hidden), rows):
            at = slice(start, start + rows)
            logits = tile.fill(at, slice(0, len(weight)))
            scaled = _view(spare, tuple(logits.shape))
            best, mean = logits.amax(-1), logits.mean(-1)
            label = logits.gather(1, labels[at, None])[:, 0]
            total = torch.exp(logits.sub_(best[:, None]), out=scaled).sum(-1)
            expected = scaled.mul_(logits).sum(-1) / total
            is_best = label >= best
            if is_best.any():  # of equal logits the first token counts
                is_best[is_best.clone()] = logits[is_best].argmax(-1) == labels[at][is_best]
            out[:, at] = torch.stack([label - best - total.log(), total.log() - expected, mean, is_best.float(), best + total.log()])
        ctx.save_for_backward(hidden, weight, bias, labels, out[4])
        ctx.dtype = dtype
        ctx.mark_non_differentiable(out[1], out[2], out[3])
        return out[0], out[1], out[2], out[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Gradients of the log-probabilities; sums over blocks are float32, since rounded for each block they would drift."""
        hidden, weight, bias, labels, totals = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] else None
        columns = max(1, BLOCK_BYTES // (4 * BACKWARD_ROWS))
        tile = _Tile(hidden, weight, bias, ctx.dtype, min(BACKWARD_ROWS, len(hidden)), min(columns, len(weight)))
        for start in range(0, len(hidden), BACKWARD_ROWS):
            at = slice(start, start + BACKWARD_ROWS)
            read, factor = tile.hidden[at].float(), grads[0][at, None]
            for first in range(0, len(weight), columns):
                part = slice(first, first + columns)
                change = tile.fill(at, part).sub_(totals[at, None]).exp_().mul_(-factor)  # d log p(label) / d logits = 1[label] - p
                inside = ((labels[at] >= first) & (labels[at] < first + change.shape[1])).nonzero()[:, 0]
                change[inside, labels[at][inside] - first] += grads[0][at][inside]
                if of_hidden is not None:
                    of_hidden[at] += tile.rounded(change) @ tile.weight[part]
                if of_weight is not None:
                    of_weight[part].addmm_(change.T, read)
                if of_bias is not None:
                    of_bias[part] += change.sum(0)
        return (
            None if of_hidden is None else of_hidden.to(hidden.dtype),
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
        )


class _Tile:
    """Memory for the logits of ``rows`` positions and ``columns`` tokens, in the type of the products and in float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int, columns: int) -> None:
        self.hidden, self.weight, self.bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        self.logits = torch.empty(rows * columns)
        self.product = self.logits if dtype == torch.float32 else torch.empty(rows * columns, dtype=dtype)

    def fill(self, rows: slice, columns: slice) -> Tensor:
        """Float32 logits [positions, tokens], valid until the next call."""
        hidden, weight = self.hidden[rows], self.weight[columns]
        shape = len(hidden), len(weight)
        product = torch.mm(hidden, weight.T, out=_view(self.product, shape))
        logits = product if self.product is self.logits else _view(self.logits, shape).copy_(product)
        return logits if self.bias is None else logits.add_(self.bias[columns])

    def rounded(self, logits: Tensor) -> Tensor:
        """``logits`` in the type of the products."""
        return logits if self.product is self.logits else _view(self.product, tuple(logits.shape)).copy_(logits)


def _view(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    return memory[: shape[0] * shape[1]].view(shape)


class ScoredOnCpu:
    """A trainer of TRL that reads labels with the head of this module where there is no GPU."""

    model: Any
    ref_model: Any = None
    accelerator: Any
    _scored: bool | None = None

    def score_on_cpu(self) -> bool:
        """Put the head on the models, once, before their first pass (TRL makes the reference's while the trainer is made). Is it there?"""
        if self._scored is None:
            models = (
                [m.get_base_model() if hasattr(m, "get_base_model") else m for m in (self.model, self.ref_model) if m is not None]
                if self.accelerator.device.type == "cpu"
                else []
            )
            self._scored = bool(models) and all(map(score_on_cpu, models))
        return self._scored


def score_on_cpu(model: Any) -> bool:
    """Give ``model``, on which TRL has put its fused head, the one of this module; False where the logits are scaled behind the head."""
    if any(getattr(model.config.get_text_config(), name, None) not in (None, 1.0) for name in SCALES):
        return False
    others: Callable[..., Any] = model.forward

    def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None or any(kwargs.get(name) is not None for name in ELSEWHERE):
            given = {} if labels is None else {"labels": labels}
            return others(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        hidden = model.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        mask = labels[:, 1:] != -100
        head = model.get_output_embeddings()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        with torch.autocast("cpu", enabled=False):
            found = LabelLogProbs.apply(hidden[mask], head.weight, head.bias, labels[:, 1:][mask], dtype)
        log_probs, entropy, mean_logits, is_top1 = (part.new_zeros(mask.shape).masked_scatter(mask, part) for part in found)
        loss = -log_probs.sum() / mask.sum().clamp(min=1)
        return FusedCausalLMOutput(
            loss=loss, log_probs=log_probs, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1 > 0, label_mask=mask
        )

    model.forward = forward
    return True
