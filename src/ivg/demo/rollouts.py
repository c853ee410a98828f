"""Responses sampled for prompts and judged by `gold`: the raw material of the pair and of the values.

Rows ``{"prompt", "response", "token_ids", "score"}`` are appended as they are done; a second run goes on where the first stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ivg.demo.corpus import Review

if TYPE_CHECKING:
    from ivg.steered import SteeredModel
    from ivg.values.reward import RewardModel


def opening_words(reviews: Sequence[Review], count: int, seed: int, shortest: int = 4, longest: int = 8) -> list[str]:
    """Prompts: the first 4 to 8 words of ``count`` reviews, drawn without replacement."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(reviews))
    out = []
    for i in order:
        words = reviews[i].text.split()
        if len(words) > longest:
            out.append(" ".join(words[: int(rng.integers(shortest, longest + 1))]))
        if len(out) == count:
            return out
    raise ValueError(f"only {len(out)} of {count} prompts: the reviews are too few or too short")


def rollout(
    model: SteeredModel, gold: RewardModel, prompts: Sequence[str], path: Path, *, samples: int, seed: int, slab: int = 64, **settings: Any
) -> None:
    """``samples`` responses for every prompt, in slabs of prompts; ``settings`` as for ``SteeredModel.request``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows_done = _complete_rows(path, slab * samples)
    for start in range(rows_done // samples, len(prompts), slab):
        part = prompts[start : start + slab]
        requests = [
            model.request(p, "base", seed=seed + start + k, index=n, ignore_eos=True, **settings)
            for k, p in enumerate(part)
            for n in range(samples)
        ]
        done = dict(model.run(requests, max_beams=512))
        texts = [part[i // samples] + done[i].text for i in range(len(requests))]
        scores, _ = gold.rewards(texts)
        with path.open("a") as f:
            for i, score in enumerate(scores):
                row = {
                    "prompt": part[i // samples],
                    "response": done[i].text,
                    "token_ids": list(done[i].token_ids),
                    "score": round(score, 4),
                }
                f.write(json.dumps(row) + "\n")


def _complete_rows(path: Path, slab_rows: int) -> int:
    """Rows of whole slabs that ``path`` holds; what an interrupted run left behind them is cut off."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    keep = len(whole) // slab_rows * slab_rows
    path.write_bytes(b"".join(whole[:keep]))
    return keep


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a rollout file."""
    with path.open() as f:
        for line in f:
            yield json.loads(line)
