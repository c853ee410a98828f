"""Finds a model by name: embedded or added, in a local directory or GGUF file, in the hub's cache, or on the hub. Fails at once where it
is in none.

transformers asks the hub for every name that is no directory, and retries for a minute where it cannot be reached. Handles names and
files; must not depend on what a model is for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivg.embedded import PREFIX
from ivg.errors import ModelError, reason
from ivg.models.added import like_added, locate, not_added
from ivg.models.gguf import converted, find_gguf
from ivg.utils.hub_status import reachable, unreachable_reason

ADAPTER_CONFIG = "adapter_config.json"
HEAD_CONFIG = "head_config.json"
PARTIAL_CONFIGS = (ADAPTER_CONFIG, HEAD_CONFIG)
BASE = "base_model_name_or_path"
"""In both (of a head: where it is alone): the network that an adapter, or a head, was trained on."""
TOKENIZER_OF = "ivg_tokenizer"
"""Setting of a config.json: the model whose tokenizer this one has, named as anywhere; for a directory without a tokenizer."""


def find_model(name: str | Path, what: str, hub: Mapping[str, Any] | None = None, *, weights: bool = True) -> str | Path:
    """The directory of a model, or its hub id.

    Args:
        name: directory, GGUF file, hub id, ``embedded:NAME``, or the name of an added model.
        what: the model's role, for errors.
        hub: ``revision`` and ``cache_dir``, where given.
        weights: True: a whole model; False: its tokenizer.

    Raises:
        ModelError: neither a directory nor a hub id; not in the hub's cache while the hub cannot be reached; an adapter; a GGUF file that
            cannot be converted.
    """
    if str(name).startswith(PREFIX):
        return locate(name)
    if not str(name).strip():
        raise ModelError(f"cannot load {what}: its name is empty\n  expected a directory with config.json and weights, or a hub id")
    title, hub = f"cannot load {what} {str(name)!r}", hub or {}
    if (place := find_local(name, what)) is not None and place.is_dir():
        _check_directory(place, what, weights=weights)
        return place
    if place is not None:
        raise ModelError(f"{title}: this is a file\n  expected a directory with config.json and weights, or a hub id")
    if str(name).lower().endswith(".gguf"):
        raise ModelError(f"{title}: no such file\n  expected a GGUF file, a directory with config.json and weights, or a hub id")
    if not _is_hub_id(name):
        raise ModelError(f"{title}: no such directory\n  expected a directory with config.json and weights, or a hub id")
    if (advice := not_added(str(name))) is not None:
        raise ModelError(f"{title}: {advice}")
    cached = _snapshot(str(name), hub)
    if reachable():
        if weights and (adapter := _file(str(name), ADAPTER_CONFIG, hub)) is not None:
            raise _adapter_error(title, adapter, whole=_file(str(name), "config.json", hub) is not None)
        return str(name)
    if cached is None:
        raise ModelError(
            f"{title}: no such directory here, not in the hub's cache, and {unreachable_reason()}\n"
            f"  expected a directory with config.json and weights, or a hub id that was downloaded before{like_added(str(name))}"
        )
    _check_directory(cached, what, weights=weights)
    return cached


def find_local(name: str | Path, what: str) -> Path | None:
    """What ``name`` stands for on this machine: a directory, that of an embedded or added model or of a converted GGUF file, or a file.

    None: nothing here has that name. Raises for GGUF files as :func:`find_model`.
    """
    place = Path(locate(name)).expanduser()
    if not place.exists():
        return None
    title = f"cannot load {what} {str(name)!r}"
    return place if (file := find_gguf(place, title)) is None else converted(place, file, title)


def adapter_at(name: str | Path, hub: Mapping[str, Any] | None = None) -> Path | None:
    """The directory of the PEFT adapter, or of the head alone, that ``name`` is; None: it is a whole model, or nothing that is found.

    Raises:
        ModelError: it cannot be downloaded.
    """
    place, hub = Path(locate(name)).expanduser(), hub or {}
    if not place.exists():
        text = str(name)
        if not _is_hub_id(name) or not_added(text) is not None:
            return None
        if reachable():
            bare = _file(text, "config.json", hub) is None and any(_file(text, file, hub) is not None for file in PARTIAL_CONFIGS)
            return download_adapter(text, "an adapter", hub) if bare else None
        place = _snapshot(text, hub) or place
    return place if partial_config(place) is not None and not (place / "config.json").is_file() else None


def partial_config(folder: Path) -> Path | None:
    """The file of ``folder`` that names the network of an adapter, or of a head alone; None: it holds neither."""
    return next((file for name in PARTIAL_CONFIGS if (file := folder / name).is_file()), None)


def has_tokenizer(folder: Path) -> bool:
    """Does ``folder`` hold a tokenizer?"""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def tokenizer_elsewhere(folder: Path) -> str | None:
    """Name of the model whose tokenizer the model in ``folder`` has; None: ``folder`` holds one, or its config.json names none."""
    if has_tokenizer(folder):
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = config.get(TOKENIZER_OF) if isinstance(config, dict) else None
    return name if isinstance(name, str) else None


def download_adapter(name: str, what: str, hub: Mapping[str, Any]) -> Path:
    """The directory of a PEFT adapter of the hub: in its cache, or downloaded into it.

    Raises:
        ModelError: as :func:`find_model`; or it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    place = find_model(name, what, hub, weights=False)
    if isinstance(place, Path):
        return place
    options = {k: v for k, v in hub.items() if k in ("revision", "cache_dir", "token")}
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja"], **options))
    except Exception as e:
        raise ModelError(f"cannot load {what} {name!r}: {reason(e)}\n  expected a directory that peft wrote, or a hub id") from e


def _is_hub_id(name: str | Path) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return False
    return not isinstance(name, Path) and str(name).isascii()


def _check_directory(place: Path, what: str, *, weights: bool) -> None:
    """Raise for directories without a model.

    Raises:
        ModelError: an adapter without its model; no configuration.
    """
    title, whole = f"cannot load {what} {str(place)!r}", (place / "config.json").is_file()
    if weights and (place / ADAPTER_CONFIG).is_file():
        raise _adapter_error(title, place / ADAPTER_CONFIG, whole=whole)
    if weights and not whole:
        raise ModelError(f"{title}: the directory has no config.json\n  expected a directory with config.json and weights, or a hub id")


def _adapter_error(title: str, file: Path, *, whole: bool) -> ModelError:
    """Adapters are not loaded: transformers would, but only where PEFT is installed, and silently ignores them elsewhere."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    what = "a model with a PEFT adapter beside it" if whole else f"a PEFT adapter of {base or 'some model'}, not a whole model"
    other = f", or take {ADAPTER_CONFIG} away for the model without it" if whole else ""
    return ModelError(
        f"{title}: this is {what}\n"
        "  merge it first: peft.AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER)\n"
        f"  (of a classifier: AutoPeftModelForSequenceClassification), save the tokenizer there too, and give FOLDER{other}"
    )


def _snapshot(name: str, hub: Mapping[str, Any]) -> Path | None:
    """The directory of a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", ADAPTER_CONFIG):
        found = try_to_load_from_cache(name, file, cache_dir=hub.get("cache_dir"), revision=hub.get("revision"))
        if isinstance(found, str):
            return Path(found).parent
    return None


def _file(name: str, file: str, hub: Mapping[str, Any]) -> Path | None:
    """A small file of a model on the hub, downloaded if need be; None: no such file or model."""
    from transformers.utils import cached_file

    options = {k: v for k, v in hub.items() if k in ("revision", "cache_dir", "token")}
    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
    except OSError:
        return None
    return None if found is None else Path(found)
