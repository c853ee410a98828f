"""Which rows are held out of training for evaluation: the last prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key")


def held_out(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """(training, evaluation): evaluation gets the items of the last ``share`` of the prompts, so that no prompt is in both.

    Of plain texts, which have no prompt, no text is in both.
    """
    keys = [getattr(item, "prompt", None) or getattr(item, "response", number) for number, item in enumerate(items)]
    last = last_share(keys, share)
    return [i for i, k in zip(items, keys, strict=True) if k not in last], [i for i, k in zip(items, keys, strict=True) if k in last]


def last_share(keys: Iterable[Key], share: float) -> frozenset[Key]:
    """The last ``share`` of the different keys (prompts), in order of appearance."""
    distinct = list(dict.fromkeys(keys))
    return frozenset(distinct[len(distinct) - round(len(distinct) * share) :])
