"""Rows of data from JSONL, JSON (gzipped or not), Parquet, a folder of such files, or a data set on the hub.

Knows: files and where they may lie. Must not know what a column means. pyarrow and datasets are imported where they are needed.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.records import read_jsonl

SUFFIXES = (".jsonl", ".json", ".json.gz", ".parquet")


def read_rows(source: str | Path, split: str = "train") -> Iterator[dict[str, Any]]:
    """Rows of a file, of a folder (``split.jsonl``, ``.json`` or ``.parquet`` in it), or of a data set on the hub.

    Raises:
        ConfigError: nothing there, or nothing that can be read.
    """
    path = Path(source)
    if path.is_dir():
        found = [p for suffix in SUFFIXES for p in (path / f"{split}{suffix}", *sorted(path.glob(f"{split}-*{suffix}"))) if p.exists()]
        if not found:
            have = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise ConfigError(f"{path} has no split {split!r}\n  expected {split}.jsonl, .json, .json.gz or .parquet; got {have}")
        kind = next(s for s in SUFFIXES if found[0].name.endswith(s))  # the same rows may lie beside each other in two formats
        for file in (p for p in found if p.name.endswith(kind)):
            yield from _read_file(file)
    elif path.name.endswith(SUFFIXES) or path.exists():
        yield from _read_file(path)
    else:
        yield from _read_hub(str(source), split)


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"no such file: {path}\n  expected {', '.join(SUFFIXES)}, a folder of such files, or the id of a data set")
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
    elif path.name.endswith((".json", ".json.gz")):
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            rows = json.loads(raw)
        except (ValueError, OSError, EOFError) as e:
            raise ConfigError(f"{path} is not JSON: {e}") from None
        if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            raise ConfigError(f"{path}: expected a JSON list of objects")
        yield from rows
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise ConfigError(f"cannot read {path}\n  expected one of {', '.join(SUFFIXES)}")


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(f"reading {path} needs pyarrow\n  pip install 'ivg[train]'") from None
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read {path} as Parquet: {e}") from None


def _read_hub(name: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{name!r} is no file here; loading it from the hub needs datasets\n  pip install 'ivg[train]'") from None
    try:
        yield from datasets.load_dataset(name, split=split)
    except Exception as e:  # network, permission, unknown id: the hub's client raises dozens of kinds
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConfigError(f"no file or folder {name!r}, and no such data set on the hub: {first}") from e
