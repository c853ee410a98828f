"""The nouns of ivg: what a request is, what a beam is, what comes back. Standard library only.

A :class:`Beam` is a hypothesis: the response so far, in the base model's tokens and as text. Engines make beams longer,
values turn them into numbers, selections make them fewer (DESIGN, section 1). Values see any object with the fields of
:class:`Hypothesis`, so that an engine can ask for guidance in the middle of a chunk without building a Beam per token.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from ivg.settings.sampling import SamplingParams as SamplingParams
from ivg.settings.schema import validate
from ivg.settings.search import SearchSettings
from ivg.types.messages import Message as Message  # nouns, too: whoever wants them finds them here
from ivg.types.messages import Prompt as Prompt

FinishReason = Literal["stop", "length", "error"]
"""``stop``: end-of-sequence token or stop string; ``length``: token limit; ``error``: a model gave NaN."""

_keys = itertools.count(1)


def new_key() -> int:
    """A number that no other hypothesis of this process has."""
    return next(_keys)


class TokenCounter:
    """Counts, for one request, the tokens that each model reads (see :class:`Usage`), and collects notes.

    The one mutable thing that beams share.
    """

    def __init__(self) -> None:
        self.forward_tokens: Counter[str] = Counter()
        self.cached_tokens: Counter[str] = Counter()
        self.notes: dict[str, None] = {}
        """What a user must know of how the request was read, each once, in order."""

    def note(self, text: str) -> None:
        """Say this of the request (:attr:`Completion.notes`)."""
        self.notes[text] = None

    def add(self, model: str, tokens: int, cached: int = 0) -> None:
        """This request asks ``model`` for ``tokens`` tokens, ``cached`` of which it had read for another request already."""
        self.forward_tokens[model] += tokens
        if cached:
            self.cached_tokens[model] += cached


@runtime_checkable
class Hypothesis(Protocol):
    """What a value needs to know of a beam."""

    @property
    def key(self) -> int:
        """Unique in this process."""

    @property
    def parent(self) -> int | None:
        """Key of the hypothesis that this one extends."""

    @property
    def ancestor_key(self) -> int | None:
        """The last ancestor that was selected, when that is not the parent: values know that one."""

    @property
    def prompt(self) -> Prompt:
        """What is answered."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The response, in the base's tokens."""

    @property
    def text(self) -> str:
        """The response as text."""

    @property
    def finish(self) -> FinishReason | None:
        """Why nothing will be added, or None."""

    @property
    def token_counter(self) -> TokenCounter:
        """Counts tokens read for the request."""

    @property
    def vocabulary(self) -> Any:
        """What ``token_ids`` mean (``models.vocab.Vocabulary``); models with another vocabulary read ``text`` instead."""

    @property
    def inherits(self) -> bool:
        """True: only sisters in the same call will ask for the parent again, so its cache row may be taken over."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token and its log-probabilities in nats: under the guided distribution and under the base alone.

    Both are softmaxes as :attr:`Completion.guide_shift` has them; ``top`` and ``top_base`` are their likeliest (id, log-probability).
    """

    token: int
    text: str
    logprob: float
    base_logprob: float
    top: tuple[tuple[int, float], ...] = ()
    top_base: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeState:
    """How far a response has been decoded (``models.vocab.Vocabulary.continue_text``).

    Attributes:
        tokens: of the response whose text is known, or held back.
        context: what the next token is decoded behind: the last tokens with text, those of an unfinished character included.
        shown: characters of ``context``'s text that are out already.
    """

    tokens: int = 0
    context: tuple[int, ...] = ()
    shown: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Beam:
    """A hypothesis: ``token_ids`` (base vocabulary, EOS included) and their ``text`` (EOS and stop strings left out)."""

    key: int
    parent: int | None
    prompt: Prompt
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish: FinishReason | None = None
    token_counter: TokenCounter = field(default_factory=TokenCounter)
    vocabulary: Any = None
    ancestor_key: int | None = None
    inherits: bool = True
    rng_path: int = 0
    """Where in the search tree this beam hangs; seeds its draws. First children inherit it (see ``engine.sampling``)."""
    guide_shift: tuple[float, ...] = ()
    """Per token: log pi_guided - log pi_base, in nats (see :attr:`Completion.guide_shift`). Empty unless recorded."""
    log_ratio: float = 0.0
    """Sum over tokens of log pi_base - log pi_proposal, both as sampled (temperature and filters). 0 unless weighed."""
    paused: bool = False
    """The chunk ended early, at a point of high entropy (see :class:`EntropyStop`)."""
    pieces: tuple[str, ...] = ()
    """Per token: the text that it added. Empty unless recorded."""
    details: tuple[TokenLogprobs, ...] = ()
    """Per token. Empty unless asked for."""
    decoded: DecodeState = DecodeState()
    """How far ``text`` has been decoded, and behind what."""
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Nothing will be added to this beam."""
        return self.finish is not None


@dataclass(frozen=True, slots=True)
class TokenGuidance:
    """Which value steers every token, and how.

    Attributes:
        value: any value; those that know the whole vocabulary shift all logits, others re-score candidates.
        beta: guidance weight; temperature acts afterwards, so the effective strength is beta / temperature.
        candidates: re-score this many of the base's likeliest tokens; 0: shift the whole vocabulary.
        transform: of candidate values: ``identity``, ``log-sigmoid`` (FUDGE), ``centered`` (VAS).
        normalise: mix log-probabilities rather than logits (GenARM).
        gate: guide only where the base's next-token entropy is at least this many nats; 0 guides everywhere. The entropy
            is that of the base's own distribution: all tokens, temperature 1.
        draft: tokens that the value drafts ahead of the base, at most; 0: none. Needs an ``ivg.types.guides.DraftingValue``. How many are
            drafted changes the speed and no token; but tokens are drawn by another rule than with 0 (``engine.coupling``).
    """

    value: Value
    beta: float = 1.0
    candidates: int = 0
    transform: Literal["identity", "log-sigmoid", "centered"] = "identity"
    normalise: bool = False
    gate: float = 0.0
    draft: int = 0

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
    """Number of the first child: other numbers, other draws (``draws.child_rng_path``)."""
    keep: bool = False
    """The beam will be extended again: its cache is not passed on, but copied."""
    pause: EntropyStop | None = None
    alternatives: int | None = None
    """Fill ``details`` of the children, each with so many alternatives."""
    stream: bool = False
    """What has grown so far is wanted meanwhile, of engines that can tell (:class:`AsyncEngine`)."""


class Value(Protocol):
    """Numbers for hypotheses of one prompt, higher is better; they depend on nothing scored before, nor on who shares the batch."""

    name: str

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """One number for each hypothesis."""

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Raise PromptError where this value cannot read prompt and answer."""

    def release(self, keys: Sequence[int]) -> None:
        """These hypotheses will not be asked for again; forget what is kept for them."""


class Engine(Protocol):
    """Turns beams into longer beams."""

    name: str

    @property
    def vocabulary(self) -> Any:
        """What the base's token ids mean (``models.vocab.Vocabulary``)."""

    @property
    def unsupported(self) -> Mapping[str, str]:
        """Fields of :class:`ExpandRequest` and :class:`SamplingParams` that this engine cannot honour, each with what to do instead."""

    def open(self, prompt: Prompt, sampling: SamplingParams) -> Beam:
        """The empty response; PromptError where the prompt is empty or, with ``sampling.max_new_tokens``, too long."""

    def prompt_tokens(self, prompt: Prompt) -> int:
        """Length of the prompt in base tokens."""

    def check(self, guidance: TokenGuidance | None) -> None:
        """Raise (ConfigError, VocabularyError) where token guidance does not fit the base."""

    def extend(self, requests: Sequence[ExpandRequest]) -> list[list[Beam]]:
        """The children of every request's beam, which passes its cache on to them unless told to keep it."""

    def release(self, keys: Sequence[int]) -> None:
        """Free what is kept for these beams."""


@dataclass(frozen=True, slots=True)
class ExpandOutput:
    """Output of one request: the children of ``beam`` (its key), ``done`` or as far as they have come."""

    beam: int
    children: list[Beam]
    done: bool = True


@runtime_checkable
class AsyncEngine(Engine, Protocol):
    """An engine that works on by itself: every request ends at its own time, and no request waits for another's.

    :meth:`release` of a request's beam aborts it. A child that cannot be made has ``finish="error"``.
    """

    def submit(self, requests: Sequence[ExpandRequest]) -> None:
        """Begin these requests; returns at once."""

    def collect(self, beams: Collection[int] | None = None) -> list[ExpandOutput]:
        """Output of the requests of ``beams`` (keys; None: of all). Waits a moment where there are none, and may come back empty.

        Output of others are kept for whoever asks for them.
        """


@dataclass(frozen=True, slots=True)
class Usage:
    """What a completion cost.

    Attributes:
        forward_tokens: by model, the tokens that it reads for this request, prompt included, when its cache is empty at first. The
            same for the same request, whatever was cached; the numbers of ``ivg bench``, ``ivg eval`` and of FLOPs are made of these.
        prompt_tokens: length of the prompt in base tokens.
        completion_tokens: length of the response in base tokens.
        seconds: from the request to its end.
        cached_tokens: by model, those of ``forward_tokens`` that were not computed, because the cache held them from other requests.
            Models without any are left out. What was computed for this request is ``forward_tokens`` less these.
    """

    forward_tokens: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    seconds: float = field(compare=False)
    cached_tokens: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def total_forward_tokens(self) -> int:
        """Tokens read by all models together."""
        return sum(self.forward_tokens.values())


@dataclass(frozen=True, slots=True)
class TraceNode:
    """One hypothesis of the search tree as it stood after its chunk."""

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
    """What one round of the search did for one request; ``committed`` is the text that all live beams share."""

    request: int
    kept: tuple[TraceNode, ...]
    dropped: tuple[TraceNode, ...]
    committed: str
    completion: Completion | None = None
    details: tuple[TokenLogprobs, ...] = ()
    """Of the live hypothesis, where there is only one."""
    tokens: int = 0
    """That all live beams share."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one request. ``trace`` and ``details`` are empty unless they were asked for.

    ``sampling`` is how it was drawn, with all defaults filled in; ``generation_config`` are those of its settings that neither
    request nor recipe gave and that the checkpoint's ``generation_config.json`` did.

    ``guide_shift``, empty unless recorded or traced, has for each token y_t what guidance made of its log-probability:
    log pi_guided(y_t) - log pi_base(y_t) in nats, both softmaxes at the request's temperature (greedy requests: at 1) over
    the tokens that may be drawn, before all that :class:`SamplingParams` does to logits but temperature. Over texts drawn from
    pi_guided the mean of its sum is KL(pi_guided || pi_base).
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the trace."""
        out: dict[str, Any] = {k: getattr(self, k) for k in ("text", "token_ids", "score", "finish_reason")}
        out["token_ids"] = list(self.token_ids)
        out["usage"] = asdict(self.usage) | {"seconds": round(self.usage.seconds, 4)}
        if self.generation_config:
            out["generation_config"] = dict(self.generation_config)
        return out | ({"notes": list(self.notes)} if self.notes else {}) | ({"error": self.error} if self.error else {})
