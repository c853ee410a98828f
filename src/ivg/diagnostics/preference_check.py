"""Will guidance help? All measurements of ``ivg check --preferences``, and the report as plain values for JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ivg.diagnostics.divergence import PairDivergence, pair_divergence
from ivg.diagnostics.logits import GuidanceLogits, response_beam
from ivg.diagnostics.pairs import (
    PairAccuracy,
    is_tie,
    longer_wins,
    pair_accuracy,
    pair_lengths,
    prompt_groups,
    readable_pairs,
    score_pairs,
)
from ivg.diagnostics.stats import Floats, Proportion, wilson
from ivg.diagnostics.sweep import BestOfGain, SweepRow, SweepSettings, best_of_gains, sample_texts, score_texts, sweep
from ivg.diagnostics.training_overlap import TrainingOverlap, training_overlap
from ivg.diagnostics.verdict import Evidence, Verdict, decide
from ivg.errors import ConfigError, PromptError
from ivg.model import GuidedModel
from ivg.settings.check import PreferenceSettings
from ivg.types import Beam, Preference, Prompt, Value
from ivg.values.implicit import AutoregressiveReward

BASELINE = "base"
"""Name of the base's own log-probability among the values: the accuracy that needs no guide."""
GUIDES = ("implicit", "arm", "explicit")
"""The default guide is the first of these that the models have (implicit is the better one at token level: IVG, section 5)."""


@dataclass(frozen=True)
class Judge:
    """Scores sampled texts. A value never judges its own guidance."""

    name: str
    value: Value


@dataclass(frozen=True)
class CheckSettings:
    """What to measure.

    Attributes:
        sweep: betas, samples and sampling settings.
        prompts: number of different prompts of the pairs that are sampled; 0: none.
        guide: value that would guide tokens; None: the first of :data:`GUIDES`; ``"none"``: no token guidance.
        judge: scores the sampled texts; left out if it is the guide.
        beta: guidance weight for the divergence.
    """

    sweep: SweepSettings = field(default_factory=SweepSettings)
    prompts: int = PreferenceSettings.sweep
    guide: str | None = None
    judge: Judge | None = None
    beta: float = 1.0


@dataclass(frozen=True)
class GuidanceReport:
    """All measurements.

    Attributes:
        pairs: number of pairs that were scored.
        skipped: reasons of those that some model cannot read or score.
        ties: pairs whose two responses are the same text; left out.
        unknown_training_data: models that have no fingerprints of their training data beside the weights.
        longer_wins: accuracy of choosing the longer response.
        values: each value, the judge and the base's log-probability on the pairs.
        divergence_on_chosen: of pair and base on the chosen responses; None without a pair that shares the base's vocabulary.
        divergence_on_samples: the same on the base's own texts.
        guide: value of the sweep.
        judge: name of the judge.
        sweep: one row for each beta.
        best_of: gain of best-of-N by each value.
        verdict: outcome and reasons.
    """

    pairs: int
    skipped: tuple[str, ...]
    ties: int
    unknown_training_data: tuple[str, ...]
    longer_wins: Proportion
    values: tuple[PairAccuracy, ...]
    divergence_on_chosen: PairDivergence | None
    divergence_on_samples: PairDivergence | None
    guide: str | None
    judge: str | None
    sweep: tuple[SweepRow, ...]
    best_of: tuple[BestOfGain, ...]
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the names of version 0.1 beside the new ones until 0.3."""
        out = asdict(self)
        out["verdict"]["exit_code"] = self.verdict.exit_code
        for row, plain in zip(self.sweep, out["sweep"], strict=True):
            plain["kl_per_token"] = row.kl_per_token
        return _with_old_names(out)


_OLD_NAMES = {
    "unknown_training_data": "unknown",
    "longer_wins": "longer",
    "accuracy": "at",
    "margin_correlation": "margin",
    "length_control": "length",
    "trained_pairs": "seen",
    "divergence_on_chosen": "chosen",
    "divergence_on_samples": "own",
    "guided_base": "moved",
    "top1_kept": "top1",
    "effective_size": "effective",
    "mean": "value",
    "best_of": "selection",
}


def _with_old_names(data: Any) -> Any:
    if isinstance(data, dict):
        new = {k: _with_old_names(v) for k, v in data.items()}
        return new | {_OLD_NAMES[k]: v for k, v in new.items() if k in _OLD_NAMES}
    return [_with_old_names(x) for x in data] if isinstance(data, list | tuple) else data


def check_preferences(
    model: GuidedModel,
    pairs: Sequence[Preference],
    settings: CheckSettings | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> GuidanceReport:
    """Measure whether guidance by a model's values follows given preferences.

    Args:
        model: base and values.
        pairs: preferences.
        settings: what to measure; None: the defaults.
        on_progress: called with a line at each step.

    Raises:
        ConfigError: no pair that all models can read, or no value of that name.
    """
    return _Check(model, settings or CheckSettings(), on_progress).run(pairs)


class _Check:
    """One run of :func:`check_preferences`."""

    def __init__(self, model: GuidedModel, settings: CheckSettings, on_progress: Callable[[str], None]) -> None:
        self.model, self.settings, self.on_progress = model, settings, on_progress
        self.base = model.reader
        self.guide = _guide(model, settings.guide)
        self.judge = settings.judge if settings.judge is not None and settings.judge.name != self.guide else None
        self.ends = not settings.sweep.sampling.ignore_eos
        self.values: dict[str, Value] = {BASELINE: AutoregressiveReward(self.base, BASELINE), **model.values}
        if self.judge is not None:
            self.values[self.judge.name] = self.judge.value

    def run(self, pairs: Sequence[Preference]) -> GuidanceReport:
        kept, scores, skipped, ties = self._score(pairs)
        overlap = {name: training_overlap(value, kept) for name, value in self.values.items() if name != BASELINE}
        measured = self._accuracies(kept, scores, overlap)
        on_chosen = self._divergence_on_chosen(kept)
        shares_vocabulary = self.guide is not None and GuidanceLogits.from_value(self.model.values[self.guide], self.base) is not None
        on_samples, rows, best_of = self._sample(self._unseen(kept, overlap), shares_vocabulary)
        judge = self.judge.name if self.judge is not None else None
        evidence = Evidence(
            values={name: v for name, v in measured.items() if name in self.model.values and name != judge},
            guide=self.guide,
            shares_vocabulary=shares_vocabulary,
            divergence=on_samples,
            sweep=rows,
            best_of=best_of,
            judge=None if judge is None else measured[judge],
        )
        return GuidanceReport(
            pairs=len(kept),
            skipped=tuple(skipped),
            ties=ties,
            unknown_training_data=tuple(dict.fromkeys(name for o in overlap.values() for name in o.unknown)),
            longer_wins=wilson(longer_wins(self.base, kept), prompt_groups(kept)),
            values=tuple(measured.values()),
            divergence_on_chosen=on_chosen,
            divergence_on_samples=on_samples,
            guide=self.guide,
            judge=judge,
            sweep=rows,
            best_of=best_of,
            verdict=decide(evidence),
        )

    def _score(self, pairs: Sequence[Preference]) -> tuple[list[Preference], dict[str, Floats], list[str], int]:
        """(pairs that every value has scores for, scores [pairs, fractions, 2] by value, reasons of skipped pairs, number of ties)."""
        different = [p for p in pairs if not is_tie(p)]
        ties = len(pairs) - len(different)
        readable, skipped = readable_pairs(self.base, self.values, different, self.ends)
        self.on_progress(f"scoring {len(readable)} pairs")
        batch = max(1, self.settings.sweep.batch // 2)
        found = {name: score_pairs(self.base, value, readable, batch=batch, ends=self.ends) for name, value in self.values.items()}
        failed: dict[int, str] = {}
        for _, faults in found.values():
            for i, fault in faults.items():
                failed.setdefault(i, " ".join(fault.split()))
        kept = [i for i in range(len(readable)) if i not in failed]
        skipped += [failed[i] for i in sorted(failed)]
        if not kept and ties and not skipped:
            raise ConfigError(f"in all {ties} pairs chosen and rejected are the same text\n  expected two different responses to a prompt")
        if not kept:
            raise ConfigError(f"no pair that all models can read: {skipped[0] if skipped else 'the file has no pairs'}")
        return [readable[i] for i in kept], {name: table[kept] for name, (table, _) in found.items()}, skipped, ties

    def _accuracies(
        self, pairs: Sequence[Preference], scores: Mapping[str, Floats], overlap: Mapping[str, TrainingOverlap]
    ) -> dict[str, PairAccuracy]:
        out = {}
        for name, value in self.values.items():
            seen = overlap[name].seen if name in overlap else None
            out[name] = pair_accuracy(name, scores[name], pairs, pair_lengths(self.base, value, pairs), seen)
        return out

    def _unseen(self, pairs: Sequence[Preference], overlap: Mapping[str, TrainingOverlap]) -> list[Preference]:
        """The pairs that neither guide nor judge was trained on; all pairs if none is left."""
        names = [name for name in (self.guide, self.judge.name if self.judge is not None else None) if name is not None]
        return [p for i, p in enumerate(pairs) if not any(overlap[name].seen[i] for name in names)] or list(pairs)

    def _divergence_on_chosen(self, pairs: Sequence[Preference]) -> PairDivergence | None:
        first = _one_per_prompt(pairs)[: max(self.settings.prompts, 1)]
        return self._divergence([response_beam(self.base, p.prompt, p.chosen, ends=self.ends and p.chosen_ends) for p in first])

    def _divergence(self, beams: Sequence[Beam]) -> PairDivergence | None:
        return pair_divergence(self.base, self.model.values.get("implicit"), beams, self.settings.beta)

    def _sample(
        self, pairs: Sequence[Preference], shares_vocabulary: bool
    ) -> tuple[PairDivergence | None, tuple[SweepRow, ...], tuple[BestOfGain, ...]]:
        """What needs sampled texts: divergence on the base's own, the sweep of beta, best-of-N."""
        self.on_progress("sampling texts")
        settings, guide = self.settings.sweep, self.guide if shares_vocabulary else None
        prompts = [p.prompt for p in _one_per_prompt(pairs) if self._has_room(p.prompt)][: self.settings.prompts]
        if not prompts:
            return None, (), ()
        if guide is None:
            settings = replace(settings, betas=(0.0,), sample_at=None)
        texts = sample_texts(self.model, guide, prompts, settings)
        self.on_progress(f"scoring {len(texts.beams)} texts")
        divergence = self._divergence([b for b, k in zip(texts.beams, texts.sampled_at, strict=True) if k == 0])
        scores = score_texts(self.judge.value, texts.beams, settings.batch) if self.judge is not None else None
        rows = sweep(self.model, guide, texts, scores, settings) if guide is not None else ()
        if self.judge is None or scores is None:
            return divergence, rows, ()
        others = {name: value for name, value in self.model.values.items() if name != self.judge.name}
        return divergence, rows, best_of_gains(others, texts, scores, settings)

    def _has_room(self, prompt: Prompt) -> bool:
        """Can every model read the prompt and an answer?"""
        new_tokens = self.settings.sweep.sampling.max_new_tokens
        try:
            self.base.check_length(prompt, new_tokens)
            for value in self.model.values.values():
                value.check(prompt, new_tokens)
        except PromptError:
            return False
        return True


def _guide(model: GuidedModel, name: str | None) -> str | None:
    if name is None:
        return next((n for n in GUIDES if n in model.values), None)
    if name != "none" and name not in model.values:
        raise ConfigError(f"no value called {name!r}\n  expected one of: {', '.join(model.values) or 'none'}")
    return None if name == "none" else name


def _one_per_prompt(pairs: Sequence[Preference]) -> list[Preference]:
    """The first pair of each prompt, in order of appearance."""
    first: dict[Prompt, Preference] = {}
    for pair in pairs:
        first.setdefault(pair.prompt, pair)
    return list(first.values())
