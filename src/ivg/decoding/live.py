"""What a request asks for, and what is kept for it while it runs.

Knows: the settings of a search and where they end. Must not know how beams are chosen (``decoding.rules`` and its
neighbours), nor how requests share rounds (``decoding.search``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from ivg.draws import mix
from ivg.errors import ConfigError
from ivg.types import Beam, Meter, Prompt, SamplingParams, Step, TokenGuidance, Value

if TYPE_CHECKING:
    from ivg.decoding.rules import Chunk, Rule

QUANTUM = 16
"""Tokens for each round at most, so that long chunks do not keep others waiting. Changes no result."""

Scored = tuple[Beam, float]
"""A hypothesis and what the selecting value says of it (0 where there is none)."""


def demand(name: str, got: object, fine: bool, expected: str) -> None:
    """Raise unless ``fine``.

    Raises:
        ConfigError: names the setting, what it may be and what it got.
    """
    if not fine:
        raise ConfigError(f"{name} must be {expected}, got {got}")


@dataclass(frozen=True, slots=True)
class Rejection:
    """Settings of CARDS' segment rejection (Li et al. 2024, arXiv 2406.16306; METHOD, section 6); see ``decoding.rejection``.

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
        demand("target", self.target, self.target is None or math.isfinite(self.target), "a finite reward")
        demand("accept_scale", self.accept_scale, 0 < self.accept_scale < math.inf, "positive")
        demand("threshold_start", self.threshold_start, 0 <= self.threshold_start <= 1, "in [0, 1]")
        demand("tries", self.tries, self.tries >= 1, "at least 1")
        demand("segment_entropy", self.segment_entropy, self.segment_entropy > 0, "positive (nats)")
        demand("segment_min", self.segment_min, self.segment_min >= 1, "at least 1 token")


@dataclass(frozen=True, slots=True)
class Particles:
    """Settings of the particle filter (METHOD, section 6); see ``decoding.particles``.

    Attributes:
        particle_beta: weight of the value in the target pi_base * exp(particle_beta * V).
        resample_below: resample when the effective sample size is below this share of the particles; 0: never.
    """

    particle_beta: float = 1.0
    resample_below: float = 0.5

    def __post_init__(self) -> None:
        demand("particle_beta", self.particle_beta, math.isfinite(self.particle_beta), "a finite number")
        demand("resample_below", self.resample_below, 0 <= self.resample_below <= 1, "in [0, 1]")


@dataclass(frozen=True, slots=True)
class Search:
    """CBS(W, K, L), its token guidance and its selection; see ``decoding.strategies`` for the named ones.

    ``decay`` < 1 spends the budget of W * K continuations for each chunk early (``decoding.rules.budgets``). ``rejection``
    and ``particles`` replace the selection by another rule.
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


@dataclass(frozen=True, slots=True)
class Request:
    """One response that is wanted.

    Attributes:
        prompt: what to answer.
        search: how to search.
        sampling: how to draw, when to stop.
        seed: with ``index`` (number of the sample for this prompt) decides every draw.
        trace: keep the tree of beams in the completion.
        record: fill ``Completion.guide_shift`` (a trace does so too).
        alternatives: fill ``Completion.details``, with so many of the likeliest tokens at each place; None: do not.
        stride: tokens for each round at most, for whoever wants to see text sooner. Changes no result.
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

    @property
    def draw_seed(self) -> int:
        """Seed of this request's draws."""
        return mix(self.seed, self.index)


@dataclass(slots=True)
class Live:
    """A request on its way: ``kept`` were selected (at first the empty response), ``growing`` belong to the current chunk."""

    id: int
    request: Request
    rule: Rule
    started: float
    kept: list[Scored]
    meter: Meter
    prompt_tokens: int
    growing: list[Beam] = field(default_factory=list)
    chunk: Chunk | None = None
    left: int = 0
    """Tokens that the current chunk may still grow."""
    inside: bool = False
    """The current chunk has had a round already."""
    round: int = 0
    """Tokens of the round that is under way."""
    clock: float = 0.0
    """What its rounds have cost (``decoding.fairness``)."""
    overtaken: int = 0
    """Requests that came later and were let in before."""
    pending: set[int] = field(default_factory=set)
    """Keys of beams whose orders are not done (engines that work on by themselves)."""
    families: dict[int, list[Beam]] = field(default_factory=dict)
    """Children of the others, and how far those under way have come, by the key of their parent."""
    trace: list[Step] = field(default_factory=list)

    @property
    def records(self) -> bool:
        """Are shifts and pieces of text wanted for every token?"""
        return self.request.trace or self.request.record


def check_watching(request: Request) -> None:
    """Raise for what cannot be shown of a request.

    Raises:
        ConfigError: a negative number of alternatives, or a stride below one.
    """
    demand("alternatives", request.alternatives, request.alternatives is None or request.alternatives >= 0, "0 or more tokens")
    demand("stride", request.stride, request.stride >= 1, "at least 1 token")


def asked(request: Request) -> set[str]:
    """What ``request`` asks of an engine beyond drawing tokens: names as in ``Engine.lacks``."""
    search, sampling = request.search, request.sampling
    wanted = {
        "pause": search.rejection is not None,
        "weigh": search.particles is not None and search.guidance is not None,
        "alternatives": request.alternatives is not None,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "min_p": sampling.min_p > 0,
        "top_k": sampling.top_k > 0,
        "ignore_eos": sampling.ignore_eos,
    }
    return {name for name, needed in wanted.items() if needed}


class _Sizes(Protocol):
    @property
    def width(self) -> int: ...
    @property
    def successors(self) -> int: ...
    @property
    def chunk_length(self) -> int | None: ...
    @property
    def decay(self) -> float: ...
    @property
    def soft_scale(self) -> float: ...


def check_sizes(search: _Sizes) -> None:
    """Raise for sizes that cannot be: W, K or L below one, budgets that grow.

    Raises:
        ConfigError: names the setting and what it got.
    """
    for letter, name in (("W", "width"), ("K", "successors"), ("L", "chunk_length")):
        number = getattr(search, name)
        demand(f"{name} ({letter})", number, number is None or number >= 1, "at least 1")
    demand("decay", search.decay, 0 < search.decay <= 1, "in (0, 1]")
    demand("soft_scale", search.soft_scale, search.soft_scale > 0, "positive")


def check_search(search: Search) -> None:
    """Raise for searches that cannot be.

    Raises:
        ConfigError: an impossible size, two rules at once, or a rule without the value that it needs.
    """
    check_sizes(search)
    if search.guidance is not None:
        demand("gate", search.guidance.gate, search.guidance.gate >= 0, "0 (guide everywhere) or more nats")
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
        demand("draft", draft, draft == 0, "0 with rule=reject, whose segments end where the base is in doubt")
        demand("width · successors (W·K)", search.width * search.successors, search.width * search.successors == 1, "1 for rejection")
        longest, least = search.chunk_length, search.rejection.segment_min
        demand("segment_min", least, longest is None or least <= longest, f"at most chunk_length ({longest})")


def check_sampling(sampling: SamplingParams) -> None:
    """Raise for sampling parameters that cannot be.

    Raises:
        ConfigError: names the parameter, what it got and what it may be.
    """
    rules = (
        ("temperature", sampling.temperature >= 0, "0 (greedy) or more"),
        ("top_k", sampling.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 < sampling.top_p <= 1, "in (0, 1]"),
        ("min_p", 0 <= sampling.min_p < 1, "in [0, 1)"),
        ("repetition_penalty", sampling.repetition_penalty > 0, "positive"),
        ("max_new_tokens", sampling.max_new_tokens >= 1, "at least 1"),
    )
    for name, fine, expected in rules:
        demand(name, getattr(sampling, name), fine, expected)
