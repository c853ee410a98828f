"""What is asked for: a request, its search, and the settings of the selection rules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ivg.errors import ConfigError
from ivg.search.rule import SelectionRule
from ivg.settings.per_request import RequestSettings
from ivg.settings.schema import validate
from ivg.settings.search import Acceptance, SearchSettings
from ivg.types import Prompt, SamplingParams, Thinking, TokenGuidance, Value
from ivg.utils.rng import mix

QUANTUM = RequestSettings.stride
"""Tokens of one round at most, so that long chunks do not keep other requests waiting. Changes no result."""
LONG_CHUNK = 8
"""Chunks of at least this many tokens are streamed while they grow."""


def require(name: str, got: object, fine: bool, expected: str) -> None:
    """Raise unless ``fine``.

    Raises:
        ConfigError: names the setting, what it may be and what it got.
    """
    if not fine:
        raise ConfigError(f"{name} must be {expected}, got {got}")


@dataclass(frozen=True, slots=True)
class Rejection:
    """Settings of CARDS' segment rejection (Li et al. 2024, arXiv 2406.16306); see :mod:`ivg.search.rejection`.

    Attributes:
        target: r*, the reward that a whole response should reach, in units of the value. None: V(prompt) +
            accept_scale * log(tries), the highest target for which a response no better than its prompt is still accepted
            once in ``tries`` attempts. Where the rewards of good responses are known, give a high quantile of them.
        accept_scale: beta of the acceptance probability min(1, exp((r - threshold) / accept_scale)).
        threshold_start: share a of r* in the first threshold, (1 - a) * V(prompt) + a * r*.
        tries: segments tried at most for one place; after the last the best of them is taken.
        segment_entropy: a segment ends where the base's next-token entropy reaches this many nats.
        segment_min: tokens of a segment at least; at most the chunk length.
    """

    target: float | None = SearchSettings.target
    accept_scale: float = SearchSettings.accept_scale
    threshold_start: float = SearchSettings.threshold_start
    tries: int = SearchSettings.tries
    segment_entropy: float = SearchSettings.segment_entropy
    segment_min: int = SearchSettings.segment_min

    def __post_init__(self) -> None:
        validate(self, SearchSettings)


@dataclass(frozen=True, slots=True)
class Particles:
    """Settings of the particle filter; see :mod:`ivg.search.particles`.

    Attributes:
        particle_beta: weight of the value in the target pi_base * exp(particle_beta * V).
        resample_below: resample when the effective sample size is below this share of the particles; 0: never.
    """

    particle_beta: float = SearchSettings.particle_beta
    resample_below: float = SearchSettings.resample_below

    def __post_init__(self) -> None:
        validate(self, SearchSettings)


@dataclass(frozen=True, slots=True)
class Speculation:
    """Settings of guided speculative chunks; see :mod:`ivg.search.speculation`.

    Attributes:
        value: its :meth:`~ivg.types.Value.draft_model` writes the drafts.
        tilt: judge drafts by value + soft_scale * log(pi_base / pi_draft) (GSI).
        acceptance: ``threshold``, ``clip`` or ``sigmoid``: how the probability that a draft is kept depends on its value.
        accept_threshold: from which value on it is kept; None: the value of the prompt.
        accept_scale: of ``clip`` and ``sigmoid``, in units of the value.
        soft_scale: of the draw among drafts, or among chunks of the base, in units of the value.
    """

    value: Value
    tilt: bool = SearchSettings.tilt
    acceptance: Acceptance = SearchSettings.acceptance
    accept_threshold: float | None = SearchSettings.accept_threshold
    accept_scale: float = SearchSettings.accept_scale
    soft_scale: float = SearchSettings.soft_scale

    def __post_init__(self) -> None:
        validate(self, SearchSettings)


@dataclass(frozen=True, slots=True)
class Tree:
    """Settings of tree search; see :mod:`ivg.search.tree`.

    Attributes:
        exploration: weight of sqrt(ln N(parent) / N(child)) beside the value of a child, in units of the value.
    """

    exploration: float = SearchSettings.exploration

    def __post_init__(self) -> None:
        validate(self, SearchSettings)


@dataclass(frozen=True, slots=True)
class Search:
    """How to search: chunk-level beam search of width W with K successors and chunks of L tokens, its guidance and its selection.

    :mod:`ivg.search.methods` has the named ones.

    Attributes:
        width: beams kept (W).
        successors: continuations of each kept beam (K).
        chunk_length: tokens between selections (L); None: the whole response.
        guidance: guides every token.
        value: ranks hypotheses.
        rule: ``top``: keep the best; ``soft``: draw with probability proportional to exp(score / soft_scale).
        soft_scale: in units of the score.
        original: treat finished hypotheses as the code of the IVG paper does: K copies of each compete.
        decay: < 1 spends the budget of W * K continuations for each chunk early (:func:`ivg.search.selection.budgets`).
        rejection: select by rejection of segments (CARDS).
        particles: select by a particle filter.
        thinking: responses begin with thinking, which is neither guided nor selected; the first chunk is thinking and L tokens of answer.
        make_rule: makes your own :class:`~ivg.search.selection.SelectionRule` for a request.
        chunk_until: a chunk also ends where this text ends a step of the answer (:mod:`ivg.types.steps`).
        speculation: a small model drafts chunks, and the base writes where they are refused.
        tree: search a tree of chunks, sampling at most the tokens of W beams.
    """

    width: int = SearchSettings.width
    successors: int = SearchSettings.successors
    chunk_length: int | None = SearchSettings.chunk_length
    guidance: TokenGuidance | None = None
    value: Value | None = None
    rule: Literal["top", "soft"] = "top"
    soft_scale: float = SearchSettings.soft_scale
    original: bool = SearchSettings.original
    decay: float = SearchSettings.decay
    rejection: Rejection | None = None
    particles: Particles | None = None
    thinking: Thinking | None = None
    make_rule: Callable[[Request], SelectionRule] | None = None
    chunk_until: str | None = SearchSettings.chunk_until
    speculation: Speculation | None = None
    tree: Tree | None = None

    def __post_init__(self) -> None:
        validate(self, SearchSettings)

    @property
    def values(self) -> list[Value]:
        """The values that read prompts and responses."""
        guide = None if self.guidance is None else self.guidance.value
        drafter = None if self.speculation is None else self.speculation.value
        return [value for value in (guide, self.value, drafter) if value is not None]


@dataclass(frozen=True, slots=True)
class Request:
    """One response to generate.

    Attributes:
        prompt: what to answer.
        search: how to search.
        sampling: how to draw, when to stop.
        seed: with ``index`` (number of the sample for this prompt) decides every draw; 64 bits with their sign.
        trace: keep the tree of beams in the completion.
        record: fill ``Completion.guide_shift`` (a trace does so too).
        alternatives: fill ``Completion.details``, with so many of the likeliest tokens at each position; None: do not.
        stride: tokens of one round at most, to see text sooner. Changes no result.
        from_checkpoint: those settings of ``sampling`` that are the checkpoint's own; for the record alone.
    """

    prompt: Prompt
    search: Search = field(default_factory=Search)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = RequestSettings.seed
    index: int = RequestSettings.index
    trace: bool = RequestSettings.trace
    record: bool = RequestSettings.record
    alternatives: int | None = RequestSettings.alternatives
    stride: int = RequestSettings.stride
    from_checkpoint: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate(self, RequestSettings)
        if self.prompt.images and self.search.guidance is not None and (draft := self.search.guidance.draft):
            raise ConfigError(f"draft={draft} takes back tokens, and a prompt with pictures cannot be cut\n  leave draft out")
        if self.alternatives is not None and self.search.speculation is not None:
            raise ConfigError(
                "alternatives (logprobs, best_of) compare each token with the base, and rule=speculate does not\n  leave them out"
            )

    def with_prompt(self, prompt: Prompt) -> Request:
        """The same for another prompt, behind the same instructions."""
        return replace(self, prompt=replace(prompt, contrast=self.prompt.contrast, negative=self.prompt.negative))

    @property
    def draw_seed(self) -> int:
        """Seed of this request's draws."""
        return mix(self.seed, self.index)


class RepeatedPrompts:
    """Indices of the samples of a list of prompts: one that comes again gets new draws, and any other those that it has alone.

    Args:
        n: samples for each prompt.
        first: index of the first sample.
    """

    def __init__(self, n: int, first: int = 0) -> None:
        self.n, self.first = n, first
        self._seen: Counter[int] = Counter()

    def indices(self, prompt: Prompt) -> range:
        """The indices of the next ``n`` samples of ``prompt``."""
        start = self.first + self.count_before(prompt) * self.n
        return range(start, start + self.n)

    def count_before(self, prompt: Prompt) -> int:
        """How often ``prompt`` came before; it counts from now on."""
        key = hash(prompt.without_data)  # no prompts are kept: an endless list may give them
        self._seen[key] += 1
        return self._seen[key] - 1


def streaming_stride(request: Request) -> int:
    """Tokens of a stream's rounds: 1 where a single beam grows, few where chunks are long; speculative decoding needs whole rounds."""
    search = request.search
    if search.guidance is not None and search.guidance.draft:
        return QUANTUM
    if search.width * search.successors == 1:
        return 1
    return 4 if (search.chunk_length or math.inf) >= LONG_CHUNK else QUANTUM


def required_features(request: Request) -> set[str]:
    """What ``request`` needs of an engine: names as in :attr:`Engine.unsupported`, and all sampling settings not at their defaults."""
    search, sampling = request.search, request.sampling
    needed = {
        "pause": search.rejection is not None,
        "until": search.chunk_until is not None,
        "return_log_ratio": search.particles is not None and search.guidance is not None,
        "alternatives": request.alternatives is not None,
        "thinking": search.thinking is not None,
    }
    chunked = search.chunk_length is not None and search.chunk_length < sampling.max_new_tokens
    return {name for name, needs in needed.items() if needs} | sampling.features(chunked=chunked)


def check_search(search: Search) -> None:
    """Raise for settings that contradict each other.

    Raises:
        ConfigError: two selection rules at once, or a rule without the value that it needs.
    """
    rules = {"reject": search.rejection, "particles": search.particles, "speculate": search.speculation, "tree": search.tree}
    named = [rule for rule, settings in rules.items() if settings is not None]
    others = {"make_rule": search.make_rule is not None, "soft": search.rule == "soft"}
    if len(given := named + [name for name, there in others.items() if there]) > 1:
        raise ConfigError(f"got {' and '.join(given)}\n  a search has one selection rule; leave one of them out")
    draft = search.guidance.draft if search.guidance is not None else 0
    if search.thinking is not None:
        check_thinking(draft=draft, rule=named[0] if named else "top")
    if named:
        least = None if search.rejection is None else search.rejection.segment_min
        check_rule(search, named[0], selects=search.value is not None, guided=search.guidance is not None, draft=draft, segment_min=least)
        return
    beams, selects = search.width * search.successors, search.value is not None or search.make_rule is not None
    require("width · successors (W·K)", beams, selects or beams == 1, "1 without a value to select by")


def check_thinking(*, draft: int, rule: str) -> None:
    """Raise for settings that do not go with ``guide_after``.

    Raises:
        ConfigError: drafts, or a rule that compares beams at equal lengths.
    """
    require("draft", draft, draft == 0, "0 with guide_after: thinking is drawn from the base alone")
    require("rule", rule, rule in ("top", "soft"), "top or soft with guide_after: beams that think have no value yet")


def check_rule(
    search: Search | SearchSettings, rule: str, *, selects: bool, guided: bool, draft: int, segment_min: int | None = None
) -> None:
    """Raise for settings that contradict a selection rule that has a module of its own.

    Args:
        search: has the rule.
        rule: ``reject``, ``particles``, ``speculate`` or ``tree``.
        selects: there is a value to select by.
        guided: tokens are guided.
        draft: of the token guidance.
        segment_min: of the rule ``reject``.

    Raises:
        ConfigError: no value to select by, or another setting that does not go with the rule.
    """
    name, beams = f"rule={rule}", search.width * search.successors
    if not selects:
        raise ConfigError(f"{name} needs a value to select by\n  name one (select=explicit, reward …)")
    if search.decay != SearchSettings.decay or search.original:
        raise ConfigError(f"{name} does not use decay and original\n  leave them out")
    if rule == "speculate":
        require("width (W)", search.width, search.width == 1, f"1 with {name}, which has one prefix")
        require("token", "a value", not guided, f"none with {name}: a draft model writes, or the base alone")
    if rule == "reject":
        require("draft", draft, draft == 0, f"0 with {name}, whose segments end where the base is uncertain")
        require("width · successors (W·K)", beams, beams == 1, f"1 with {name}")
        longest = search.chunk_length
        fits = segment_min is None or longest is None or segment_min <= longest
        require("segment_min", segment_min, fits, f"at most chunk_length ({longest})")
