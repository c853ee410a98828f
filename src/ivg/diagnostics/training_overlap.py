"""Which of the given pairs was a value trained on? By the fingerprints beside the weights (``models.training_rows``).

Knows: values and the networks in them. Must not know what is measured, nor how results are shown.
"""

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
class TrainedOn:
    """What is known of a value's training data.

    Attributes:
        seen: True for each pair of which it was trained on a response [pairs].
        unknown: its networks that have no fingerprints beside them.
    """

    seen: NDArray[np.bool_]
    unknown: tuple[str, ...]


def trained_on(value: Value, pairs: Sequence[Pair]) -> TrainedOn:
    """Ask every network of a value; Python functions and networks made in memory have no training data that could be known.

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
    return TrainedOn(found, tuple(dict.fromkeys(unknown)))


def _networks(value: Any) -> Iterator[tuple[str, Any]]:
    """(name, network) of all that a value reads with."""
    own = list(cached_lms(value))
    for reader in own:
        yield reader.name, reader.model.network
    for _, part in getattr(value, "parts", ()):
        if not list(cached_lms(part)):
            yield from _networks(part)
    if not own and (network := getattr(value, "network", None)) is not None:
        yield value.name, network
