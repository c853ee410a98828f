"""Calls of tools in responses: which request may have them, and how OpenAI's objects show them. Independent of HTTP and threads."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ivg.errors import ConfigError, MissingDependencyError, ServeError
from ivg.model import GuidedModel
from ivg.models.tool_formats import FORMATS, ParsedResponse, ToolFormat
from ivg.models.tool_grammar import call_grammar
from ivg.models.tool_guess import format_of_template, reads_several
from ivg.models.tool_reader import CallText
from ivg.models.vocabulary import Vocabulary
from ivg.search.request import Request
from ivg.search.searcher import check_engine
from ivg.serving.errors import one_line
from ivg.serving.protocol import ChatRequest
from ivg.types import Engine, SamplingParams

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """The functions that a response may call.

    Attributes:
        format: how the model writes calls.
        names: of the functions.
        parallel: may there be several calls? Else those after the first are left out.
        named: is the function that is called in the request?
        closed: are calls of other functions left out?
        grammar: of responses, where they are calls, or calls or JSON; None: they are free.
        schemas: that the grammar is made of, by their place in the request.
    """

    format: ToolFormat
    names: frozenset[str]
    parallel: bool = True
    named: bool = False
    closed: bool = False
    grammar: str | None = None
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def sampling(self, body: ChatRequest) -> dict[str, Any]:
        """Settings of sampling for ``body``, with the grammar in the place of its ``response_format``."""
        given = body.sampling
        if self.grammar is None:
            return given
        return {name: value for name, value in given.items() if name not in (body.response_format or {})} | {"grammar": self.grammar}

    def check(self, engine: Engine, request: Request) -> None:
        """Raise where ``engine`` cannot follow the grammar for ``request``, or where a free response could end within a call.

        Raises:
            ServeError: names the field.
        """
        if self.grammar is None:
            if request.sampling.end_at_sentence:
                message = "end_at_sentence could end a call within its arguments; set it to 0, or offer no tools"
                raise ServeError(message, 400, "invalid_value", "end_at_sentence")
            return
        try:
            check_engine(engine, request)
        except (ConfigError, MissingDependencyError) as e:
            message = one_line(str(e))
            if not message.startswith(("grammar", "structured output")):
                raise
            if message.startswith("grammar cannot"):
                self._check_schemas(engine)
            raise ServeError(f"tool_choice: such a call is structured output; {message}", 400, "invalid_value", "tool_choice") from None

    def _check_schemas(self, engine: Engine) -> None:
        """Raise for a schema that cannot be followed.

        Raises:
            ServeError: names its place.
        """
        for place, schema in self.schemas.items():
            try:
                engine.check_sampling(SamplingParams(json_schema=json.dumps(schema)))
            except ConfigError as e:
                message = one_line(str(e)).replace("json_schema", place, 1)
                raise ServeError(f"{message}; a call that is required is structured output", 400, "invalid_value", place) from None

    def parse(self, text: str, *, final: bool) -> ParsedResponse:
        """Text and calls of a response, or of its beginning unless it is ``final``."""
        found = self.format.parse(text, self.names, final=final)
        calls = tuple(call for call in found.calls if not self.closed or call.name in self.names)
        return ParsedResponse(found.content, calls if self.parallel else calls[:1])

    def call_id(self, response: str, choice: int, number: int) -> str:
        """The id of a call: the same in a stream and in a whole response of this id."""
        digest = hashlib.sha256(f"{response}/{choice}/{number}".encode()).digest()
        letters = "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest)
        return letters[:9] if self.format.short_ids else f"call_{letters[:24]}"


def tool_format(model: GuidedModel, name: str | None) -> ToolFormat | None:
    """The format in which the base writes calls, whose special tokens are text from now on; None: none is known.

    A response has one call where the chat template reads one call of a turn but refuses two.

    Args:
        model: with the base.
        name: of the format, or ``none``; None: the one that the base's chat template writes.
    """
    found = format_of_template(model.base) if name is None else FORMATS.get(name)
    if found is not None:
        model.base.vocabulary.show(found.tokens)
        found = replace(found, several=reads_several(model.base))
    return found


def offered_tools(body: ChatRequest, known: ToolFormat | None, vocabulary: Vocabulary) -> OfferedTools | None:
    """The functions that the response to ``body`` may call; None: none.

    A call that is required is structured output. So is a response that is a call or, with ``response_format``, JSON.

    Args:
        body: of the request.
        known: the format in which the base writes calls.
        vocabulary: of the base.

    Raises:
        ServeError: there is no format, or the arguments of a function are no object.
    """
    if not body.offered_tools:
        return None
    if known is None:
        message = (
            "tools is not supported by this model: its chat template writes calls in no known form"
            f" (the server's --tool-call-parser takes {', '.join(FORMATS)})"
        )
        raise ServeError(message, 400, "invalid_value", "tools")
    name, allowed = body.called_function, body.allowed_functions
    parallel = known.several and body.parallel_tool_calls is not False
    only = allowed if name is None else (name,)
    tools = body.known_tools  # by their place in the request
    placed = {f"tools[{i}].function": tool["function"] for i, tool in enumerate(tools)}
    functions = {place: function for place, function in placed.items() if only is None or function["name"] in only}
    schema = (body.response_format or {}).get("json_schema")
    out = OfferedTools(known, frozenset(f["name"] for f in functions.values()), parallel, name is not None, allowed is not None)
    if not body.call_required and schema is None:
        return out
    instead = None if body.call_required else schema
    try:
        grammar = call_grammar(known, tools, vocabulary.special_id, several=parallel and name is None, only=only, instead=instead)
    except ConfigError as e:
        raise ServeError(one_line(str(e)), 400, "invalid_value", str(e).partition(" ")[0]) from None
    schemas = {f"{place}.parameters": function.get("parameters") or {} for place, function in functions.items()}
    return replace(out, grammar=grammar, schemas=schemas if instead is None else schemas | {"response_format": instead})


def message_calls(calls: Sequence[CallText], ids: Sequence[str]) -> list[dict[str, Any]]:
    """``tool_calls`` of a message."""
    return [_call(call, identity, call.arguments) for call, identity in zip(calls, ids, strict=True)]


def call_deltas(sent: Sequence[CallText], calls: Sequence[CallText], ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    """``tool_calls`` of deltas: for each call its id and name first, then pieces of its arguments."""
    for i, (call, identity) in enumerate(zip(calls, ids, strict=True)):
        if i >= len(sent):
            yield {"index": i, **_call(call, identity, "")}
        if piece := call.arguments[len(sent[i].arguments) if i < len(sent) else 0 :]:
            yield {"index": i, "function": {"arguments": piece}}


def _call(call: CallText, identity: str, arguments: str) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": call.name, "arguments": arguments}}
