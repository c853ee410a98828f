"""Values in the columns of training rows: prompts, responses, scores, lists. An unusable value raises RowError."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ivg.errors import PromptError
from ivg.jobs.prompts import prompt_of, with_chat_columns
from ivg.models.chat_template import prompt_text
from ivg.types.messages import Message, Prompt, check_text
from ivg.utils.jsonl import RowError

Row = Mapping[str, Any]
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
"""A number as text; Python itself also takes ``1_0`` and digits of other scripts."""
_MOST_TOKENS = 2**31
"""Ids of tokens are below this in every library."""


def cell(row: Row, name: str) -> Any:
    """The value in a column of a row.

    Raises:
        RowError: the row has no such column, or no value in it.
    """
    if row.get(name) is None:
        raise RowError(f"no {name}\n  got {', '.join(k for k, v in row.items() if v is not None)}")
    return row[name]


def list_of(row: Row, name: str) -> list[Any]:
    """The list in a column; CSV has it as JSON."""
    found = cell(row, name)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            found = None
    if not isinstance(found, list | tuple):
        raise RowError(f"expected a list in {name}, got {str(row[name])[:80]!r}")
    return list(found)


def ends_with_answer(row: Row) -> bool:
    """Is the last of the row's ``messages`` the assistant's?"""
    turns = list_of(row, "messages") if row.get("messages") else []
    return bool(turns) and isinstance(turns[-1], Mapping) and turns[-1].get("role") == "assistant"


def flag(value: Any) -> bool:
    """A boolean; CSV has it as a word."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise RowError(f"expected true or false in ended, got {value!r}")
    return value


def is_complete(row: Row) -> bool:
    """Is the response of a row complete? Cut are those with ``ended`` false, or where that is missing a ``finish_reason`` but ``stop``."""
    if row.get("ended") not in (None, ""):
        return flag(row["ended"])
    return row.get("finish_reason") in (None, "", "stop")


def tokens_of(row: Row) -> tuple[int, ...] | None:
    """``token_ids`` of a row; None: it has none."""
    if row.get("token_ids") in (None, ""):
        return None
    ids = list_of(row, "token_ids")
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < _MOST_TOKENS:
            raise RowError(f"expected whole numbers from 0 in token_ids, got {str(token)[:40]!r}")
    return tuple(ids)


def responses_of(row: Row) -> list[tuple[str, float]]:
    """(response, score) of the lists ``responses`` and ``scores``."""
    responses, scores = list_of(row, "responses"), list_of(row, "scores")
    if len(responses) != len(scores):
        raise RowError(f"{len(responses)} responses and {len(scores)} scores")
    return [(response_text(text), finite_score(score)) for text, score in zip(responses, scores, strict=True)]


def prompt_in(row: Row, value: Any = None) -> Prompt:
    """The prompt of a row (``prompt``, or ``messages`` in its place), which is not empty, with its variables of chat templates and tools.

    Args:
        row: the row.
        value: the prompt, where it is not in the column ``prompt``.
    """
    if value is None and row.get("prompt") in (None, "") and ends_with_answer(row):
        raise RowError("no prompt, and messages end with the answer\n  give the messages before it as prompt")
    found = prompt_of(row) if value is None else with_chat_columns(Prompt.of(value), row)
    if not prompt_text(found).strip():
        raise PromptError("the prompt is empty")
    return found


def response_text(value: Any) -> str:
    """A response: a text, or a list of one message."""
    if isinstance(value, str):
        check_text(value, "the response")
        return value
    if isinstance(value, list | tuple) and len(value) == 1:
        message = Message.of(value[0])
        if message.tool_calls:
            raise RowError("the response calls tools, which each chat template writes in a way of its own; give it as the model writes it")
        return message.content
    raise RowError(f"expected a response as text, or as a list of one message; got {str(value)[:80]}")


def finite_score(value: Any) -> float:
    """A finite number, or its digits."""
    score = math.nan
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        with suppress(TypeError, ValueError, OverflowError):  # OverflowError: a whole number beyond double precision
            score = float(value)
    if not math.isfinite(score):
        raise RowError(f"expected a finite score, got {_shown(value)}")
    return score


def _shown(value: Any) -> str:
    try:
        return repr(value)[:80]
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a whole number of thousands of digits"
