"""What clients may ask: OpenAI's fields, strictly, and ``guidance``. Knows no models; unknown fields are errors that name them.

Fields that OpenAI's clients may send and that nothing here can honour (tools, penalties, audio …) are accepted at the value that
asks for nothing, and refused by name otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from ivg.config import SearchConfig


class Only:
    """Marks a field that may only ask for nothing, by one of these values or None."""

    def __init__(self, *neutral: Any) -> None:
        self.neutral = neutral

    def check(self, value: Any) -> Any:
        """``value``, if it is one of them; 0 is not False."""
        if not any(value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in (None, *self.neutral)):
            raise ValueError(f"is not supported; leave it out{f' or give {self.neutral[0]!r}' if self.neutral else ''}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.neutral]}


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is no Unicode text: it has half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Guidance(SearchConfig):
    """Method and settings of the search (``ivg models`` lists them), and sampling settings that OpenAI's protocol lacks."""

    model_config = ConfigDict(allow_inf_nan=False)

    method: str | None = None  # type: ignore[assignment]
    beta: float | None = Field(None, ge=-1000, le=1000, validation_alias=SearchConfig.model_fields["beta"].validation_alias)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    ignore_eos: bool | None = None

    @property
    def search(self) -> dict[str, Any]:
        """Settings of the search that were given, but for the method."""
        return {k: v for k, v in self.settings().items() if k in SearchConfig.model_fields}

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of sampling that were given."""
        return {k: v for k, v in self.settings().items() if k not in SearchConfig.model_fields}


class StreamOptions(_Body):
    """What a stream carries besides text; ``include_beams`` (ours) sends the search tree and every token's alternatives."""

    include_usage: bool | None = None
    include_beams: bool | None = None
    include_obfuscation: Annotated[Any, Only(False)] = None


Stop = Text | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=16)] | None


class _Common(_Body):
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
    presence_penalty: Annotated[Any, Only(0)] = None
    frequency_penalty: Annotated[Any, Only(0)] = None
    logit_bias: Annotated[Any, Only({})] = None

    @property
    def stops(self) -> list[str] | None:
        """Stop strings, always as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def watched(self) -> bool:
        """Does the client want to see beams?"""
        return bool(self.stream and self.stream_options and self.stream_options.include_beams)

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens are to be shown at each place; None: not even the drawn ones' log-probabilities."""
        return None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer."""
        return self.max_tokens

    @model_validator(mode="after")
    def _streams(self) -> _Common:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true")
        if self.stop == "":
            raise ValueError("stop must not be empty")
        return self


class TextPart(_Body):
    """A piece of a message; only text is read."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None
    refusal: Annotated[Any, Only()] = None
    tool_calls: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only()] = None
    audio: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Annotated[Any, Only({"type": "text"})] = None
    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none")] = None
    parallel_tool_calls: Annotated[Any, Only(False, True)] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    verbosity: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    store: Annotated[Any, Only(False)] = None
    metadata: Annotated[Any, Only({})] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """As many as ``top_logprobs`` says."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1)
    echo: Annotated[Any, Only(False)] = None
    suffix: Annotated[Any, Only("")] = None

    @property
    def alternatives(self) -> int | None:
        """As many as ``logprobs`` says."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several texts, or token ids."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given

    @model_validator(mode="after")
    def _no_best_of(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError('best_of is not supported; guidance={"method": "bon", "successors": N} picks the best of N by a value')
        return self
