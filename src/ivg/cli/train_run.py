"""What the verbs of ``ivg train`` share around the training itself: rows in, the finished model out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ivg.errors import ConfigError
from ivg.settings.train import DataSettings, PairSettings, TrainSettings

if TYPE_CHECKING:
    from ivg.training.pairing import Comparisons


@contextmanager
def train_extra() -> Iterator[None]:
    """Say which package of the extra ``train`` is missing."""
    try:
        yield
    except ModuleNotFoundError as e:
        if e.name not in ("trl", "peft", "accelerate", "datasets", "pyarrow"):
            raise
        raise ConfigError(f"training needs {e.name}\n  pip install 'ivg[train]'") from None


def read_rows(reader: Callable[..., list[Any]], sources: Sequence[str], settings: DataSettings, **more: Any) -> list[Any]:
    """Rows of all sources together, at most ``limit``; those that cannot be used are reported, counted and left out."""
    return [row for rows in read_sources(reader, sources, settings, **more) for row in rows][: settings.limit]


def read_sources(reader: Callable[..., list[Any]], sources: Sequence[str], settings: DataSettings, **more: Any) -> list[list[Any]]:
    """The rows of each source; those that cannot be used are reported, counted and left out."""
    from ivg.cli.files import check_files
    from ivg.cli.progress import print_error
    from ivg.jobs.failures import Failures
    from ivg.training.data import ColumnMapping, ReadOptions

    mapping = ColumnMapping(settings.column_names or None, settings.prompt_format, settings.response_format)
    check_files([("--data", source) for source in sources], [("--failed", settings.failed)], settings.split)
    failures = Failures(print_error, settings.failed)
    failures.open()
    options = ReadOptions(settings.split, mapping, settings.format, failures.add_unusable)
    found = [reader(source, options=options, **more) for source in sources]
    failures.close()
    if failures.count:
        typer.echo(f"read {sum(map(len, found))}, left out {failures.count}", err=True)
    return found


def read_comparisons(sources: Sequence[str], settings: DataSettings, pairs: PairSettings, training: TrainSettings) -> Comparisons:
    """The pairs of all sources, at most ``limit``, and the prompts that are held out."""
    from ivg.training.data import read_comparable
    from ivg.training.pairing import compare

    rows = read_sources(read_comparable, sources, settings, by_score=pairs.by_score)
    return compare(rows, pairs, seed=training.seed, eval_share=training.eval_share, limit=settings.limit)


def finish(out: Path, metrics: Mapping[str, Any], settings: TrainSettings, push_to: str | None) -> None:
    """Say what came out, and upload it where that was asked for; the processes of a run have nothing more to exchange."""
    from torch import distributed

    from ivg.training.run_dir import first_process
    from ivg.utils.jsonl import jsonable

    if distributed.is_available() and distributed.is_initialized():
        # gloo's threads may still free tensors of the last exchange: in an interpreter that is ending, that aborts the process
        distributed.destroy_process_group()
    if not first_process():
        return
    typer.echo(json.dumps(jsonable(metrics), indent=2, allow_nan=False))
    if ties := metrics.get("ties_left_out"):
        typer.echo(f"{ties} pairs were left out: chosen and rejected are the same text", err=True)
    last = metrics["rounds"][-1] if "rounds" in metrics else metrics
    if settings.eval_share and last.get("rows_held_out") == 0:
        typer.echo(
            f"no row was held out for evaluation: --eval-share {settings.eval_share:g} of the prompts is none\n"
            "  give more prompts, or raise --eval-share",
            err=True,
        )
    typer.echo(f"done: {out}", err=True)
    if push_to:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(push_to, exist_ok=True)
        api.upload_folder(
            repo_id=push_to, folder_path=out, ignore_patterns=["checkpoints/*", "rollouts-*", "round-*/*", "run.json", "log.json"]
        )
        typer.echo(f"uploaded to {push_to}", err=True)
