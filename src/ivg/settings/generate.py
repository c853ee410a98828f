"""The files of ``ivg generate``. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ivg.settings.rows import RowSettings
from ivg.settings.schema import Setting


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(RowSettings):
    """What ``ivg generate`` reads and writes."""

    input: Annotated[
        Path | None,
        Setting(
            "Rows with prompts: JSONL, JSON, CSV, Parquet, gzipped or not; - is standard input.",
            flags=("--input", "-i"),
            unset="the prompts of the command line, or one text through a pipe",
        ),
    ] = None
    image: Annotated[
        tuple[str, ...],
        Setting("Picture before the text of every prompt of the command line: file or URL; may be repeated.", flags=("--image",)),
    ] = ()
    output: Annotated[
        Path | None,
        Setting("JSONL file to append answers to; - is standard output.", flags=("--output", "-o"), unset="answers go to the screen"),
    ] = None
    failed: Annotated[
        Path | None, Setting("JSONL file for the rows that failed, each with the reason.", flags=("--failed",), unset="none")
    ] = None
    trace: Annotated[Path | None, Setting("Write the search as one HTML page.", flags=("--trace",), unset="none")] = None
    json: Annotated[bool, Setting("Print answers as JSON rows, as --output - does.", flags=("--json",))] = False
    quiet: Annotated[bool, Setting("Print answers alone: no costs, notes or counts.", flags=("--quiet", "-q"))] = False
