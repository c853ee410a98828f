"""The interface of selection rules: which beams grow next, and which of the grown are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from ivg.types import Beam, EntropyStop, Posterior

Scored = tuple[Beam, float]
"""A hypothesis and its score by the selecting value (0 where there is none)."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What grows next.

    Attributes:
        expansions: beams and how many children each gets.
        tokens: length of the chunk at most.
        held: hypotheses that stay kept while others grow.
        first: number of the first child of each beam (:func:`ivg.utils.rng.child_rng_path`).
        keep: the beams will be extended again.
        pause: where the chunk ends early.
        drafted: the drafter's model writes it (:class:`~ivg.search.request.Speculation`).
    """

    expansions: list[tuple[Beam, int]]
    tokens: int
    held: list[Scored] = field(default_factory=list)
    first: int = 0
    keep: bool = False
    pause: EntropyStop | None = None
    drafted: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """The result of a rule for a grown chunk.

    Attributes:
        kept: the next ``kept``; may contain a hypothesis several times.
        dropped: hypotheses that lost, for traces.
        released: hypotheses whose caches can be freed.
        answer: the response, when nothing is left to grow.
        error: why there can be none.
    """

    kept: list[Scored]
    dropped: list[Scored]
    released: list[Beam]
    answer: Scored | None = None
    error: str | None = None


class SelectionRule(ABC):
    """How one request selects.

    A rule sees hypotheses and scores, never engines, values or other requests. One object serves one request, from its first chunk to
    its last, and may keep state between chunks; it draws from counters (:mod:`ivg.utils.rng`), so that nothing depends on rounds.
    """

    reads_prompt: bool = False
    """Set :attr:`prompt_value`, the value of the empty response, before the first chunk."""
    prompt_advice: str = ""
    """What to do where there is no such value."""
    needs_log_ratio: bool = False
    """Fill ``Beam.log_ratio`` where the proposal is guided, or drafted."""
    prompt_value: float = 0.0
    posterior: Posterior | None = None
    """All weighted hypotheses, once the answer is chosen, where the rule has weights."""
    drafted_tokens: int = 0
    """Tokens of the kept hypothesis that a draft model wrote."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Hypotheses in flight at most."""

    @property
    def retained(self) -> list[Beam]:
        """Hypotheses that the rule keeps besides the kept ones. Default: none."""
        return []

    @abstractmethod
    def begin(self, kept: list[Scored]) -> Chunk:
        """The next chunk; ``kept`` has at least one beam that is not finished."""

    @abstractmethod
    def choose(self, held: list[Scored], grown: list[Scored]) -> Selection:
        """Select among the hypotheses that were ``held`` and those that have ``grown``, in the order of the chunk's expansions."""
