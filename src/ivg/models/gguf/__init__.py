"""GGUF files as models: converted once into a directory in hub layout, which is cached by the content of the file.

Imports no torch; the conversion is :mod:`ivg.models.gguf.conversion`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ivg.errors import ModelError, OutputError
from ivg.models.gguf.parts import parts_of
from ivg.utils.cache import cache_folder, file_digest
from ivg.utils.locks import lock_file

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files of the original model that take the place of what the GGUF file says, where a folder with both is given."""
NOTES = "gguf.json"
"""File of a converted model that says what it was made from."""
_FORMAT = 1
"""Part of the cache's key: a conversion that gives something else has another number."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")

log = logging.getLogger("ivg")


def is_gguf(file: Path) -> bool:
    """Is this a GGUF file, by its name or by its first bytes (Ollama's files have no ending)?"""
    if file.suffix.lower() == ".gguf":
        return True
    with suppress(OSError), file.open("rb") as f:
        return f.read(4) == b"GGUF"
    return False


def find_gguf(place: Path, title: str) -> Path | None:
    """The GGUF file that ``place`` is or holds, of a split model the first; None: it is none, or holds other weights or no GGUF file.

    Raises:
        ModelError: a folder with several models, or a part of a model without the others; begins with ``title``.
    """
    if place.is_file():
        found = [place] if is_gguf(place) else []
    elif any(next(place.glob(pattern), None) for pattern in _WEIGHTS):
        found = []
    else:
        found = sorted(p for p in place.iterdir() if p.suffix.lower() == ".gguf" and p.is_file() and not p.name.startswith("mmproj"))
    if not found:
        return None
    found = list(dict.fromkeys(parts_of(file, title)[0] for file in found))
    if len(found) > 1:
        listed = ", ".join(file.name for file in found[:4]) + (" …" if len(found) > 4 else "")
        raise ModelError(f"{title}: the folder holds {len(found)} GGUF models ({listed})\n  give one of them: {found[0]}")
    return found[0]


def converted(place: Path, file: Path, title: str) -> Path:
    """The directory that the GGUF ``file`` was converted to; converts it, where that was not done before.

    Processes that ask for the same file at once convert it once. A conversion that is interrupted leaves no directory.

    Args:
        place: what was named: the file, or the folder with it, whose :data:`COMPANIONS` then count.
        file: the GGUF file; of a split model the first.
        title: begins errors.

    Raises:
        ModelError: the file cannot be read or converted.
        MissingDependencyError: without the extra ``gguf``.
        OutputError: the cache cannot be written.
    """
    beside = [place / name for name in COMPANIONS if (place / name).is_file()] if place.is_dir() else []
    parts = parts_of(file, title)
    key = "\0".join([str(_FORMAT), *map(file_digest, parts)]) + "".join(f"\0{path.name}\0{file_digest(path)}" for path in beside)
    target = cache_folder("gguf") / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not target.is_dir():
        with lock_file(target, wait=True, timeout=-1):
            if not target.is_dir():
                _remove_interrupted(target)
                size = sum(part.stat().st_size for part in parts) / 1e6
                note = f"converting {file} ({size:.0f} MB) once, into {target}"
                convert_to(target, file, title, beside, on_read=lambda: log.warning(note))
    return target


def convert_to(
    target: Path,
    file: Path,
    title: str,
    beside: list[Path] | None = None,
    source: str | None = None,
    on_read: Callable[[], None] = lambda: None,
) -> None:
    """Convert ``file`` into the directory ``target``, which appears when it is whole. The caller holds the lock of ``target``.

    Args:
        target: new directory.
        file: GGUF file.
        title: begins errors.
        beside: files of the original model that take precedence (:data:`COMPANIONS`).
        source: where the file comes from, for the list of models; None: its path.
        on_read: called once it is known what the file holds.
    """
    from ivg.models.gguf.conversion import convert

    partial = _partial(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        notes = convert(parts_of(file, title), partial, title, beside or [], on_read)
        (partial / NOTES).write_text(json.dumps({"source": source or str(file.resolve()), **notes}, indent=2) + "\n", encoding="utf-8")
        partial.rename(target)
    except OSError as e:
        raise OutputError(f"cannot write {target}: {e.strerror or e}\n  free some space, or set IVG_CACHE to another folder") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def conversions() -> Iterator[dict[str, Any]]:
    """The converted files in the cache: ``name`` of the directory, ``source``, ``MB`` and ``directory``."""
    for folder in sorted(cache_folder("gguf").glob("[0-9a-f]*")):
        with suppress(OSError, ValueError):
            notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
            yield {"name": folder.name, "source": notes["source"], "MB": size_in_mb(folder), "directory": str(folder)}


def size_in_mb(folder: Path) -> float:
    """Size of the files of a directory."""
    return round(sum(file.stat().st_size for file in folder.iterdir()) / 1e6, 1)


def remove(target: Path) -> None:
    """Remove a converted model; at no time is it half there."""
    with lock_file(target, wait=True, timeout=-1):
        partial = _partial(target)
        shutil.rmtree(partial, ignore_errors=True)
        target.rename(partial)
        shutil.rmtree(partial)


def _partial(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def _remove_interrupted(target: Path) -> None:
    """Remove what killed conversions of other files have left."""
    for folder in target.parent.glob(".*.partial"):
        other = target.parent / folder.name[1:].removesuffix(".partial")
        if other != target:
            with suppress(OutputError), lock_file(other):
                shutil.rmtree(folder, ignore_errors=True)
