"""Request bodies: OpenAI's fields, the settings of ``ivg.settings``, and ``guidance``. Independent of models.

Settings of search and sampling have the names, aliases and ranges of :mod:`ivg.settings`: all of them in ``guidance``, those of sampling
at the top level too, as in vLLM. Unknown fields are errors; ``serving.ignored`` has removed those that do not change the response, and
refused those that are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ivg.serving.fields import Messages, Prompts, Stop, ToolChoice
from ivg.serving.structured import ResponseFormat, StructuredOutputs
from ivg.settings.chat import ChatSettings
from ivg.settings.per_request import RequestSettings
from ivg.settings.requests import SearchConfig
from ivg.settings.rules import count
from ivg.settings.sampling import STRUCTURES, SamplingParams
from ivg.settings.schema import Setting, settings_of
from ivg.settings.tables import Table, table_of

_OPENAI_NAMES = ("max_new_tokens", "stop")
"""Settings of sampling that OpenAI calls otherwise, or writes in another form."""


def _renamed(name: str, **changes: Any) -> tuple[Setting, Any]:
    """A setting of sampling for a field of another name, and that field."""
    setting = replace(settings_of(SamplingParams)[name].setting, aliases=(), **changes)
    return setting, Field(description=setting.help, json_schema_extra=dict(setting.rule.bounds) if setting.rule else {})


_MAX_TOKENS, _MAX_TOKENS_FIELD = _renamed("max_new_tokens")
_LENGTH, _LENGTH_FIELD = _renamed(
    "max_new_tokens", help=f"{_MAX_TOKENS.help} 0 gives log-probabilities of the prompt alone.", rule=count(0, "at least 0")
)


def _without_minus(data: Any) -> Any:
    """``data`` with 0 where ``top_k`` is vLLM's -1."""
    return {**data, "top_k": 0} if isinstance(data, Mapping) and data.get("top_k") == -1 else data


@table_of(SamplingParams, without=("temperature", "top_p", *_OPENAI_NAMES))
class Guidance(SearchConfig):
    """Method and settings of the search (see ``ivg models``), and sampling settings that OpenAI's protocol lacks."""

    method: str | None = None  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _top_k_off(cls, data: Any) -> Any:
        return _without_minus(data)

    @property
    def search(self) -> dict[str, Any]:
        """Settings of the search that were given, without the method."""
        return {k: v for k, v in self.settings().items() if k in SearchConfig.model_fields}

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling settings that were given."""
        return {k: v for k, v in self.settings().items() if k not in SearchConfig.model_fields}


class StreamOptions(Table):
    """What a stream contains besides text.

    Attributes:
        include_usage: end with a chunk of usage.
        continuous_usage_stats: with ``include_usage``, add the usage so far to every chunk (as vLLM does).
        include_beams: send the search tree and the alternatives of every token (an ivg extension).
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_beams: bool | None = None
    include_obfuscation: Literal[False] | None = None


@table_of(SamplingParams, without=_OPENAI_NAMES)
@table_of(RequestSettings, only=("seed",))
class _Request(Table):
    model: str
    n: int | None = Field(None, ge=1)
    stop: Stop = None
    response_format: ResponseFormat = None
    structured_outputs: StructuredOutputs = None
    max_tokens: Annotated[int | None, _MAX_TOKENS, _MAX_TOKENS_FIELD] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    guidance: Guidance | None = None

    if TYPE_CHECKING:
        seed: int | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling settings that were given, here or in ``guidance``; without the maximum length."""
        own = {name: value for name in settings_of(SamplingParams) if (value := getattr(self, name, None)) is not None}
        if isinstance(self.stop, str):
            own["stop"] = [self.stop]
        own |= {**(self.response_format or {}), **(self.structured_outputs or {})}
        return own | (self.guidance.sampling if self.guidance else {})

    @property
    def include_beams(self) -> bool:
        """Stream the search tree?"""
        return bool(self.stream and self.stream_options and self.stream_options.include_beams)

    @property
    def limit(self) -> int | None:
        """Maximum number of completion tokens."""
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        """The field that gives :attr:`limit`."""
        return "max_tokens"

    @property
    def samples(self) -> int:
        """Completions that are generated for every prompt."""
        return self.n or 1

    @property
    def _structures(self) -> list[str]:
        """The fields that ask for structured output."""
        inner = self.guidance.sampling if self.guidance else {}
        forms = [name for name in ("response_format", "structured_outputs", *STRUCTURES) if getattr(self, name)]
        return forms + [f"guidance.{name}" for name in STRUCTURES if inner.get(name) and not getattr(self, name)]

    @property
    def structure_field(self) -> str:
        """The field that forbids tokens by a grammar; ``guidance`` where none does, and so another setting of sampling."""
        return next(iter(self._structures), "guidance")

    @model_validator(mode="before")
    @classmethod
    def _top_k_off(cls, data: Any) -> Any:
        return _without_minus(data)

    @model_validator(mode="after")
    def _check_stream_options(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @model_validator(mode="after")
    def _check_one_structure(self) -> _Request:
        if len(forms := self._structures) > 1:
            raise ValueError(f"{forms[0]} and {forms[1]} are both given; a response follows one of them")
        return self

    @model_validator(mode="after")
    def _check_given_once(self) -> _Request:
        for name, inner in (self.guidance.sampling if self.guidance else {}).items():
            own = getattr(self, name)
            if own is not None and own != inner:
                raise ValueError(f"{name} is {own} and guidance.{name} is {inner}; give one of them")
        return self


@table_of(ChatSettings)
class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Messages
    if TYPE_CHECKING:
        chat_template_kwargs: dict[str, Any] | None = None
        add_generation_prompt: bool | None = None
        continue_final_message: bool | None = None
        tools: list[dict[str, Any]] | None = None

    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Annotated[int | None, _MAX_TOKENS, _MAX_TOKENS_FIELD] = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def limit(self) -> int | None:
        """Maximum number of completion tokens, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_field(self) -> str:
        """The field that gives :attr:`limit`."""
        return "max_tokens" if self.max_tokens is not None else "max_completion_tokens"

    @property
    def known_tools(self) -> list[dict[str, Any]]:
        """All functions, without ``strict``, which templates do not know; none with ``tool_choice: none``."""
        given = () if self.tool_choice == "none" else self.tools or ()
        return [{**tool, "function": {k: v for k, v in tool["function"].items() if k != "strict"}} for tool in given]

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """Those of them that the model sees; a free response could call any of them."""
        allowed = self.allowed_functions
        return [tool for tool in self.known_tools if allowed is None or tool["function"]["name"] in allowed]

    @property
    def allowed_functions(self) -> tuple[str, ...] | None:
        """Names of the functions of ``allowed_tools``; None: ``tool_choice`` is another one."""
        choice: Any = self.tool_choice
        if not isinstance(choice, Mapping) or choice["type"] != "allowed_tools":
            return None
        return tuple(tool["function"]["name"] for tool in choice["allowed_tools"]["tools"])

    @property
    def called_function(self) -> str | None:
        """The function that the response must call; None: none is named."""
        choice: Any = self.tool_choice
        if not isinstance(choice, Mapping) or self.allowed_functions is not None:
            return None
        name: str = choice["function"]["name"]
        return name

    @property
    def call_required(self) -> bool:
        """Must the response be a call?"""
        choice: Any = self.tool_choice
        mode = choice["allowed_tools"]["mode"] if self.allowed_functions is not None else choice
        return mode == "required" or self.called_function is not None

    @property
    def structure_field(self) -> str:
        """As of completions; a call that is required is structured output."""
        return "tool_choice" if self.call_required else super().structure_field

    @property
    def chat(self) -> dict[str, Any]:
        """The settings of the chat template that were given."""
        return {name: value for name in settings_of(ChatSettings) if name != "tools" and (value := getattr(self, name)) is not None} | (
            {"tools": self.offered_tools} if self.offered_tools else {}
        )

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives for each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message are both true; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @model_validator(mode="after")
    def _check_tool_choice(self) -> ChatRequest:
        wanted = self.allowed_functions or ((self.called_function,) if self.called_function is not None else ())
        names = [tool["function"]["name"] for tool in self.known_tools]
        if self.call_required and not self.tools:
            raise ValueError("tool_choice requires a call, and there are no tools to call")
        if (unknown := next((name for name in wanted if name not in names), None)) is not None:
            raise ValueError(f"tool_choice names the function {unknown!r}, which is not among tools ({', '.join(names)})")
        if not self.call_required:
            return self
        if other := next((form for form in self._structures if form != "response_format"), None):
            raise ValueError(f"tool_choice requires a call, and {other} is given; a response follows one of them")
        return self


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int | None, _LENGTH, _LENGTH_FIELD] = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1)

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives for each token; None: no log-probabilities."""
        return self.logprobs

    @property
    def n_prompt_logprobs(self) -> int | None:
        """Alternatives for each token of the prompt; None: no log-probabilities."""
        wanted = [n for n in (self.logprobs if self.echo else None, self.prompt_logprobs) if n is not None]
        return max(wanted, default=None)

    @model_validator(mode="after")
    def _check_prompts(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens must be at least 1, got 0; 0 needs echo=true or prompt_logprobs")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs needs stream=false; a stream has those of echo=true with logprobs")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several texts, or token ids."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given

    @property
    def samples(self) -> int:
        """Completions that are generated for every prompt; the ``n`` likeliest are returned."""
        return self.best_of or self.n or 1

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of must be at least n ({self.n or 1}), got {self.best_of}")
        if self.samples > (self.n or 1) and self.stream:
            raise ValueError("best_of cannot be streamed: the best is known at the end; leave stream out")
        return self


Body = ChatRequest | CompletionRequest
"""A parsed request body."""
