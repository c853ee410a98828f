"""Reading the files of answers: ``transcripts/<label>.jsonl``, one row for each prompt and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.evaluation.plan import EvalPlan
from ivg.evaluation.task import Answer
from ivg.jobs.blocks import check_provenance
from ivg.settings.schema import settings_of
from ivg.settings.search import SearchSettings
from ivg.utils.jsonl import read_jsonl

Row = dict[str, Any]


def read_transcripts(plan: EvalPlan, label: str) -> list[Row]:
    """The rows of one method's answers.

    Raises:
        ConfigError: the file is incomplete, or was made with other settings or for other prompts.
    """
    path = plan.transcripts(label)
    if path.exists():
        check_file_provenance(path, {**plan.provenance(label), "block": plan.block_size(label)})
    rows = list(read_jsonl(path))[: plan.total] if path.exists() else []
    if len(rows) < plan.total:
        raise ConfigError(f"{path} has {len(rows)} of {plan.total} answers\n  run the stage generate to its end first")
    for number, (row, (seed, _, example)) in enumerate(zip(rows, plan.items(range(plan.total)), strict=True), 1):
        if (row.get("seed"), row.get("id")) != (seed, example.id):
            raise ConfigError(
                f"{path}, line {number}: seed {row.get('seed')} and prompt {row.get('id')!r}, expected {seed} and {example.id!r}\n"
                "  remove the file and run the stage generate again"
            )
    return rows


def read_answers(plan: EvalPlan, label: str) -> list[Answer]:
    """One method's answers as tasks see them."""
    examples = plan.examples_by_id
    rows = list(read_jsonl(plan.transcripts(label)))[: plan.total]
    return [Answer(examples[r["id"]], r["seed"], r["text"], r.get("error")) for r in rows]


def fingerprint(row: Mapping[str, Any]) -> str:
    """A hash of the answer's text, or of all texts of a row of base samples."""
    texts = [s["text"] for s in row["samples"]] if "samples" in row else [row["text"]]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def check_file_provenance(path: Path, wanted: Row) -> None:
    """Check the settings that a file's rows were made with.

    A model that is not on this machine has no fingerprint here (a report may be made elsewhere); the recorded one is accepted. So are rows
    that were made before a search setting existed, where the method has that setting's default.

    Raises:
        ConfigError: other settings; names what differs.
    """
    meta = path.with_name(f"{path.name}.meta.json")
    if meta.exists():
        found = json.loads(meta.read_text(encoding="utf-8"))
        wanted = _without_newer_settings(_with_recorded_fingerprints(wanted, found), found)
    check_provenance(path, wanted)


def _with_recorded_fingerprints(wanted: Row, found: Row) -> Row:
    out = dict(wanted)
    for key in ("weights", "judge_weights"):
        if key in out:
            out[key] = {**found.get(key, {}), **out[key]}
    if "transcripts" in out:
        out["transcripts"] = _with_recorded_fingerprints(out["transcripts"], found.get("transcripts", {}))
    return out


def _without_newer_settings(wanted: Row, found: Row) -> Row:
    """``wanted`` without search settings that have their default and that the rows know nothing of."""
    out = dict(wanted)
    if "method" in out and "method" in found:
        defaults = {name: declared.default for name, declared in settings_of(SearchSettings).items()}
        out["method"] = {k: v for k, v in out["method"].items() if k in found["method"] or k not in defaults or v != defaults[k]}
    if "transcripts" in out:
        out["transcripts"] = _without_newer_settings(out["transcripts"], found.get("transcripts", {}))
    return out
