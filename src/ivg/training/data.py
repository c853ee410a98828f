"""Training data: rows (``jobs.formats``) as preferences, rated responses, demonstrations or prompts.

Shapes that are read (strings, or messages as OpenAI and TRL write them):

==================  =====================================================  =============================
name                columns                                                gives
==================  =====================================================  =============================
preference (TRL)    ``prompt, chosen, rejected``; or ``chosen, rejected``  preferences
rated               ``prompt, response, score``                            rated responses, preferences
imdb_preference     ``prompt, responses, scores, chosen``                  rated responses, preferences
demonstration       ``prompt, response`` (or ``completion``), or ``text``  demonstrations
==================  =====================================================  =============================

Knows: columns. Must not know: tokenizers, models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from ivg.errors import ConfigError, PromptError
from ivg.jobs.formats import SourceRow, scan_rows
from ivg.jobs.prompts import prompt_of
from ivg.training.columns import Row, cell, finite_score, flag, list_of, response_text, responses_of, usable_prompt
from ivg.types.messages import Prompt
from ivg.utils.jsonl import RowError
from ivg.utils.rng import uniform

Item = TypeVar("Item")
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
class RatedResponse:
    """A response with its reward. ``token_ids``: in the tokens of the model that wrote it; ``ends``: the response is whole."""

    prompt: Prompt
    response: str
    score: float
    token_ids: tuple[int, ...] | None = None
    ends: bool = True


@dataclass(frozen=True)
class SFTExample:
    """What a model should write behind ``prompt``; without one, ``response`` is a text as it is."""

    prompt: Prompt | None
    response: str


@dataclass(frozen=True)
class ColumnMapping:
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


OnBad = Callable[[SourceRow], None] | None
"""Told of rows that cannot be used, which are then left out; None: the first one is an error."""


def read_preferences(
    source: str | Path,
    limit: int | None = None,
    *,
    split: str = "train",
    mapping: ColumnMapping | None = None,
    seed: int = 0,
    format: str | None = None,
    on_bad: OnBad = None,
) -> list[Preference]:
    """Preferences of any shape above; rated responses become pairs by :func:`pair_up`.

    Args:
        source: file, folder, id on the hub, or ``-``.
        limit: the first so many pairs.
        split: of a folder or data set.
        mapping: the column names of the file and the formats of prompts and responses.
        seed: of the labels drawn for rated responses.
        format: of the file (``jobs.formats``); None: by its name.
        on_bad: see :data:`OnBad`. A row whose two responses are the same text says nothing, and is one of these.

    Raises:
        ConfigError: unreadable, wrong columns, no row.
    """
    rows = _Rows(source, split, mapping, format, on_bad)
    first = rows.first()
    if all(c in first for c in SEVERAL) and "chosen" in first:
        out = list(rows.each(_labelled))
    elif all(c in first for c in SEVERAL) or all(c in first for c in RATED):
        out = pair_up(_rated_rows(rows), seed)
    elif all(c in first for c in IMPLICIT):
        out = list(rows.each(_preference))
    else:
        raise _wrong(source, first, "preferences", PREFERENCE, RATED, SEVERAL)
    if not out:
        raise ConfigError(f"{source} holds no pair of different responses to one prompt")
    return out[:limit]


def read_rated(
    source: str | Path, *, split: str = "train", mapping: ColumnMapping | None = None, format: str | None = None, on_bad: OnBad = None
) -> list[RatedResponse]:
    """Rated responses: ``prompt, response, score`` or ``prompt, responses, scores``.

    Raises:
        ConfigError: unreadable, wrong columns, no row, a score that is no finite number.
    """
    return list(_rated_rows(_Rows(source, split, mapping, format, on_bad)))


def read_sft_examples(
    source: str | Path, *, split: str = "train", mapping: ColumnMapping | None = None, format: str | None = None, on_bad: OnBad = None
) -> list[SFTExample]:
    """What is to be imitated: ``prompt, response`` (or ``completion``; the chosen ones of preferences), ``messages``, or ``text``.

    Raises:
        ConfigError: unreadable, wrong columns, no row.
    """
    rows = _Rows(source, split, mapping, format, on_bad)
    first = rows.first()
    name = next((n for n in ("response", "completion", "chosen") if n in first), None)
    if name == "chosen" and all(c in first for c in SEVERAL):
        return list(dict.fromkeys(SFTExample(pair.prompt, pair.chosen) for pair in rows.each(_labelled)))
    if name is not None and "prompt" in first:
        return list(rows.each(lambda row: [SFTExample(usable_prompt(cell(row, "prompt")), response_text(cell(row, name)))]))
    if "messages" in first:
        return list(rows.each(_conversation))
    if "text" in first:
        return list(rows.each(lambda row: [SFTExample(None, response_text(cell(row, "text")))]))
    raise _wrong(source, first, "demonstrations", ("prompt", "response"), ("prompt", "completion"), ("messages",), ("text",))


def read_prompts(
    source: str | Path, *, split: str = "train", mapping: ColumnMapping | None = None, format: str | None = None, on_bad: OnBad = None
) -> list[Prompt]:
    """The different prompts of ``prompt`` (or ``messages``), in order of appearance.

    Raises:
        ConfigError: unreadable, wrong columns, no row.
    """
    rows = _Rows(source, split, mapping, format, on_bad)
    first = rows.first()
    if not {"prompt", "messages"} & set(first):
        raise _wrong(source, first, "prompts", ("prompt",), ("messages",))
    return list(dict.fromkeys(rows.each(lambda row: [usable_prompt(prompt_of(row))])))


def pair_up(rated: Iterable[RatedResponse], seed: int = 0) -> list[Preference]:
    """The responses to each prompt, two by two as they come, labelled by Bradley and Terry: P(first is chosen) = sigmoid(r_1 - r_2).

    Pairs of equal text are left out (METHOD, section 5: how the paper made its preferences). Draws are counter-based: a pair's
    label depends on ``seed`` and its position alone.
    """
    out: list[Preference] = []
    waiting: dict[Prompt, RatedResponse] = {}
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


def answers(row: Preference | RatedResponse | SFTExample) -> list[tuple[Prompt | None, str]]:
    """The responses of a row, each with what it answers: what ``models.training_rows`` takes fingerprints of."""
    texts = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.response,)
    return [(row.prompt, text) for text in texts]


def held_out(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """(training, evaluation): the items of the last ``share`` of the prompts, so that no prompt is in both."""
    keys = [getattr(item, "prompt", None) or number for number, item in enumerate(items)]
    distinct = list(dict.fromkeys(keys))
    last = set(distinct[len(distinct) - round(len(distinct) * share) :])
    return [i for i, k in zip(items, keys, strict=True) if k not in last], [i for i, k in zip(items, keys, strict=True) if k in last]


class _Rows:
    """The rows of a source with our column names; the first one that can be read decides what the source holds."""

    def __init__(self, source: str | Path, split: str, mapping: ColumnMapping | None, format: str | None, on_bad: OnBad) -> None:
        self.source, self.mapping, self.on_bad = source, mapping, on_bad
        self._rows = scan_rows(source, split, format)
        self._ahead: list[tuple[SourceRow, dict[str, Any]]] = []

    def first(self) -> dict[str, Any]:
        """The first row, which comes again from :meth:`each`.

        Raises:
            ConfigError: there is none.
        """
        self._ahead = list(islice(self._readable(), 1))
        if not self._ahead:
            raise ConfigError(f"{self.source} is empty")
        return self._ahead[0][1]

    def each(self, parse: Callable[[dict[str, Any]], Iterable[Item]]) -> Iterator[Item]:
        """What ``parse`` makes of every row.

        Raises:
            ConfigError: of the first row that it cannot use, where nobody is told of those.
        """
        for source, row in chain(self._ahead, self._readable()):
            try:
                found = list(parse(row))
            except (PromptError, RowError) as e:
                self._bad(replace(source, data=None, error=str(e)))
                continue
            yield from found

    def _readable(self) -> Iterator[tuple[SourceRow, dict[str, Any]]]:
        for source in self._rows:
            if source.data is None:
                self._bad(source)
            elif not source.data.get("error"):  # a prompt of a rollout that could not be answered
                try:
                    row = self.mapping.apply(source.data) if self.mapping else source.data
                except ConfigError as e:
                    if not self._ahead:  # a name that is wrong for all
                        raise
                    self._bad(replace(source, data=None, error=str(e)))
                    continue
                yield source, row

    def _bad(self, row: SourceRow) -> None:
        if self.on_bad is None:
            raise ConfigError(f"{row.place}: {row.error}")
        self.on_bad(row)


def _wrong(source: str | Path, row: Row, what: str, *shapes: Sequence[str]) -> ConfigError:
    wanted = "; or ".join(", ".join(s) for s in shapes)
    return ConfigError(
        f"{source} has the columns {', '.join(row)}\n  {what} need {wanted}\n"
        "  for other names: --columns NAME=COLUMN,… (in Python: ColumnMapping({NAME: COLUMN}))"
    )


def _rated_rows(rows: _Rows) -> Iterator[RatedResponse]:
    first = rows.first()
    if all(c in first for c in SEVERAL):
        return rows.each(lambda row: [RatedResponse(usable_prompt(cell(row, "prompt")), text, score) for text, score in responses_of(row)])
    if all(c in first for c in RATED):
        return rows.each(lambda row: [_rated(row)])
    raise _wrong(rows.source, first, "rated responses", RATED, SEVERAL)


def _rated(row: Row) -> RatedResponse:
    ids = None if row.get("token_ids") in (None, "") else tuple(list_of(row, "token_ids"))
    ended = flag(row["ended"]) if row.get("ended") not in (None, "") else row.get("finish_reason", "stop") == "stop"
    return RatedResponse(
        usable_prompt(cell(row, "prompt")), response_text(cell(row, "response")), finite_score(cell(row, "score")), ids, ended
    )


def _labelled(row: Row) -> list[Preference]:
    """The paper's rows: ``chosen`` is the place of the better response among ``responses``."""
    prompt, found, place = usable_prompt(cell(row, "prompt")), responses_of(row), cell(row, "chosen")
    if isinstance(place, str) and place.isdigit():
        place = int(place)
    if not isinstance(place, int) or not 0 <= place < len(found):
        raise RowError(f"chosen must be the place of one of {len(found)} responses, got {place!r}")
    best, high = found[place]
    return [Preference(prompt, best, text, high - score) for text, score in found if text != best]


def _preference(row: Row) -> list[Preference]:
    both = cell(row, "chosen"), cell(row, "rejected")
    if "prompt" in row:
        prompt = usable_prompt(cell(row, "prompt"))
        chosen, rejected = both
    else:  # whole conversations: what they share is the prompt
        if any(not isinstance(side, list | tuple) for side in both):
            raise RowError("chosen and rejected are texts, and there is no column prompt\n  add one")
        shared = 0
        while shared < min(map(len, both)) - 1 and both[0][shared] == both[1][shared]:
            shared += 1
        prompt, chosen, rejected = usable_prompt(both[0][:shared]), both[0][shared:], both[1][shared:]
    scores = row.get("chosen_score", row.get("score_chosen")), row.get("rejected_score", row.get("score_rejected"))
    margin = None if None in scores else finite_score(scores[0]) - finite_score(scores[1])
    found = Preference(prompt, response_text(chosen), response_text(rejected), margin)
    if found.chosen == found.rejected:
        raise RowError("chosen and rejected are the same text, which says nothing")
    return [found]


def _conversation(row: Row) -> list[SFTExample]:
    turns = list_of(row, "messages")
    return [SFTExample(usable_prompt(turns[:-1]), response_text(turns[-1:]))]
