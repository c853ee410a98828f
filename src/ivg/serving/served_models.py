"""What clients call a model, and what they get for it: the base's name, and ``NAME:METHOD`` for every method at hand.

Turns bodies into requests of the search, within the server's ceilings. Runs where the models are (``serving.worker``); knows no HTTP.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ivg.errors import ConfigError, ContextLengthError, PromptError, ScoreFault, ServeError, UpstreamError
from ivg.model import GuidedModel
from ivg.search.methods import METHODS, Method
from ivg.search.request import QUANTUM, Request
from ivg.search.searcher import check_engine
from ivg.serving.lengths import check, check_chats, check_size, reads_chats, room, too_long
from ivg.serving.protocol import ChatRequest, CompletionRequest, Guidance
from ivg.serving.settings import ServeSettings
from ivg.settings.recipe import Recipe
from ivg.settings.rules import MIN_TEMPERATURE
from ivg.types import Message, Prompt

SHOWN = 5
"""Alternatives to each token where a client watches the beams."""
DEFAULT_TOKENS = 2048
"""Of an answer whose length neither client nor server says, where no model has a limit."""
LONG_CHUNK = 8
"""Chunks of so many tokens are shown as they grow."""


@dataclass(frozen=True)
class Order:
    """What a body asks for, as requests: for every prompt in turn its ``n`` answers."""

    requests: list[Request]
    method: str
    seed: int
    vocabulary: Any
    prompt_tokens: int
    """Of all prompts, each once."""
    each: int
    """Answers to every prompt."""


@dataclass
class ServedModels:
    """The models as clients see them.

    Args:
        model: base and values.
        recipe: gives defaults: its method, that method's settings, sampling.
        settings: ceilings.
    """

    model: GuidedModel
    recipe: Recipe
    settings: ServeSettings
    names: dict[str, str] = field(init=False)
    """The method of every name."""

    def __post_init__(self) -> None:
        base = self.recipe.models.given.get("base")
        self.name = self.settings.name or ("embedded" if base is None else base.path.rstrip("/").rpartition("/")[2].replace(":", "-"))
        self.names = {self.name: self.recipe.search.method} | {f"{self.name}:{m}": m for m in self.model.methods}
        check_chats(self.model)
        self.sampling = {**asdict(self.model.sampling), **self.recipe.sampling.settings()}
        one = self.model.request(
            "x", self.get_method(self.recipe.search.method, {}), **self.sampling
        )  # an error now, not at the first request
        check_engine(self.model.engine, one)

    # Methods

    def get_method(self, method: str, given: dict[str, Any]) -> Method:
        """A method with the recipe's settings, where it is the recipe's method, and what a request gives over them."""
        defaults = self.recipe.search.settings() if method == self.recipe.search.method else {}
        if {"weights", "token"} & set(given):
            defaults = {k: v for k, v in defaults.items() if k not in ("weights", "token")}
        if {"select_weights", "select"} & set(given):
            defaults = {k: v for k, v in defaults.items() if k not in ("select_weights", "select")}
        return self.model.get_method(method, **{**defaults, **given})

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
        if wanted not in METHODS and wanted != "custom":
            known = ", ".join([*METHODS, "custom"])
            raise ServeError(f"unknown method {wanted!r}; expected one of: {known}", 400, "invalid_value", "guidance.method")
        if name != self.name and wanted != self.names[name]:
            message = f"model {name!r} means the method {self.names[name]}, but guidance.method is {wanted!r}; give one of them"
            raise ServeError(message, 400, "invalid_value", "guidance.method")
        return wanted

    def listing(self) -> list[dict[str, Any]]:
        """Name, method and sizes of every preset."""
        out = []
        for name, method in self.names.items():
            strategy = self.get_method(method, {})
            length = self._context(strategy)
            out.append({"id": name, **({} if length is None else {"max_model_len": length}), "ivg": described(strategy)})
        return out

    def _context(self, strategy: Method) -> int | None:
        """Tokens of prompt and answer together that all models of a method can read, as the base counts them."""
        one = self.model.request("x", strategy, **self.sampling)
        left = room(self.model, one)
        return None if left is None else left + len(self.model.base.prompt_ids(one.prompt))

    @property
    def max_tokens(self) -> int | None:
        """Of one answer, as far as it can be known without its prompt."""
        return self.model.base.max_positions if self.settings.max_tokens is None else self.settings.max_tokens

    @property
    def defaults(self) -> dict[str, Any]:
        """What holds where a request does not say otherwise; ``max_new_tokens`` is None where the context decides."""
        return self.sampling | {"max_new_tokens": self._length, "method": self.names[self.name]}

    @property
    def _length(self) -> int | None:
        """Tokens of an answer that nobody limits: the recipe's, else the checkpoint's; None: as the context allows."""
        given = self.recipe.sampling.max_new_tokens
        return self.model.generation_config.get("max_new_tokens") if given is None else given

    # Requests

    def order(self, body: ChatRequest | CompletionRequest) -> Order:
        """The requests that ``body`` asks for.

        Raises:
            ServeError: over a ceiling, no such model; ``param`` names the field.
            ConfigError, PromptError: settings or prompts that cannot be.
        """
        method = self.method(body.model, body.guidance)
        strategy = self._within(self.get_method(method, body.guidance.search if body.guidance else {}))
        seed = random.getrandbits(31) if body.seed is None else body.seed
        watched, wanted = body.watched, body.alternatives
        if watched and "alternatives" not in self.model.engine.unsupported:
            wanted = max(wanted or 0, SHOWN)
        one = self.model.request("x", strategy, seed=seed, record=watched, alternatives=wanted, **self._sampling(body))
        one = replace(one, stride=_stride(one) if body.stream else QUANTUM)
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        try:
            ones = [self._fitting(replace(one, prompt=prompt), body.limit) for prompt in self._prompts(body)]
        except ContextLengthError as e:
            raise too_long(e, param) from None
        except PromptError as e:
            raise fault(e, param) from None
        requests = [replace(one, index=i) for one in ones for i in range(body.n or 1)]
        engine = self.model.engine
        tokens = sum(engine.prompt_tokens(one.prompt) for one in ones)
        return Order(requests, strategy.name, seed, engine.vocabulary, tokens, body.n or 1)

    def _fitting(self, one: Request, wanted: int | None) -> Request:
        """The request with as many tokens as were asked for; without a wish: as the server says, and as models can read."""
        left = room(self.model, one)
        if wanted is None:
            limits = (self._length, self.settings.max_tokens, left)
            wanted = min((n for n in limits if n is not None), default=DEFAULT_TOKENS)
        elif left is not None and wanted > left:
            check(self.model, one, wanted)
        own = {k: v for k, v in one.from_checkpoint.items() if (k, v) == ("max_new_tokens", wanted) or k != "max_new_tokens"}
        return replace(one, sampling=replace(one.sampling, max_new_tokens=wanted), from_checkpoint=own)

    def _sampling(self, body: ChatRequest | CompletionRequest) -> dict[str, Any]:
        if body.temperature is not None and 0 < body.temperature < MIN_TEMPERATURE:
            raise ServeError(
                f"temperature must be 0 or at least {MIN_TEMPERATURE}, got {body.temperature}", 400, "invalid_value", "temperature"
            )
        if body.limit is not None and self.settings.max_tokens is not None:
            field = "max_tokens" if body.max_tokens is not None or isinstance(body, CompletionRequest) else "max_completion_tokens"
            self._at_most(field, body.limit, self.settings.max_tokens)
        given = {"temperature": body.temperature, "top_p": body.top_p, "stop": body.stops, **body.sampling}
        return self.recipe.sampling.settings() | {k: v for k, v in given.items() if v is not None}

    def _within(self, strategy: Method) -> Method:
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
            made = Prompt(prompt)
            check_size(self.model.base, made)
            return made
        if not self.model.base.reads_given_ids:
            raise ServeError("this model is sent text and reads no token ids; give the prompt as text", 400, "invalid_value", "prompt")
        check_size(self.model.base, Prompt("", tuple(prompt)))
        beyond = [i for i in prompt if i >= self.model.base.vocab_size]
        if beyond:
            message = f"token id {beyond[0]} is beyond the vocabulary ({self.model.base.vocab_size})"
            raise ServeError(message, 400, "invalid_value", "prompt")
        return Prompt(self.model.engine.vocabulary.whole(prompt), tuple(prompt))

    def _conversation(self, messages: Sequence[Message]) -> Prompt:
        """The messages, where the base has a template for them; a plain model continues their texts, one line each, none left out."""
        if reads_chats(self.model.base):
            prompt = Prompt(tuple(Message("system" if m.role == "developer" else m.role, m.content) for m in messages))
        else:
            prompt = Prompt("\n".join(m.content for m in messages))
        check_size(self.model.base, prompt)
        return prompt

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


def described(strategy: Method) -> dict[str, Any]:
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


def fault(error: Exception, param: str = "prompt") -> ServeError:
    """What a client is told of an error that ivg raised on purpose; ``param`` is where prompts stand in its body."""
    if isinstance(error, ServeError):
        return error
    message = public(str(error))
    if isinstance(error, PromptError):
        place = re.match(r"messages(?:\.\w+|\[\d+\])*", message)
        return ServeError(message, 400, "invalid_prompt", place[0] if place else param)
    if isinstance(error, ConfigError | ValueError):
        first = message.partition(" ")[0]
        named = first in Guidance.model_fields
        return ServeError(message, 400, "invalid_value", f"guidance.{first}" if named else "guidance")
    return ServeError(message, 500, "model_error")


def failed(error: str) -> ServeError:
    """What a client is told of an answer that a model broke off. Where another server did, its address is nobody's business."""
    if isinstance(error, ScoreFault):
        return fault(PromptError(error)) if error.prompt else ServeError(public(error.said), 500, "model_error")
    if not isinstance(error, UpstreamError):
        return ServeError(public(error), 500, "model_error")
    if error.status in (400, 413, 422):  # the request's own fault: too long, mostly
        return ServeError(public(error.said), 400, "invalid_request")
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


def public(message: str) -> str:
    """A message for strangers: one line, and of files of this machine the last part of their paths at most."""
    return re.sub(r"(?<![\w.:/~])~?/(?!v1/)(?:[\w.+@-]+/)+([\w.+@-]*)", r"\1", one_line(message))
