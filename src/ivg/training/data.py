"""Training data: rows (:mod:`ivg.jobs.formats`) as preferences, rated responses, SFT examples or prompts.

Forms of rows (texts, or messages in the format of OpenAI and TRL):

==================  =====================================================  =============================
form                columns                                                read as
==================  =====================================================  =============================
preference (TRL)    ``prompt, chosen, rejected``; or ``chosen, rejected``  preferences
rated               ``prompt, response, score``                            rated responses, preferences
imdb_preference     ``prompt, responses, scores, chosen``                  rated responses, preferences
SFT example         ``prompt, response`` (or ``completion``, ``text``)      SFT examples
plain text          ``text``                                               SFT examples
==================  =====================================================  =============================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ivg.errors import ConfigError
from ivg.jobs.prompts import prompt_of
from ivg.settings.train import PairLabel
from ivg.training.columns import Row, cell, finite_score, is_complete, list_of, prompt_in, response_text, responses_of, tokens_of
from ivg.training.row_source import ColumnMapping as ColumnMapping
from ivg.training.row_source import ReadOptions as ReadOptions
from ivg.training.row_source import Rows
from ivg.types import Preference, Prompt
from ivg.utils.jsonl import RowError
from ivg.utils.rng import uniform

PREFERENCE = ("prompt", "chosen", "rejected")
CONVERSATIONS = ("chosen", "rejected")
RATED = ("prompt", "response", "score")
RATED_LISTS = ("prompt", "responses", "scores")


@dataclass(frozen=True)
class RatedResponse:
    """A response with its reward.

    Attributes:
        prompt: text or messages.
        response: text.
        score: reward.
        token_ids: of the response, by the model that generated it, if known.
        ends: the response is complete, so that an end-of-sequence token follows it.
    """

    prompt: Prompt
    response: str
    score: float
    token_ids: tuple[int, ...] | None = None
    ends: bool = True


@dataclass(frozen=True)
class SFTExample:
    """A response that a model should learn to give to ``prompt``; without a prompt, a plain text.

    Attributes:
        prompt: text or messages; None: none.
        response: text.
        ends: the response is complete, so that an end-of-sequence token follows it.
    """

    prompt: Prompt | None
    response: str
    ends: bool = True

    def __repr__(self) -> str:
        cut = "" if self.ends else ", ends=False"  # runs compare their rows by this text, and those of version 0.2.0 had no ends
        return f"SFTExample(prompt={self.prompt!r}, response={self.response!r}{cut})"


def read_preferences(
    source: str | Path, limit: int | None = None, *, seed: int = 0, options: ReadOptions | None = None, label: PairLabel = "sampled"
) -> list[Preference]:
    """Preferences of any form above; rated responses are paired by :func:`pair_up`.

    Args:
        source: file, folder, id on the hub, or ``-``.
        limit: number of pairs, from the first; None: all.
        seed: random seed of the labels of rated responses, where ``label`` is "sampled".
        options: how it is read. Rows whose two responses are the same text cannot be used.

    Raises:
        ConfigError: unreadable, wrong columns, no row.
    """
    rows = read_comparable(source, options)
    out = [row for row in rows if isinstance(row, Preference)]
    out += pair_up([row for row in rows if isinstance(row, RatedResponse)], seed, label)
    if not out:
        raise ConfigError(f"{source} holds no pair of different responses to one prompt")
    return out[:limit]


def read_comparable(source: str | Path, options: ReadOptions | None = None, *, by_score: bool = False) -> list[Preference | RatedResponse]:
    """Finished pairs as preferences, or rated responses, of which :func:`ivg.training.pairing.compare` makes pairs.

    Args:
        source: file, folder, id on the hub, or ``-``.
        options: how it is read. Preferences whose two responses are the same text cannot be used.
        by_score: rows of imdb_preference are rated responses; else the column ``chosen`` makes pairs of them.

    Raises:
        ConfigError: unreadable, wrong columns, no row.
    """
    rows = Rows(source, options)
    if rows.have(*RATED_LISTS, "chosen") and not by_score:
        return [*rows.each(_labelled)]
    if rows.have(*RATED_LISTS) or rows.have(*RATED):
        return [*_rated_rows(rows)]
    if rows.have(*CONVERSATIONS):
        return [*rows.each(_preference)]
    raise rows.wrong_columns("preferences", PREFERENCE, RATED, RATED_LISTS)


def read_rated(source: str | Path, options: ReadOptions | None = None) -> list[RatedResponse]:
    """Rated responses: ``prompt, response, score`` or ``prompt, responses, scores``.

    Raises:
        ConfigError: unreadable, wrong columns, no row, a score that is no finite number.
    """
    return _rated_rows(Rows(source, options))


def read_sft_examples(source: str | Path, options: ReadOptions | None = None) -> list[SFTExample]:
    """SFT examples: ``prompt, response`` (or ``completion``; the chosen ones of preferences), ``messages``, ``prompt, text``, or ``text``.

    ``ended`` false, or a ``finish_reason`` other than ``stop``: the response was cut, and no end-of-sequence token follows it.

    Raises:
        ConfigError: unreadable, wrong columns, no row.
    """
    rows = Rows(source, options)
    if rows.have(*RATED_LISTS) and rows.response == "chosen":
        return list(dict.fromkeys(SFTExample(pair.prompt, pair.chosen) for pair in rows.each(_labelled)))
    if (parse := _sft_parser(rows)) is not None:
        return rows.each(parse)
    raise rows.wrong_columns("SFT examples", ("prompt", "response"), ("prompt", "completion"), ("messages",), ("prompt", "text"), ("text",))


def read_prompts(source: str | Path, options: ReadOptions | None = None) -> list[Prompt]:
    """The different prompts of ``prompt`` (or ``messages``), in order of appearance.

    Raises:
        ConfigError: unreadable, wrong columns, no row.
    """
    rows = Rows(source, options)
    if not (rows.have("prompt") or rows.have("messages")):
        raise rows.wrong_columns("prompts", ("prompt",), ("messages",))
    return list(dict.fromkeys(rows.each(lambda row: [prompt_in(row, prompt_of(row))])))


def read_any(source: str | Path, options: ReadOptions | None = None) -> tuple[str, list[Preference | RatedResponse | SFTExample | Prompt]]:
    """(form, items) of whatever the first row's columns say that the source holds: one of those above, or prompts.

    Raises:
        ConfigError: unreadable, or columns of no form.
    """
    rows = Rows(source, options)
    if rows.have(*RATED_LISTS) or rows.have(*RATED):
        return "rated responses", [*_rated_rows(rows)]
    if rows.have(*CONVERSATIONS):
        return "preferences", [*rows.each(_preference)]
    if rows.response is None if rows.have("prompt") else rows.have("messages") and not rows.ends_with_answer:
        if rows.have("rejected"):  # pairs without their other half, not prompts
            raise rows.wrong_columns("preferences", PREFERENCE)
        return "prompts", [*rows.each(lambda row: [prompt_in(row, prompt_of(row))])]
    if (parse := _sft_parser(rows)) is not None:
        return "SFT examples", [*rows.each(parse)]
    raise rows.wrong_columns("rows", PREFERENCE, RATED, RATED_LISTS, ("prompt", "response"), ("messages",), ("prompt",), ("text",))


def pair_up(rated: Iterable[RatedResponse], seed: int = 0, label: PairLabel = "sampled") -> list[Preference]:
    """Pair the responses to each prompt in order, labelled by the Bradley-Terry model: P(first is chosen) = sigmoid(r_1 - r_2).

    So the preferences of Liu et al. 2024 (arXiv 2409.17819) were made. Pairs of the same text are left out. A label depends on ``seed`` and
    the position of the pair only. With ``label`` "higher" the response with the higher score is chosen, and equal scores make no pair.
    """
    rows = list(rated)
    if label == "higher":
        found = [sorted((rows[i], rows[j]), key=lambda row: -row.score) for i, j in consecutive_pairs(rows)]
        return [preference(best, worst) for best, worst in found if best.score > worst.score]
    return [sampled_preference(rows[i], rows[j], uniform(seed, j)) for i, j in consecutive_pairs(rows)]


def consecutive_pairs(rated: Sequence[RatedResponse]) -> list[tuple[int, int]]:
    """Indices of the first and second, third and fourth, … response to each prompt, in the order of the later one; no two same texts."""
    out: list[tuple[int, int]] = []
    unpaired: dict[Prompt, int] = {}
    for number, row in enumerate(rated):
        first = unpaired.pop(row.prompt, None)
        if first is None:
            unpaired[row.prompt] = number
        elif rated[first].response != row.response:
            out.append((first, number))
    return out


def preference(chosen: RatedResponse, rejected: RatedResponse) -> Preference:
    """Two rated responses to one prompt as a preference, whose margin is the difference of their scores."""
    return Preference(chosen.prompt, chosen.response, rejected.response, chosen.score - rejected.score, chosen.ends, rejected.ends)


def sampled_preference(first: RatedResponse, second: RatedResponse, draw: float) -> Preference:
    """The first is chosen with the probability sigmoid(difference of scores); ``draw``: uniform in [0, 1)."""
    chance = 1 / (1 + math.exp(min(700.0, second.score - first.score)))
    return preference(first, second) if draw < chance else preference(second, first)


def answers(row: Preference | RatedResponse | SFTExample) -> list[tuple[Prompt | None, str]]:
    """(prompt, response) of each response in a row, for :mod:`ivg.models.training_rows`."""
    texts = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.response,)
    return [(row.prompt, text) for text in texts]


def _sft_parser(rows: Rows) -> Callable[[Row], list[SFTExample]] | None:
    """What makes SFT examples of rows with these columns; None: nothing does."""
    name = rows.response
    if name is not None and rows.have("prompt"):
        return lambda row: [_sft_example(row, name)]
    if rows.have("messages"):
        return _conversation
    return (lambda row: [SFTExample(None, response_text(cell(row, "text")), is_complete(row))]) if rows.have("text") else None


def _sft_example(row: Row, name: str) -> SFTExample:
    out = SFTExample(prompt_in(row), response_text(cell(row, name)), is_complete(row))
    if name == "text" and isinstance(row["prompt"], str) and out.response.startswith(row["prompt"]):
        raise RowError("text begins with the prompt\n  give the response alone as text, or leave prompt out (--columns)")
    return out


def _rated_rows(rows: Rows) -> list[RatedResponse]:
    if rows.have(*RATED_LISTS):
        return rows.each(lambda row: [RatedResponse(prompt_in(row), text, score) for text, score in responses_of(row)])
    if rows.have(*RATED):
        return rows.each(lambda row: [_rated(row)])
    raise rows.wrong_columns("rated responses", RATED, RATED_LISTS)


def _rated(row: Row) -> RatedResponse:
    return RatedResponse(
        prompt_in(row), response_text(cell(row, "response")), finite_score(cell(row, "score")), tokens_of(row), is_complete(row)
    )


def _labelled(row: Row) -> list[Preference]:
    """Rows of imdb_preference: ``chosen`` is the index of the better response in ``responses``."""
    prompt, found, index = prompt_in(row), responses_of(row), cell(row, "chosen")
    if isinstance(index, str) and index.isascii() and index.isdigit():
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(found):
        raise RowError(f"chosen must be the index of one of {len(found)} responses, got {index!r}")
    best, high = found[index]
    return [Preference(prompt, best, text, high - score) for text, score in found if text != best]


def _preference(row: Row) -> list[Preference]:
    both = cell(row, "chosen"), cell(row, "rejected")
    if "prompt" in row:
        prompt = prompt_in(row)
        chosen, rejected = both
    else:  # whole conversations: their common prefix is the prompt
        if any(not isinstance(side, list | tuple) for side in both):
            raise RowError("chosen and rejected are texts, and there is no column prompt\n  add one")
        shared = 0
        while shared < min(map(len, both)) - 1 and both[0][shared] == both[1][shared]:
            shared += 1
        prompt, chosen, rejected = prompt_in(row, both[0][:shared]), both[0][shared:], both[1][shared:]
    scores = row.get("chosen_score", row.get("score_chosen")), row.get("rejected_score", row.get("score_rejected"))
    margin = None if None in scores else finite_score(scores[0]) - finite_score(scores[1])
    found = Preference(prompt, response_text(chosen), response_text(rejected), margin)
    if found.chosen == found.rejected:
        raise RowError("chosen and rejected are the same text")
    return [found]


def _conversation(row: Row) -> list[SFTExample]:
    turns = list_of(row, "messages")
    return [SFTExample(prompt_in(row, turns[:-1]), response_text(turns[-1:]), is_complete(row))]
