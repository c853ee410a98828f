"""A beam: one hypothesis of the response, in the base model's tokens and as text. Standard library only.

Values see any object with the fields of :class:`Hypothesis`, so that an engine can apply guidance in the middle of a chunk
without building a :class:`Beam` for every token.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ivg.types.messages import Prompt

FinishReason = Literal["stop", "length", "error"]
"""``stop``: end-of-sequence token or stop string; ``length``: token limit; ``error``: a model gave NaN, or no answer."""

_keys = itertools.count(1)


def new_key() -> int:
    """A number that no other hypothesis of this process has."""
    return next(_keys)


HEAD_SUFFIX = ".head"
"""Behind the name of a value in usage: positions where its head was computed on hidden states that the base had read."""


class TokenCounter:
    """Counts the tokens that each model reads for one request (see :class:`~ivg.types.Usage`), and collects notes.

    The one mutable object that the beams of a request share.
    """

    def __init__(self) -> None:
        self.forward_tokens: Counter[str] = Counter()
        self.cached_tokens: Counter[str] = Counter()
        self.notes: dict[str, None] = {}
        """What the user should know about how the request was read; each once, in order."""

    def note(self, text: str) -> None:
        """Add to the notes of the request (:attr:`Completion.notes`)."""
        self.notes[text] = None

    def add(self, model: str, tokens: int, cached: int = 0) -> None:
        """``model`` reads ``tokens`` tokens for this request, of which ``cached`` were already cached by other requests."""
        self.forward_tokens[model] += tokens
        if cached:
            self.cached_tokens[model] += cached


class Hypothesis(Protocol):
    """What a value may read of a beam."""

    @property
    def key(self) -> int:
        """Unique in this process."""

    @property
    def parent(self) -> int | None:
        """Key of the hypothesis that this one extends."""

    @property
    def ancestor_key(self) -> int | None:
        """Key of the last selected ancestor, where that is not the parent: values have a cache for that one."""

    @property
    def prompt(self) -> Prompt:
        """What is answered."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The response, in the base model's tokens."""

    @property
    def text(self) -> str:
        """The response as text."""

    @property
    def finish(self) -> FinishReason | None:
        """Why the response has ended; None: it has not."""

    @property
    def token_counter(self) -> TokenCounter:
        """Counts tokens read for the request."""

    @property
    def vocabulary(self) -> Any:
        """What ``token_ids`` mean (:class:`ivg.models.vocabulary.Vocabulary`); models with another vocabulary read ``text``."""

    @property
    def inherits(self) -> bool:
        """True: only siblings in the same call use the parent again, so the last of them may take over its cache row."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token and its log-probabilities in nats: under the guided distribution and under the base alone.

    Both are softmaxes as for :attr:`Completion.guide_shift`; ``top`` and ``top_base`` are their likeliest (id, log-probability).
    ``rank``: how many tokens are at least as likely with guidance, the token itself among them, as vLLM counts; None: not known.
    """

    token: int
    text: str
    logprob: float
    base_logprob: float
    top: tuple[tuple[int, float], ...] = ()
    top_base: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class DecodeState:
    """How far a response has been decoded (:meth:`ivg.models.vocabulary.Vocabulary.continue_text`).

    Attributes:
        tokens: of the response whose text is known, or held back.
        context: what the next token is decoded after: the last tokens with text, those of an unfinished character included.
        shown: characters of ``context``'s text that are out already.
    """

    tokens: int = 0
    context: tuple[int, ...] = ()
    shown: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Beam:
    """A hypothesis: ``token_ids`` (base vocabulary, EOS included) and their ``text`` (without EOS and stop string)."""

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
    """Place in the search tree, which seeds the draws; first children have that of their parent (:mod:`ivg.utils.rng`)."""
    guide_shift: tuple[float, ...] = ()
    """Per token: log pi_guided - log pi_base, in nats (see :attr:`Completion.guide_shift`). Empty unless recorded."""
    log_ratio: float = 0.0
    """Sum over tokens of log pi_base - log pi_proposal, both as sampled (temperature and filters). 0 unless requested."""
    kl_spent: float = 0.0
    """Nats of the budget of token guidance that the tokens have cost (``TokenGuidance.kl_budget``)."""
    kl_rate: float = 0.0
    """Sum over the tokens of what each costs at full guidance, nearly (:mod:`ivg.engines.transformers.kl_budget`)."""
    paused: bool = False
    """The chunk ended early: at a point of high entropy (:class:`~ivg.types.EntropyStop`), or at a text (``ExpandRequest.until``)."""
    pieces: tuple[str, ...] = ()
    """Per token: the text that it added. Empty unless recorded."""
    details: tuple[TokenLogprobs, ...] = ()
    """Per token. Empty unless requested."""
    decoded: DecodeState = DecodeState()
    """How far ``text`` has been decoded."""
    error: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the response and are not part of its text, besides end-of-sequence tokens."""
    answer_start: int | None = 0
    """Tokens of the response before its answer; None: it is still thinking (:class:`~ivg.types.thinking.Thinking`)."""
    answer_text: int = 0
    """Characters of ``text`` before the answer."""

    @property
    def finished(self) -> bool:
        """Nothing will be added to this beam."""
        return self.finish is not None
