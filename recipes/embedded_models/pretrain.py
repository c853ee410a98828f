"""Pre-training of the embedded language models: a small loop for CPUs, resumable and seeded. Knows nothing of the corpus.

Hidden matrices are trained by Muon (Jordan et al. 2024: momentum, orthogonalised by Newton-Schulz), all else by AdamW.
torch.optim.Muon runs its iteration in bfloat16, which CPUs without AVX512-BF16 emulate 8 times slower than float32;
hence the 20 lines here. Depth may grow once during training (new layers start as the identity), which saves a third of the compute.
Matrix products run in bfloat16 where the processor supports it (1.8 times faster here); weights stay float32.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ivg.models.kernels import has_native_bfloat16
from ivg.utils.jsonl import to_json


@dataclass(frozen=True)
class Phase:
    """Training at one depth: ``tokens`` tokens in windows of ``window``."""

    layers: int
    tokens: int
    window: int


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of one pre-training run. Learning rates are peaks; they decay to zero over the last ``decay`` of all steps."""

    phases: tuple[Phase, ...]
    model: dict[str, Any] = field(default_factory=dict)
    batch_tokens: int = 8192
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup: int = 60
    decay: float = 0.35
    seed: int = 0
    compile: bool = True


@torch.no_grad()
def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration: an approximation of the nearest semi-orthogonal matrix to ``g`` [..., m, n]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by :func:`orthogonalise`, for matrices [m, n]; float32 throughout."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads = []
                for p in params:
                    assert p.grad is not None
                    buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buf.lerp_(p.grad, 1 - group["momentum"])
                    grads.append(p.grad.lerp(buf, group["momentum"]))
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for p, update in zip(params, orthogonalise(torch.stack(grads)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def mixed_precision() -> Any:
    """Autocast to bfloat16 where the processor has it; elsewhere nothing."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_native_bfloat16())


def build_model(config: PretrainConfig, layers: int) -> Any:
    """A fresh Llama of the configured width and ``layers`` layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    return LlamaForCausalLM(LlamaConfig(**config.model, num_hidden_layers=layers))


def grow(small: Any, large: Any) -> None:
    """Copy ``small`` into the deeper ``large`` so that both compute the same function: new layers start as the identity."""
    n, m = small.config.num_hidden_layers, large.config.num_hidden_layers
    large.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    large.model.norm.load_state_dict(small.model.norm.state_dict())
    large.lm_head.load_state_dict(small.lm_head.state_dict())
    source = [i * n // m for i in range(m)]
    for i, layer in enumerate(large.model.layers):
        layer.load_state_dict(small.model.layers[source[i]].state_dict())
        if i + 1 < m and source[i + 1] == source[i]:  # only the last of the copies is the original
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)


def optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    outer = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    adam = torch.optim.AdamW(outer, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    return [Muon(inner, lr=config.muon_lr), adam]


def learning_rate(step: int, first: int, total: int, config: PretrainConfig) -> float:
    """Factor in [0, 1]: warm-up from step ``first`` of the phase, plateau, linear decay."""
    return min(1.0, (step - first + 1) / config.warmup, (total - step) / (config.decay * total))


def copy_moments(old: torch.optim.Optimizer, small: nn.Module, new: torch.optim.Optimizer, large: nn.Module) -> None:
    """AdamW's moments of embeddings, head and last norm: without them, the first steps after growth would be full-size for every token."""
    before, after = dict(small.named_parameters()), dict(large.named_parameters())
    for name in before:
        if ".layers." not in name and before[name] in old.state:
            new.state[after[name]] = {k: v.clone() for k, v in old.state[before[name]].items()}


def batch(stream: np.ndarray, config: PretrainConfig, phase: Phase, step: int) -> Tensor:
    """Windows for ``step`` [rows, window]; a pass over all windows, then the next in another order."""
    rows, count = config.batch_tokens // phase.window, (len(stream) - 1) // phase.window
    epoch, position = divmod(step * rows, count)
    order = np.random.default_rng((config.seed, epoch)).permutation(count)
    picks = order[(position + np.arange(rows)) % count]
    return torch.from_numpy(np.stack([stream[i * phase.window : (i + 1) * phase.window] for i in picks]).astype(np.int64))


@torch.no_grad()
def evaluate(model: nn.Module, held_out: np.ndarray, window: int, rows: int = 32) -> float:
    """Mean negative log-likelihood in nats per token over the first ``rows`` windows."""
    ids = torch.from_numpy(held_out[: rows * window].astype(np.int64)).view(rows, window)
    return float(model(input_ids=ids, labels=ids).loss)


def pretrain(stream: np.ndarray, held_out: np.ndarray, config: PretrainConfig, folder: Path, log_every: int = 25) -> nn.Module:
    """Train to the end of the last phase; resumes from ``folder/checkpoint.pt``, which is written every 100 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    lengths = [p.tokens // config.batch_tokens for p in config.phases]
    total = sum(lengths)
    state = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    start = state["step"] if state else 0
    model: nn.Module | None = None
    opts: list[torch.optim.Optimizer] = []
    first = 0
    for phase, length in zip(config.phases, lengths, strict=True):
        end = first + length
        if start <= end or phase is config.phases[-1]:
            previous, former = model, opts
            model = build_model(config, phase.layers)
            opts = optimizers(model, config)
            if previous is not None:
                grow(previous, model)
                copy_moments(former[1], previous, opts[1], model)
            if state is not None:
                model.load_state_dict(state["model"])
                for opt, saved in zip(opts, state["opts"], strict=True):
                    opt.load_state_dict(saved)
                state = None
            forward = torch.compile(model) if config.compile else model  # 1.4-1.8 times faster on two cores
            start_time = time.perf_counter()
            for step in range(max(start, first), end):
                ids = batch(stream, config, phase, step)
                with mixed_precision():
                    loss = forward(input_ids=ids, labels=ids).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                factor = learning_rate(step, first, total, config)
                for opt, peak in zip(opts, (config.muon_lr, config.adam_lr), strict=True):
                    opt.param_groups[0]["lr"] = peak * factor
                    opt.step()
                    opt.zero_grad()
                if (step + 1) % log_every == 0:
                    rate = config.batch_tokens * log_every / (time.perf_counter() - start_time)
                    row = {"step": step + 1, "of": total, "loss": round(loss.item(), 4), "tokens_per_s": round(rate)}
                    if (step + 1) % (8 * log_every) == 0:
                        row["held_out"] = round(evaluate(model, held_out, phase.window), 4)
                    with log.open("a") as f:
                        f.write(to_json(row) + "\n")
                    start_time = time.perf_counter()
                if (step + 1) % 100 == 0 or step + 1 == end:
                    partial = checkpoint.with_suffix(".tmp")
                    torch.save({"step": step + 1, "model": model.state_dict(), "opts": [o.state_dict() for o in opts]}, partial)
                    partial.replace(checkpoint)
        first = end
    assert model is not None
    return model
