"""The models as clients see them: the base's name, and ``NAME:METHOD`` for every method whose values are loaded.

Turns request bodies into search requests, within the server's limits. Runs in the worker thread; independent of HTTP.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ivg.errors import ConfigError, ContextLengthError, IVGError, PromptError, ServeError
from ivg.model import GuidedModel
from ivg.models.chat_template import is_chat
from ivg.models.images import ImageReader
from ivg.models.prompt_encoder import conversation_prompt, has_chat_template
from ivg.search.given import NEUTRAL
from ivg.search.lengths import DEFAULT_MAX_TOKENS, check_lengths, max_new_tokens
from ivg.search.methods import LEVELS, Method, method_names
from ivg.search.request import QUANTUM, RepeatedPrompts, Request, streaming_stride
from ivg.search.searcher import check_engine
from ivg.search.tree import most_leaves
from ivg.serving.echo import EchoJob
from ivg.serving.errors import client_error, one_line
from ivg.serving.lengths import (
    check_chat_templates,
    check_prompt_length,
    context_length_error,
)
from ivg.serving.protocol import Body, ChatRequest, Guidance
from ivg.serving.tools import OfferedTools, offered_tools, tool_format
from ivg.settings.chat import ChatSettings
from ivg.settings.recipe import Recipe
from ivg.settings.sampling import STRUCTURES
from ivg.settings.serve import ServeSettings
from ivg.types import Prompt
from ivg.utils.version import VERSION

PLAYGROUND_TOP_LOGPROBS = 5
"""Alternatives for each token with ``include_beams``."""
MAX_BODY_WITH_IMAGES = 32 << 20
"""Bytes of a request body where the base reads pictures, unless the setting says otherwise."""


@dataclass(frozen=True)
class RequestBatch:
    """The search requests of one HTTP request.

    Attributes:
        requests: ``n`` for every prompt, in order.
        method: name of the method.
        seed: of all requests.
        prompt_tokens: of all prompts, each counted once.
        n: completions that are generated for every prompt.
        thinking: for each request what ends the thinking that its response begins with; None: it begins with its answer.
        returned: completions that are returned for every prompt, of ``n`` the likeliest.
        echo: the prompts, where the response shows anything of them; done before any text is generated.
        generate: is any text wanted?
        tools: the functions that the responses may call; None: none.
    """

    requests: list[Request]
    method: str
    seed: int
    prompt_tokens: int
    n: int
    thinking: list[str | None]
    returned: int
    echo: EchoJob | None = None
    generate: bool = True
    tools: OfferedTools | None = None


class ServedModels:
    """A model, the defaults of its requests, and the server's limits.

    Args:
        model: base and values.
        recipe: defaults: method, that method's settings, sampling.
        settings: limits.

    Attributes:
        name: of the base, the first one.
        bare_names: all names of the base, without a method.
        names: every model name that clients may use, with its method.

    Raises:
        ConfigError: the recipe's method cannot run, or a value has no chat template although the base has one.
    """

    def __init__(self, model: GuidedModel, recipe: Recipe, settings: ServeSettings) -> None:
        if model.base.images is not None and "max_body_bytes" not in settings.model_fields_set:
            settings = settings.model_copy(update={"max_body_bytes": MAX_BODY_WITH_IMAGES})
        self.model, self.recipe, self.settings = model, recipe, settings
        base = recipe.models.given.get("base")
        own = "embedded" if base is None else base.path.rstrip("/").rpartition("/")[2].replace(":", "-")
        self.bare_names = settings.name or (own,)
        self.name = self.bare_names[0]
        self.names = dict.fromkeys(self.bare_names, recipe.search.method)
        self.names |= {f"{name}:{m}": m for name in self.bare_names for m in model.methods}
        check_chat_templates(model)
        self.tool_format = tool_format(model, settings.tool_call_parser)
        self.sampling = {**asdict(model.sampling), **recipe.sampling.settings()}
        method = model.with_instruction(self.get_method(recipe.search.method, {}))
        check_engine(model.engine, model.request("x", method, **self.sampling))

    # Methods

    def get_method(self, method: str, given: dict[str, Any]) -> Method:
        """A method with the settings of a request; for the recipe's method, the recipe's settings are the defaults."""
        defaults = self.recipe.search.settings() if method == self.recipe.search.method else {}
        if {"weights", "token"} & set(given):
            defaults = {k: v for k, v in defaults.items() if k not in ("weights", "token")}
        if {"select_weights", "select"} & set(given):
            defaults = {k: v for k, v in defaults.items() if not k.startswith("select")}
        return self.model.get_method(method, **{**defaults, **given})

    def resolve_method(self, name: str, guidance: Guidance | None) -> str:
        """The method of a request, from its model name and its ``guidance.method``.

        Raises:
            ServeError: 404 for an unknown model; 400 for an unknown method, or one that contradicts the model name.
        """
        if name not in self.names:
            raise ServeError(
                f"the model {name!r} does not exist; expected one of: {', '.join(self.names)}", 404, "model_not_found", "model"
            )
        wanted = guidance.method if guidance else None
        if wanted is None:
            return self.names[name]
        if wanted not in method_names() and wanted != "custom":
            known = ", ".join([*method_names(), "custom"])
            raise ServeError(f"unknown method {wanted!r}; expected one of: {known}", 400, "invalid_value", "guidance.method")
        if name not in self.bare_names and wanted != self.names[name]:
            message = f"model {name!r} has the method {self.names[name]}, but guidance.method is {wanted!r}; give one of them"
            raise ServeError(message, 400, "invalid_value", "guidance.method")
        return wanted

    def listing(self) -> list[dict[str, Any]]:
        """Every model name with vLLM's ``root``, ``parent`` and ``max_model_len``, and the settings of its method.

        Clients that count tokens take the tokenizer at ``root``.
        """
        out, root = [], str(self.model.base.tokenizer.name_or_path)
        for name, method_name in self.names.items():
            method = self.get_method(method_name, {})
            bare, sign, _ = name.partition(":")
            length = self._context_length(method)
            own = {} if length is None else {"max_model_len": length}
            out.append({"id": name, "root": root or bare, "parent": bare if sign else None, **own, "ivg": describe_method(method)})
        return out

    def describe(self) -> dict[str, Any]:
        """What a page needs to know to offer settings: limits, values, defaults, and what models and engine can do."""
        names = ("max_hypotheses", "max_chunk_length", "max_candidates", "max_n", "deadline")
        return {
            "version": VERSION,
            "limits": {n: getattr(self.settings, n) for n in names} | {"max_tokens": self.max_tokens},
            "levels": dict(LEVELS),
            "values": list(self.model.values),
            "guides": [name for name in self.model.values if self._guides(name)],
            "chat": has_chat_template(self.model.base),
            "embedded": self.recipe.uses_embedded and not self.recipe.values,
            "end_at_sentence": "end_at_sentence" not in self.model.engine.unsupported and not any(map(self.sampling.get, STRUCTURES)),
            "defaults": self.defaults,
        }

    def _guides(self, value: str) -> bool:
        """Can ``value`` guide tokens without candidates?"""
        try:
            check_engine(self.model.engine, self.model.request("x", self.model.get_method("custom", token=value)))
        except IVGError:
            return False
        return True

    def _context_length(self, method: Method) -> int | None:
        """Tokens of prompt and completion together that all models of a method can read, as the base counts them."""
        request = self.model.request("x", self.model.with_instruction(method), **self.sampling)
        request = replace(request, prompt=Prompt("x", contrast=method.contrast, negative=method.negative))
        left = max_new_tokens(self.model.engine, request)
        return None if left is None else left + len(self.model.base.prompt_ids(request.prompt))

    @property
    def max_tokens(self) -> int | None:
        """Upper limit of ``max_tokens``, as far as it is known without the prompt."""
        return self.model.base.max_positions if self.settings.max_tokens is None else self.settings.max_tokens

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings of a request that gives none; ``max_new_tokens`` is None where the context decides."""
        return self.sampling | {"max_new_tokens": self._default_max_tokens, "method": self.names[self.name]}

    @property
    def _default_max_tokens(self) -> int | None:
        """The recipe's, else the checkpoint's; None: as the context allows."""
        given = self.recipe.sampling.max_new_tokens
        return self.model.generation_config.get("max_new_tokens") if given is None else given

    # Requests

    def prepare(self, body: Body) -> RequestBatch:
        """The search requests for ``body``.

        Raises:
            ServeError: over a limit, unknown model, prompt too long; ``param`` names the field.
            ConfigError: unusable settings.
        """
        name = self.resolve_method(body.model, body.guidance)
        method = self._check_limits(self.get_method(name, body.guidance.search if body.guidance else {}))
        seed = random.getrandbits(31) if body.seed is None else body.seed
        top_logprobs = body.n_logprobs
        if body.samples > (body.n or 1):
            top_logprobs = top_logprobs or 0  # it selects by them
        free = method.rule != "speculate" and not {"alternatives", "return_log_ratio"} & set(self.model.engine.unsupported)
        if body.include_beams and free:  # the engine has them at no cost
            top_logprobs = max(top_logprobs or 0, PLAYGROUND_TOP_LOGPROBS)
        if body.limit is not None and self.settings.max_tokens is not None:
            self._at_most(body.limit_field, body.limit, self.settings.max_tokens)
        offered = None
        if isinstance(body, ChatRequest) and self.tool_format is not None:
            offered = offered_tools(body, self.tool_format, self.model.base.vocabulary)
        own = offered.sampling(body) if offered is not None and isinstance(body, ChatRequest) else body.sampling
        sampling = self.recipe.sampling.settings() | own
        template = self.model.request("x", method, seed=seed, record=body.include_beams, alternatives=top_logprobs, **sampling)
        if offered is not None:
            offered.check(self.model.engine, template)
        template = replace(template, stride=streaming_stride(template) if body.stream else QUANTUM)
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        try:
            firsts = [self._with_max_tokens(template.with_prompt(prompt), body.limit) for prompt in self._prompts(body)]
            echo = self._echo(body, method, [first.prompt for first in firsts])
        except ContextLengthError as e:
            raise context_length_error(e, param, body.limit) from None
        except PromptError as e:
            raise client_error(e, param) from None
        if isinstance(body, ChatRequest) and self.tool_format is None:
            # no format of calls is known, so tools are refused; a prompt that the template refuses was refused before
            offered_tools(body, None, self.model.base.vocabulary)
        n = body.samples
        prompt_tokens = sum(self.model.engine.prompt_tokens(first.prompt) for first in firsts)
        repeated = RepeatedPrompts(n)
        requests = [replace(first, index=i) for first in firsts for i in repeated.indices(first.prompt)]
        markers = [self._marker(first) for first in firsts for _ in range(n)]
        return RequestBatch(requests, method.name, seed, prompt_tokens, n, markers, body.n or 1, echo, body.limit != 0, offered)

    def _echo(self, body: Body, method: Method, prompts: list[Prompt]) -> EchoJob | None:
        """What the response shows of the prompts."""
        if isinstance(body, ChatRequest) or not (body.echo or body.prompt_logprobs is not None):
            return None
        alternatives = body.n_prompt_logprobs
        template = None if alternatives is None else self.model.request("x", method, sampling=NEUTRAL)
        job = EchoJob(self.model, template, prompts, alternatives or 0)
        try:
            job.check()
        except ConfigError as e:
            field = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
            raise ServeError(one_line(str(e)), 400, "invalid_value", field) from None
        return job

    def _marker(self, request: Request) -> str | None:
        """What ends the thinking that the response begins with."""
        thinking = request.search.thinking
        if thinking is None or self.model.engine.answers_at_once(request.prompt, thinking.guide_after):
            return None
        return thinking.guide_after

    def read_images(self, body: Body) -> Body:
        """``body`` with the content of its pictures, which clients may name as data: URLs, or as the settings allow.

        May wait for other hosts: not for the worker's thread.

        Raises:
            ServeError: a base that reads text alone; a picture that is not allowed, not found or too large.
        """
        if not isinstance(body, ChatRequest) or not any(message.images for message in body.messages):
            return body
        prompt = Prompt(body.messages)
        try:
            if self.model.base.images is None:
                self.model.base.read_images(prompt)
            found = ImageReader(self.recipe.images, local=False).read(prompt)
        except PromptError as e:
            raise client_error(e, "messages") from None
        return body.model_copy(update={"messages": found.content})

    def _with_max_tokens(self, request: Request, wanted: int | None) -> Request:
        """The request with its number of new tokens: as asked for, else as the settings say and all models can read.

        One that wants none, but its prompt, stays as it is: it is not run.
        """
        if wanted == 0:
            check_lengths(self.model.engine, request, 0)
            return request
        left = max_new_tokens(self.model.engine, request)
        if wanted is None:
            limits = (self._default_max_tokens, self.settings.max_tokens, left)
            wanted = min((n for n in limits if n is not None), default=DEFAULT_MAX_TOKENS)
        elif left is not None and wanted > left:
            check_lengths(self.model.engine, request, wanted)
        if request.search.tree is not None and (rows := most_leaves(request.search, wanted)) > self.settings.max_beams:
            message = f"a tree of {wanted} tokens holds up to {rows} responses, this server allows {self.settings.max_beams}"
            raise ServeError(f"{message}; give a larger chunk_length, or fewer tokens", 400, "over_limit", "guidance.chunk_length")
        own = {k: v for k, v in request.from_checkpoint.items() if (k, v) == ("max_new_tokens", wanted) or k != "max_new_tokens"}
        return replace(request, sampling=replace(request.sampling, max_new_tokens=wanted), from_checkpoint=own)

    def _check_limits(self, method: Method) -> Method:
        limit = self.settings.max_hypotheses
        if method.width * method.successors > limit:
            message = f"width · successors is {method.width * method.successors}, this server allows {limit}"
            raise ServeError(message, 400, "over_limit", "guidance.successors" if method.successors > 1 else "guidance.width")
        self._at_most("guidance.chunk_length", method.chunk_length or 1, self.settings.max_chunk_length)
        self._at_most("guidance.candidates", method.candidates, self.settings.max_candidates)
        self._at_most("guidance.tries", method.tries, limit)
        self._at_most("guidance.draft", method.draft, QUANTUM)
        for name in ("weights", "select_weights"):
            if any(abs(weight) > 1000 for _, weight in getattr(method, name)):
                raise ServeError(f"{name} must be within 1000 of 0", 400, "invalid_value", f"guidance.{name}")
        return method

    @staticmethod
    def _at_most(field: str, got: int, limit: int) -> None:
        if got > limit:
            raise ServeError(f"{field} is {got}, this server allows at most {limit}", 400, "over_limit", field)

    def count_completions(self, body: Body) -> int:
        """How many completions ``body`` asks for.

        Raises:
            ServeError: more than the server allows in one request.
        """
        count = body.samples * (1 if isinstance(body, ChatRequest) else len(body.prompts))
        field = "prompt" if body.samples == 1 else "n" if body.samples == body.n else "best_of"
        if count > self.settings.max_n:
            raise ServeError(f"{count} completions requested, this server allows at most {self.settings.max_n}", 400, "over_limit", field)
        return count

    # Prompts

    def _prompts(self, body: Body) -> list[Prompt]:
        if isinstance(body, ChatRequest):
            return [self._chat_prompt(body)]
        return [self._text_prompt(p, 0 if body.limit == 0 else 1) for p in body.prompts]

    def _text_prompt(self, given: str | Sequence[int], new_tokens: int) -> Prompt:
        base = self.model.base
        if isinstance(given, str):
            prompt = Prompt(given)
            check_prompt_length(base, prompt, new_tokens)
            return prompt
        if not base.reads_given_ids:
            raise ServeError("this model does not accept token ids; send the prompt as text", 400, "invalid_value", "prompt")
        check_prompt_length(base, Prompt("", tuple(given)), new_tokens)
        beyond = [i for i in given if i >= base.vocab_size]
        if beyond:
            message = f"token id {beyond[0]} is outside the vocabulary ({base.vocab_size} tokens)"
            raise ServeError(message, 400, "invalid_value", "prompt")
        return Prompt(self.model.engine.vocabulary.prompt_text(given), tuple(given))

    def _chat_prompt(self, body: ChatRequest) -> Prompt:
        """The messages as the base reads them; what only a chat template reads is refused where it has none."""
        prompt = conversation_prompt(body.messages, self.model.base, ChatSettings(**body.chat))
        for name, given in (("chat_template_kwargs", body.chat_template_kwargs), ("tools", body.offered_tools)):
            if given and not is_chat(prompt, self.model.base.template):
                message = f"{name} is not supported by this model, which has no chat template; leave it out"
                raise ServeError(message, 400, "invalid_value", name)
        check_prompt_length(self.model.base, prompt)
        return prompt


def describe_method(method: Method) -> dict[str, Any]:
    """A method as JSON values."""
    names = (
        *("summary", "token", "select", "width", "successors", "chunk_length", "beta", "candidates"),
        *("contrast", "negative", "select_combine"),
    )
    weights = {name: dict(getattr(method, name)) for name in ("weights", "select_weights", "select_reference")}
    return {
        "method": method.name,
        "level": method.level,
        "rule": method.rule_name,
        **{name: getattr(method, name) for name in names},
        **weights,
    }
