"""What a request asks for, and what is kept for it while it runs.

Knows: the settings of a search and where they end. Must not know how beams are chosen (``search.selection`` and its
neighbours), nor how requests share rounds (``search.searcher``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ivg.errors import ConfigError
from ivg.settings.schema import validate
from ivg.settings.search import RequestSettings, SearchSettings
from ivg.types import Beam, Prompt, SamplingParams, Step, TokenCounter, TokenGuidance, Value
from ivg.utils.rng import mix

if TYPE_CHECKING:
    from ivg.search.selection import Chunk, SelectionRule

QUANTUM = 16
"""Tokens for each round at most, so that long chunks do not keep others waiting. Changes no result."""

Scored = tuple[Beam, float]
"""A hypothesis and what the selecting value says of it (0 where there is none)."""


def require(name: str, got: object, fine: bool, expected: str) -> None:
    """Raise unless ``fine``.

    Raises:
        ConfigError: names the setting, what it may be and what it got.
    """
    if not fine:
        raise ConfigError(f"{name} must be {expected}, got {got}")


@dataclass(frozen=True, slots=True)
class Rejection:
    """Settings of CARDS' segment rejection (Li et al. 2024, arXiv 2406.16306; METHOD, section 6); see ``search.rejection``.

    Attributes:
        target: r*, the reward that a whole response should reach, in units of the value. None: V(prompt) +
            accept_scale * log(tries), the highest target for which a response no better than its prompt is still accepted
            once in ``tries`` attempts; whoever knows the rewards of good responses gives a number.
        accept_scale: beta of the acceptance probability min(1, exp((r - threshold) / accept_scale)).
        threshold_start: share a of r* in the first threshold, (1 - a) * V(prompt) + a * r*.
        tries: segments tried at most for one place; after the last the best of them is taken.
        segment_entropy: a segment ends where the base's next-token entropy reaches this many nats.
        segment_min: tokens of a segment at least; at most the chunk length.
    """

    target: float | None = None
    accept_scale: float = 0.7
    threshold_start: float = 0.5
    tries: int = 20
    segment_entropy: float = 3.0
    segment_min: int = 4

    def __post_init__(self) -> None:
        validate(self, SearchSettings)


@dataclass(frozen=True, slots=True)
class Particles:
    """Settings of the particle filter (METHOD, section 6); see ``search.particles``.

    Attributes:
        particle_beta: weight of the value in the target pi_base * exp(particle_beta * V).
        resample_below: resample when the effective sample size is below this share of the particles; 0: never.
    """

    particle_beta: float = 1.0
    resample_below: float = 0.5

    def __post_init__(self) -> None:
        validate(self, SearchSettings)


@dataclass(frozen=True, slots=True)
class Search:
    """CBS(W, K, L), its token guidance and its selection; see ``search.methods`` for the named ones.

    ``decay`` < 1 spends the budget of W * K continuations for each chunk early (``search.selection.budgets``). ``rejection``
    and ``particles`` replace the selection by another rule, ``make_rule`` by your own: it gets the request and returns a
    :class:`~ivg.search.selection.SelectionRule` for it.
    """

    width: int = 1
    successors: int = 1
    chunk_length: int | None = None
    guidance: TokenGuidance | None = None
    value: Value | None = None
    rule: Literal["top", "soft"] = "top"
    soft_scale: float = 1.0
    original: bool = False
    decay: float = 1.0
    rejection: Rejection | None = None
    particles: Particles | None = None
    make_rule: Callable[[Request], SelectionRule] | None = None

    def __post_init__(self) -> None:
        validate(self, SearchSettings)


@dataclass(frozen=True, slots=True)
class Request:
    """One response that is wanted.

    Attributes:
        prompt: what to answer.
        search: how to search.
        sampling: how to draw, when to stop.
        seed: with ``index`` (number of the sample for this prompt) decides every draw; 64 bits with their sign.
        trace: keep the tree of beams in the completion.
        record: fill ``Completion.guide_shift`` (a trace does so too).
        alternatives: fill ``Completion.details``, with so many of the likeliest tokens at each place; None: do not.
        stride: tokens for each round at most, for whoever wants to see text sooner. Changes no result.
        from_checkpoint: those settings of ``sampling`` that are the checkpoint's own; for the record alone.
    """

    prompt: Prompt
    search: Search = field(default_factory=Search)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    index: int = 0
    trace: bool = False
    record: bool = False
    alternatives: int | None = None
    stride: int = QUANTUM
    from_checkpoint: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate(self, RequestSettings)

    @property
    def draw_seed(self) -> int:
        """Seed of this request's draws."""
        return mix(self.seed, self.index)


@dataclass(slots=True)
class RequestState:
    """A request on its way: ``kept`` were selected (at first the empty response), ``growing`` belong to the current chunk."""

    id: int
    request: Request
    rule: SelectionRule
    started: float
    kept: list[Scored]
    token_counter: TokenCounter
    prompt_tokens: int
    growing: list[Beam] = field(default_factory=list)
    chunk: Chunk | None = None
    left: int = 0
    """Tokens that the current chunk may still grow."""
    inside: bool = False
    """The current chunk has had a round already."""
    round: int = 0
    """Tokens of the round that is under way."""
    virtual_time: float = 0.0
    """Cost of its steps so far (``search.scheduling``)."""
    bypassed: int = 0
    """Later requests that were admitted before it."""
    pending: set[int] = field(default_factory=set)
    """Keys of beams that are still being extended (engines that work on by themselves)."""
    families: dict[int, list[Beam]] = field(default_factory=dict)
    """Children of the others, and how far those under way have come, by the key of their parent."""
    trace: list[Step] = field(default_factory=list)

    @property
    def records(self) -> bool:
        """Are shifts and pieces of text wanted for every token?"""
        return self.request.trace or self.request.record


def required_features(request: Request) -> set[str]:
    """What ``request`` asks of an engine: names as in ``Engine.unsupported``, and every setting of sampling that is not at its default."""
    search, sampling = request.search, request.sampling
    wanted = {
        "pause": search.rejection is not None,
        "return_log_ratio": search.particles is not None and search.guidance is not None,
        "alternatives": request.alternatives is not None,
    }
    return {name for name, needed in wanted.items() if needed} | set(sampling.changed)


def check_search(search: Search) -> None:
    """Raise for searches that cannot be.

    Raises:
        ConfigError: two rules at once, or a rule without the value that it needs.
    """
    if search.rejection is None and search.particles is None:
        return
    if search.rejection is not None and search.particles is not None:
        raise ConfigError("got settings of rejection and of particles\n  a search has one rule; leave one of them out")
    if search.value is None:
        raise ConfigError("rejection and particles need a value to select by\n  name one (select=explicit, reward …)")
    if search.decay != 1.0 or search.original or search.rule == "soft":
        raise ConfigError("rejection and particles have their own rule\n  leave out decay, original and soft")
    if search.rejection is not None:
        draft = search.guidance.draft if search.guidance is not None else 0
        require("draft", draft, draft == 0, "0 with rule=reject, whose segments end where the base is in doubt")
        require("width · successors (W·K)", search.width * search.successors, search.width * search.successors == 1, "1 for rejection")
        longest, least = search.chunk_length, search.rejection.segment_min
        require("segment_min", least, longest is None or least <= longest, f"at most chunk_length ({longest})")
