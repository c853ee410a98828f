"""The interface of engines: beams in, longer beams out. Standard library only.

Of an :class:`Engine`, ``vocabulary``, ``open``, ``prompt_tokens`` and ``extend`` must be written; of an :class:`AsyncEngine`, whose
requests end each at its own time, ``submit``, ``poll``, ``abort`` and ``running`` in place of ``extend``. Everything else has a
default. :mod:`ivg.testing` has the laws that every engine obeys.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Self

from ivg.errors import ConfigError, ModelError
from ivg.settings.sampling import SamplingParams
from ivg.settings.schema import validate
from ivg.settings.search import SearchSettings, Transform
from ivg.types.beam import Beam, TokenLogprobs
from ivg.types.messages import Prompt
from ivg.types.thinking import Thinking
from ivg.types.value import Value


@dataclass(frozen=True, slots=True)
class TokenGuidance:
    """Which value guides every token, and how.

    Attributes:
        value: any value; those that know the whole vocabulary shift all logits, others re-score candidates.
        beta: guidance weight; temperature acts afterwards, so the effective strength is beta / temperature.
        candidates: re-score this many of the base's likeliest tokens; 0: shift the whole vocabulary.
        transform: of candidate values: ``identity``, ``log-sigmoid`` (FUDGE), ``centered`` (VAS).
        normalise: mix log-probabilities rather than logits (GenARM).
        gate: guide only where the base's next-token entropy is at least this many nats; 0 guides everywhere. The entropy
            is that of the base's own distribution: all tokens, temperature 1.
        draft: tokens that the value drafts ahead of the base, at most; 0: none. Needs :meth:`Value.drafter`. The number changes the
            speed and no token; but with drafts tokens are drawn by rejection sampling, so 0 draws others, from the same distribution.
        plausibility: where a token is guided, forbid those to which the base alone (temperature 1) gives less than this share of its
            likeliest token's probability (contrastive decoding: Li et al. 2023, arXiv 2210.15097); 0 forbids none.
        kl_budget: nats of KL(pi_guided || pi_base) that the tokens of one answer may cost together, both softmaxes at the request's
            temperature (greedy: 1) before top-k, top-p and the like. The weight is at most beta, and so much that the tokens up to
            ``max_new_tokens`` take the budget; None: no limit.
    """

    value: Value
    beta: float = SearchSettings.beta
    candidates: int = SearchSettings.candidates
    transform: Transform = SearchSettings.transform
    normalise: bool = SearchSettings.normalise
    gate: float = SearchSettings.gate
    draft: int = SearchSettings.draft
    plausibility: float = SearchSettings.plausibility
    kl_budget: float | None = SearchSettings.kl_budget

    def __post_init__(self) -> None:
        validate(self, SearchSettings)


@dataclass(frozen=True, slots=True)
class EntropyStop:
    """Where a chunk ends early: before a token whose entropy under the base alone (temperature 1) is ``entropy`` nats or more.

    Never before the response has ``after`` tokens. The beam is then :attr:`Beam.paused`; one that pauses before its first new
    token comes back itself.
    """

    entropy: float
    after: int


@dataclass(frozen=True, slots=True)
class ExpandRequest:
    """What an engine is asked for: ``successors`` children of ``beam``, each up to ``tokens`` longer."""

    beam: Beam
    successors: int
    tokens: int
    sampling: SamplingParams
    guidance: TokenGuidance | None
    seed: int
    record: bool = False
    """Fill ``guide_shift`` and ``pieces`` of the children."""
    return_log_ratio: bool = False
    """Add to ``log_ratio`` of the children."""
    first: int = 0
    """Number of the first child: other numbers, other draws (:func:`ivg.utils.rng.child_rng_path`)."""
    keep: bool = False
    """The beam will be extended again: its cache is copied, not taken over."""
    pause: EntropyStop | None = None
    until: str | None = None
    """A child is :attr:`Beam.paused` behind a token with which its answer has one more step that this text ends."""
    alternatives: int | None = None
    """Fill ``details`` of the children, each with so many alternatives."""
    thinking: Thinking | None = None
    """The response begins with thinking: guidance begins with its answer (``Beam.answer_start`` of the children)."""
    answer_tokens: int | None = None
    """A child whose answer begins grows by at most so many tokens of it; None: by ``tokens`` in all."""
    stream: bool = False
    """Show unfinished children meanwhile, where the engine can (:class:`AsyncEngine`)."""
    drafter: Value | None = None
    """Its :meth:`Value.draft_model` writes some chunks of the response; what it has read follows the beams."""
    drafted: bool = False
    """These children are written by the drafter's model, without guidance."""


@dataclass(frozen=True, slots=True)
class LogprobsRequest:
    """What :meth:`Engine.logprobs` is asked for: log-probabilities of a response that is given.

    Attributes:
        beam: the empty response to the prompt (:meth:`Engine.open`).
        token_ids: the response, in the base's tokens; at least one.
        sampling: temperature, filters and processors of the distributions.
        guidance: of every token; without ``kl_budget``.
        alternatives: so many of the likeliest tokens at each position; the transformers engine gives at least one.
    """

    beam: Beam
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    guidance: TokenGuidance | None = None
    alternatives: int = 1


@dataclass(frozen=True, slots=True)
class ExpandOutput:
    """The children of ``beam`` (its key): complete if ``done``, else as far as they have come."""

    beam: int
    children: list[Beam]
    done: bool = True


class Engine(ABC):
    """Turns beams into longer beams. A context manager: leaving it closes the engine."""

    name: str = "engine"
    """In errors."""
    unsupported: Mapping[str, str] = MappingProxyType({})
    """Fields of :class:`ExpandRequest` and :class:`SamplingParams` that this engine cannot honour, each with what to do instead."""
    logprobs_after_generation: bool = False
    """Log-probabilities of an answer come from :meth:`logprobs`, once it is complete; ``ExpandRequest.alternatives`` is unsupported."""
    vocabulary: Any = None
    """What the base's token ids mean (:class:`ivg.models.vocabulary.Vocabulary`)."""
    base: Any = None
    """Reads prompts as the base does (:class:`ivg.models.prompt_encoder.PromptEncoder`); without one override what uses it."""

    def open(self, prompt: Prompt, sampling: SamplingParams) -> Beam:
        """The empty response to ``prompt``.

        Raises:
            PromptError: the prompt is empty or, with ``sampling.max_new_tokens``, too long.
        """
        root: Beam = self.base.root(prompt, sampling.max_new_tokens)
        return root

    def prompt_tokens(self, prompt: Prompt) -> int:
        """Length of the prompt in base tokens."""
        return len(self.base.prompt_ids(prompt))

    @abstractmethod
    def extend(self, requests: Sequence[ExpandRequest]) -> list[list[Beam]]:
        """The children of every request's beam, which passes its cache on to them unless ``keep`` is set; no beam twice.

        A child that cannot be made has ``finish="error"`` and affects no other.
        """

    def logprobs(self, requests: Sequence[LogprobsRequest]) -> list[list[TokenLogprobs]]:
        """Log-probabilities of given tokens, one entry for each token of each request. Default: they cannot be had.

        Raises:
            ConfigError: by default.
            ModelError: a model gave NaN or infinity.
            ScoreError: a value has no number for a candidate.
        """
        raise ConfigError(
            f"the engine {self.name} gives no log-probabilities of given texts\n  use the transformers engine (leave --engine out)"
        )

    def reads_last_token(self, guidance: TokenGuidance | None) -> bool:
        """Does :meth:`logprobs` read the last of the given tokens, too? If not, it may stand behind the context. Default: it does.

        Args:
            guidance: by whose value it is read; None: by the base.
        """
        return True

    def check(self, guidance: TokenGuidance | None) -> None:
        """Raise where token guidance does not fit the base. Default: there can be none.

        Raises:
            ConfigError, VocabularyError: says why.
        """
        if guidance is not None:
            raise ConfigError(
                f"token guidance by {guidance.value.name} needs the base's logits, which the engine {self.name} does not give\n"
                "  use a method that selects chunks (cbs-explicit, bon …)"
            )

    def check_drafter(self, drafter: Value | None, sampling: SamplingParams, *, compared: bool = False) -> None:
        """Raise where the model of ``drafter`` cannot write in the base's place. Default: none can.

        Args:
            drafter: None: there are no drafts.
            sampling: of the request.
            compared: its drafts are compared with the base token by token (``return_log_ratio``).

        Raises:
            ConfigError, VocabularyError: says why.
        """
        if drafter is not None:
            raise ConfigError(
                f"drafts by {drafter.name} (rule=speculate) need both models in this process; the engine {self.name} runs the base alone\n"
                "  use the transformers engine"
            )

    def writes_whole_chunks(self, drafter: Value) -> bool:
        """Must a chunk that the model of ``drafter`` writes be asked for in one request? Default: no."""
        return False

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Raise where settings of ``sampling`` do not fit the base, besides what :attr:`unsupported` says. Default: all fit.

        Raises:
            ConfigError: says why.
        """

    def check_logprobs(self, sampling: SamplingParams) -> None:
        """Raise where log-probabilities of tokens drawn with ``sampling`` cannot be had. Default: they can, or :attr:`unsupported` says.

        Raises:
            ConfigError: says why.
        """

    def check_thinking(self, thinking: Thinking | None) -> None:
        """Raise where the marker of ``thinking`` cannot be found or forced. Default: it can.

        Raises:
            ConfigError: says why.
        """

    def answers_at_once(self, prompt: Prompt, marker: str) -> bool:
        """Has the thinking before the answer to ``prompt`` ended already (``marker`` is in the begun turn)?"""
        ended: bool = self.base.has_thought(prompt, marker)
        return ended

    def check_request(self, request: ExpandRequest) -> None:
        """Raise where ``request`` needs what this engine does not support.

        Raises:
            ConfigError, VocabularyError: says what.
        """
        needed = {
            "pause": request.pause is not None,
            "until": request.until is not None,
            "alternatives": request.alternatives is not None,
            "return_log_ratio": request.return_log_ratio,
            "thinking": request.thinking is not None,
        }
        chunked = bool(request.beam.token_ids) or request.tokens < request.sampling.max_new_tokens
        self.check_features({name for name, needs in needed.items() if needs} | request.sampling.features(chunked=chunked))
        self.check_sampling(request.sampling)
        self.check(request.guidance)
        self.check_drafter(request.drafter, request.sampling, compared=request.return_log_ratio)
        self.check_thinking(request.thinking)

    def check_features(self, features: Collection[str]) -> None:
        """Raise where one of ``features`` (names as in :attr:`unsupported`) is not supported.

        Raises:
            ConfigError: names it, and what to do instead.
        """
        for name in sorted(set(features) & set(self.unsupported)):
            raise ConfigError(f"{name}: the engine {self.name} cannot do that\n  {self.unsupported[name]}")

    def release(self, keys: Sequence[int]) -> None:
        """Free what is kept for the beams with these keys; unknown keys are ignored. Default: nothing is kept."""

    def reset_caches(self) -> None:
        """Empty all caches, so that later results do not depend on earlier calls, to the last bit. Default: there are none."""

    def release_memory(self) -> None:
        """Give memory that is not needed now back to the system; results do not change. Default: nothing."""

    def restart(self) -> bool:
        """Start what runs in another process again if it died; requests that ran are gone. True if it had died.

        Raises:
            ModelError: it does not start.
        """
        return False

    def close(self) -> None:
        """Stop what runs in another process; a second call does nothing. Default: nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncEngine(Engine):
    """An engine whose requests end each at its own time: no search waits for another's.

    At most one request runs for a beam. :meth:`release` of a request's beam aborts it. Outputs are kept until they are collected.
    """

    patience = 0.05
    """Seconds that :meth:`collect` waits for an output."""

    def __init__(self) -> None:
        self._outputs: dict[int, ExpandOutput] = {}

    @abstractmethod
    def submit(self, requests: Sequence[ExpandRequest]) -> None:
        """Begin these requests and return at once. Invalid requests return error beams, and affect no others."""

    @abstractmethod
    def poll(self, seconds: float) -> list[ExpandOutput]:
        """Outputs since the last call, of any request; waits up to about ``seconds`` for the first."""

    @abstractmethod
    def abort(self, beams: Collection[int] | None = None) -> None:
        """Give up the requests of these beams (keys; None: of all), where any run."""

    @property
    @abstractmethod
    def running(self) -> bool:
        """Is any request under way?"""

    def collect(self, beams: Collection[int] | None = None) -> list[ExpandOutput]:
        """Outputs of the requests of ``beams`` (keys; None: of all); may come back empty after :attr:`patience` seconds.

        Outputs of other requests are kept until they are collected; of an unfinished one, the newest.
        """
        deadline = time.monotonic() + self.patience
        while not (found := self._take(beams)) and self.running and (left := deadline - time.monotonic()) > 0:
            self.keep(self.poll(left))
        return found

    def extend(self, requests: Sequence[ExpandRequest]) -> list[list[Beam]]:
        """Submit, and collect until all are done; outputs of other requests are kept for :meth:`collect`.

        Raises:
            ModelError: a request was aborted meanwhile, by :meth:`release` or :meth:`close`.
        """
        self.submit(requests)
        found: dict[int, list[Beam]] = {}
        while missing := {r.beam.key for r in requests} - set(found):
            found |= {output.beam: output.children for output in self.collect(missing) if output.done}
            if not self.running and missing - set(found) - set(self._outputs):
                raise ModelError(f"{len(missing)} requests to the engine {self.name} were aborted while they ran\n  send them again")
        return [found[r.beam.key] for r in requests]

    def release(self, keys: Sequence[int]) -> None:
        """Abort the requests of these beams and drop their outputs; nothing else is kept for a beam."""
        for key in keys:
            self._outputs.pop(key, None)
        self.abort(set(keys))

    def reset_caches(self) -> None:
        """Abort all requests and drop their outputs."""
        self._outputs.clear()
        self.abort()

    def keep(self, outputs: Sequence[ExpandOutput]) -> None:
        """Keep outputs until they are asked for."""
        for output in outputs:
            self._outputs[output.beam] = output

    def _take(self, beams: Collection[int] | None) -> list[ExpandOutput]:
        keys = list(self._outputs) if beams is None else [key for key in self._outputs if key in beams]
        return [self._outputs.pop(key) for key in keys]
