"""Objects that other installed packages add, by entry points of their distribution (docs/how-to/plugins.md). Standard library only.

Nothing is imported before it is asked for. A plugin that cannot be used is left out with one warning, and nothing else is affected.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any


class PluginWarning(UserWarning):
    """A plugin cannot be used and was left out."""


class Plugins:
    """The entry points of one group, by name.

    Args:
        group: such as ``ivg.methods``.
        kind: class of the objects; None: they must be callable.
        reserved: names that plugins may not take.
    """

    def __init__(self, group: str, kind: type | None = None, reserved: frozenset[str] = frozenset()) -> None:
        self.group, self.kind, self.reserved = group, kind, reserved
        self._objects: dict[str, Any] = {}

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            if entry.name in self.reserved:
                self._warn(entry, "the name is taken by ivg itself")
            elif entry.name in found and found[entry.name].value != entry.value:
                self._warn(entry, f"the name is taken by {_source(found[entry.name])}")
            else:
                found[entry.name] = entry
        return found

    @property
    def names(self) -> list[str]:
        """All names, sorted; those that cannot be used are left out once that is known."""
        return sorted(self._entry_points)

    def source(self, name: str) -> str:
        """The distribution and object behind a name of :attr:`names`, for tables."""
        return _source(self._entry_points[name])

    def get(self, name: str) -> Any | None:
        """The object called ``name``; None where there is none, or where it cannot be used."""
        if name in self._objects:
            return self._objects[name]
        entry = self._entry_points.get(name)
        if entry is None:
            return None
        try:
            found = entry.load()
        except (Exception, SystemExit) as e:  # whatever importing a foreign package raises
            self._drop(entry, f"{type(e).__name__}: {e}")
            return None
        fits = callable(found) if self.kind is None else isinstance(found, self.kind)
        if not fits:
            expected = "a callable" if self.kind is None else f"an object of class {self.kind.__name__}"
            self._drop(entry, f"got {type(found).__name__}, expected {expected}")
            return None
        self._objects[name] = found
        return found

    def all(self) -> dict[str, Any]:
        """Every object that can be used, by name; imports them all."""
        return {name: found for name in self.names if (found := self.get(name)) is not None}

    def _drop(self, entry: EntryPoint, reason: str) -> None:
        del self._entry_points[entry.name]
        self._warn(entry, reason)

    def _warn(self, entry: EntryPoint, reason: str) -> None:
        message = f"left out the plugin {entry.name!r} of {self.group} from {_source(entry)}: {reason}"
        warnings.warn(message, PluginWarning, stacklevel=4)


def _source(entry: EntryPoint) -> str:
    owner = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"{owner} ({entry.value})"
