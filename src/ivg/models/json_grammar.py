"""JSON schemas as llguidance reads them. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any

_SPACE = r"( |\n {0,16})?"


def llguidance_schema(schema: Mapping[str, Any]) -> str:
    """The text of a JSON schema, with the white space that is allowed between the parts of JSON.

    A model could else write white space without end. Options of the schema's own (``x-guidance``) come first.
    """
    return json.dumps({"x-guidance": _options(), **schema})


@cache
def _options() -> dict[str, Any]:
    """Llguidance before 1.8, which vLLM needs, allows a pattern of white space any number of times: there, space beside , and : alone."""
    try:
        version = tuple(int(part) for part in metadata.version("llguidance").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        version = (1, 8)
    if version >= (1, 8):
        return {"whitespace_pattern": _SPACE}
    return {
        "whitespace_flexible": False,
        **{f"{name}_separator": f"{_SPACE}{sign}{_SPACE}" for name, sign in (("item", ","), ("key", ":"))},
    }
