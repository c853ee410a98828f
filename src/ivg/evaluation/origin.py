"""What rows were made from, beyond names of paths: fingerprints of local weights and of Python functions.

A directory may be trained anew under the same name; a file of rows must not go on with other weights. Ids of the hub are told apart
by their revision alone. Knows files; must not know what a model is for. Imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ivg.config import ModelRef, Recipe
from ivg.embedded import PREFIX, locate, names

WHOLE = 64 << 20
"""Bytes up to which a file is read whole; of a longer one its header and both ends."""
_END = 1 << 20
_PARTS = (".safetensors", ".bin", ".pt", ".json", ".model", ".txt", ".jinja", ".py")
_LEFT_BY_TRAINING = ("trainer_state.json", "training_args.bin", "all_results.json", "train_results.json", "eval_results.json")


def weights(recipe: Recipe) -> dict[str, str]:
    """Fingerprints of the recipe's models that lie on this machine, by role; of the embedded ones where it names none."""
    refs = dict(recipe.models.given)
    if not refs:
        refs = {name: ModelRef(path=f"{PREFIX}{name}") for name in names() if name != "gold"}
    for name, value in recipe.values.items():
        refs |= {f"{name}.{role}": ref for role, ref in value.given.items()}
    return fingerprints(refs)


def fingerprints(refs: Mapping[str, ModelRef]) -> dict[str, str]:
    """Of those that are directories here, or Python functions."""
    found = {name: fingerprint(ref.path) for name, ref in refs.items()}
    return {name: mark for name, mark in sorted(found.items()) if mark is not None}


def fingerprint(path: str) -> str | None:
    """Of a model's directory, or of the file of a function (``file.py:function``, ``module:function``); None: not on this machine."""
    where = Path(locate(path))
    if where.is_dir():
        return _directory(where)
    file = function_file(path)
    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def same(a: str, b: str) -> bool:
    """Do both name one model, or one function?"""
    return _place(a) == _place(b)


def function_file(path: str) -> Path | None:
    """The file that ``path`` takes a function from; None where it names none that can be found."""
    module, sign, _ = path.rpartition(":")
    if not sign or path.startswith(PREFIX):
        return None
    beside = Path(module) if module.endswith(".py") else Path(*module.split(".")).with_suffix(".py")
    if beside.is_file():
        return beside
    with suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            return Path(spec.origin)
    return None


def _place(path: str) -> tuple[str, str]:
    where, file = Path(locate(path)), function_file(path)
    if file is not None:
        return str(file.resolve()), path.rpartition(":")[2]
    return (str(where.resolve()) if where.exists() else path), ""


def _directory(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.endswith(_PARTS) and path.name not in _LEFT_BY_TRAINING:
            size = path.stat().st_size
            found.update(f"{path.name}\0{size}\0".encode())
            found.update(path.read_bytes() if size < WHOLE else _ends(path, size))
    return found.hexdigest()[:16]


def _ends(path: Path, size: int) -> bytes:
    """The beginning (of safetensors the whole header, which lists all tensors) and the last MiB."""
    with path.open("rb") as file:
        first = _END
        if path.suffix == ".safetensors":
            first = max(first, min(8 + int.from_bytes(file.read(8), "little"), WHOLE))
        file.seek(0)
        head = file.read(first)
        file.seek(size - _END)
        return head + file.read()
