"""Which files a command reads and writes: none of them twice."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ivg.errors import ConfigError
from ivg.jobs.store import is_stream

Named = tuple[str, str | Path | None]
"""An option, and the path that it was given; None: it was not."""


def check_files(reads: Iterable[Named], writes: Iterable[Named], split: str = "train") -> None:
    """No file is read and written, or written twice, in one run.

    Args:
        reads: files, folders of splits, ids of data sets on the hub.
        writes: files.
        split: that is read of folders.

    Raises:
        ConfigError: names the two options.
    """
    taken = [(option, Path(path)) for option, path in reads if path is not None and not is_stream(Path(path))]
    for option, given in writes:
        if given is None or is_stream(path := Path(given)):
            continue
        for other, place in taken:
            if _same(place, path):
                raise ConfigError(f"{other} and {option} are the same file, {path}\n  give each a file of its own")
            if _in_split(path, place, split):
                raise ConfigError(f"{option} {path} is a file of the split that {other} {place} reads\n  give a file in another folder")
        taken.append((option, path))


def _same(a: Path, b: Path) -> bool:
    """One file, by whatever names."""
    try:
        return a.samefile(b)
    except OSError:  # one of them is not there
        return a.resolve() == b.resolve()


def _in_split(path: Path, folder: Path, split: str) -> bool:
    return folder.is_dir() and path.resolve().parent == folder.resolve() and path.name.startswith((f"{split}.", f"{split}-"))
