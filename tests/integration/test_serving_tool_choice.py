"""``tool_choice`` required and of a name, for real families' templates and a model whose answers are random: all are valid calls."""

import json
import sys

import httpx
import pytest
from openai.types.responses import Response

from scripted import RECIPE, random_chat, scripted
from serving_tools import Running, chunks, well_formed
from tool_chats import ASKED, TOOL

pytest.importorskip("llguidance", reason="needs the extra structured")
jsonschema = pytest.importorskip("jsonschema")
PATH, RESPONSES = "/v1/chat/completions", "/v1/responses"
PLACE = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/City"},
        "day": {"type": "integer", "minimum": 0, "maximum": 9},
        "unit": {"enum": ["°C", "°F"]},
    },
    "required": ["city", "day"],
    "$defs": {"City": {"type": "string", "maxLength": 3}},
}
WEATHER = {"type": "function", "function": {"name": "wx", "description": "Weather of a city.", "parameters": PLACE}}
CLOCK = {"type": "function", "function": {"name": "at", "description": "The time."}}
SCHEMAS = {"wx": PLACE | {"additionalProperties": False}, "at": {"const": {}}}
NAMED = {"type": "function", "function": {"name": "wx"}}
BODY = {"model": "tiny:eft", "messages": ASKED, "tools": [WEATHER, CLOCK], "max_tokens": 2000}
SEARCH = {"method": "ivg", "width": 2, "successors": 2, "chunk_length": 7}
FAMILIES = {
    "qwen3": ("<tool_call>", "</tool_call>"),
    "llama3_1": (),
    "mistral": ("[TOOL_CALLS]",),
    "mistral_named": ("[TOOL_CALLS]", "[ARGS]"),
}


@pytest.fixture(scope="module", params=[*FAMILIES])
def running(request):
    with Running(random_chat(request.param, FAMILIES[request.param])) as server:
        yield server


@pytest.fixture(scope="module")
def qwen():
    with Running(random_chat()) as server:
        yield server


def checked(calls, names=("wx", "at")):
    """Names of the calls, whose arguments follow their schemas."""
    assert calls
    for call in calls:
        function = call["function"]
        assert call["type"] == "function" and call["id"] and function["name"] in names
        jsonschema.validate(json.loads(function["arguments"]), SCHEMAS[function["name"]])
    return [call["function"]["name"] for call in calls]


def assembled(response):
    """The message and the reason to finish of a stream."""
    calls, text, reason = [], "", None
    for chunk in chunks(response):
        for choice in chunk["choices"]:
            delta, reason = choice["delta"], choice["finish_reason"] or reason
            text += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append(json.loads(json.dumps(call)))
                    calls[-1].pop("index")
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return {"content": text or None, "calls": calls, "reason": reason}


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), (NAMED, "stop"), ({"function": {"name": "wx"}}, "stop")],
    ids=["required", "named", "named without a type"],
)
def test_a_call_that_is_required_is_a_valid_one(running, choice, reason):
    """Also under beams and streamed. OpenAI's reason to finish is ``stop`` where the request named the function."""
    for guidance in ({"method": "eft"}, SEARCH | {"beta": 2.0}):
        body = BODY | {"tool_choice": choice, "seed": 1, "guidance": guidance, "model": "tiny", "parallel_tool_calls": False}
        whole = running.post(body, PATH)
        assert whole.status_code == 200, whole.text
        (found,) = whole.json()["choices"]
        (name,) = checked(found["message"]["tool_calls"])
        assert (found["finish_reason"], found["message"]["content"]) == (reason, None) and (choice == "required" or name == "wx")
    streamed = assembled(running.post(body | {"stream": True}, PATH))
    assert [c["function"] for c in streamed["calls"]] == [c["function"] for c in found["message"]["tool_calls"]]
    assert (streamed["reason"], streamed["content"]) == (reason, None)


def allowed(*tools, mode="required", flat=False):
    """OpenAI's object; ``flat``: that of the Responses API."""
    names = [{"name": tool["function"]["name"]} for tool in tools]
    given = {"mode": mode, "tools": [{"type": "function", **(name if flat else {"function": name})} for name in names]}
    return {"type": "allowed_tools", **(given if flat else {"allowed_tools": given})}


def test_tools_that_are_allowed(running):
    """Of three functions the calls are of those two, in each format; by either API, streamed too."""
    tools = [bad()["tools"][0], WEATHER, CLOCK]
    for seed in range(3):
        body = BODY | {"tools": tools, "tool_choice": allowed(WEATHER, CLOCK), "seed": seed, "parallel_tool_calls": False}
        whole = running.post(body, PATH)
        assert whole.status_code == 200, whole.text
        (found,) = whole.json()["choices"]
        assert set(checked(found["message"]["tool_calls"])) <= {"wx", "at"} and found["finish_reason"] == "tool_calls"
    streamed = assembled(running.post(body | {"stream": True}, PATH))
    assert [c["function"] for c in streamed["calls"]] == [c["function"] for c in found["message"]["tool_calls"]]
    flat = [{"type": "function", **tool["function"]} for tool in tools]
    own = {"model": "tiny", "input": "Weather?", "max_output_tokens": 2000, "seed": 1, "tools": flat, "parallel_tool_calls": False}
    response = running.post(own | {"tool_choice": allowed(CLOCK, flat=True), "guidance": {"method": "eft"}}, RESPONSES)
    assert response.status_code == 200, response.text
    read = Response.model_validate(response.json())
    assert {(item.type, item.name) for item in read.output} == {("function_call", "at")} and read.tool_choice.mode == "required"


def test_calls_that_are_not_allowed_are_left_out():
    """The model sees the allowed functions alone; where it calls another one all the same, nobody is to run that."""
    seen = []

    def write(prompt):
        seen.append([tool["function"]["name"] for tool in prompt.chat.tools])
        call = '<tool_call>\n{"name": "%s", "arguments": {}}\n</tool_call>'
        return "Well.\n" + call % "wx" + "\n" + call % "at"

    with Running(scripted(write), RECIPE) as running:
        body = {"model": "tiny", "messages": ASKED, "tools": [WEATHER, CLOCK, TOOL], "tool_choice": allowed(CLOCK, TOOL, mode="auto")}
        choice = running.post(body, PATH).json()["choices"][0]
        assert checked(choice["message"]["tool_calls"]) == ["at"] and choice["finish_reason"] == "tool_calls"
        streamed = assembled(running.post(body | {"stream": True}, PATH))
        assert checked(streamed["calls"]) == ["at"] and streamed["content"] == choice["message"]["content"] == "Well."
        choice = running.post(body | {"tool_choice": allowed(TOOL, mode="auto")}, PATH).json()["choices"][0]
        assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"
        assert seen[0] == ["at", "get_weather"] and seen[-1] == ["get_weather"]


def test_several_calls_may_be_required(qwen):
    """One after another, unless parallel_tool_calls is false; a bias to line breaks, which stand between calls, makes further ones."""
    (line_break,) = qwen.served.model.base.tokenizer("\n", add_special_tokens=False).input_ids
    body = BODY | {"tool_choice": "required", "tools": [CLOCK], "seed": 3, "logit_bias": {str(line_break): 100}, "max_tokens": 200}
    several = qwen.post(body, PATH).json()["choices"][0]
    assert len(several["message"]["tool_calls"]) > 1 and checked(several["message"]["tool_calls"][:1]) == ["at"]
    one = qwen.post(body | {"parallel_tool_calls": False}, PATH).json()["choices"][0]
    assert checked(one["message"]["tool_calls"]) == ["at"] and one["finish_reason"] == "tool_calls"


def test_responses(qwen):
    """Of the Responses API, whose tools and names are flat."""
    flat = [{"type": "function", **tool["function"]} for tool in (WEATHER, CLOCK)]
    ask = {"model": "tiny:eft", "input": "Weather?", "tools": flat, "max_output_tokens": 2000, "seed": 1, "parallel_tool_calls": False}
    for choice in ("required", {"type": "function", "name": "wx"}):
        response = qwen.post(ask | {"tool_choice": choice}, RESPONSES)
        assert response.status_code == 200, response.text
        found = Response.model_validate(response.json())
        assert (
            found.status == "completed"
            and {item.type for item in found.output} == {"function_call"}
            and response.json()["tool_choice"] == choice
        )
        calls = [{"id": i.call_id, "type": "function", "function": {"name": i.name, "arguments": i.arguments}} for i in found.output]
        names = checked(calls)
        assert choice == "required" or names == ["wx"]
        with qwen.client().responses.stream(
            **{k: v for k, v in ask.items() if k != "seed"}, tool_choice=choice, extra_body={"seed": 1}
        ) as stream:
            streamed = stream.get_final_response().output
        assert [(i.name, i.arguments) for i in streamed] == [(i.name, i.arguments) for i in found.output]


def test_a_call_that_is_required_and_cut(qwen):
    cut = qwen.post(BODY | {"tool_choice": NAMED, "max_tokens": 60, "seed": 1}, PATH).json()["choices"][0]
    assert cut["finish_reason"] == "length" and cut["message"]["tool_calls"][0]["function"]["name"] == "wx"


def test_calls_are_required_after_thinking(qwen):
    thinking = {"guide_after": "</think>", "thinking_budget": 3}
    message = qwen.post(BODY | {"tool_choice": NAMED, "guidance": thinking, "seed": 2}, PATH).json()["choices"][0]["message"]
    assert message["reasoning_content"] and checked(message["tool_calls"]) == ["wx"]


def test_a_call_or_json(running):
    """``response_format`` beside tools that may be called: the answer is a valid call or JSON, as a bias has it."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    words = running.served.model.base.vocabulary
    first = (
        words.special_id("<tool_call>") or words.special_id("[TOOL_CALLS]") or words.tokenizer("n", add_special_tokens=False).input_ids[0]
    )
    for bias, reason in ((100, "tool_calls"), (-100, "stop")):
        body = BODY | {"response_format": form, "seed": 5, "logit_bias": {str(first): bias}, "parallel_tool_calls": False}
        choice = running.post(body, PATH).json()["choices"][0]
        assert choice["finish_reason"] == reason
        if reason == "tool_calls":
            checked(choice["message"]["tool_calls"])
            assert choice["message"]["content"] is None
        else:
            assert set(json.loads(choice["message"]["content"])) == {"ok"} and "tool_calls" not in choice["message"]


def test_a_call_that_is_required_is_no_json(qwen):
    """``response_format`` is about the text of an answer, and there is none."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": "yes"}}}
    message = qwen.post(BODY | {"response_format": form, "tool_choice": NAMED, "seed": 1}, PATH).json()["choices"][0]["message"]
    assert checked(message["tool_calls"]) == ["wx"] and message["content"] is None


def bad(**schema):
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}


SET = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
NO_SET = bad(**SET)
NAMED_F = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"tool_choice": "always"}, "tool_choice", "must be none, auto, required, allowed_tools or the name of a function"),
        ({"tool_choice": {"type": "function", "name": "wx"}}, "tool_choice", "got an object"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice", "got type 'custom'"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto"}},
            "tool_choice",
            "must have mode auto or required, got allowed_tools null",
        ),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice", "must have mode auto or required, got null"),
        ({"tool_choice": allowed(mode="auto")}, "tool_choice", "must have a list of tools, got an empty list"),
        ({"tool_choice": allowed(CLOCK, {"function": {"name": 5}})}, "tool_choice", "allowed tool 1 must be a function with a name"),
        ({"tool_choice": allowed(WEATHER), "tools": [CLOCK]}, "tool_choice", "'wx', which is not among tools (at)"),
        ({"tool_choice": allowed(WEATHER, mode="auto"), "tools": [CLOCK]}, "tool_choice", "'wx', which is not among tools (at)"),
        ({"tool_choice": allowed(WEATHER), "tools": None}, "tool_choice", "there are no tools to call"),
        (
            {
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED_F]}},
                "tools": [CLOCK, *NO_SET["tools"]],
            },
            "tools[1].function.parameters",
            "uniqueItems",
        ),
        ({"tool_choice": "required", "tools": None}, "tool_choice", "there are no tools to call"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "there are no tools to call"),
        ({"tool_choice": NAMED, "tools": [CLOCK]}, "tool_choice", "'wx', which is not among tools (at)"),
        ({"tool_choice": "required", "guided_regex": "a"}, "tool_choice", "and regex is given"),
        ({"tool_choice": "required", "guidance": {"method": "eft", "choice": ["a"]}}, "tool_choice", "and guidance.choice is given"),
        ({"tool_choice": "required", **bad(type="string")}, "tools[0].function.parameters", "expected one of an object"),
        (
            {"tool_choice": "required", "tools": [CLOCK, *NO_SET["tools"]]},
            "tools[1].function.parameters",
            'tools[1].function.parameters cannot be used: Unimplemented keys: ["uniqueItems"]',
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [CLOCK, *NO_SET["tools"]]},
            "tools[1].function.parameters",
            "uniqueItems",
        ),
        (
            {"tool_choice": NAMED_F, "tools": [CLOCK, *bad(type="string")["tools"]]},
            "tools[1].function.parameters",
            "expected one of an object",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SET}}}, "response_format", "response_format cannot be used"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_what_is_refused(qwen, more, param, words):
    error = well_formed(qwen.post({**BODY, **more}, PATH), 400, param)
    assert words in error["message"] and "\n" not in error["message"]


def test_without_the_package(qwen, monkeypatch):
    """A clear refusal; calls that are not required need no package."""
    qwen.served.model.engine.grammars.reset()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tool = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {"z": {"type": "null"}}}}}
    body = BODY | {"tools": [tool], "max_tokens": 8}
    error = well_formed(qwen.post(body | {"tool_choice": "required"}, PATH), 400, "tool_choice")
    assert "structured output needs the package llguidance" in error["message"]
    form = {"type": "json_schema", "json_schema": {"schema": {"const": "unseen"}}}
    error = well_formed(qwen.post(CHAT | {"response_format": form}, PATH), 400, "response_format")
    assert "structured output needs the package llguidance" in error["message"]
    assert qwen.post(body, PATH).status_code == 200


CHAT = {"model": "tiny:eft", "messages": ASKED, "max_tokens": 8}


def test_engines_that_cannot(qwen, monkeypatch):
    monkeypatch.setattr(qwen.served.model.engine, "unsupported", {"grammar": "servers have no common field for it"})
    error = well_formed(qwen.post(BODY | {"tool_choice": "required"}, PATH), 400, "tool_choice")
    assert "servers have no common field for it" in error["message"]


def test_the_schema_offers_the_choices_that_are_taken(qwen):
    schemas = httpx.get(f"{qwen.url}/openapi.json").json()["components"]["schemas"]
    flat = {"type": "function", "name": "wx"}
    for kind, path, name, some in (
        ("ChatRequest", PATH, NAMED, allowed(CLOCK)),
        ("ResponsesRequest", RESPONSES, flat, allowed(CLOCK, flat=True)),
    ):
        schema = schemas[kind]["properties"]["tool_choice"]
        (choices,) = [part["enum"] for part in schema["anyOf"] if "enum" in part]
        assert choices == ["none", "auto", "required"]
        body = BODY | {"max_tokens": 5} if kind == "ChatRequest" else {"model": "tiny", "input": "Hi", "max_output_tokens": 5}
        tools = BODY["tools"] if kind == "ChatRequest" else [{"type": "function", **tool["function"]} for tool in BODY["tools"]]
        for choice in (*choices, name, some, None):
            jsonschema.validate(choice, schema)
            response = qwen.post(body | {"tools": tools, "tool_choice": choice}, path)
            assert response.status_code == 200, response.text
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate("always", schema)


def test_a_guide_is_followed_within_the_grammar():
    """The script's arguments, where the schema allows them; the text before the call, which a required call has not, is left out."""

    def write(prompt):
        return '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'

    with Running(scripted(write), RECIPE) as running:
        body = {"model": "tiny", "messages": ASKED, "tools": [CLOCK, TOOL], "tool_choice": "required", "seed": 1}
        choice = running.post(body, PATH).json()["choices"][0]
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Bern"}'}
        assert choice["finish_reason"] == "tool_calls"
