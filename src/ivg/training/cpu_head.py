"""Log-probabilities of labels on a CPU, for TRL's ``DPOTrainer``.

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
"""Size of a block of float32 logits."""
SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Settings of models that change their logits behind the head; such models keep TRL's own forward."""


class LabelLogProbs(torch.autograd.Function):
    """(log p(label), entropy, mean logit, label is the likeliest token) of the softmax of ``hidden @ weight.T``, each [positions].

    Only the first is differentiable. The logits of a block are made anew for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shapes: hidden [positions, width], weight [vocabulary, width], bias [vocabulary], labels [positions]."""
        parts: list[tuple[Tensor, ...]] = [tuple(hidden.new_zeros(0, dtype=torch.float32) for _ in range(4))]
        totals = [hidden.new_zeros(0, dtype=torch.float32)]
        for at in _blocks(hidden, weight):
            logits = _logits(hidden[at], weight, bias)
            total = logits.logsumexp(-1)
            label = logits.gather(1, labels[at, None])[:, 0]
            mean, best = logits.mean(-1), logits.argmax(-1) == labels[at]
            expected = (logits.sub(total[:, None]).exp_().mul_(logits)).sum(-1)
            parts.append((label - total, total - expected, mean, best.float()))
            totals.append(total)
        log_probs, entropy, mean_logits, is_top1 = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, labels, torch.cat(totals))
        ctx.mark_non_differentiable(entropy, mean_logits, is_top1)
        return log_probs, entropy, mean_logits, is_top1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of the log-probabilities; sums over blocks are float32."""
        hidden, weight, bias, labels, totals = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        of_hidden = torch.zeros_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] else None
        for at in _blocks(hidden, weight):
            change = _logits(hidden[at], weight, bias).sub_(totals[at, None]).exp_()  # d log p(label) / d logits = 1[label] - p
            change.scatter_add_(1, labels[at, None], change.new_full((len(change), 1), -1.0)).mul_(-grads[0][at, None])
            as_read = change.to(weight.dtype)
            if of_hidden is not None:
                of_hidden[at] = as_read @ weight
            if of_weight is not None:
                of_weight.addmm_(change.T, hidden[at].float())  # in float32: rounded for each block it would drift
            if of_bias is not None:
                of_bias += change.sum(0)
        return of_hidden, None if of_weight is None else of_weight.to(weight.dtype), of_bias, None


def _blocks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(1, BLOCK_BYTES // (4 * len(weight)))
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).float()


def score_on_cpu(model: Any) -> None:
    """Give ``model``, on which TRL has put its fused head, the one of this module; nothing where the logits are scaled behind the head."""
    if any(getattr(model.config.get_text_config(), name, None) not in (None, 1.0) for name in SCALES):
        return
    others: Callable[..., Any] = model.forward

    def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None or kwargs.get("output_router_logits"):
            given = {} if labels is None else {"labels": labels}
            return others(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        hidden = model.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        mask = labels[:, 1:] != -100
        head = model.get_output_embeddings()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        with torch.autocast("cpu", enabled=False):
            found = LabelLogProbs.apply(hidden[mask].to(dtype), weight, bias, labels[:, 1:][mask])
        log_probs, entropy, mean_logits, is_top1 = (part.new_zeros(mask.shape).masked_scatter(mask, part) for part in found)
        loss = -log_probs.sum() / mask.sum().clamp(min=1)
        return FusedCausalLMOutput(
            loss=loss, log_probs=log_probs, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1 > 0, label_mask=mask
        )

    model.forward = forward
