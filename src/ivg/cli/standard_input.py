"""Texts from standard input, where a pipe or ``-`` gives them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ivg.errors import PromptError

DASH = "-"
"""An argument that stands for standard input."""


def is_terminal() -> bool:
    """Does someone type on standard input?"""
    return sys.stdin is not None and sys.stdin.isatty()


def read_standard_input() -> str:
    """All of standard input, without the line break at its end; empty where there is none.

    Raises:
        PromptError: it is no UTF-8.
    """
    if sys.stdin is None:
        return ""
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as e:
        raise PromptError(f"standard input is not {e.encoding.upper()}: {e.reason} at byte {e.start}\n  send text") from None
    except OSError:  # closed, or a folder
        return ""
    return text.removesuffix("\n").removesuffix("\r")


def texts_of(arguments: Sequence[str] | None) -> list[str]:
    """The texts that ``arguments`` give: ``-`` is standard input, and so is nothing where standard input is a pipe or a file.

    Raises:
        PromptError: more than one ``-``, or an empty standard input where one stands.
    """
    given = list(arguments or ())
    if given.count(DASH) > 1:
        raise PromptError("got - twice, and there is one standard input\n  give it once")
    if not given:
        return [text] if not is_terminal() and (text := read_standard_input()).strip() else []
    if DASH in given:
        text = read_standard_input()
        if not text.strip():
            raise PromptError("got -, and standard input is empty\n  send the text through a pipe: echo TEXT | ivg …")
        given[given.index(DASH)] = text
    return given
