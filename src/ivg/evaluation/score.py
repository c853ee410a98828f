"""The second stage: what gold and the other judges say of every answer, and how likely the base finds it.

A row of scores names the transcript it belongs to and carries a fingerprint of its text; :func:`scored` joins the two and refuses
what does not match, so that a score without its transcript does not exist. Knows judges and the base; not how figures are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivg.errors import ConfigError, ScoreError, ScoreFault
from ivg.evaluation.methods import BANK
from ivg.evaluation.plan import GOLD, Plan
from ivg.evaluation.runner import Report, Worker, answers, prompt_of
from ivg.evaluation.task import Example
from ivg.types import Beam, TokenCounter, new_key
from ivg.types.scores import every, judge_each, note_of
from ivg.utils import environment
from ivg.utils.jsonl import BlockFile, demand_provenance, read_jsonl, write_json

if TYPE_CHECKING:
    from ivg.model import GuidedModel
    from ivg.values.reward import Reward

Row = dict[str, Any]


def load_judges(p: Plan) -> dict[str, Reward]:
    """Gold and the further judges by name, in float32 unless the recipe names another type; never of the base's revision, never quantized.

    Raises:
        ModelError: one that cannot be loaded.
    """
    from dataclasses import replace

    from ivg.factory.recipe import load_options
    from ivg.values.reward import load_reward

    options = load_options(p.recipe)
    options = replace(options, dtype="float32" if options.dtype == "auto" else options.dtype, revision=None, quantization=None)
    return {
        name: load_reward(ref.path, template=ref.template, label=ref.label, options=options, name=name) for name, ref in p.judges.items()
    }


def score(worker: Worker, label: str, done: Report) -> None:
    """Every row of one method's transcripts that has no scores yet.

    Raises:
        ConfigError: transcripts that are missing, or are not those that were scored.
    """
    p = worker.plan
    rows = transcripts(p, label)
    with environment.alone(p.scores(label)):
        file = BlockFile(p.scores(label), p.block, len(rows), _provenance(p, label))
        _compare(p, label, rows, list(read_jsonl(p.scores(label))) if file.rows else [])
        done(label, min(file.rows, len(rows)))
        for positions in file.missing():
            part = [rows[i] for i in positions]
            judged = list(_judged_bank(worker, part) if label == BANK else _judged(worker, part))
            worker.sign("score")
            file.append(judged)
            done(label, len(part))
        if label != BANK:
            _measure(p, label, rows)


def transcripts(p: Plan, label: str) -> list[Row]:
    """The rows of one method's answers.

    Raises:
        ConfigError: not all there, made with other settings, or answers to other prompts.
    """
    path = p.transcripts(label)
    if path.exists():
        _demand(path, {**p.provenance(label), "block": p.block_of(label)})
    rows = list(read_jsonl(path))[: p.total] if path.exists() else []
    if len(rows) < p.total:
        raise ConfigError(f"{path} has {len(rows)} of {p.total} answers\n  run the stage generate to its end first")
    for number, (row, (seed, _, example)) in enumerate(zip(rows, p.items(range(p.total)), strict=True), 1):
        if (row.get("seed"), row.get("id")) != (seed, example.id):
            raise ConfigError(
                f"{path}, line {number}: seed {row.get('seed')} and prompt {row.get('id')!r}, expected {seed} and {example.id!r}\n"
                "  remove the file and run the stage generate again"
            )
    return rows


def scored(p: Plan, label: str) -> list[tuple[Row, Row]]:
    """(transcript, scores) of every answer.

    Raises:
        ConfigError: scores that are missing, of other judges, or belong to other transcripts.
    """
    rows, path = transcripts(p, label), p.scores(label)
    if path.exists():
        _demand(path, {**_provenance(p, label), "block": p.block})
    scores = list(read_jsonl(path))[: p.total] if path.exists() else []
    if len(scores) < len(rows):
        raise ConfigError(f"{path} has {len(scores)} of {len(rows)} scores\n  run the stage score to its end first")
    _compare(p, label, rows, scores)
    failed = [{"error": judged["error"]} if "error" in judged else {} for judged in scores]  # a judge had no score for it
    return [(row | error, judged) for row, error, judged in zip(rows, failed, scores, strict=True)]


def fingerprint(row: Mapping[str, Any]) -> str:
    """Of what was judged: an answer's text, or the texts of a bank row."""
    texts = [s["text"] for s in row["samples"]] if "samples" in row else [row["text"]]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _compare(p: Plan, label: str, rows: Sequence[Row], scores: Sequence[Row]) -> None:
    for number, (row, judged) in enumerate(zip(rows, scores, strict=False), 1):
        expected = {"seed": row["seed"], "id": row["id"], "of": fingerprint(row)}
        found = {k: judged.get(k) for k in expected}
        if found != expected:
            raise ConfigError(
                f"{p.scores(label)}, line {number}: scores of {found}, but the transcript is {expected}\n"
                "  the transcripts are not those that were scored: remove this file and score again"
            )


def _demand(path: Path, wanted: Row) -> None:
    """Check what made the rows. A model that is not on this machine (a report may be made elsewhere) is taken to be what it was."""
    beside = path.with_name(f"{path.name}.meta.json")
    demand_provenance(path, _absent(wanted, json.loads(beside.read_text(encoding="utf-8"))) if beside.exists() else wanted)


def _absent(wanted: Row, found: Row) -> Row:
    """``wanted`` with those fingerprints of ``found`` that cannot be taken here."""
    out = dict(wanted)
    for key in ("weights", "judge_weights"):
        if key in out:
            out[key] = {**found.get(key, {}), **out[key]}
    if "transcripts" in out:
        out["transcripts"] = _absent(out["transcripts"], found.get("transcripts", {}))
    return out


def _provenance(p: Plan, label: str) -> dict[str, Any]:
    judges = {name: ref.model_dump(exclude_none=True) for name, ref in p.judges.items()}
    return {"transcripts": p.provenance(label), "judges": judges, "judge_weights": p.judge_weights}


def _judged(worker: Worker, rows: Sequence[Row]) -> Iterator[Row]:
    """Scores of some answers; one that failed has none."""
    p, known = worker.plan, _examples(worker.plan)
    good = [r for r in rows if "error" not in r]
    pairs = [p.task.judged(known[r["id"]], r["text"]) for r in good]
    rewards = {name: judge_each(judge, pairs) for name, judge in worker.judges.items()}
    logps = base_logps(worker.model, good)
    at = {id(r): i for i, r in enumerate(good)}
    for row in rows:
        out: Row = {"label": row["label"], "seed": row["seed"], "id": row["id"], "of": fingerprint(row)}
        if id(row) in at:
            i = at[id(row)]
            out |= _checked({name: values[i] for name, values in rewards.items()})
            out |= {"base_logp": round(logps[i], 4), "tokens": len(row["token_ids"])}
            if notes := [note for judge in worker.judges.values() if (note := note_of(judge, *pairs[i]))]:
                out["notes"] = notes
        yield out


def _checked(rewards: Mapping[str, float | ScoreFault]) -> Row:
    """The scores of one answer; or an error, the first."""
    try:
        return {name: round(score, 6) for name, score in zip(rewards, every(list(rewards.values())), strict=True)}
    except ScoreError:
        return {"error": next(" ".join(score.split()) for score in rewards.values() if isinstance(score, ScoreFault))}


def _judged_bank(worker: Worker, rows: Sequence[Row]) -> Iterator[Row]:
    """Gold of those samples that best-of-N selects for some N; the others are never looked at."""
    from ivg.evaluation.base_samples import prefix_maxima

    p, known, gold = worker.plan, _examples(worker.plan), worker.judges.get(GOLD)
    for row in rows:
        places = prefix_maxima([s["value"] for s in row["samples"]])
        pairs = [p.task.judged(known[row["id"]], row["samples"][i]["text"]) for i in places]
        chosen = _checked({str(i): r for i, r in zip(places, judge_each(gold, pairs), strict=True)} if gold is not None else {})
        found = chosen if "error" in chosen else {GOLD: chosen}
        yield {"label": BANK, "seed": row["seed"], "id": row["id"], "of": fingerprint(row), **found}


def base_logps(model: GuidedModel, rows: Sequence[Row]) -> list[float]:
    """Log-probability of every answer under the plain base at temperature 1, in nats: sum over its tokens."""
    model.reset_caches()
    beams = [
        Beam(new_key(), None, prompt_of(r), tuple(r["token_ids"]), r["text"], None, TokenCounter(), model.base.vocabulary, inherits=False)
        for r in rows
    ]
    filled = [b for b in beams if b.token_ids]
    sums = dict(zip((b.key for b in filled), map(sum, model.reader.token_logps(filled)), strict=True)) if filled else {}
    model.reader.release([b.key for b in filled])
    return [float(sums.get(b.key, 0.0)) for b in beams]


def measures(p: Plan, label: str, rows: Sequence[Row]) -> Row:
    """The task's own figures of one method.

    Raises:
        ConfigError: they are those of other answers, references or settings.
    """
    path = _measured(p, label)
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    different = [k for k, v in _of(p, rows).items() if found.get(k) != v]
    if different:
        what = {"of": "other answers", "references": "other references", "settings": "other settings of the task"}
        raise ConfigError(f"{path}: figures of {', '.join(what[k] for k in different)}\n  run the stage score again")
    return dict(found["figures"])


def _measure(p: Plan, label: str, rows: Sequence[Row]) -> None:
    figures = dict(p.task.measure(p.config, p.out, label, answers(p, label)))
    if figures:
        write_json(_measured(p, label), {**_of(p, rows), "figures": figures})
    else:
        _measured(p, label).unlink(missing_ok=True)  # of a run that had a judge


def _measured(p: Plan, label: str) -> Path:
    return p.out / "scores" / f"{label}.task.json"


def _of(p: Plan, rows: Sequence[Row]) -> Row:
    """What the task's own figures depend on."""
    answered, references = "".join(map(fingerprint, rows)), json.dumps([e.reference for e in p.examples])
    whole = {"of": answered, "references": references}
    return {k: hashlib.sha256(v.encode()).hexdigest()[:16] for k, v in whole.items()} | {"settings": dict(p.task.settings(p.config))}


def _examples(p: Plan) -> dict[str, Example]:
    return {e.id: e for e in p.examples}
