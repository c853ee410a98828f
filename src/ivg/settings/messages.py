"""pydantic's validation errors as one line for users: the setting, what was expected, what was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel

from ivg.errors import ConfigError
from ivg.settings.schema import Setting

_EXPECTED = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "bool_": "true or false",
    "string_": "a text",
    "list_": "a list",
    "dict_": "a table",
    "model_": "a table",
    "literal_error": "{expected}",
}
"""What was expected, by the beginning of the name of pydantic's error."""


def explain(error: Any, recipe: type[BaseModel]) -> str:
    """One of pydantic's errors; ``recipe``: the table that was read."""
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown setting {where}" + hint(recipe, error["loc"])
    raised = error.get("ctx", {}).get("error")
    if isinstance(raised, ConfigError):  # of a rule, which names the setting itself
        return ".".join([*map(str, error["loc"][:-1]), str(raised)])
    if _is_secret(recipe, error["loc"]):
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    words = next((text for kind, text in _EXPECTED.items() if error["type"].startswith(kind)), None)
    if words is None and isinstance(error["input"], Mapping):  # of a whole table, which would hide what is wrong with it
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    if words is not None:
        words = "expected " + words.format(**error.get("ctx", {}))
    return f"{where}: {words or error['msg'].removeprefix('Value error, ')}, got {error['input']!r}"


def hint(kind: type[BaseModel], place: Sequence[str | int]) -> str:
    """``; did you mean …?`` for an unknown name in the table ``kind``; of its own level, without a like name, all that it has."""
    names = _names(kind, place[:-1])
    near = get_close_matches(str(place[-1]), names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; expected some of: {', '.join(names)}" if names and len(place) == 1 and len(names) < 15 else ""


def _names(kind: Any, place: Sequence[str | int]) -> list[str]:
    """Names of the settings of the table at ``place``; [] if there is none, or one with free names."""
    for name in place:
        field = getattr(kind, "model_fields", {}).get(name)
        kind = _table(field)
    return list(getattr(kind, "model_fields", {}))


def _table(field: Any) -> Any:
    """The table that a field holds, if any."""
    kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
    return next((kind for kind in kinds if hasattr(kind, "model_fields")), None)


def _is_secret(kind: Any, place: Sequence[str | int]) -> bool:
    """Is the setting at ``place`` one whose value is never shown?"""
    for name in place:
        field = getattr(kind, "model_fields", {}).get(name)
        if field is not None and any(isinstance(m, Setting) and m.secret for m in field.metadata):
            return True
        kind = _table(field)
    return False
