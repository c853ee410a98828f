"""What is wrong with settings, in the words of a recipe rather than of pydantic. Knows: pydantic's kinds of errors."""

from __future__ import annotations

from collections.abc import Sequence
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
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
    "greater_than": "more than {gt}",
    "less_than": "less than {lt}",
}
"""What pydantic's kinds of errors, by how their names begin, mean in a recipe."""


def explain(error: Any, recipe: type[BaseModel]) -> str:
    """One error of pydantic in the words of a recipe: where, what was expected, what was got."""
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        near = get_close_matches(str(error["loc"][-1]), _names(recipe, error["loc"][:-1]), n=1)
        return f"unknown setting {where}" + (f"; did you mean {near[0]}?" if near else "")
    if isinstance(
        raised := error.get("ctx", {}).get("error"), ConfigError
    ):  # a rule of ``ivg.settings.schema``, which names the setting itself
        return ".".join([*map(str, error["loc"][:-1]), str(raised)])
    if _is_secret(recipe, error["loc"]):
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    words = next((text for kind, text in _EXPECTED.items() if error["type"].startswith(kind)), None)
    if words is not None:
        words = "expected " + words.format(**error.get("ctx", {}))
    return f"{where}: {words or error['msg'].removeprefix('Value error, ')}, got {error['input']!r}"


def _names(kind: Any, place: Sequence[str | int]) -> list[str]:
    """The settings of the table at ``place``; [] where that is no table with fixed names."""
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
