"""Options that the verbs of ``ivg train`` share, and how they become the settings of ``training.common``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivg.errors import ConfigError

if TYPE_CHECKING:
    from ivg.settings.train import TrainSettings
    from ivg.training.data import ColumnMapping

_DATA, _HOW = "Data", "Training"

Model = Annotated[str, typer.Option("--model", help="Where training starts: hub id, directory, or embedded:NAME.")]
Data = Annotated[
    list[str],
    typer.Option("--data", help="Rows (docs/reference/data.md): a file, -, a folder of splits, or a data set on the hub; may be repeated."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the run; the same command again goes on where it stopped.")]
Split = Annotated[str, typer.Option("--split", help="Which split of a folder or data set.", rich_help_panel=_DATA)]
Limit = Annotated[int | None, typer.Option("--limit", help="The first so many rows.", min=1, rich_help_panel=_DATA)]
Format = Annotated[
    str | None, typer.Option("--format", help="jsonl, json, csv, parquet or text. (default: by the file's name)", rich_help_panel=_DATA)
]
Failed = Annotated[
    Path | None, typer.Option("--failed", help="JSONL file that takes the rows that cannot be used, each with why.", rich_help_panel=_DATA)
]
Columns = Annotated[
    str | None,
    typer.Option("--columns", help="Other column names: OURS=THEIRS,… e.g. prompt=email,response=subject.", rich_help_panel=_DATA),
]
PromptFormat = Annotated[
    str | None,
    typer.Option("--prompt-format", help='What becomes of a prompt in the data, e.g. "{prompt}\\n\\nTL;DR:".', rich_help_panel=_DATA),
]
ResponseFormat = Annotated[
    str | None, typer.Option("--response-format", help='What becomes of a response, e.g. " {response}".', rich_help_panel=_DATA)
]
Template = Annotated[
    str | None, typer.Option("--template", help='How the model reads prompts: chat, or "... {prompt} ...".', rich_help_panel=_HOW)
]
Mode = Annotated[str, typer.Option("--mode", help="full, or lora.", rich_help_panel=_HOW)]
ValueMode = Annotated[str, typer.Option("--mode", help="full, lora, or head (the body stays as it is).", rich_help_panel=_HOW)]
LoraRank = Annotated[int, typer.Option("--lora-rank", help="Rank of LoRA.", rich_help_panel=_HOW)]
EvalTimes = Annotated[int, typer.Option("--evaluations", help="Evaluations, the one at the end included.", rich_help_panel=_HOW)]
Epochs = Annotated[float, typer.Option("--epochs", help="Passes over the data.", rich_help_panel=_HOW)]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", help="Peak learning rate. (default: the verb's, ten times that for lora and head)", rich_help_panel=_HOW),
]
Batch = Annotated[int, typer.Option("--batch-size", help="Rows for each step and device.", rich_help_panel=_HOW)]
Accumulate = Annotated[int, typer.Option("--accumulate", help="Steps whose gradients are added up.", rich_help_panel=_HOW)]
MaxLength = Annotated[int, typer.Option("--max-length", help="Longer rows (tokens) are left out, and counted.", rich_help_panel=_HOW)]
Warmup = Annotated[float, typer.Option("--warmup", help="Share of the steps.", rich_help_panel=_HOW)]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="Of AdamW.", rich_help_panel=_HOW)]
EvalShare = Annotated[float, typer.Option("--eval-share", help="Share of the prompts held out and measured.", rich_help_panel=_HOW)]
SaveSteps = Annotated[int, typer.Option("--save-steps", help="Steps between checkpoints.", rich_help_panel=_HOW)]
Seed = Annotated[int, typer.Option("--seed", help="Of data order and new weights.", rich_help_panel=_HOW)]
ReportTo = Annotated[str, typer.Option("--report-to", help="Tracker: wandb, tensorboard …", rich_help_panel=_HOW)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field of the trainer's arguments: NAME=VALUE (JSON); may be repeated.", rich_help_panel=_HOW),
]
PushTo = Annotated[str | None, typer.Option("--push-to", help="Upload the finished folder to this repository on the hub.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.", rich_help_panel=_HOW)]


def options_of(given: Mapping[str, Any], lr: float) -> TrainSettings:
    """Training settings from a verb's arguments; ``lr``: its learning rate where all weights are trained.

    Raises:
        ConfigError: settings out of range.
    """
    from dataclasses import fields

    from ivg.settings.train import TrainSettings

    names = {f.name for f in fields(TrainSettings)} - {"extra"}
    settings = {k: v for k, v in given.items() if k in names}
    if settings["lr"] is None:
        settings["lr"] = lr if settings["mode"] == "full" else 10 * lr  # few weights bear, and need, larger steps
    return TrainSettings(**settings, extra=assignments(given.get("set") or ()))


def column_mapping(given: Mapping[str, Any]) -> ColumnMapping:
    """How columns of the data become ours.

    Raises:
        ConfigError: unreadable ``--columns``.
    """
    from ivg.training.data import ColumnMapping

    columns: dict[str, str] = {}
    for part in (given.get("columns") or "").split(",") if given.get("columns") else ():
        ours, sign, theirs = part.strip().partition("=")
        if not sign:
            raise ConfigError(f"--columns {given['columns']!r}\n  expected OURS=THEIRS,… e.g. prompt=email,response=subject")
        columns[ours] = theirs
    formats = {"prompt": given.get("prompt_format"), "response": given.get("response_format")}
    for name, text in formats.items():
        if text is not None and f"{{{name}}}" not in text:
            raise ConfigError(f"--{name}-format {text!r}\n  expected a text with {{{name}}} where the {name} goes")
    return ColumnMapping(columns or None, _unescaped(formats["prompt"]), _unescaped(formats["response"]))


def _unescaped(text: str | None) -> str | None:
    """A backslash and an n, as typed in a shell, are a line break."""
    return text.replace("\\n", "\n") if text is not None else None


def assignments(texts: list[str] | tuple[()]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, the value as JSON where it is JSON, else as text.

    Raises:
        ConfigError: no equals sign.
    """
    out: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"--set {text!r}\n  expected NAME=VALUE")
        try:
            out[name] = json.loads(value)
        except ValueError:
            out[name] = value
    return out


def read(reader: Any, sources: list[str], given: Mapping[str, Any], **more: Any) -> list[Any]:
    """Rows of all sources together, at most ``--limit``; those that cannot be used are reported, counted and left out."""
    from ivg.cli.progress import report
    from ivg.jobs.failures import Failures

    mapping, failures = column_mapping(given), Failures(report, given.get("failed"))
    how = {"split": given["split"], "format": given.get("format"), "mapping": mapping, "on_bad": failures.of_source}
    rows = [row for source in sources for row in reader(source, **how, **more)]
    failures.close()
    if failures.count:
        typer.echo(f"read {len(rows)}, left out {failures.count}", err=True)
    return rows[: given.get("limit")]


def finish(out: Path, metrics: Mapping[str, Any], push_to: str | None) -> None:
    """Say what came out, and upload it where that was asked for."""
    from ivg.training.common import first_process
    from ivg.utils.jsonl import jsonable

    if not first_process():
        return
    typer.echo(json.dumps(jsonable(metrics), indent=2, allow_nan=False))
    if ties := metrics.get("ties_left_out"):
        typer.echo(f"{ties} pairs were left out: chosen and rejected are the same text", err=True)
    typer.echo(f"done: {out}", err=True)
    if push_to:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(push_to, exist_ok=True)
        api.upload_folder(
            repo_id=push_to, folder_path=out, ignore_patterns=["checkpoints/*", "rollouts-*", "round-*/*", "run.json", "log.json"]
        )
        typer.echo(f"uploaded to {push_to}", err=True)
