"""Fingerprints of models and Python functions on this machine, so that rows notice other weights under the same path.

Models of the hub are compared by id and revision only. Imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ivg.embedded import DEFAULTS, PREFIX
from ivg.jobs.imports import local_imports
from ivg.models.added import locate
from ivg.models.hub import BASE, partial_config, tokenizer_elsewhere
from ivg.settings.recipe import ModelRef, Recipe
from ivg.utils.cache import file_digest

_MODEL_FILES = (".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".txt", ".jinja", ".py")
_TRAINING_LOGS = (
    "trainer_state.json", "training_args.bin", "all_results.json", "train_results.json", "eval_results.json", "run.json", "log.json",
    "metrics.json",
)  # fmt: skip


def weight_fingerprints(recipe: Recipe) -> dict[str, str]:
    """Fingerprints of the recipe's models on this machine, by role; of the embedded models if it names none."""
    refs: dict[str, ModelRef | str] = dict(recipe.models.given)
    if not refs:
        refs = {name: ModelRef(path=f"{PREFIX}{name}") for name in DEFAULTS}
    for name, value in recipe.values.items():
        refs |= {f"{name}.{role}": ref for role, ref in value.given.items()}
    return fingerprints(refs)


def fingerprints(refs: Mapping[str, ModelRef | str]) -> dict[str, str]:
    """Fingerprints by name, of those that are on this machine."""
    found = {name: fingerprint(ref if isinstance(ref, str) else ref.path) for name, ref in refs.items()}
    adapters = {name: ref.adapter for name, ref in refs.items() if isinstance(ref, ModelRef) and ref.adapter is not None}
    found |= {f"{name}.adapter": fingerprint(adapter) for name, adapter in adapters.items()}
    return {name: digest for name, digest in sorted(found.items()) if digest is not None}


def fingerprint(path: str) -> str | None:
    """A hash of a model's directory or file, or of a function's file (``file.py:function``, ``module:function``).

    None: not on this machine.
    """
    where = Path(locate(path))
    if where.is_dir():
        return _directory(where)
    if where.is_file():
        return file_digest(where)[:16]
    file = function_file(path)
    return None if file is None else _function(file)


def same_source(a: str, b: str) -> bool:
    """Do both paths name the same model, or the same function?"""
    return _place(a) == _place(b)


def function_file(path: str) -> Path | None:
    """The file of the function that ``path`` names; None where there is none."""
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


def _function(file: Path) -> str:
    """A hash of a function's file and of all local files that it imports; installed packages do not count."""
    files = local_imports(file)
    if len(files) == 1:
        return file_digest(file)[:16]
    return hashlib.sha256("".join(f"{path.name}\0{file_digest(path)}\0" for path in files).encode()).hexdigest()[:16]


def _directory(folder: Path) -> str:
    """A hash of all files of the model in ``folder``, with the base and the tokenizer that it names, if they are on this machine."""
    found = hashlib.sha256()
    paths = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name.endswith(_MODEL_FILES) and p.name not in _TRAINING_LOGS]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, digest in zip(paths, pool.map(file_digest, paths), strict=True):
            found.update(f"{path.name}\0{digest}\0".encode())
    with suppress(OSError, ValueError, KeyError, TypeError):
        named = partial_config(folder)
        base = folder if named is None else Path(locate(json.loads(named.read_text(encoding="utf-8"))[BASE]))
        if base.is_dir() and base.resolve() != folder.resolve():
            found.update(_directory(base).encode())
    if (other := tokenizer_elsewhere(folder)) is not None and (file := Path(locate(other)) / "tokenizer.json").is_file():
        found.update(file_digest(file).encode())
    return found.hexdigest()[:16]
