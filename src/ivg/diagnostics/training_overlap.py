"""Which of the given pairs was a value trained on? By the fingerprints of training rows beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ivg.models.cached_lm import CachedLM
from ivg.models.training_rows import read_training_rows, seen, source_of
from ivg.types import Preference, Value


@dataclass(frozen=True)
class TrainingOverlap:
    """What is known of a value's training data.

    Attributes:
        seen: True for each pair with a response that the value was trained on [pairs].
        unknown: names of its networks (or their adapters) that have no fingerprints beside the weights.
    """

    seen: NDArray[np.bool_]
    unknown: tuple[str, ...]


def training_overlap(value: Value, pairs: Sequence[Preference]) -> TrainingOverlap:
    """The overlap of pairs with the training data of every network and adapter of a value (a Python function has none).

    Raises:
        ModelError: a damaged file of fingerprints.
    """
    found, unknown = np.zeros(len(pairs), dtype=bool), []
    sources: list[tuple[str, str | Path | None]] = [(name, source_of(network)) for name, network in value.networks()]
    for lm in value.cached_lms():
        if isinstance(lm, CachedLM) and lm.adapter_folder is not None:
            sources.append((lm.name, lm.adapter_folder))
    for name, source in sources:
        rows = None if source is None else read_training_rows(source)
        if rows is None:
            unknown.append(name)
        elif len(rows):
            found |= [seen(rows, p.prompt, p.chosen) or seen(rows, p.prompt, p.rejected) for p in pairs]
    return TrainingOverlap(found, tuple(dict.fromkeys(unknown)))
