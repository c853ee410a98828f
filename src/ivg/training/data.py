"""Training data: rows from JSONL, JSON, Parquet or the hub, as preferences, rated responses, demonstrations or prompts.

Shapes that are read (strings, or messages as OpenAI and TRL write them):

==================  =====================================================  =============================
name                columns                                                gives
==================  =====================================================  =============================
preference (TRL)    ``prompt, chosen, rejected``; or ``chosen, rejected``  preferences
rated               ``prompt, response, score``                            rated responses, preferences
imdb_preference     ``prompt, responses, scores, chosen``                  rated responses, preferences
demonstration       ``prompt, response`` (or ``completion``), or ``text``  demonstrations
==================  =====================================================  =============================

Knows: files and columns. Must not know: tokenizers, models. pyarrow and datasets are imported where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ivg.draws import uniform
from ivg.errors import ConfigError, PromptError
from ivg.models.chat import prompt_text
from ivg.tables import read_rows
from ivg.types import Message, Prompt

Row = Mapping[str, Any]
Item = TypeVar("Item")
Read = TypeVar("Read")
PREFERENCE = ("prompt", "chosen", "rejected")
IMPLICIT = ("chosen", "rejected")
RATED = ("prompt", "response", "score")
SEVERAL = ("prompt", "responses", "scores")


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, the better one first; ``margin``: by how much, where rewards are known.

    ``chosen_ends`` / ``rejected_ends``: the response is whole, so an end-of-sequence token belongs behind it.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    chosen_ends: bool = True
    rejected_ends: bool = True


@dataclass(frozen=True)
class Rated:
    """A response with its reward. ``token_ids``: in the tokens of the model that wrote it; ``ends``: the response is whole."""

    prompt: Prompt
    response: str
    score: float
    token_ids: tuple[int, ...] | None = None
    ends: bool = True


@dataclass(frozen=True)
class Demonstration:
    """What a model should write behind ``prompt``; without one, ``response`` is a text as it is."""

    prompt: Prompt | None
    response: str


@dataclass(frozen=True)
class Shape:
    """How the columns of a file become the ones that are read.

    Attributes:
        columns: ours -> the file's, e.g. ``{"prompt": "email", "response": "subject"}``.
        prompt: format of prompts, with ``{prompt}``; None: as they are. Strings only.
        response: format of responses, with ``{response}``; None: as they are.
    """

    columns: Mapping[str, str] | None = None
    prompt: str | None = None
    response: str | None = None

    def apply(self, row: Row) -> dict[str, Any]:
        """The row with our column names and formats.

        Raises:
            ConfigError: a column that the row lacks.
        """
        out = dict(row)
        for ours, theirs in (self.columns or {}).items():
            if theirs not in row:
                raise ConfigError(f"no column {theirs!r} (for {ours})\n  got {', '.join(row)}")
            out[ours] = row[theirs]
        if self.prompt is not None and isinstance(out.get("prompt"), str):
            out["prompt"] = self.prompt.replace("{prompt}", out["prompt"])
        if self.response is not None:
            for name in ("response", "completion", "chosen", "rejected"):
                if isinstance(out.get(name), str):
                    out[name] = self.response.replace("{response}", out[name])
            if isinstance(out.get("responses"), list):
                out["responses"] = [self.response.replace("{response}", r) if isinstance(r, str) else r for r in out["responses"]]
        return out


def read_preferences(
    source: str | Path, limit: int | None = None, *, split: str = "train", shape: Shape | None = None, seed: int = 0
) -> list[Preference]:
    """Preferences of any shape above; rated responses become pairs by :func:`pair_up`.

    Args:
        source: file, folder or id on the hub.
        limit: the first so many pairs.
        split: of a folder or data set.
        shape: how columns become ours.
        seed: of the labels drawn for rated responses.

    Raises:
        ConfigError: unreadable, wrong columns, no row.
    """
    rows = _shaped(source, split, shape)
    first = _peek(rows, source)
    if all(c in first for c in SEVERAL) and "chosen" in first:
        out = [pair for number, row in enumerate(rows, 1) for pair in _labelled(row, source, number)]
    elif all(c in first for c in SEVERAL) or all(c in first for c in RATED):
        out = pair_up(_rated_rows(rows, source), seed)
    elif all(c in first for c in IMPLICIT):
        out = [_preference(row, source, number) for number, row in enumerate(rows, 1)]
    else:
        raise _wrong(source, first, "preferences", PREFERENCE, RATED, SEVERAL)
    if not out:
        raise ConfigError(f"{source} holds no pair of different responses to one prompt")
    return out[:limit]


def read_rated(source: str | Path, *, split: str = "train", shape: Shape | None = None) -> list[Rated]:
    """Rated responses: ``prompt, response, score`` or ``prompt, responses, scores``.

    Raises:
        ConfigError: unreadable, wrong columns, no row, a score that is no finite number.
    """
    return list(_rated_rows(_shaped(source, split, shape), source))


def read_demonstrations(source: str | Path, *, split: str = "train", shape: Shape | None = None) -> list[Demonstration]:
    """What is to be imitated: ``prompt, response`` (or ``completion``; the chosen ones of preferences), ``messages``, or ``text``.

    Raises:
        ConfigError: unreadable, wrong columns, no row.
    """
    rows = _shaped(source, split, shape)
    first = _peek(rows, source)
    name = next((n for n in ("response", "completion", "chosen") if n in first), None)
    if name == "chosen" and all(c in first for c in SEVERAL):
        pairs = (pair for number, row in enumerate(rows, 1) for pair in _labelled(row, source, number))
        return list(dict.fromkeys(Demonstration(pair.prompt, pair.chosen) for pair in pairs))
    if name is not None and "prompt" in first:
        return [
            Demonstration(_prompt(_cell(row, "prompt", source, i), source, i), _text(_cell(row, name, source, i), source, i))
            for i, row in enumerate(rows, 1)
        ]
    if "messages" in first:
        return [
            Demonstration(_prompt(row["messages"][:-1], source, i), _text(row["messages"][-1:], source, i)) for i, row in enumerate(rows, 1)
        ]
    if "text" in first:
        return [Demonstration(None, _text(row["text"], source, i)) for i, row in enumerate(rows, 1)]
    raise _wrong(source, first, "demonstrations", ("prompt", "response"), ("prompt", "completion"), ("messages",), ("text",))


def read_prompts(source: str | Path, *, split: str = "train", shape: Shape | None = None) -> list[Prompt]:
    """The different prompts of ``prompt`` (or ``messages``), in order of appearance.

    Raises:
        ConfigError: unreadable, wrong columns, no row.
    """
    rows = _shaped(source, split, shape)
    first = _peek(rows, source)
    name = "prompt" if "prompt" in first else "messages"
    if name not in first:
        raise _wrong(source, first, "prompts", ("prompt",), ("messages",))
    return list(dict.fromkeys(_prompt(_cell(row, name, source, i), source, i) for i, row in enumerate(rows, 1)))


def pair_up(rated: Iterable[Rated], seed: int = 0) -> list[Preference]:
    """The responses to each prompt, two by two as they come, labelled by Bradley and Terry: P(first is chosen) = sigmoid(r_1 - r_2).

    Pairs of equal text are left out (METHOD, section 5: how the paper made its preferences). Draws are counter-based: a pair's
    label depends on ``seed`` and its position alone.
    """
    out: list[Preference] = []
    waiting: dict[Prompt, Rated] = {}
    for number, row in enumerate(rated):
        first, second = waiting.pop(row.prompt, None), row
        if first is None:
            waiting[row.prompt] = row
            continue
        if first.response == second.response:
            continue
        if uniform(seed, number) >= 1 / (1 + math.exp(min(700.0, second.score - first.score))):
            first, second = second, first
        out.append(Preference(first.prompt, first.response, second.response, first.score - second.score, first.ends, second.ends))
    return out


def answers(row: Preference | Rated | Demonstration) -> list[tuple[Prompt | None, str]]:
    """The responses of a row, each with what it answers: what ``models.training_rows`` takes fingerprints of."""
    texts = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.response,)
    return [(row.prompt, text) for text in texts]


def held_out(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """(training, evaluation): the items of the last ``share`` of the prompts, so that no prompt is in both."""
    keys = [getattr(item, "prompt", None) or number for number, item in enumerate(items)]
    distinct = list(dict.fromkeys(keys))
    last = set(distinct[len(distinct) - round(len(distinct) * share) :])
    return [i for i, k in zip(items, keys, strict=True) if k not in last], [i for i, k in zip(items, keys, strict=True) if k in last]


def _shaped(source: str | Path, split: str, shape: Shape | None) -> _Peekable:
    rows = (row for row in read_rows(source, split) if row.get("error") is None)  # a prompt of a rollout that could not be answered
    return _Peekable(map(shape.apply, rows) if shape else rows)


class _Peekable:
    """An iterator whose first row can be looked at."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self.rows = rows
        self.ahead: list[dict[str, Any]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.ahead:
            yield self.ahead.pop(0)
        yield from self.rows

    def peek(self) -> dict[str, Any] | None:
        if not self.ahead:
            self.ahead = [row for row in [next(self.rows, None)] if row is not None]
        return self.ahead[0] if self.ahead else None


def _peek(rows: _Peekable, source: str | Path) -> dict[str, Any]:
    first = rows.peek()
    if first is None:
        raise ConfigError(f"{source} is empty")
    return first


def _wrong(source: str | Path, row: Row, what: str, *shapes: Sequence[str]) -> ConfigError:
    wanted = "; or ".join(", ".join(s) for s in shapes)
    return ConfigError(
        f"{source} has the columns {', '.join(row)}\n  {what} need {wanted}\n"
        "  other names: --columns OURS=THEIRS,… (from Python: Shape(columns={…}))"
    )


def _rated_rows(rows: _Peekable, source: str | Path) -> Iterator[Rated]:
    first = _peek(rows, source)
    if all(c in first for c in SEVERAL):
        for number, row in enumerate(rows, 1):
            prompt = _prompt(row["prompt"], source, number)
            for response, score in _several(row, source, number):
                yield Rated(prompt, _text(response, source, number), _score(score, source, number))
    elif all(c in first for c in RATED):
        for number, row in enumerate(rows, 1):
            prompt, ids = _prompt(_cell(row, "prompt", source, number), source, number), row.get("token_ids")
            yield Rated(
                prompt,
                _text(_cell(row, "response", source, number), source, number),
                _score(_cell(row, "score", source, number), source, number),
                None if ids is None else tuple(ids),
                row.get("ended", row.get("finish_reason", "stop") == "stop"),
            )
    else:
        raise _wrong(source, first, "rated responses", RATED, SEVERAL)


def _cell(row: Row, name: str, source: str | Path, number: int) -> Any:
    """A column of a row that is not the first.

    Raises:
        ConfigError: this row lacks it.
    """
    if row.get(name) is None:
        raise ConfigError(f"{source}, row {number}: no {name}\n  got {', '.join(k for k, v in row.items() if v is not None)}")
    return row[name]


def _several(row: Row, source: str | Path, number: int) -> list[tuple[Any, Any]]:
    responses, scores = _cell(row, "responses", source, number), _cell(row, "scores", source, number)
    if len(responses) != len(scores):
        raise ConfigError(f"{source}, row {number}: {len(responses)} responses and {len(scores)} scores")
    return list(zip(responses, scores, strict=True))


def _labelled(row: Row, source: str | Path, number: int) -> list[Preference]:
    """The paper's rows: ``chosen`` is the place of the better response among ``responses``."""
    prompt = _prompt(_cell(row, "prompt", source, number), source, number)
    found = [(_text(text, source, number), _score(score, source, number)) for text, score in _several(row, source, number)]
    place = _cell(row, "chosen", source, number)
    if not isinstance(place, int) or not 0 <= place < len(found):
        raise ConfigError(f"{source}, row {number}: chosen must be the place of one of {len(found)} responses, got {place!r}")
    best, high = found[place]
    return [Preference(prompt, best, text, high - score) for text, score in found if text != best]


def _preference(row: Row, source: str | Path, number: int) -> Preference:
    both = _cell(row, "chosen", source, number), _cell(row, "rejected", source, number)
    if "prompt" in row:
        prompt = _prompt(_cell(row, "prompt", source, number), source, number)
        chosen, rejected = both
    else:  # whole conversations: what they share is the prompt
        if any(isinstance(side, str) for side in both):
            raise ConfigError(f"{source}, row {number}: chosen and rejected are texts, and there is no column prompt\n  add one")
        shared = 0
        while shared < min(map(len, both)) - 1 and both[0][shared] == both[1][shared]:
            shared += 1
        prompt, chosen, rejected = _prompt(both[0][:shared], source, number), both[0][shared:], both[1][shared:]
    scores = row.get("chosen_score", row.get("score_chosen")), row.get("rejected_score", row.get("score_rejected"))
    margin = None if None in scores else _score(scores[0], source, number) - _score(scores[1], source, number)
    return Preference(prompt, _text(chosen, source, number), _text(rejected, source, number), margin)


def _prompt(value: Any, source: str | Path, number: int) -> Prompt:
    found = _read(lambda: Prompt.of(value), source, number)
    if not prompt_text(found).strip():
        raise ConfigError(f"{source}, row {number}: the prompt is empty")
    return found


def _read(parse: Callable[[], Read], source: str | Path, number: int) -> Read:
    try:
        return parse()
    except PromptError as e:
        raise ConfigError(f"{source}, row {number}: {e}") from None


def _text(value: Any, source: str | Path, number: int) -> str:
    """A response: a text, or the one message of a list."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and len(value) == 1:
        return _read(lambda: Message.of(value[0]).content, source, number)
    raise ConfigError(f"{source}, row {number}: expected a response as text, or as a list of one message; got {str(value)[:80]}")


def _score(value: Any, source: str | Path, number: int) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ConfigError(f"{source}, row {number}: expected a finite score, got {value!r}")
    return score
