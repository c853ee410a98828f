"""What rows of answers depend on: settings, versions, and fingerprints of models and functions. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ivg.jobs.fingerprints import weight_fingerprints
from ivg.search.methods import get_method, method_names
from ivg.settings.placement import is_spread
from ivg.settings.recipe import ModelRef, Recipe
from ivg.settings.rules import is_template_file
from ivg.settings.schema import check
from ivg.settings.search import SearchSettings
from ivg.utils.jsonl import to_json

_IRRELEVANT = {
    "run": {"n", "batch_size", "seed", "engine", "device"},
    "vllm": {"gpu_memory_utilization", "value_memory", "cache"},
    "endpoint": {"model", "api_key_env", "timeout", "concurrency"},
    **dict.fromkeys(("models", "values", "search", "sampling", "eval", "serve"), None),
}
"""Settings that change no answer, or that have a column of their own. All others count, new ones included."""


def answer_provenance(recipe: Recipe, device: str | None) -> dict[str, Any]:
    """Everything that an answer depends on besides its prompt: columns of every row of answers.

    Args:
        recipe: of the run.
        device: kind of device that the models are on (``cpu``, ``cuda``); None: not known.

    Returns:
        ``method, seed, settings, models`` (and ``engine, endpoint, values`` where they are not the default), and
        ``provenance`` with the rest: version of ivg, device, dtype, templates, fingerprints of models on this machine.
    """
    run = recipe.run
    out: dict[str, Any] = {
        "method": recipe.search.method,
        "seed": run.seed,
        "settings": {**_search_settings(recipe), **recipe.sampling.settings()},
        "models": {role: ref.path for role, ref in recipe.models.given.items()} or "embedded",
    }
    if run.engine != "transformers":
        out["engine"] = run.engine
    if recipe.uses_endpoint:
        out["endpoint"] = recipe.endpoint.model
    if recipe.values:
        out["values"] = {name: {role: ref.path for role, ref in value.given.items()} for name, value in recipe.values.items()}
    return json.loads(json.dumps(out | {"provenance": _details(recipe, device)}))


def _search_settings(recipe: Recipe) -> dict[str, Any]:
    """Those of ``[search]`` that are not the method's own. Of ``[sampling]`` all count, since a checkpoint may have other defaults."""
    name, given = recipe.search.method, recipe.search.settings()
    own = asdict(get_method(name)) if name in method_names() else {}
    return {k: v for k, v in given.items() if k not in own or own[k] != (None if v == "none" else check(SearchSettings, k, v))}


def _details(recipe: Recipe, device: str | None) -> dict[str, Any]:
    from ivg.utils.version import VERSION

    out: dict[str, Any] = {"ivg": VERSION, "device": device} | {k: v for k, v in run_provenance(recipe).items() if v is not None}
    used = {"vllm": recipe.run.engine == "vllm", "endpoint": recipe.uses_endpoint}
    for table, settings in recipe.model_dump(exclude_none=True).items():
        ignored = _IRRELEVANT.get(table, set())
        if ignored is None or not used.get(table, True):
            continue
        found = {k: v for k, v in settings.items() if k not in ignored} if isinstance(settings, dict) else settings
        if table != "run" and found:
            out[table] = found
    refs = dict(recipe.models.given) | {f"{n}.{role}": ref for n, v in recipe.values.items() for role, ref in v.given.items()}
    found = {role: model_settings(ref) for role, ref in refs.items()}
    templates = {role: _template_text(settings.pop("template")) for role, settings in found.items() if "template" in settings}
    kwargs = {role: settings.pop("chat_template_kwargs") for role, settings in found.items() if "chat_template_kwargs" in settings}
    loaded = {role: settings for role, settings in found.items() if settings}
    more = {"templates": templates, "chat_template_kwargs": kwargs, "loaded": loaded}
    return out | {name: value for name, value in more.items() if value} | {"weights": weight_fingerprints(recipe)}


def _template_text(template: str) -> str:
    """The template itself; of a file, what is in it."""
    return Path(template).read_text(encoding="utf-8") if is_template_file(template) and Path(template).is_file() else template


def run_provenance(recipe: Recipe) -> dict[str, Any]:
    """The settings of ``[run]`` that an answer depends on, but for seed, engine and device."""
    return {k: v for k, v in recipe.run.model_dump().items() if k not in (_IRRELEVANT["run"] or ())}


def device_kind(recipe: Recipe) -> str:
    """``cpu``, ``cuda`` …: the kind of device that the recipe's base is on."""
    device = recipe.devices.get("base", recipe.run.device)
    if isinstance(device, str) and not is_spread(device):
        return device.partition(":")[0]
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def model_settings(ref: ModelRef) -> dict[str, Any]:
    """What answers depend on of one model's settings, but for its path: which device of a kind it lies on is left out."""
    out = {name: value for name, value in ref.model_dump(exclude_none=True).items() if name not in ("path", "max_memory")}
    device = out.pop("device", None)
    return out if device is None or is_spread(device) else {**out, "device": device.partition(":")[0]}


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs, each as ``name is B, was A``; an unknown device (None) equals every device.

    Args:
        found: what the file records.
        wanted: of this run.
        prefix: of the names.
    """
    out: list[str] = []
    for key in sorted({*found, *wanted}):
        was, now = found.get(key), wanted.get(key)
        if was == now or (key == "device" and None in (was, now)):
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            out += differences(was, now, prefix if key in ("provenance", "settings") else f"{prefix}{key}.")
        else:
            out.append(f"{prefix}{key} is {_json(now)}, was {_json(was)}")
    return out


def _json(value: Any) -> str:
    return "not set" if value is None else to_json(value)
