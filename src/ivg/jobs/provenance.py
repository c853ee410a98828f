"""What rows were made from, beyond names of paths: settings, and fingerprints of local weights and of Python functions.

A directory may be trained anew under the same name; a file of rows must not go on with other weights. Ids of the hub are told apart
by their revision alone. Knows files; must not know what a model is for. Imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ivg.embedded import PREFIX, locate, names
from ivg.jobs.imports import own_imports
from ivg.settings.recipe import ModelRef, Recipe
from ivg.utils.jsonl import to_json

REMEMBER = 64 << 20
"""Bytes from which the digest of a file is remembered (in ``$XDG_CACHE_HOME/ivg``), by path, size, time of change and inode."""
_FRESH = 2.0
"""Seconds after a change in which a digest is not remembered: clocks of file systems are coarse."""
_PARTS = (".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".txt", ".jinja", ".py")
_LEFT_BY_TRAINING = (
    "trainer_state.json", "training_args.bin", "all_results.json", "train_results.json", "eval_results.json", "run.json", "log.json",
    "metrics.json",
)  # fmt: skip
_IRRELEVANT = {
    "run": {"n", "batch_size", "seed", "engine", "device"},
    "vllm": {"gpu_memory_utilization", "value_memory", "cache"},
    "endpoint": {"model", "api_key_env", "timeout", "concurrency"},
    **dict.fromkeys(("models", "values", "search", "sampling", "eval", "serve"), None),
}
"""Settings that change no answer, or that rows name elsewhere. Every other one counts, new ones included."""


def answer_provenance(recipe: Recipe, device: str | None) -> dict[str, Any]:
    """Everything that an answer depends on besides its prompt, as every row of answers says it.

    Args:
        recipe: of the run.
        device: kind of device that the models are on (``cpu``, ``cuda``); None: not known.

    Returns:
        ``method, seed, settings, models`` (and ``engine, endpoint, values`` where they are not the default) for people and programs, and
        ``provenance`` with all the rest: version of ivg, device, dtype, templates, fingerprints of what lies on this machine.
    """
    run = recipe.run
    remote = run.engine.startswith(("http://", "https://"))
    out: dict[str, Any] = {
        "method": recipe.search.method,
        "seed": run.seed,
        "settings": {**recipe.search.settings(), **recipe.sampling.settings()},
        "models": {role: ref.path for role, ref in recipe.models.given.items()} or "embedded",
    }
    if run.engine != "transformers":
        out["engine"] = run.engine
    if remote:
        out["endpoint"] = recipe.endpoint.model
    if recipe.values:
        out["values"] = {name: {role: ref.path for role, ref in value.given.items()} for name, value in recipe.values.items()}
    return json.loads(json.dumps(out | {"provenance": _details(recipe, device, remote)}))


def _details(recipe: Recipe, device: str | None, remote: bool) -> dict[str, Any]:
    from ivg.utils.version import VERSION

    out: dict[str, Any] = {"ivg": VERSION, "device": device} | {k: v for k, v in of_run(recipe).items() if v is not None}
    used = {"vllm": recipe.run.engine == "vllm", "endpoint": remote}
    for table, settings in recipe.model_dump(exclude_none=True).items():
        left_out = _IRRELEVANT.get(table, set())
        if left_out is None or not used.get(table, True):
            continue
        found = {k: v for k, v in settings.items() if k not in left_out} if isinstance(settings, dict) else settings
        if table != "run" and found:
            out[table] = found
    refs = dict(recipe.models.given) | {f"{n}.{role}": ref for n, v in recipe.values.items() for role, ref in v.given.items()}
    templates = {role: ref.template for role, ref in refs.items() if ref.template is not None}
    return out | ({"templates": templates} if templates else {}) | {"weights": weights(recipe)}


def of_run(recipe: Recipe) -> dict[str, Any]:
    """The settings of ``[run]`` that an answer depends on, but for seed, engine and device."""
    return {k: v for k, v in recipe.run.model_dump().items() if k not in (_IRRELEVANT["run"] or ())}


def device_kind(name: str | None) -> str:
    """``cpu``, ``cuda`` …: where models go that are told to go to ``name`` (None: the best at hand)."""
    if name is not None:
        return name.partition(":")[0]
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def weights(recipe: Recipe) -> dict[str, str]:
    """Fingerprints of the recipe's models that lie on this machine, by role; of the embedded ones where it names none."""
    refs: dict[str, ModelRef | str] = dict(recipe.models.given)
    if not refs:
        refs = {name: ModelRef(path=f"{PREFIX}{name}") for name in names() if name != "gold"}
    for name, value in recipe.values.items():
        refs |= {f"{name}.{role}": ref for role, ref in value.given.items()}
    return fingerprints(refs)


def fingerprints(refs: Mapping[str, ModelRef | str]) -> dict[str, str]:
    """Of those that are directories here, or Python functions."""
    found = {name: fingerprint(ref if isinstance(ref, str) else ref.path) for name, ref in refs.items()}
    return {name: mark for name, mark in sorted(found.items()) if mark is not None}


def fingerprint(path: str) -> str | None:
    """Of a model's directory or file, or of a function's file (``file.py:function``, ``module:function``); None: not on this machine."""
    where = Path(locate(path))
    if where.is_dir():
        return _directory(where)
    if where.is_file():
        return _file(where)[:16]
    file = function_file(path)
    return None if file is None else _function(file)


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


def _function(file: Path) -> str:
    """Of a function's file and of all files of the user's that it imports; installed packages are not looked into."""
    files = own_imports(file)
    if len(files) == 1:
        return _digest(file)[:16]
    return hashlib.sha256("".join(f"{path.name}\0{_digest(path)}\0" for path in files).encode()).hexdigest()[:16]


def _directory(folder: Path) -> str:
    """Of all that makes the model in ``folder``; of an adapter, of the base that it names too, where that is here."""
    found = hashlib.sha256()
    paths = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name.endswith(_PARTS) and p.name not in _LEFT_BY_TRAINING]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, mark in zip(paths, pool.map(_file, paths), strict=True):
            found.update(f"{path.name}\0{mark}\0".encode())
    with suppress(OSError, ValueError, KeyError, TypeError):
        base = Path(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
        if base.is_dir() and base.resolve() != folder.resolve():
            found.update(_directory(base).encode())
    return found.hexdigest()[:16]


def _file(path: Path) -> str:
    """Digest of a file's whole content; that of a large one is remembered."""
    about = path.stat()
    if about.st_size < REMEMBER:
        return _digest(path)
    key = f"{path.resolve()}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_ino}"
    note = _cache() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.sha256"
    with suppress(OSError, ValueError):
        mark = note.read_text(encoding="ascii").strip()
        if len(mark) == 64:
            return mark
    mark = _digest(path)
    if time.time() - about.st_mtime > _FRESH and path.stat().st_mtime_ns == about.st_mtime_ns:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            partial = note.with_suffix(f".{os.getpid()}")
            partial.write_text(mark, encoding="ascii")
            partial.replace(note)
    return mark


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivg" / "digests"


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs, each ``name: there, now``; a device that is not known differs from none."""
    out: list[str] = []
    for key in sorted({*found, *wanted}):
        there, now = found.get(key), wanted.get(key)
        if there == now or (key == "device" and None in (there, now)):
            continue
        if isinstance(there, dict) and isinstance(now, dict):
            out += differences(there, now, "" if key == "provenance" else f"{prefix}{key}.")
        else:
            out.append(f"{prefix}{key}: {_said(there)} there, {_said(now)} now")
    return out


def _said(value: Any) -> str:
    return "not given" if value is None else to_json(value)
