"""Which of the given pairs was a value trained on? By the fingerprints of training rows beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivg.diagnostics.pairs import Pair
from ivg.model import cached_lms
from ivg.models.training_rows import read_training_rows, seen, source_of
from ivg.types import Value


@dataclass(frozen=True)
class TrainingOverlap:
    """What is known of a value's training data.

    Attributes:
        seen: True for each pair with a response that the value was trained on [pairs].
        unknown: names of its networks that have no fingerprints beside the weights.
    """

    seen: NDArray[np.bool_]
    unknown: tuple[str, ...]


def training_overlap(value: Value, pairs: Sequence[Pair]) -> TrainingOverlap:
    """The overlap of pairs with the training data of every network of a value (a Python function has none).

    Raises:
        ModelError: a damaged file of fingerprints.
    """
    found, unknown = np.zeros(len(pairs), dtype=bool), []
    for name, network in _networks(value):
        source = source_of(network)
        rows = None if source is None else read_training_rows(source)
        if rows is None:
            unknown.append(name)
        elif len(rows):
            found |= [seen(rows, p.prompt, p.chosen) or seen(rows, p.prompt, p.rejected) for p in pairs]
    return TrainingOverlap(found, tuple(dict.fromkeys(unknown)))


def _networks(value: Any) -> Iterator[tuple[str, Any]]:
    """(name, network) of every model inside a value."""
    own = list(cached_lms(value))
    for lm in own:
        yield lm.name, lm.model.network
    for _, part in getattr(value, "parts", ()):
        if not list(cached_lms(part)):
            yield from _networks(part)
    if not own and (network := getattr(value, "network", None)) is not None:
        yield value.name, network
