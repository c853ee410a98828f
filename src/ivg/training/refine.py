"""Iterative value refinement (Liu et al. 2024, arXiv 2409.17819): train a value, sample from the policy that it guides, train again.

Round 0 trains on the given rows; each further round adds new rollouts and starts from the value before it. Every round has its own folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.jobs.fingerprints import fingerprints
from ivg.model import GuidedModel
from ivg.models.loading import LoadOptions, load_causal
from ivg.settings.train import RefineSettings, ValueSettings, ValueTrainSettings
from ivg.training.data import RatedResponse, read_rated
from ivg.training.rollout import rollout
from ivg.training.run_dir import RunDir, hash_rows, open_run, recorded, require_single_process, run_provenance
from ivg.training.value import train_value
from ivg.types import Prompt, Reward
from ivg.utils.jsonl import write_json
from ivg.values.explicit import ExplicitValue


def refine(
    model: str | Path,
    rows: Sequence[RatedResponse],
    out: str | Path,
    settings: ValueTrainSettings,
    value: ValueSettings,
    rollouts: RefineSettings,
    reward: Reward,
    *,
    prompts: Sequence[Prompt] = (),
    sources: Sequence[str | Path] = (),
    load: LoadOptions | None = None,
    reward_name: str | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train a value, and refine it in ``rollouts.rounds`` further rounds.

    Args:
        model: body of the value, directory or hub id.
        rows: training rows of the first round.
        out: folder of the run: ``round-0`` … in it, and the value of the last round at its top.
        settings: of the trainer, for each round.
        value: head and targets; ``value.base`` is the policy that is guided.
        rollouts: number of rounds, and how the value guides the policy in them.
        reward: scores the new responses.
        prompts: of the new responses; default: those of ``rows``.
        sources: where the rows come from; named in the model card.
        load: how the policy is loaded.
        reward_name: path of the reward, by which a resumed run recognises it; default: its name.
        on_progress: called with one line of text before each step.

    Returns:
        ``{"rounds": [metrics of each round]}``.

    Raises:
        ConfigError: no ``value.base``, an adapter is to be kept, several processes, or ``out`` holds another run.
    """
    require_single_process("refinement")
    if value.base is None:
        raise ConfigError("refinement samples from a policy that the value guides\n  give it as base (--base MODEL)")
    if settings.keep_adapter:
        raise ConfigError("refinement starts each round from the value before it, which is a whole model\n  leave --keep-adapter out")
    prompts = list(prompts) or list(dict.fromkeys(row.prompt for row in rows))
    how = {
        "method": rollouts.method,
        "samples": rollouts.samples,
        "prompts": hash_rows(prompts),
        "settings": dict(rollouts.request),
        "load": asdict(load or LoadOptions()),
    }
    names = {"base": value.base, "reward": reward_name or reward.name}
    shared = {**names, "value": recorded(value), "rounds": rollouts.rounds, "rollouts": how, "made_from": fingerprints(names)}
    refinement = _Refinement(model, settings, value, rollouts, reward, prompts, load, shared)
    with open_run(out, run_provenance("value", model, sources, rows, settings, **shared)) as run:
        return run.metrics or refinement.run(run, list(rows), [str(source) for source in sources], on_progress)


@dataclass(frozen=True)
class _Refinement:
    """What all rounds share; see :func:`refine`."""

    model: str | Path
    settings: ValueTrainSettings
    value: ValueSettings
    rollouts: RefineSettings
    reward: Reward
    prompts: Sequence[Prompt]
    load: LoadOptions | None
    provenance: Mapping[str, Any]

    def run(self, run: RunDir, rows: list[RatedResponse], sources: list[str], on_progress: Callable[[str], None]) -> dict[str, Any]:
        """Train and sample in turn; the value of the last round comes to the top of the run's folder."""
        start, metrics, last = self.model, [], self.rollouts.rounds
        for number in range(last + 1):
            folder = run.path / f"round-{number}"
            on_progress(f"round {number}: training on {len(rows)} responses")
            settings = replace(self.settings, seed=self.settings.seed + number)
            metrics.append(train_value(start, rows, folder, settings, self.value, sources=sources))
            start = folder
            if number < last:
                on_progress(f"round {number}: sampling {len(self.prompts) * self.rollouts.samples} responses by {self.rollouts.method}")
                path = self.sample(number, folder, run.path / f"rollouts-{number + 1}.jsonl")
                rows += read_rated(path)
                sources.append(str(path))
        return _copy_last_round(run, folder, metrics)

    def sample(self, number: int, folder: Path, path: Path) -> Path:
        """Rollouts of the policy, guided by the value in ``folder``."""
        base = self.value.base
        assert base is not None
        explicit = ExplicitValue.from_pretrained(folder, template=self.settings.template, options=self.load)
        return rollout(
            GuidedModel(load_causal(base, "base", self.load, self.value.base_template), {"explicit": explicit}),
            self.prompts,
            path,
            self.reward,
            method=self.rollouts.method,
            samples=self.rollouts.samples,
            seed=self.settings.seed + 1000 + number,
            provenance={**self.provenance, "round": number},
            **self.rollouts.request,
        )


def _copy_last_round(run: RunDir, last: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Copy the value of the last round to the top of the run's folder."""
    for file in last.iterdir():
        if file.is_file() and file.name not in ("run.json", "metrics.json", "log.json"):
            shutil.copy(file, run.path / file.name)
    found = {"rounds": list(metrics)}
    write_json(run.path / "metrics.json", found)
    return found
