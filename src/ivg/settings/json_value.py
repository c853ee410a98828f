"""JSON that is kept as text, so that settings which hold it are immutable and can be compared. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


class JSONValue:
    """An object or a list. Immutable; equal to another of its class where the JSON text is (true is not 1).

    Args:
        value: a dict or a list of JSON values.
        sort_keys: the order of keys does not count.
    """

    __slots__ = ("_json",)

    def __init__(self, value: dict[str, Any] | list[Any], *, sort_keys: bool = False) -> None:
        self._json = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)

    def __getitem__(self, key: Any) -> Any:
        return json.loads(self._json)[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(json.loads(self._json))

    def __len__(self) -> int:
        return len(json.loads(self._json))

    def __eq__(self, other: object) -> bool:
        return self._json == other._json if isinstance(other, JSONValue) and type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._json)

    def __repr__(self) -> str:
        return self._json
