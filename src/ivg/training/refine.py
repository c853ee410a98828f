"""Iterative value refinement: fit a value, sample from the policy that it guides, fit again on all that was sampled (IVR; METHOD, 6).

Round 0 is the fit to the given data; each further round goes on from the value before it. Every round has its folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.models.loading import LoadOptions, load_causal
from ivg.records import write_json
from ivg.steered import SteeredModel
from ivg.training.common import TrainingOptions
from ivg.training.data import Rated, read_rated
from ivg.training.learner import ValueOptions
from ivg.training.rollout import rollout
from ivg.training.value import train_value
from ivg.types import Prompt
from ivg.values.explicit import ExplicitValue
from ivg.values.reward import Reward

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")


def refine(
    model: str | Path,
    rows: Sequence[Rated],
    out: str | Path,
    options: TrainingOptions,
    value: ValueOptions,
    *,
    base: str | Path,
    reward: Reward,
    rounds: int,
    prompts: Sequence[Prompt] = (),
    method: str = "cbs-explicit",
    samples: int = 2,
    sources: Sequence[str | Path] = (),
    load: LoadOptions | None = None,
    note: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a value in ``rounds`` further rounds after the first.

    Args:
        model: body of the value.
        rows: the first round's data.
        out: folder; ``round-0`` … in it, and the last round's value at its top.
        options: how to train each round.
        value: what to train.
        base: the policy that is guided.
        reward: scores the new rollouts.
        rounds: further rounds.
        prompts: of the new rollouts; default: those of ``rows``.
        method: how the value guides the policy; ``settings`` as for ``SteeredModel.request``.
        samples: new responses for each prompt and round.
        sources: named in the card.
        load: how the base is loaded.
        note: told what is going on.

    Returns:
        ``{"rounds": [metrics of each round]}``.
    """
    if rounds < 0:
        raise ConfigError(f"rounds must be 0 or more, got {rounds}")
    out, data, names, found = Path(out), list(rows), list(map(str, sources)), []
    wanted = list(prompts) or list(dict.fromkeys(r.prompt for r in rows))
    start: str | Path = model
    for number in range(rounds + 1):
        folder = out / f"round-{number}"
        note(f"round {number}: fitting {len(data)} responses")
        found.append(train_value(start, data, folder, replace(options, seed=options.seed + number), value, sources=names))
        start = folder
        if number == rounds:
            break
        note(f"round {number}: sampling {len(wanted) * samples} responses by {method}")
        guided = SteeredModel(
            load_causal(base, "base", load), {"explicit": ExplicitValue.from_pretrained(folder, template=options.template, options=load)}
        )
        path = rollout(
            guided,
            wanted,
            out / f"rollouts-{number + 1}.jsonl",
            reward,
            method=method,
            samples=samples,
            seed=options.seed + 1000 + number,
            provenance={"base": str(base), "round": number},
            **settings,
        )
        data += read_rated(path)
        names.append(str(path))
    return _publish(out, start, found)


def _publish(out: Path, last: str | Path, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last round's value to the top of the folder."""
    for name in FILES:
        if (Path(last) / name).exists():
            shutil.copy(Path(last) / name, out / name)
    metrics = {"rounds": [{k: v for k, v in m.items() if k != "log"} for m in found]}
    write_json(out / "metrics.json", metrics)
    return metrics
