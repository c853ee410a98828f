"""What values and rewards return, checked: one finite number for each response, or what went wrong with that response.

All values and rewards are called through this module, so that one bad response never costs the others. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from ivg.errors import ConfigError, IVGError, PromptError, ScoreError, ScoreFault
from ivg.types.beam import Hypothesis
from ivg.types.messages import Prompt

T = TypeVar("T")
Scores = list["float | ScoreFault"]


class Scorer(Protocol):
    """A :class:`~ivg.types.value.Value`."""

    @property
    def name(self) -> str:
        """In errors."""

    def score(self, hypotheses: Sequence[Hypothesis], /) -> list[float]:
        """One number for each hypothesis."""

    def score_candidates(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis], /) -> list[float]:
        """One number for each candidate."""


class Judge(Protocol):
    """A :class:`~ivg.types.value.Reward`."""

    @property
    def name(self) -> str:
        """In errors."""

    def judge(self, pairs: Sequence[tuple[Prompt, str]], /) -> list[float]:
        """One number for each (prompt, response)."""


def checked_scores(name: str, score: Callable[[Sequence[T]], Any], items: Sequence[T]) -> Scores:
    """``score(items)``: numbers, and a fault for every item that makes ``score`` raise or that gets no finite number.

    After an exception the items are scored again in halves, down to one. A wrong number of scores is a fault of all items: which score
    belongs to which cannot be told, and a function that gives one number for any list would be right by chance for a list of one.
    Errors of ivg itself concern all items (a model that cannot be used) and are raised, except a PromptError.

    Args:
        name: of the value or reward, for errors.
        score: gives one score for each item: a list, tuple or tensor of numbers.
        items: hypotheses, or pairs of prompt and response.
    """
    if not items:
        return []
    try:
        found = score(items)
    except ScoreError as e:
        if len(e.scores) == len(items):
            return list(e.scores)
        problem = ScoreFault(f"{name}: {_line(e)}")
    except PromptError as e:
        problem = ScoreFault(str(e), prompt=True)
    except IVGError:
        raise
    except (Exception, SystemExit) as e:  # whatever a user's function raises; sys.exit() in it must not end the run
        problem = exception_fault(name, e)
    else:
        scores = _as_list(found)
        if scores is not None and len(scores) == len(items):
            return [finite_score(name, score) for score in scores]
        got = (
            f"{len(scores)} score{'' if len(scores) == 1 else 's'}"
            if scores is not None
            else f"{_shown(found)} instead of a list of scores"
        )
        problem = ScoreFault(f"{name} gave {got} for {len(items)} response{'s' if len(items) > 1 else ''}: expected one for each")
        return [problem] * len(items)
    if len(items) == 1:
        return [problem]
    half = len(items) // 2
    return [*checked_scores(name, score, items[:half]), *checked_scores(name, score, items[half:])]


def score_each(value: Scorer, hypotheses: Sequence[Hypothesis]) -> Scores:
    """The value of each hypothesis (:func:`checked_scores`)."""
    return checked_scores(f"the value {value.name}", value.score, hypotheses)


def score_each_candidate(value: Scorer, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> Scores:
    """The value of each candidate (:meth:`Value.score_candidates`), checked as by :func:`score_each`."""
    return checked_scores(f"the value {value.name}", partial(value.score_candidates, hypotheses), candidates)


def combine_scores(scores: Sequence[Scores], count: int, combine: Callable[[Sequence[float]], float]) -> list[float]:
    """One number for each of ``count`` hypotheses, from its number in each of ``scores``.

    Raises:
        ScoreError: some hypotheses have a fault, the first of which is theirs; has the numbers of all others.
    """
    found: Scores = []
    for of_one in zip(*scores, strict=True) if scores else [()] * count:
        numbers = [score for score in of_one if not isinstance(score, ScoreFault)]
        fault = next((score for score in of_one if isinstance(score, ScoreFault)), None)
        found.append(combine(numbers) if fault is None else fault)
    return require_scores(found)


def judge_each(reward: Judge, pairs: Sequence[tuple[Prompt, str]]) -> Scores:
    """The reward of each (prompt, response) (:func:`checked_scores`)."""
    return checked_scores(f"the reward {reward.name}", reward.judge, pairs)


def require_scores(scores: Scores) -> list[float]:
    """``scores``, if none is a fault.

    Raises:
        ScoreError: one is; names the first, and has all scores.
    """
    for i, score in enumerate(scores):
        if isinstance(score, ScoreFault):
            raise ScoreError(f"response {i + 1} of {len(scores)}: {score}" if len(scores) > 1 else str(score), scores)
    return [float(score) for score in scores]


def finite_score(name: str, score: Any) -> float | ScoreFault:
    """``score`` as a finite number."""
    try:
        found = float(score.item() if hasattr(score, "item") else score)  # tensors and arrays of one number
    except Exception:  # tensors raise what they like
        return ScoreFault(f"{name} gave {_shown(score)}: expected a number")
    if math.isfinite(found):
        return found
    return ScoreFault(f"{name} gave {'NaN' if found != found else 'infinity' if found > 0 else '-infinity'}: expected a finite number")


def exception_fault(name: str, e: BaseException) -> ScoreFault:
    """The fault for an exception that is not one of ivg's."""
    return ScoreFault(f"{name} raised {type(e).__name__}: {_line(e)}", said=f"{name} failed on this response")


def _as_list(found: Any) -> list[Any] | None:
    if isinstance(found, str | bytes | Mapping):
        return None
    try:
        return list(found)
    except TypeError:
        return None


def _line(e: BaseException) -> str:
    return " ".join(str(e).split()) or "no message"


def _shown(found: Any) -> str:
    shape = getattr(found, "shape", None)
    if shape is not None and tuple(shape):
        return f"a {type(found).__name__} of shape {tuple(shape)}"
    text = repr(found)
    return text if len(text) <= 60 else f"a {type(found).__name__}"


def check_finite(what: str, number: object) -> None:
    """Raise unless ``number`` is a finite number.

    Raises:
        ConfigError: names ``what``.
    """
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise ConfigError(f"{what} must be a finite number, got {number!r}")
