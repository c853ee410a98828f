"""`value` and `value-other`: prefix values fitted to gold rewards of sampled responses (FUDGE targets; METHOD, section 1).

loss = 1/2 mean_t (V(x, y_<=t) - r(x, y))^2 over response tokens. A vocabulary head sees, at each position, only the token
that was sampled; so that the others still get sensible values, its rows are trained as shared + embedding·map + own, and
added up at the end into the one plain matrix that every reader of ``score_head.weight`` expects.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ivg.demo.pretrain import mixed_precision
from ivg.models.value_head import HeadKind, ValueModel


@dataclass(frozen=True)
class FudgeConfig:
    """Budget of one value; rewards are multiplied by ``scale``, which sets the strength of token guidance at beta 1."""

    epochs: int = 3
    batch: int = 64
    width: int = 64
    lr: float = 1.5e-3
    scale: float = 1.0
    seed: int = 4


class FactoredHead(nn.Module):
    """A vocabulary head in training: W = 1·shared + embedding·map + own, [vocabulary, hidden]."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        size, hidden = embedding.weight.shape
        self.embedding = embedding
        self.shared = nn.Parameter(torch.zeros(hidden))
        self.map = nn.Parameter(torch.zeros(hidden, hidden))
        self.own = nn.Embedding(size, hidden)
        nn.init.zeros_(self.own.weight)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Q(s_t, y_t) for hidden states [..., hidden] and the tokens that follow them [...]."""
        rows = self.shared + self.embedding(tokens) @ self.map + self.own(tokens)
        return (hidden * rows).sum(-1)

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """The whole head as one matrix [vocabulary, hidden]."""
        return self.shared + self.embedding.weight @ self.map + self.own.weight


def table(rows: Sequence[tuple[list[int], int, float]], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [rows, width], mask of response tokens [rows, width], rewards [rows]) from (ids, prompt length, reward)."""
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.float32)
    for i, (tokens, prompt, _) in enumerate(rows):
        n = min(len(tokens), width)
        ids[i, :n] = tokens[:n]
        mask[i, min(prompt, width) : n] = 1.0
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.tensor([r for *_, r in rows])


def train(
    backbone: Any, kind: HeadKind, rows: Sequence[tuple[list[int], int, float]], config: FudgeConfig, folder: Path, compile: bool = True
) -> ValueModel:
    """Fit a value to ``rows``; logs to ``folder/log.jsonl``; the weights of ``backbone`` are trained too."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    ids, mask, rewards = table(rows, config.width)
    rewards = rewards * config.scale
    model = ValueModel(backbone, kind, bias=False)
    head = FactoredHead(backbone.get_input_embeddings()) if kind == "vocabulary" else None
    parameters = {id(p): p for m in (backbone, head or model.head) for p in m.parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=0.02, betas=(0.9, 0.98))
    steps = config.epochs * (len(rows) // config.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.1)
    backbone.train()
    forward = torch.compile(backbone) if compile else backbone
    began, running, step = time.perf_counter(), 0.0, 0
    for epoch in range(config.epochs):
        order = torch.from_numpy(np.random.default_rng((config.seed, epoch)).permutation(len(rows)))
        for picks in order[: len(rows) // config.batch * config.batch].view(-1, config.batch):
            x, wanted, m = ids[picks], rewards[picks][:, None], mask[picks]
            with mixed_precision():
                hidden = forward(input_ids=x).last_hidden_state
            hidden = hidden.float()
            if head is not None:  # the value of the prefix that ends in token t is read at t - 1
                values, m = head(hidden[:, :-1], x[:, 1:]), m[:, 1:]
            else:
                values = model.head(hidden)[..., 0]
            loss = 0.5 * (((values - wanted) ** 2) * m).sum() / m.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            schedule.step()
            running, step = running + loss.item(), step + 1
            if step % 50 == 0:
                row = {"step": step, "of": steps, "loss": round(running / 50, 4), "seconds": round(time.perf_counter() - began)}
                with (folder / "log.jsonl").open("a") as f:
                    f.write(json.dumps(row) + "\n")
                running = 0.0
    if head is not None:
        model.head.weight.data.copy_(head.matrix())
    return model.eval()


def rows_of(rollouts: Sequence[dict[str, Any]], tokenizer: Any, *, as_text: bool) -> list[tuple[list[int], int, float]]:
    """Training rows of rollouts: by their very tokens, or tokenised anew as text for another vocabulary."""
    prompts = tokenizer([r["prompt"] for r in rollouts]).input_ids
    if not as_text:
        return [(p + r["token_ids"], len(p), r["score"]) for p, r in zip(prompts, rollouts, strict=True)]
    whole = tokenizer([r["prompt"] + r["response"] for r in rollouts]).input_ids
    return [(w, len(p), r["score"]) for w, p, r in zip(whole, prompts, rollouts, strict=True)]
