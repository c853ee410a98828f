"""What values and rewards answer, checked: one finite number for each response, or, in its place, what went wrong with that one.

Whoever asks a value or a reward asks here, so that one bad response never costs the others. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from ivg.errors import IVGError, PromptError, ScoreError, ScoreFault
from ivg.types import Hypothesis, Prompt, Value

T = TypeVar("T")
Scores = list["float | ScoreFault"]


class Judge(Protocol):
    """What scores whole responses (``values.reward.Reward``)."""

    name: str

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The reward of each (prompt, response)."""
        ...


@runtime_checkable
class NotingJudge(Protocol):
    """One that may read less than it is given."""

    def note(self, prompt: Prompt, response: str) -> str | None:
        """What is left out when this is scored; None: nothing."""


def each(name: str, ask: Callable[[Sequence[T]], Any], items: Sequence[T]) -> Scores:
    """``ask(items)``, checked: numbers, and a fault for every item that makes ``ask`` raise, or whose number is none or not finite.

    After an exception, or with a wrong number of scores, the items are asked for again in halves, down to one. What ivg itself
    raises is about all of them (a model that cannot be used) and is raised on, but for a PromptError.

    Args:
        name: of the value or reward, for errors.
        ask: gives one score for each item: a list, tuple or tensor of numbers.
        items: hypotheses, or pairs of prompt and response.
    """
    if not items:
        return []
    try:
        found = ask(items)
    except ScoreError as e:
        if len(e.scores) == len(items):
            return list(e.scores)
        problem = ScoreFault(f"{name}: {_line(e)}")
    except PromptError as e:
        problem = ScoreFault(str(e), prompt=True)
    except IVGError:
        raise
    except (Exception, SystemExit) as e:  # whatever a user's function raises; sys.exit() in it would end the run as if all were well
        problem = raised(name, e)
    else:
        scores = _as_list(found)
        if scores is not None and len(scores) == len(items):
            return [number(name, score) for score in scores]
        got = f"{len(scores)} scores" if scores is not None else f"{_shown(found)} instead of a list of scores"
        problem = ScoreFault(f"{name} gave {got} for {len(items)} response{'s' if len(items) > 1 else ''}: expected one for each")
    if len(items) == 1:
        return [problem]
    half = len(items) // 2
    return [*each(name, ask, items[:half]), *each(name, ask, items[half:])]


def score_each(value: Value, hypotheses: Sequence[Hypothesis]) -> Scores:
    """What ``value`` says of each hypothesis (:func:`each`)."""
    return each(f"the value {value.name}", value.score, hypotheses)


def judge_each(judge: Judge, pairs: Sequence[tuple[Prompt, str]]) -> Scores:
    """What ``judge`` says of each (prompt, response) (:func:`each`)."""
    return each(f"the reward {judge.name}", judge.judge, pairs)


def note_of(judge: Judge, prompt: Prompt, response: str) -> str | None:
    """What ``judge`` leaves out of this, in words; None: nothing."""
    return judge.note(prompt, response) if isinstance(judge, NotingJudge) else None


def every(scores: Scores) -> list[float]:
    """``scores`` where none is a fault.

    Raises:
        ScoreError: one is; names the first, and has them all.
    """
    for i, score in enumerate(scores):
        if isinstance(score, ScoreFault):
            raise ScoreError(f"response {i + 1} of {len(scores)}: {score}" if len(scores) > 1 else str(score), scores)
    return [float(score) for score in scores]


def number(name: str, score: Any) -> float | ScoreFault:
    """``score`` as a finite number."""
    try:
        found = float(score.item() if hasattr(score, "item") else score)  # tensors and arrays of one number
    except Exception:  # tensors raise what they like
        return ScoreFault(f"{name} gave {_shown(score)}: expected a number")
    if math.isfinite(found):
        return found
    return ScoreFault(f"{name} gave {'NaN' if found != found else 'infinity' if found > 0 else '-infinity'}: expected a finite number")


def raised(name: str, e: BaseException) -> ScoreFault:
    """What to say of an exception that is not ours."""
    return ScoreFault(f"{name} raised {type(e).__name__}: {_line(e)}", said=f"{name} failed on this response")


def _as_list(found: Any) -> list[Any] | None:
    if isinstance(found, str | bytes | Mapping):
        return None
    try:
        return list(found)
    except TypeError:
        return None


def _line(e: BaseException) -> str:
    return " ".join(str(e).split()) or "without a word"


def _shown(found: Any) -> str:
    shape = getattr(found, "shape", None)
    if shape is not None and tuple(shape):
        return f"a {type(found).__name__} of shape {tuple(shape)}"
    text = repr(found)
    return text if len(text) <= 60 else f"a {type(found).__name__}"
