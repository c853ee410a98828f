"""Where a model lies: an embedded one, a directory here, the hub's cache, or the hub. What is not there is told at once.

transformers asks the hub for whatever is no directory, and tries again for a minute where nobody answers. Knows names and files;
must not know what a model is for.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivg.embedded import PREFIX, locate
from ivg.errors import ModelError

PROBE_SECONDS = 5.0
"""The hub has this long to answer whether it is there at all."""
_REPOSITORY = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
_ADAPTER = "adapter_config.json"


def find_model(name: str | Path, what: str, hub: Mapping[str, Any] | None = None, *, weights: bool = True) -> str | Path:
    """The directory of a model, or the hub id where the hub is to be asked.

    Args:
        name: directory, hub id, or ``embedded:NAME``.
        what: the model's role, for errors.
        hub: ``revision`` and ``cache_dir``, where given.
        weights: a whole model is wanted, rather than its tokenizer.

    Raises:
        ModelError: neither a directory nor a hub id; the hub cannot be reached and its cache has not got it; an adapter.
    """
    if str(name).startswith(PREFIX):
        return locate(name)
    if not str(name).strip():
        raise ModelError(f"cannot load {what}: its name is empty\n  expected a directory with config.json and weights, or a hub id")
    place, hub = Path(name).expanduser(), hub or {}
    if place.is_dir():
        _check_directory(place, what, weights=weights)
        return place
    title = f"cannot load {what} {str(name)!r}"
    if place.exists():
        raise ModelError(f"{title}: this is a file\n  expected a directory with config.json and weights, or a hub id")
    if isinstance(name, Path) or not _REPOSITORY.fullmatch(str(name)) or str(name).startswith(".") or ".." in str(name):
        raise ModelError(f"{title}: no such directory\n  expected a directory with config.json and weights, or a hub id")
    cached = _snapshot(str(name), hub)
    if _reachable():
        return str(name)
    if cached is None:
        raise ModelError(
            f"{title}: no such directory here, not in the hub's cache, and {_why_not()}\n"
            "  expected a directory with config.json and weights, or a hub id that was downloaded before"
        )
    _check_directory(cached, what, weights=weights)
    return cached


def _check_directory(place: Path, what: str, *, weights: bool) -> None:
    """Raise for directories that hold something else.

    Raises:
        ModelError: an adapter without its model; no configuration.
    """
    if (place / "config.json").is_file():
        return
    title = f"cannot load {what} {str(place)!r}"
    if not (place / _ADAPTER).is_file():
        if not weights:
            return
        raise ModelError(f"{title}: the directory has no config.json\n  expected a directory with config.json and weights, or a hub id")
    base = adapted(place) or "its base model"
    raise ModelError(
        f"{title}: this is a PEFT adapter of {base}, not a whole model\n"
        "  merge it first: peft.AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER)\n"
        "  (of a classifier: AutoPeftModelForSequenceClassification), save the tokenizer there too, and give FOLDER"
    )


def adapted(place: Path) -> str | None:
    """What model the adapter in ``place`` belongs to, as far as it says so."""
    try:
        found = json.loads((place / _ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    return base if isinstance(base, str) else None


def _snapshot(name: str, hub: Mapping[str, Any]) -> Path | None:
    """The directory of a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", _ADAPTER):
        found = try_to_load_from_cache(name, file, cache_dir=hub.get("cache_dir"), revision=hub.get("revision"))
        if isinstance(found, str):
            return Path(found).parent
    return None


def _why_not() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids asking the hub"
    return f"the hub ({constants.ENDPOINT}) cannot be reached"


def _reachable() -> bool:
    """Does the hub answer? Asked once in a minute."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(str(constants.ENDPOINT), int(time.monotonic() // 60))


@functools.lru_cache(maxsize=8)
def _answers(endpoint: str, minute: int) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=PROBE_SECONDS)  # any answer will do
    except Exception:  # whatever the client of the day raises: no route, no name, no time, no proxy
        return False
    return True
