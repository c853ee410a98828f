"""Stage 2 of an evaluation: rewards of every answer, its log-probability under the base, and the task's own metrics.

A row of scores holds a fingerprint of the answer's text; :func:`read_scored` joins transcripts and scores and refuses rows that do
not match.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivg.diagnostics.logits import response_beam
from ivg.errors import ConfigError, ScoreError, ScoreFault
from ivg.evaluation.base_samples import prefix_maxima
from ivg.evaluation.methods import BASE_SAMPLES
from ivg.evaluation.plan import GOLD, EvalPlan
from ivg.evaluation.transcripts import check_file_provenance, fingerprint, read_answers, read_transcripts
from ivg.evaluation.worker import OnProgress, Worker
from ivg.jobs.blocks import open_blocks
from ivg.types import Prompt
from ivg.types.scores import judge_each, require_scores
from ivg.utils.jsonl import read_jsonl, write_json
from ivg.utils.rounding import keep_digits

if TYPE_CHECKING:
    from ivg.model import GuidedModel

Row = dict[str, Any]


def score(worker: Worker, label: str, on_progress: OnProgress) -> None:
    """Score the rows of one method's transcripts that have no scores yet.

    Raises:
        ConfigError: transcripts that are incomplete, or are not those that were scored.
    """
    p = worker.plan
    rows = read_transcripts(p, label)
    with open_blocks(p.scores(label), _block_size(p), len(rows), _provenance(p, label)) as file:
        _check_scores_match(p, label, rows, list(read_jsonl(p.scores(label))) if file.rows else [])
        on_progress(label, min(file.rows, len(rows)))
        for positions in file.missing():
            part = [rows[i] for i in positions]
            judged = list(_score_base_samples(worker, part) if label == BASE_SAMPLES else _score_answers(worker, part))
            worker.record_metadata("score")
            file.append(judged)
            on_progress(label, len(part))
        if label != BASE_SAMPLES:
            _write_task_metrics(p, label, rows)


def read_scored(p: EvalPlan, label: str) -> list[tuple[Row, Row]]:
    """(transcript row, score row) of every answer. An answer that a judge could not score has its ``error``.

    Raises:
        ConfigError: scores that are incomplete, of other judges, or of other transcripts.
    """
    rows, path = read_transcripts(p, label), p.scores(label)
    if path.exists():
        check_file_provenance(path, {**_provenance(p, label), "block": _block_size(p)})
    scores = list(read_jsonl(path))[: p.total] if path.exists() else []
    if len(scores) < len(rows):
        raise ConfigError(f"{path} has {len(scores)} of {len(rows)} scores\n  run the stage score to its end first")
    _check_scores_match(p, label, rows, scores)
    failed = [{"error": judged["error"]} if "error" in judged else {} for judged in scores]
    return [(row | error, judged) for row, error, judged in zip(rows, failed, scores, strict=True)]


def _check_scores_match(p: EvalPlan, label: str, rows: Sequence[Row], scores: Sequence[Row]) -> None:
    for number, (row, judged) in enumerate(zip(rows, scores, strict=False), 1):
        expected = {"seed": row["seed"], "id": row["id"], "fingerprint": fingerprint(row)}
        found = {k: judged.get(k) for k in expected}
        if found != expected:
            raise ConfigError(
                f"{p.scores(label)}, line {number}: scores of {found}, but the transcript is {expected}\n"
                "  the transcripts are not those that were scored: remove this file and score again"
            )


def _block_size(p: EvalPlan) -> int:
    return p.recipe.run.batch_size


def _provenance(p: EvalPlan, label: str) -> dict[str, Any]:
    judges = {name: ref.model_dump(exclude_none=True) for name, ref in p.judges.items()}
    read = {} if p.judged_prompts is None else {"judged_prompts": p.judged_prompts}
    return {"transcripts": p.provenance(label), "judges": judges, "judge_weights": p.judge_fingerprints, **read}


def _score_answers(worker: Worker, rows: Sequence[Row]) -> Iterator[Row]:
    """Score rows of some answers; a failed answer has no scores."""
    p, known = worker.plan, worker.plan.examples_by_id
    good = [r for r in rows if "error" not in r]
    pairs = [p.task.judged(known[r["id"]], r["text"]) for r in good]
    rewards = {name: judge_each(judge, pairs) for name, judge in worker.judges.items()}
    logps = base_logps(worker.model, good)
    at = {id(r): i for i, r in enumerate(good)}
    for row in rows:
        out: Row = {"label": row["label"], "seed": row["seed"], "id": row["id"], "fingerprint": fingerprint(row)}
        if id(row) in at:
            i = at[id(row)]
            out |= _scores_or_error({name: values[i] for name, values in rewards.items()})
            out |= {"base_logp": round(logps[i], 4), "tokens": len(row["token_ids"])}
            if notes := [note for judge in worker.judges.values() if (note := judge.note(*pairs[i]))]:
                out["notes"] = notes
        yield out


def _scores_or_error(rewards: Mapping[str, float | ScoreFault]) -> Row:
    """The scores of one answer, or the first judge's error."""
    try:
        return {name: keep_digits(score, 6) for name, score in zip(rewards, require_scores(list(rewards.values())), strict=True)}
    except ScoreError:
        return {"error": next(" ".join(score.split()) for score in rewards.values() if isinstance(score, ScoreFault))}


def _score_base_samples(worker: Worker, rows: Sequence[Row]) -> Iterator[Row]:
    """Rewards, by judge, of those samples that best-of-N selects for some N."""
    p, known = worker.plan, worker.plan.examples_by_id
    places = [prefix_maxima([s["value"] for s in row["samples"]]) for row in rows]
    pairs = [p.task.judged(known[r["id"]], r["samples"][i]["text"]) for r, chosen in zip(rows, places, strict=True) for i in chosen]
    rewards = {name: iter(judge_each(judge, pairs)) for name, judge in worker.judges.items()}
    for row, chosen in zip(rows, places, strict=True):
        found: Row = {GOLD: {}}
        for name, scores in rewards.items():
            found[name] = _scores_or_error({str(i): next(scores) for i in chosen})
        failed = next((scores["error"] for scores in found.values() if "error" in scores), None)
        result = found if failed is None else {"error": failed}
        yield {"label": BASE_SAMPLES, "seed": row["seed"], "id": row["id"], "fingerprint": fingerprint(row), **result}


def base_logps(model: GuidedModel, rows: Sequence[Row]) -> list[float]:
    """Log-probability of every answer under the base at temperature 1, summed over its tokens, in nats [rows]."""
    model.reset_caches()
    beams = [response_beam(model.reader, Prompt.of(r["prompt"]), r["text"], r["token_ids"]) for r in rows]
    filled = [b for b in beams if b.token_ids]
    sums = dict(zip((b.key for b in filled), map(sum, model.reader.token_logps(filled)), strict=True)) if filled else {}
    model.reader.release([b.key for b in filled])
    return [float(sums.get(b.key, 0.0)) for b in beams]


def read_task_metrics(p: EvalPlan, label: str, rows: Sequence[Row]) -> Row:
    """The task's own metrics of one method.

    Raises:
        ConfigError: they were computed from other answers, references or settings.
    """
    path = _task_metrics_file(p, label)
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    different = [k for k, v in _task_metrics_inputs(p, rows).items() if found.get(k) != v]
    if different:
        raise ConfigError(f"{path}: metrics of other {' and '.join(different)}\n  run the stage score again")
    return dict(found["metrics"])


def _write_task_metrics(p: EvalPlan, label: str, rows: Sequence[Row]) -> None:
    metrics = dict(p.task.measure(p.config, p.out, label, read_answers(p, label)))
    if metrics:
        write_json(_task_metrics_file(p, label), {**_task_metrics_inputs(p, rows), "metrics": metrics})
    else:
        _task_metrics_file(p, label).unlink(missing_ok=True)  # left by a run that had a judge


def _task_metrics_file(p: EvalPlan, label: str) -> Path:
    return p.out / "scores" / f"{label}.task.json"


def _task_metrics_inputs(p: EvalPlan, rows: Sequence[Row]) -> Row:
    """What the task's own metrics depend on."""
    answered, references = "".join(map(fingerprint, rows)), json.dumps([e.reference for e in p.examples])
    whole = {"answers": answered, "references": references}
    return {k: hashlib.sha256(v.encode()).hexdigest()[:16] for k, v in whole.items()} | {"settings": dict(p.task.settings(p.config))}
