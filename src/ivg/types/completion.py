"""What comes back for a request: completion, usage, and the steps of the search. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ivg.settings.sampling import SamplingParams
from ivg.types.beam import HEAD_SUFFIX, FinishReason, TokenLogprobs
from ivg.types.thinking import split_reasoning


@dataclass(frozen=True, slots=True)
class Usage:
    """What a completion cost.

    Attributes:
        forward_tokens: by model, the tokens that it reads for this request, prompt included, when its cache is empty at first. The
            same for the same request, whatever was cached; ``ivg bench``, ``ivg eval`` and FLOPs are computed from these. ``NAME.head``:
            positions where the whole head of a value was computed on what the base had read.
        prompt_tokens: length of the prompt in base tokens.
        completion_tokens: length of the response in base tokens.
        seconds: from the request to its end.
        cached_tokens: by model, those of ``forward_tokens`` that were not computed, because other requests had cached them.
            Models without any are left out. What was computed for this request is ``forward_tokens`` less these.
        drafted_tokens: of the response, those that a draft model wrote and the base did not (rule ``speculate``).
    """

    forward_tokens: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    seconds: float = field(compare=False)
    cached_tokens: Mapping[str, int] = field(default_factory=dict, compare=False)
    drafted_tokens: int = 0

    @property
    def total_forward_tokens(self) -> int:
        """Tokens read by all models together."""
        return sum(tokens for name, tokens in self.forward_tokens.items() if not name.endswith(HEAD_SUFFIX))


@dataclass(frozen=True, slots=True)
class Particle:
    """One weighted response of a particle filter.

    Attributes:
        text: the response.
        token_ids: in base tokens.
        score: its value.
        weight: share of all particles' weight, in [0, 1].
        finish_reason: why it ended.
    """

    text: str
    token_ids: tuple[int, ...]
    score: float
    weight: float
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Posterior:
    """All particles of one particle filter: an estimate of the target pi_base(y) * exp(particle_beta * V(y)) / Z.

    Attributes:
        particles: every one of them; some may be equal.
        log_z: estimate of log Z in nats, Z = E_base[exp(particle_beta * V(y))]; its exponential is unbiased. The base as it is sampled:
            temperature and filters included.
    """

    particles: tuple[Particle, ...]
    log_z: float

    @property
    def effective_sample_size(self) -> float:
        """1 / sum of squared weights: between 1 and the number of particles (Kong 1992)."""
        return 1 / sum(p.weight**2 for p in self.particles)

    @property
    def decoded(self) -> dict[str, float]:
        """The probability of each text, the likeliest first; equal texts of several particles, or of other tokens, are one."""
        mass: dict[str, float] = {}
        for p in self.particles:
            mass[p.text] = mass.get(p.text, 0.0) + p.weight
        return dict(sorted(mass.items(), key=lambda item: -item[1]))

    def expectation(self, function: Callable[[str], float]) -> float:
        """The mean of a function of the text under the posterior."""
        return sum(p * function(text) for text, p in self.decoded.items() if p)


@dataclass(frozen=True, slots=True)
class TraceNode:
    """One hypothesis of the search tree, as it was at the end of its chunk."""

    key: int
    parent: int | None
    text: str
    tokens: tuple[str, ...]
    guide_shift: tuple[float, ...]
    score: float | None
    kept: bool
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Step:
    """What one round of the search did for one request; ``committed`` is the text that all its beams share."""

    request: int
    kept: tuple[TraceNode, ...]
    dropped: tuple[TraceNode, ...]
    committed: str
    completion: Completion | None = None
    details: tuple[TokenLogprobs, ...] = ()
    """Of the beam, if there is only one."""
    tokens: int = 0
    """Number of tokens that all beams share."""


@dataclass(frozen=True, slots=True)
class ResponseLogprobs:
    """Log-probabilities, in nats, of the tokens of a response that was given (:meth:`ivg.GuidedModel.logprobs`).

    ``tokens`` has for each the guided and the base's log-probability, each distribution with the filters that were asked for; ``top`` has
    at least the likeliest token. ``forward_tokens`` are those that each model read, together with the other responses to the same prompt.
    """

    tokens: tuple[TokenLogprobs, ...]
    forward_tokens: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def logprob(self) -> float:
        """Log-probability of the whole response under the guided distribution."""
        return sum(t.logprob for t in self.tokens)

    @property
    def base_logprob(self) -> float:
        """The same under the base alone."""
        return sum(t.base_logprob for t in self.tokens)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The response in the base's tokens."""
        return tuple(t.token for t in self.tokens)

    @property
    def is_greedy(self) -> bool:
        """Is every token the likeliest one, so that greedy decoding would write the response?"""
        return all(t.logprob >= t.top[0][1] for t in self.tokens)


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one request. ``trace`` and ``details`` are empty unless requested.

    ``sampling`` is how it was drawn, with all defaults filled in; ``generation_config`` are those of its settings that neither
    request nor recipe gave and that the checkpoint's ``generation_config.json`` did.

    ``guide_shift``, empty unless recorded or traced, has for each token y_t what guidance made of its log-probability:
    log pi_guided(y_t) - log pi_base(y_t) in nats, both softmaxes at the request's temperature (greedy requests: at 1) over
    the tokens that may be drawn, before all that :class:`SamplingParams` does to logits but temperature. Over texts drawn from
    pi_guided the mean of its sum is KL(pi_guided || pi_base). It is 0 for tokens of a draft model (rule ``speculate``).
    """

    text: str
    token_ids: tuple[int, ...]
    score: float | None
    finish_reason: FinishReason
    usage: Usage
    error: str | None = None
    trace: tuple[Step, ...] = ()
    guide_shift: tuple[float, ...] = ()
    details: tuple[TokenLogprobs, ...] = ()
    notes: tuple[str, ...] = ()
    """What to know of how it was made: a prompt that a reward model could not read whole, say."""
    sampling: SamplingParams | None = None
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    guide_after: str | None = None
    """What ends the thinking that ``text`` begins with; None: it begins with the answer."""
    kl_spent: float | None = None
    """Nats that token guidance has taken of its budget: the sum of KL(pi_guided || pi_base) over the tokens; None: it has no budget."""

    answer_start: int | None = 0
    """How many of ``token_ids`` come before the answer; None: it has not begun."""
    posterior: Posterior | None = None
    """Of a particle filter: all particles with their weights; ``text`` is one drawn from them."""

    @property
    def reasoning_content(self) -> str | None:
        """The thinking before the answer; None: there is none."""
        return None if self.guide_after is None else split_reasoning(self.text, self.guide_after)[0]

    @property
    def answer(self) -> str:
        """The text without thinking; empty where the answer has not begun."""
        return self.text if self.guide_after is None else split_reasoning(self.text, self.guide_after)[1] or ""

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of its tokens in nats, of those in ``details``; -inf where there are none."""
        return sum(t.logprob for t in self.details) / len(self.details) if self.details else -math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the trace."""
        out: dict[str, Any] = {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "score": self.score,
            "finish_reason": self.finish_reason,
            "usage": asdict(self.usage) | {"seconds": round(self.usage.seconds, 4)},
        }
        if not self.usage.drafted_tokens:
            del out["usage"]["drafted_tokens"]
        if self.guide_after is not None:
            out |= {"reasoning_content": self.reasoning_content, "answer": self.answer}
        if self.kl_spent is not None:
            out["kl_spent"] = round(self.kl_spent, 6)
        if (found := self.posterior) is not None:
            out |= {"log_z": round(found.log_z, 6), "effective_sample_size": round(found.effective_sample_size, 6)}
        if self.generation_config:
            out["generation_config"] = dict(self.generation_config)
        return out | ({"notes": list(self.notes)} if self.notes else {}) | ({"error": self.error} if self.error else {})


def likeliest(completions: Sequence[Completion], n: int) -> list[Completion]:
    """The ``n`` with the highest :attr:`Completion.mean_logprob`, best first (OpenAI's ``best_of``); no more than n: as they are.

    Those with an error come last; where some are left out, the best has a note.
    """
    if len(completions) <= n:
        return list(completions)
    return note_failed(by_likelihood(completions)[:n], [c.error for c in completions if c.error is not None], len(completions))


def by_likelihood(completions: Sequence[Completion]) -> list[Completion]:
    """All of them, the highest :attr:`Completion.mean_logprob` first; those with an error come last."""
    return sorted(completions, key=lambda c: (c.error is not None, -c.mean_logprob))


def note_failed(best: Sequence[Completion], errors: Sequence[str], drawn: int) -> list[Completion]:
    """``best``, whose first says how many of the ``drawn`` samples failed, unless it is one of them."""
    if not errors or not best or best[0].error is not None:
        return list(best)
    first = " - ".join(errors[0].split("\n  "))
    note = f"best_of: {len(errors)} of {drawn} samples failed: {first}"
    return [replace(best[0], notes=(*best[0].notes, note)), *best[1:]]
