"""Do models share the base's vocabulary? With contexts and chat templates, for the first table of ``ivg check``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ivg.models.cached_lm import CachedLM
from ivg.types import Value


@dataclass(frozen=True)
class Compatibility:
    """How one model's vocabulary relates to the base's.

    Attributes:
        name: of the model.
        tokens: size of its vocabulary.
        context: tokens that it can read; None: no limit.
        chat_template: its tokenizer has one.
        different: number of ids whose tokens differ.
        examples: the first of them: (id, the base's token, the model's token).
    """

    name: str
    tokens: int
    context: int | None
    chat_template: bool
    different: int
    examples: tuple[tuple[int, str | None, str | None], ...]

    @property
    def same_vocabulary(self) -> bool:
        """All ids have the same tokens, so the model can guide over the whole vocabulary."""
        return self.different == 0


def compare_vocabularies(base: CachedLM, other: CachedLM) -> Compatibility:
    """Compare a model's vocabulary with the base's."""
    differences = [] if other.vocabulary.same_as(base.vocabulary) else list(base.vocabulary.differences(other.vocabulary))
    return Compatibility(
        name=other.name,
        tokens=len(other.vocabulary.pieces),
        context=other.max_positions,
        chat_template=bool(getattr(other.tokenizer, "chat_template", None)),
        different=len(differences),
        examples=tuple(differences[:5]),
    )


def models_of(values: Mapping[str, Value]) -> dict[str, CachedLM]:
    """Every language model behind the values, by its name."""
    return {lm.name: lm for value in values.values() for lm in value.cached_lms()}
