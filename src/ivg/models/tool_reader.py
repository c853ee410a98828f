"""Reads calls of tools out of the text of a response that may still grow (``models.tool_formats``). No torch.

What was read of a beginning is a beginning of what is read of more: a call is added once its name is known and its arguments have begun,
and then stays. One that is cut between the two is added at the end of the response, its arguments an empty text. JSON is followed by its
brackets and texts alone, so that arguments are kept as the model wrote them, right or wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

_SPACE = re.compile(r"\s*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|["{}\[\]<]', re.DOTALL)
"""What nests or ends a JSON value. A lone quote begins a text that is not complete; ``<`` outside of texts begins a closing tag."""
_SCALAR = re.compile(r"[\w.+-]+")
_ARGUMENTS = ("arguments", "parameters")


class MalformedCallError(Exception):
    """Not a call."""


class PendingError(Exception):
    """The text ends before it is known what it is."""


@dataclass(frozen=True, slots=True)
class CallText:
    """A call, as far as it was written.

    Attributes:
        name: of the function.
        arguments: JSON text; a beginning of one while it is being written, or where the response was cut.
    """

    name: str
    arguments: str


@dataclass(slots=True)
class _Begun:
    """What is known of a call: whole up to ``end``, unless that is None."""

    name: str | None = None
    arguments: str | None = None
    end: int | None = None


class ToolReader:
    """What has been read of a response, up to ``at``.

    Args:
        text: of the response so far.
        names: of the functions that may be called.
        final: nothing follows.
    """

    def __init__(self, text: str, names: frozenset[str], *, final: bool) -> None:
        self.text, self.names, self.final = text, names, final
        self.at = 0
        self.content = ""
        """Text outside of calls."""
        self.calls: list[CallText] = []

    # Text

    def add_text(self, end: int, *, call_follows: bool = False) -> None:
        """The text up to ``end`` is no call. White space beside calls is dropped."""
        piece = self.text[self.at : end]
        piece = piece.rstrip() if call_follows else piece
        if self.calls:
            piece = piece.lstrip()
            piece = f"\n{piece}" if self.content and piece else piece
        self.content += piece
        self.at = end

    def add_rest(self, marker: str) -> None:
        """All that is left is no call. Unless it is final, white space at its end waits, and what may become ``marker``."""
        end = len(self.text)
        if not self.final:
            end -= max((n for n in range(1, len(marker)) if self.text.endswith(marker[:n], self.at)), default=0)
            end = self.at + len(self.text[self.at : end].rstrip())
        self.add_text(end)

    def skip(self, at: int) -> int:
        """The first place from ``at`` on that is no white space.

        Raises:
            PendingError: there is none.
        """
        found = _SPACE.match(self.text, at)
        end = at if found is None else found.end()
        if end >= len(self.text):
            raise PendingError
        return end

    # Calls

    def try_calls(self, start: int, begin: int, *, known: bool = False) -> bool | None:
        """Read the call at ``begin``, or those of a list there; the text before ``start`` is no call.

        Args:
            start: where their marker begins.
            begin: where they begin.
            known: their names must be those of functions that may be called, and there must be arguments.

        Returns:
            Were there any? They end at ``at``. None: the text ends here, and all that can be read of it was.
        """
        return self._attempt(start, lambda: self._read_calls(start, begin, known))

    def try_arguments(self, start: int, name: str, begin: int) -> bool | None:
        """As :meth:`try_calls`, for the arguments of ``name`` at ``begin``."""
        return self._attempt(start, lambda: self._read_named(start, name, begin))

    def add_cut_call(self, start: int, name: str) -> None:
        """The text ends behind the name of a call, whose marker is at ``start``."""
        self.add_text(start, call_follows=True)
        self.calls.append(CallText(name, ""))
        self.at = len(self.text)

    def _attempt(self, start: int, read: Callable[[], None]) -> bool | None:
        before = len(self.calls)
        try:
            read()
        except MalformedCallError:
            return len(self.calls) > before
        except PendingError:
            if len(self.calls) == before:
                if self.final:
                    return False
                self.add_text(start, call_follows=True)
            return None
        return True

    def _read_calls(self, start: int, at: int, known: bool) -> None:
        at = self.skip(at)
        if self.text[at] != "[":
            self._read_call(start, at, known)
            return
        at = self._read_call(start, self.skip(at + 1), known)
        while self.text[at := self.skip(at)] == ",":
            at = self._read_call(at, self.skip(at + 1), known)
        if self.text[at] == "]":
            self.at = at + 1

    def _read_call(self, start: int, at: int, known: bool) -> int:
        begun = _Begun()
        try:
            end = self._read_object(at, begun)
        except PendingError:
            if self.final and begun.arguments is None:
                begun.arguments = ""
            self._add(start, begun, known)
            raise
        except MalformedCallError:
            if begun.end is None:
                raise
            end = begun.end
        if not known and begun.arguments is None:
            begun.arguments = "{}"
        if begun.name is None or begun.arguments is None:
            raise MalformedCallError
        self._add(start, begun, known)
        self.at = end
        return end

    def _read_named(self, start: int, name: str, at: int) -> None:
        begun = _Begun(name)
        try:
            self._read_arguments(at, begun)
        except PendingError:
            self._add(start, begun, known=False)
            raise
        self._add(start, begun, known=False)
        self.at = begun.end or at

    def _add(self, start: int, begun: _Begun, known: bool) -> None:
        if begun.name is None or begun.arguments is None:
            return
        if known and begun.name not in self.names:
            raise MalformedCallError
        self.add_text(max(start, self.at), call_follows=True)
        self.calls.append(CallText(begun.name, begun.arguments))

    # JSON

    def _read_object(self, at: int, begun: _Begun) -> int:
        """Fill ``begun`` from the object at ``at``; where it ends."""
        if self.text[at] != "{":
            raise MalformedCallError
        at += 1
        while self.text[at := self.skip(at)] != "}":
            if self.text[at] == ",":
                at = self.skip(at + 1)
            key, at = self._read_string(at)
            if self.text[at := self.skip(at)] != ":":
                raise MalformedCallError
            at = self.skip(at + 1)
            if key == "name" and begun.name is None:
                begun.name, at = self._read_string(at)
                begun.end = None if begun.arguments is None else at
            elif key in _ARGUMENTS and begun.arguments is None:
                at = self._read_arguments(at, begun)
            else:
                at = self._skip_value(at)
        return at + 1

    def _read_arguments(self, at: int, begun: _Begun) -> int:
        """Where they end: an object, an object as text, or null."""
        if self.text[at] == "{":
            end, whole = self._end_of_value(at)
            begun.arguments = self.text[at:end]
            if not whole:
                raise PendingError
        elif self.text[at] == '"':
            begun.arguments, end = self._read_string(at)
        elif self.text.startswith("null", at):
            begun.arguments, end = "{}", at + len("null")
        elif "null".startswith(self.text[at:]):
            raise PendingError
        else:
            raise MalformedCallError
        begun.end = None if begun.name is None else end
        return end

    def _read_string(self, at: int) -> tuple[str, int]:
        if self.text[at] != '"':
            raise MalformedCallError
        found = _STRING.match(self.text, at)
        if found is None:
            raise PendingError
        try:
            value: str = json.loads(found[0], strict=False)
        except ValueError:
            raise MalformedCallError from None
        return value, found.end()

    def _skip_value(self, at: int) -> int:
        if self.text[at] in '{["':
            end, whole = self._end_of_value(at)
            if not whole:
                raise PendingError
            return end
        found = _SCALAR.match(self.text, at)
        if found is None:
            raise MalformedCallError
        if found.end() == len(self.text):
            raise PendingError
        return found.end()

    def _end_of_value(self, at: int) -> tuple[int, bool]:
        """(end of the object, list or text at ``at``, is it there)."""
        depth = 0
        for found in _BRACKET.finditer(self.text, at):
            sign = found[0]
            if sign == "<":
                return found.start(), True
            if sign == '"':
                break
            depth += (sign in "{[") - (sign in "}]")
            if depth == 0:
                return found.end(), True
        return len(self.text), False
