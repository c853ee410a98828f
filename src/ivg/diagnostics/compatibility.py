"""Do these models fit together? Vocabularies, contexts, chat templates.

Knows: readers and vocabularies. Must not know what the models prefer, nor how results are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ivg.model import cached_lms
from ivg.models.cached_lm import CachedLM
from ivg.models.vocabulary import Vocabulary
from ivg.types import Value


@dataclass(frozen=True)
class Compatibility:
    """How one model's vocabulary relates to the base's: ``same``, or the number of ids that differ and the first of them."""

    name: str
    tokens: int
    context: int | None
    chat_template: bool
    same: bool
    different: int
    first: tuple[tuple[int, str | None, str | None], ...]


def fit(base: CachedLM, other: CachedLM) -> Compatibility:
    """Compare vocabularies, contexts and templates."""
    differences = [] if other.vocabulary.same_as(base.vocabulary) else list(base.vocabulary.differences(other.vocabulary))
    return Compatibility(
        name=other.name,
        tokens=len(other.vocabulary.pieces),
        context=other.max_positions,
        chat_template=bool(getattr(other.tokenizer, "chat_template", None)),
        same=not differences,
        different=len(differences),
        first=tuple(differences[:5]),
    )


def readers(values: Mapping[str, Value]) -> dict[str, CachedLM]:
    """Every reader behind the values, by its name."""
    return {reader.name: reader for value in values.values() for reader in cached_lms(value)}


def vocabulary_lines(base: Vocabulary, f: Compatibility) -> list[str]:
    """The first mismatches, readable."""
    return [f"id {i}: {a!r} in {base.owner}, {b!r} in {f.name}" for i, a, b in f.first]
