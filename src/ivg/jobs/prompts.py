"""From rows of data to jobs: id, prompt, and the columns that are copied to the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ivg.errors import ConfigError, PromptError
from ivg.jobs.formats import SourceRow
from ivg.types.messages import Prompt
from ivg.utils.jsonl import jsonable, to_json

ANSWER_COLUMNS = frozenset({
    "id", "prompt", "index", "repeat", "text", "token_ids", "score", "finish_reason", "usage", "error",
    "method", "seed", "settings", "models", "engine", "endpoint", "values", "provenance", "input_columns",
    "generation_config", "notes",
})  # fmt: skip
"""Columns of answers; columns of the input with such a name are kept in ``input_columns``."""

KWARGS, TOOLS = CHAT_COLUMNS = ("chat_template_kwargs", "tools")
"""Columns of rows, as in TRL: variables of the chat templates for one prompt, and the functions that its answer may call."""


@dataclass(frozen=True)
class Job:
    """One prompt of the input.

    Attributes:
        id: unique in the run.
        prompt: text, or messages.
        chat: what its row says of the chat templates (:data:`CHAT_COLUMNS`).
        place: file and line, for error messages; default: the id.
        row: the row of the input.
    """

    id: Any
    prompt: Any
    place: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)
    chat: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", self.place or f"prompt {self.id}")

    @property
    def key(self) -> str:
        """The id as JSON, so that ids of different types differ (1 and "1")."""
        return id_key(self.id)

    @property
    def prompt_key(self) -> str:
        """A hash of what is answered."""
        return prompt_key(self.prompt, self.chat)

    @property
    def request_prompt(self) -> Prompt:
        """The prompt as a request has it."""
        return with_chat_columns(Prompt.of(self.prompt), self.chat)

    def extra_columns(self, answer: Iterable[str]) -> dict[str, Any]:
        """The further columns of the input; those named like a column of the ``answer`` under ``input_columns``."""
        rest = {k: v for k, v in self.row.items() if k not in ("id", "prompt", "messages")}
        taken = {k: v for k, v in rest.items() if k in ANSWER_COLUMNS or k in answer}
        return {k: v for k, v in rest.items() if k not in taken} | ({"input_columns": taken} if taken else {})


def read_jobs(rows: Iterable[SourceRow], fail: Callable[[str, str, Mapping[str, Any]], None]) -> Iterator[Job]:
    """A job for every row with a prompt. A row without an id gets a hash of its prompt as id.

    Args:
        rows: of the input.
        fail: called with the place of every other row, why it cannot be used, and the row.
    """
    places, counts = dict[str, str](), dict[str, int]()
    for source in rows:
        if source.data is None:
            fail(source.place, source.error or "", {"place": source.place, "text": source.text})
            continue
        row = jsonable(source.data)
        try:
            found = prompt_of(row)
            prompt, chat = found.plain, chat_columns(found)
            own = row["id"] if row.get("id") not in (None, "") else _new_id(prompt_key(prompt, chat), places, counts)
            job = Job(own, prompt, source.place, row, chat)
            if job.key in places:
                raise PromptError(f"the id {job.key} is also that of {places[job.key]}\n  give each row an id of its own, or none")
        except PromptError as e:
            fail(source.place, str(e), row)
            continue
        places[job.key] = source.place
        yield job


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row: its column ``prompt``, or ``messages`` where that is empty, with its ``chat_template_kwargs`` and ``tools``.

    Messages, variables and tools may be JSON in a text, as CSV has them.

    Raises:
        PromptError: neither, or an invalid one.
    """
    return with_chat_columns(_content_of(row), row)


def with_chat_columns(prompt: Prompt, row: Mapping[str, Any]) -> Prompt:
    """``prompt`` with what the :data:`CHAT_COLUMNS` of its row say: JSON values, the same as text, or nothing.

    Raises:
        PromptError: something else.
    """
    given = {name: _of_json(value) for name in CHAT_COLUMNS if (value := row.get(name)) not in (None, "", {}, [])}
    if not given:
        return prompt
    try:
        return replace(prompt, chat=replace(prompt.chat, **given))
    except ConfigError as e:
        raise PromptError(str(e)) from None


def chat_columns(prompt: Prompt) -> dict[str, Any]:
    """What :func:`with_chat_columns` reads back."""
    found = {KWARGS: dict(prompt.chat.chat_template_kwargs), TOOLS: list(prompt.chat.tools)}
    return {name: value for name, value in found.items() if value}


def _of_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _content_of(row: Mapping[str, Any]) -> Prompt:
    prompt, messages = row.get("prompt"), row.get("messages")
    if prompt not in (None, "") or (prompt == "" and messages in (None, "")):
        return Prompt.of(prompt)  # type: ignore[arg-type]
    if messages not in (None, ""):
        return Prompt.of(_parsed(messages) if isinstance(messages, str) else messages)
    got = ", ".join(k for k, v in row.items() if v is not None) or "no column"
    raise PromptError(f"expected a prompt or messages, got {got}")


def _parsed(text: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise PromptError(f'messages is the text {text[:40]!r}\n  expected [{{"role": "user", "content": "…"}}, …]')
    return found


def id_key(identity: Any) -> str:
    """An id as JSON."""
    return json.dumps(identity, sort_keys=True)


def prompt_key(prompt: Any, row: Mapping[str, Any] | None = None) -> str:
    """A hash of a prompt (text or messages) and of the :data:`CHAT_COLUMNS` of its row."""
    chat = chat_columns(with_chat_columns(Prompt(""), row or {}))
    more = [*([chat[KWARGS]] if KWARGS in chat else []), *([{TOOLS: chat[TOOLS]}] if TOOLS in chat else [])]
    return hashlib.sha256(to_json([prompt, *more] if more else prompt).encode()).hexdigest()[:16]


def _new_id(name: str, taken: Mapping[str, str], counts: dict[str, int]) -> str:
    """An id that does not depend on the row's position, so that rows may be added anywhere.

    Args:
        name: the prompt's hash.
        taken: ids.
        counts: how many of each name were given; changed here, so that many equal prompts need no search each.
    """
    while True:
        count = counts[name] = counts.get(name, 0) + 1
        if id_key(new := name if count == 1 else f"{name}-{count}") not in taken:
            return new
