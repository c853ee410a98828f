"""Iterative value refinement: fit a value, sample from the policy that it guides, fit again on all that was sampled (IVR; METHOD, 6).

Round 0 is the fit to the given data; each further round goes on from the value before it. Every round has its folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.jobs.fingerprints import fingerprints
from ivg.model import GuidedModel
from ivg.models.loading import LoadOptions, load_causal
from ivg.settings.train import TrainSettings, ValueSettings
from ivg.training.common import RunDir, build_request, digest, require_single_process
from ivg.training.data import RatedResponse, read_rated
from ivg.training.rollout import rollout
from ivg.training.value import train_value
from ivg.types import Prompt, Reward
from ivg.utils.jsonl import write_json
from ivg.values.explicit import ExplicitValue


def refine(
    model: str | Path,
    rows: Sequence[RatedResponse],
    out: str | Path,
    options: TrainSettings,
    value: ValueSettings,
    *,
    base: str | Path,
    reward: Reward,
    rounds: int,
    prompts: Sequence[Prompt] = (),
    method: str = "cbs-explicit",
    samples: int = 2,
    sources: Sequence[str | Path] = (),
    load: LoadOptions | None = None,
    reward_name: str | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
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
        method: how the value guides the policy; ``settings`` as for ``GuidedModel.request``.
        samples: new responses for each prompt and round.
        sources: named in the card.
        load: how the base is loaded.
        reward_name: what tells this reward from others; default: its name.
        on_progress: called with one line of text before each step.

    Returns:
        ``{"rounds": [metrics of each round]}``.
    """
    if rounds < 0:
        raise ConfigError(f"rounds must be 0 or more, got {rounds}")
    require_single_process("refinement")
    data, names, found = list(rows), list(map(str, sources)), []
    wanted = list(prompts) or list(dict.fromkeys(r.prompt for r in rows))
    how = {"method": method, "samples": samples, "prompts": digest(wanted), "settings": settings, "load": asdict(load or LoadOptions())}
    judge = reward_name or reward.name
    weights = fingerprints({"base": str(base), "reward": judge})
    about = {"value": asdict(value), "base": str(base), "reward": judge, "rounds": rounds, "rollouts": how, "made_from": weights}
    run = RunDir(out, build_request("value", model, names, rows, options, **about))
    start: str | Path = model
    for number in range(rounds + 1):
        folder = run.out / f"round-{number}"
        on_progress(f"round {number}: fitting {len(data)} responses")
        found.append(train_value(start, data, folder, replace(options, seed=options.seed + number), value, sources=names))
        start = folder
        if number < rounds:
            on_progress(f"round {number}: sampling {len(wanted) * samples} responses by {method}")
            path = run.out / f"rollouts-{number + 1}.jsonl"
            provenance = {**about, "round": number}
            seed = options.seed + 1000 + number
            guided = _guided(base, folder, value, options, load)
            rollout(guided, wanted, path, reward, method=method, samples=samples, seed=seed, provenance=provenance, **settings)
            del guided  # before the next round trains
            data += read_rated(path)
            names.append(str(path))
    return _publish(run, start, found)


def _guided(base: str | Path, folder: Path, value: ValueSettings, options: TrainSettings, load: LoadOptions | None) -> GuidedModel:
    """The policy, and the value in ``folder`` to guide it."""
    explicit = ExplicitValue.from_pretrained(folder, template=options.template, options=load)
    return GuidedModel(load_causal(base, "base", load, value.base_template), {"explicit": explicit})


def _publish(run: RunDir, last: str | Path, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last round's value, with all that belongs to it, to the top of the folder."""
    for file in Path(last).iterdir():
        if file.is_file() and file.name not in ("run.json", "metrics.json", "log.json"):
            shutil.copy(file, run.out / file.name)
    metrics = {"rounds": list(found)}
    write_json(run.out / "metrics.json", metrics)
    return metrics
