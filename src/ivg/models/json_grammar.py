"""JSON schemas as llguidance reads them. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_SPACE = {"whitespace_pattern": r"( |\n {0,16})?"}
"""Between the parts of JSON, unless the schema has other options (``x-guidance``): a model could else write white space without end."""


def llguidance_schema(schema: Mapping[str, Any]) -> str:
    """The text of a JSON schema, with the white space that is allowed between the parts of JSON."""
    return json.dumps({"x-guidance": _SPACE, **schema})
