"""What clients call a model, and what they get for it: the base's name, and ``NAME:METHOD`` for every method at hand.

Turns bodies into requests of the search, within the server's ceilings. Runs where the models are (``serving.worker``); knows no HTTP.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ivg.config import Recipe
from ivg.decoding.live import QUANTUM, Request
from ivg.decoding.search import check_engine
from ivg.decoding.strategies import STRATEGIES, Strategy
from ivg.errors import ConfigError, PromptError, ScoreFault, ServeError, UpstreamFault
from ivg.models.chat import encode, prompt_text
from ivg.serving.schemas import ChatMessage, ChatRequest, CompletionRequest, Guidance
from ivg.serving.settings import ServeSettings
from ivg.steered import SteeredModel
from ivg.types import Message, Prompt

SHOWN = 5
"""Alternatives to each token where a client watches the beams."""
COOLEST = 1e-3
"""Lower temperatures than this, but 0, would divide logits beyond float32."""
LONG_CHUNK = 8
"""Chunks of so many tokens are shown as they grow."""


@dataclass(frozen=True)
class Order:
    """What a body asks for, as requests: for every prompt in turn its ``n`` answers."""

    requests: list[Request]
    method: str
    seed: int
    vocabulary: Any


@dataclass
class Presets:
    """The models as clients see them.

    Args:
        model: base and values.
        recipe: gives defaults: its method, that method's settings, sampling.
        settings: ceilings.
    """

    model: SteeredModel
    recipe: Recipe
    settings: ServeSettings
    names: dict[str, str] = field(init=False)
    """The method of every name."""

    def __post_init__(self) -> None:
        base = self.recipe.models.given.get("base")
        self.name = self.settings.name or ("embedded" if base is None else base.path.rstrip("/").rpartition("/")[2].replace(":", "-"))
        self.names = {self.name: self.recipe.search.method} | {f"{self.name}:{m}": m for m in self.model.methods}
        self.sampling = {**asdict(self.model.sampling), **self.recipe.sampling.settings()}
        one = self.model.request(
            "x", self.strategy(self.recipe.search.method, {}), **self.sampling
        )  # an error now, not at the first request
        check_engine(self.model.engine, one)

    # Methods

    def strategy(self, method: str, given: dict[str, Any]) -> Strategy:
        """A method with the recipe's settings, where it is the recipe's method, and what a request gives over them."""
        defaults = self.recipe.search.settings() if method == self.recipe.search.method else {}
        if {"weights", "token"} & set(given):
            defaults = {k: v for k, v in defaults.items() if k not in ("weights", "token")}
        if {"select_weights", "select"} & set(given):
            defaults = {k: v for k, v in defaults.items() if k not in ("select_weights", "select")}
        return self.model.strategy(method, **{**defaults, **given})

    def method(self, name: str, guidance: Guidance | None) -> str:
        """The method that a request means.

        Raises:
            ServeError: 404 for a model that is not here; 400 for two methods at once, or one that does not exist.
        """
        if name not in self.names:
            raise ServeError(f"no model {name!r} here; expected one of: {', '.join(self.names)}", 404, "model_not_found", "model")
        wanted = guidance.method if guidance else None
        if wanted is None:
            return self.names[name]
        if wanted not in STRATEGIES and wanted != "custom":
            known = ", ".join([*STRATEGIES, "custom"])
            raise ServeError(f"unknown method {wanted!r}; expected one of: {known}", 400, "invalid_value", "guidance.method")
        if name != self.name and wanted != self.names[name]:
            message = f"model {name!r} means the method {self.names[name]}, but guidance.method is {wanted!r}; give one of them"
            raise ServeError(message, 400, "invalid_value", "guidance.method")
        return wanted

    def listing(self) -> list[dict[str, Any]]:
        """Name, method and sizes of every preset."""
        return [{"id": name, "ivg": described(self.strategy(method, {}))} for name, method in self.names.items()]

    # Requests

    def order(self, body: ChatRequest | CompletionRequest) -> Order:
        """The requests that ``body`` asks for.

        Raises:
            ServeError: over a ceiling, no such model; ``param`` names the field.
            ConfigError, PromptError: settings or prompts that cannot be.
        """
        method = self.method(body.model, body.guidance)
        strategy = self._within(self.strategy(method, body.guidance.search if body.guidance else {}))
        seed = random.getrandbits(31) if body.seed is None else body.seed
        watched, wanted = body.watched, body.alternatives
        if watched and "alternatives" not in self.model.engine.lacks:
            wanted = max(wanted or 0, SHOWN)
        one = self.model.request("x", strategy, seed=seed, record=watched, alternatives=wanted, **self._sampling(body))
        one = replace(one, stride=_stride(one) if body.stream else QUANTUM)
        prompts, n = self._prompts(body), body.n or 1
        return Order(
            [replace(one, prompt=p, index=i) for p in prompts for i in range(n)], strategy.name, seed, self.model.engine.vocabulary
        )

    def _sampling(self, body: ChatRequest | CompletionRequest) -> dict[str, Any]:
        if body.temperature is not None and 0 < body.temperature < COOLEST:
            raise ServeError(f"temperature must be 0 or at least {COOLEST}, got {body.temperature}", 400, "invalid_value", "temperature")
        limit = body.limit or min(self.sampling["max_new_tokens"], self.settings.max_tokens)
        field = "max_tokens" if body.max_tokens is not None or isinstance(body, CompletionRequest) else "max_completion_tokens"
        self._at_most(field, limit, self.settings.max_tokens)
        given = {"temperature": body.temperature, "top_p": body.top_p, "max_new_tokens": limit, "stop": body.stops}
        given |= body.guidance.sampling if body.guidance else {}
        return self.sampling | {k: v for k, v in given.items() if v is not None}

    def _within(self, strategy: Strategy) -> Strategy:
        ceiling = self.settings.max_hypotheses
        if strategy.width * strategy.successors > ceiling:
            message = f"width · successors is {strategy.width * strategy.successors}, this server allows {ceiling}"
            raise ServeError(message, 400, "over_limit", "guidance.successors" if strategy.successors > 1 else "guidance.width")
        self._at_most("guidance.chunk_length", strategy.chunk_length or 1, self.settings.max_chunk_length)
        self._at_most("guidance.candidates", strategy.candidates, self.settings.max_candidates)
        self._at_most("guidance.tries", strategy.tries, ceiling)
        self._at_most("guidance.draft", strategy.draft, QUANTUM)
        for name in ("weights", "select_weights"):
            if any(abs(weight) > 1000 for _, weight in getattr(strategy, name)):
                raise ServeError(f"{name} must be within 1000 of 0", 400, "invalid_value", f"guidance.{name}")
        return strategy

    @staticmethod
    def _at_most(field: str, got: int, ceiling: int) -> None:
        if got > ceiling:
            raise ServeError(f"{field} is {got}, this server allows at most {ceiling}", 400, "over_limit", field)

    # Prompts

    def _prompts(self, body: ChatRequest | CompletionRequest) -> list[Prompt]:
        if isinstance(body, ChatRequest):
            return [self._conversation(body.messages)]
        return [self._text(p) for p in body.prompts]

    def _text(self, prompt: str | Sequence[int]) -> Prompt:
        if isinstance(prompt, str):
            self._check_size(Prompt(prompt))
            return Prompt(prompt)
        if not self.model.base.reads_given_ids:
            raise ServeError("this model is sent text and reads no token ids; give the prompt as text", 400, "invalid_value", "prompt")
        vocabulary = self.model.engine.vocabulary
        limit = self.model.base.max_positions
        if limit is not None and len(prompt) >= limit:
            raise PromptError(f"prompt of {len(prompt)} tokens > context of the base ({limit})\n  shorten the prompt")
        beyond = [i for i in prompt if i >= self.model.base.vocab_size]
        if beyond:
            message = f"token id {beyond[0]} is beyond the vocabulary ({self.model.base.vocab_size})"
            raise ServeError(message, 400, "invalid_value", "prompt")
        return Prompt(vocabulary.whole(prompt), tuple(prompt))

    def _conversation(self, messages: Sequence[ChatMessage]) -> Prompt:
        """The messages, where the base has a template for them; a plain model continues their texts, one line each, none left out."""
        base = self.model.base
        if base.template is not None or getattr(base.tokenizer, "chat_template", None):
            prompt = Prompt(tuple(Message("system" if m.role == "developer" else m.role, m.text) for m in messages))
        else:
            prompt = Prompt("\n".join(m.text for m in messages))
        self._check_size(prompt)
        return prompt

    def _check_size(self, prompt: Prompt) -> None:
        """Refuse what is far too long before anything reads or remembers it: readers keep the tokens of the prompts that they saw.

        Raises:
            PromptError: more tokens than the base has positions.
        """
        base, text = self.model.base, prompt_text(prompt)
        limit = base.max_positions
        if limit is None or len(text) <= 4 * limit:
            return
        longest = max(map(len, base.vocabulary.pieces.values()), default=1)
        tokens = len(text) // longest if len(text) > longest * limit else len(encode(prompt, base.tokenizer, base.template))
        if tokens >= limit:
            raise PromptError(f"prompt of at least {tokens} tokens > context of {base.name} ({limit})\n  shorten the prompt")

    def size(self, body: ChatRequest | CompletionRequest) -> int:
        """How many answers ``body`` asks for.

        Raises:
            ServeError: more than this server gives at once.
        """
        count = (body.n or 1) * (1 if isinstance(body, ChatRequest) else len(body.prompts))
        field = "n" if (body.n or 1) > 1 else "prompt"
        if count > self.settings.max_n:
            raise ServeError(f"{count} answers asked for, this server gives at most {self.settings.max_n}", 400, "over_limit", field)
        return count


def described(strategy: Strategy) -> dict[str, Any]:
    """A method in plain values."""
    return {
        "method": strategy.name,
        "summary": strategy.summary,
        "token": strategy.token,
        "select": strategy.select,
        "weights": dict(strategy.weights),
        "select_weights": dict(strategy.select_weights),
        "width": strategy.width,
        "successors": strategy.successors,
        "chunk_length": strategy.chunk_length,
        "beta": strategy.beta,
        "rule": strategy.rule,
    }


def _stride(request: Request) -> int:
    """Tokens for each round: one where a single hypothesis grows or chunks are long; drafts need room to be verified in."""
    search = request.search
    if search.guidance is not None and search.guidance.draft:
        return QUANTUM
    alone = search.width * search.successors == 1
    long = (search.chunk_length or math.inf) >= LONG_CHUNK
    return 1 if alone else 4 if long else QUANTUM


def fault(error: Exception) -> ServeError:
    """What a client is told of an error that ivg raised on purpose."""
    if isinstance(error, ServeError):
        return error
    message = one_line(str(error))
    if isinstance(error, PromptError):
        return ServeError(message, 400, "invalid_prompt", "prompt")
    if isinstance(error, ConfigError | ValueError):
        first = message.partition(" ")[0]
        named = first in Guidance.model_fields
        return ServeError(message, 400, "invalid_value", f"guidance.{first}" if named else "guidance")
    return ServeError(message, 500, "model_error")


def failed(error: str) -> ServeError:
    """What a client is told of an answer that a model broke off. Where another server did, its address is nobody's business."""
    if isinstance(error, ScoreFault):
        return fault(PromptError(error)) if error.prompt else ServeError(one_line(error.said), 500, "model_error")
    if not isinstance(error, UpstreamFault):
        return ServeError(one_line(error), 500, "model_error")
    if error.status in (400, 413, 422):  # the request's own fault: too long, mostly
        return ServeError(error.said, 400, "invalid_request")
    if error.status is None or error.status in (408, 409, 429) or error.status >= 500:
        return ServeError("the engine behind this server is busy or away; try again later", 503, "upstream_unavailable")
    return ServeError("the engine behind this server refuses it; the log says why", 502, "upstream_refused")


def torn() -> ServeError:
    """What a client is told while a model that failed cannot begin anew."""
    return ServeError("a model failed and could not begin anew; try again later", 503, "unavailable")


def one_line(message: str) -> str:
    """A message of several lines (what was got, what was expected, what to do) as one, its parts divided by semicolons."""
    out = ""
    for line in filter(None, map(str.strip, message.splitlines())):
        out += f"{' ' if out[-1] in ':;,.' else '; '}{line}" if out else line
    return out
