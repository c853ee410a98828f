"""Which settings have no effect on a method: for notes, warnings and errors."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ivg.search.methods import CONTRAST, Method, get_method, method_names
from ivg.settings.schema import settings_of
from ivg.settings.search import SearchSettings

_NO_STEPS = ("implicit", "arm", CONTRAST)


def warn_of_unused(method: str | Method, given: Mapping[str, Any]) -> None:
    """Warn of those of the given settings that have no effect on a method; of names that are no settings of a search nothing is said.

    The warning names the place outside of ivg. None is no setting: it means "unchanged".
    """
    known = {k: v for k, v in given.items() if k in settings_of(SearchSettings) and v is not None}
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("ivg."):
        level, frame = level + 1, frame.f_back
    for name, why in unused_settings(method, known).items():
        warnings.warn(f"{name} has no effect: {why}", stacklevel=level)


def unused_settings(method: str | Method, given: Mapping[str, Any]) -> dict[str, str]:
    """Those of the given settings that have no effect on a method, each with the reason."""
    if isinstance(method, str):
        row = get_method(method) if method in method_names() else Method("custom", "")
    else:
        row, method = method, method.name
    guided = given.get("token", row.token) not in (None, "none") or bool(given.get("weights", row.weights))
    selects = given.get("select", row.select) not in (None, "none") or bool(given.get("select_weights", row.select_weights))
    rule = given.get("rule", row.rule)
    # beams without a value to select by are an error for "custom"; a rule of one's own selects
    selects |= row.name == "custom" or not isinstance(rule, str)
    named = {given.get("token", row.token), given.get("select", row.select)}
    contrasts = CONTRAST in named or any(CONTRAST in str(given.get(name, getattr(row, name))) for name in ("weights", "select_weights"))
    weighted = {*_names(given.get("weights", row.weights)), *_names(given.get("select_weights", row.select_weights))}
    steps = bool((named | weighted) - {None, "none", *_NO_STEPS})
    active = {"": True, "guidance": guided, "selection": selects, "contrast": contrasts, "steps": steps}
    reasons = {
        "guidance": f"the method {method} guides no tokens (token=VALUE makes it do so)",
        "selection": f"the method {method} selects among nothing (select=VALUE makes it a search)",
        "steps": f"the method {method} uses no reward (select=reward makes it do so)",
        "contrast": f"the method {method} does not use the value contrast (method=contrast does)",
    }
    out = {}
    for name, value in given.items():
        group = settings_of(SearchSettings)[name].setting.group
        if group not in active and (not isinstance(rule, str) or rule in group.split("|")):
            continue  # a rule of one's own may use whatever there is
        if not any(active.get(name, False) for name in group.split("|")) and value != getattr(row, name):
            out[name] = reasons.get(group, f"it belongs to rule={' or '.join(group.split('|'))}")
    return out


def _names(weights: Any) -> Iterator[str]:
    """The names in weights as a recipe or the command line gives them."""
    if isinstance(weights, str):
        return (part.partition("=")[0].strip() for part in weights.split(","))
    return iter(weights) if isinstance(weights, Mapping) else (name for name, _ in weights)
