"""Request bodies: OpenAI's fields, vLLM's names for further sampling settings, and ``guidance``. Knows no models.

Unknown fields are errors (``serving.parsing`` has removed those that do not change the response). Fields of OpenAI's protocol that are
not supported (tools, penalties, audio …) are accepted at their neutral value and refused otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from ivg.errors import PromptError
from ivg.settings.recipe import SearchConfig
from ivg.types.messages import Message, Prompt, check_text

MAX_MESSAGES = 1024
MAX_STOPS = 16
ROLES = ("system", "developer", "user", "assistant")
SAMPLING = ("top_k", "min_p", "repetition_penalty", "ignore_eos")
"""Fields of ``guidance`` that are also accepted at the body's top level, where vLLM has them."""


class MustBe:
    """Marks a field that is not supported: it must be None or one of these neutral values."""

    def __init__(self, *neutral: Any) -> None:
        self.neutral = neutral

    def check(self, value: Any) -> Any:
        """``value``, if it is neutral; ValueError otherwise."""
        if not is_one_of(value, (None, *self.neutral)):
            raise ValueError(f"is not supported; leave it out{f' or give {self.neutral[0]!r}' if self.neutral else ''}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.neutral]}


def is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    """Is a JSON value among ``choices``? Unlike in Python, 0 is not false."""
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Guidance(SearchConfig):
    """Method and settings of the search (see ``ivg models``), and sampling settings that OpenAI's protocol lacks."""

    model_config = ConfigDict(allow_inf_nan=False)

    method: str | None = None  # type: ignore[assignment]
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    ignore_eos: bool | None = None

    @property
    def search(self) -> dict[str, Any]:
        """Settings of the search that were given, without the method."""
        return {k: v for k, v in self.settings().items() if k in SearchConfig.model_fields}

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling settings that were given."""
        return {k: v for k, v in self.settings().items() if k not in SearchConfig.model_fields}


class StreamOptions(_Strict):
    """What a stream contains besides text.

    Attributes:
        include_usage: end with a chunk of usage.
        continuous_usage_stats: with ``include_usage``, add the usage so far to every chunk (as vLLM does).
        include_beams: send the search tree and the alternatives of every token (ours).
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_beams: bool | None = None
    include_obfuscation: Annotated[Any, MustBe(False)] = None


def _stop(value: Any) -> str | list[str] | None:
    """One text or several, none of them empty; errors name the path."""
    if value is None:
        return None
    if not isinstance(value, str | list):
        raise PromptError(f"stop must be text or a list of texts, got {show_json(value)}")
    if isinstance(value, list) and len(value) > MAX_STOPS:
        raise PromptError(f"stop must have at most {MAX_STOPS} texts, got {len(value)}")
    for where, text in [("stop", value)] if isinstance(value, str) else [(f"stop[{i}]", text) for i, text in enumerate(value)]:
        check_text(text, where)
        if not text:
            raise PromptError(f"{where} must not be empty; leave it out")
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    """The messages of a chat; roles for tools are not supported."""
    if not isinstance(value, list):
        raise PromptError(f"messages must be a list of messages, got {show_json(value)}")
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise PromptError(f"messages must have 1 to {MAX_MESSAGES} messages, got {len(value)}")
    turns: Any = Prompt.of(value).content
    for i, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise PromptError(f"messages[{i}].role must be one of {', '.join(ROLES)}, got {turn.role!r}")
    return tuple(turns)


def _prompt(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    """A text, several texts, token ids, or several lists of token ids; errors name the path."""
    if isinstance(value, str):
        check_text(value, "prompt")
        return value
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else show_json(value)
        raise PromptError(f"prompt must be text, a list of texts, token ids, or a list of lists of token ids; got {got}")
    if _is_token_id(value[0]):
        return _token_ids(value, "prompt")
    if isinstance(value[0], list):
        return [_token_ids(ids, f"prompt[{i}]") for i, ids in enumerate(value)]
    for i, text in enumerate(value):
        check_text(text, f"prompt[{i}]")
    return value


def _token_ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise PromptError(f"{where} must be a list of token ids, got {'an empty list' if value == [] else show_json(value)}")
    for i, token in enumerate(value):
        if not _is_token_id(token) or token < 0:
            raise PromptError(f"{where}[{i}] must be a token id (an integer of 0 or more), got {show_json(token)}")
    return value


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def show_json(value: Any) -> str:
    """A JSON value in an error message: the value if it is short, else its type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value) if abs(value) < 1e20 else "a very large number"
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"text of {len(value)} characters"
    return "an object" if isinstance(value, dict) else "a list"


_TEXT: dict[str, Any] = {"type": "string"}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def _list_of(items: dict[str, Any], most: int | None = None) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1} | ({} if most is None else {"maxItems": most})


_PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _TEXT}}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": list(ROLES)}, "content": {"anyOf": [_TEXT, _list_of(_PART)]}},
}
Stop = Annotated[
    Any,
    PlainValidator(_stop),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": MAX_STOPS}, {"type": "null"}]}),
]
Messages = Annotated[tuple[Message, ...], PlainValidator(_messages), WithJsonSchema(_list_of(_MESSAGE, MAX_MESSAGES))]
Prompts = Annotated[Any, PlainValidator(_prompt), WithJsonSchema({"anyOf": [_TEXT, _list_of(_TEXT), _IDS, _list_of(_IDS)]})]


class _Request(_Strict):
    model: str
    n: int | None = Field(None, ge=1)
    stop: Stop = None
    seed: int | None = Field(None, ge=-(1 << 63), le=(1 << 63) - 1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    guidance: Guidance | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    presence_penalty: Annotated[Any, MustBe(0)] = None
    frequency_penalty: Annotated[Any, MustBe(0)] = None
    logit_bias: Annotated[Any, MustBe({})] = None

    @property
    def stops(self) -> list[str] | None:
        """Stop strings, always as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling settings that OpenAI's protocol lacks and that were given, here or in ``guidance``."""
        own = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if own.get("top_k") == -1:  # off, in vLLM
            own["top_k"] = 0
        if self.min_tokens is not None:
            own["min_new_tokens"] = self.min_tokens
        return own | (self.guidance.sampling if self.guidance else {})

    @property
    def include_beams(self) -> bool:
        """Stream the search tree?"""
        return bool(self.stream and self.stream_options and self.stream_options.include_beams)

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives for each token; None: no log-probabilities."""
        return None

    @property
    def limit(self) -> int | None:
        """Maximum number of completion tokens."""
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        """The field that gives :attr:`limit`."""
        return "max_tokens"

    @model_validator(mode="after")
    def _check_stream_options(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @model_validator(mode="after")
    def _check_given_once(self) -> _Request:
        given = self.guidance.sampling if self.guidance else {}
        for name in SAMPLING:
            own = getattr(self, name)
            if None not in (own, given.get(name)) and own != given[name]:
                raise ValueError(f"{name} is {own} and guidance.{name} is {given[name]}; give one of them")
        return self


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Annotated[Any, MustBe({"type": "text"})] = None
    tools: Annotated[Any, MustBe([])] = None
    tool_choice: Annotated[Any, MustBe("none")] = None
    parallel_tool_calls: Annotated[Any, MustBe(False, True)] = None
    functions: Annotated[Any, MustBe([])] = None
    function_call: Annotated[Any, MustBe("none")] = None
    modalities: Annotated[Any, MustBe(["text"])] = None
    audio: Annotated[Any, MustBe()] = None
    prediction: Annotated[Any, MustBe()] = None
    reasoning_effort: Annotated[Any, MustBe("none")] = None
    verbosity: Annotated[Any, MustBe()] = None
    web_search_options: Annotated[Any, MustBe()] = None
    service_tier: Annotated[Any, MustBe("auto", "default")] = None
    store: Annotated[Any, MustBe(False)] = None
    metadata: Annotated[Any, MustBe({})] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def limit(self) -> int | None:
        """Maximum number of completion tokens, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_field(self) -> str:
        """The field that gives :attr:`limit`."""
        return "max_tokens" if self.max_tokens is not None else "max_completion_tokens"

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives for each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1)
    echo: Annotated[Any, MustBe(False)] = None
    suffix: Annotated[Any, MustBe("")] = None

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives for each token; None: no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several texts, or token ids."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given

    @model_validator(mode="after")
    def _no_best_of(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError('best_of is not supported; guidance={"method": "bon", "successors": N} selects the best of N by a value')
        return self


Body = ChatRequest | CompletionRequest
"""A parsed request body."""
