"""/v1/responses: OpenAI's client and types, streamed and whole, with and without tools."""

import json

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ivg.models.token_text import TokenText
from ivg.serving.parsing import parse_data
from ivg.serving.protocol import ChatRequest
from ivg.serving.requests import Progress
from ivg.serving.responses import ResponseBuilder
from ivg.serving.responses_api.events import ResponseEncoder
from ivg.serving.responses_api.items import ResponseObjects
from ivg.serving.responses_api.request import ResponsesRequest
from scripted import RECIPE, scripted
from serving_tools import Running, well_formed
from tool_chats import ARGUMENTS, TOOL

PATH = "/v1/responses"
FLAT = {"type": "function", "strict": True, **TOOL["function"]}
CALLED = f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
BODY = {"model": "tiny", "input": "Hi", "seed": 1}


def write(prompt):
    first, last = prompt.content[0], prompt.content[-1]
    if last.role == "tool":
        return f"It is {last.content}."
    if prompt.chat.tools:
        return CALLED
    return f"{first.content}: {len(prompt.content)} turns" if first.role in ("system", "developer") else f"You said {last.content}."


@pytest.fixture(scope="module")
def running():
    with Running(scripted(write), RECIPE) as server:
        yield server


def events(running, body):
    """The events as OpenAI's types read them; each is named as its type, and numbered."""
    adapter = TypeAdapter(ResponseStreamEvent)
    out = []
    with httpx.stream("POST", running.url + PATH, json=body | {"stream": True}, timeout=300) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(response.iter_text()).split("\n\n")
    for block in filter(None, blocks):
        name, data = block.split("\n", 1)
        event = adapter.validate_json(data.removeprefix("data: "))
        assert name == f"event: {event.type}" and event.sequence_number == len(out)
        out.append(event)
    return out


def test_a_text(running):
    client = running.client()
    response = client.responses.create(**{k: v for k, v in BODY.items() if k != "seed"}, extra_body={"seed": 1})
    Response.model_validate_json(response.model_dump_json())
    assert response.output_text == "You said Hi." and response.status == "completed" and response.object == "response"
    assert response.usage.output_tokens == len("You said Hi.") + 1 and response.usage.total_tokens > response.usage.input_tokens > 2
    assert response.model_extra["ivg"]["method"] == "custom" and response.store is False
    told = client.responses.create(model="tiny", instructions="Be brief", input=[
        {"role": "developer", "content": "Rhyme"}, {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes?", "annotations": []}]},
        {"type": "reasoning", "id": "rs_1", "summary": []}, {"role": "user", "content": "Go"},
    ])  # fmt: skip
    assert told.output_text == "Be brief\n\nRhyme: 4 turns" and told.instructions == "Be brief"
    alone = client.responses.create(model="tiny", instructions="Be brief", input="Hi", metadata={"run": "7"}, store=True, user="me")
    assert alone.output_text == "Be brief: 2 turns" and alone.metadata == {"run": "7"} and alone.user == "me"


def test_a_stream_says_the_same(running):
    whole = running.post(BODY, PATH).json()
    seen = events(running, BODY)
    kinds = [event.type.removeprefix("response.") for event in seen]
    deltas = [event.delta for event in seen if event.type == "response.output_text.delta"]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"] and len(deltas) > 5
    assert kinds[4 + len(deltas) :] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(deltas) == seen[-4].text == whole["output"][0]["content"][0]["text"] == "You said Hi."
    last = json.loads(seen[-1].response.model_dump_json())
    assert without_ids(last["output"]) == without_ids(Response.model_validate(whole).model_dump(mode="json")["output"])
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"] and seen[-1].response.status == "completed"
    with running.client().responses.stream(model="tiny", input="Hi") as stream:
        assert stream.get_final_response().output_text == "You said Hi."


def without_ids(items):
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]


def test_a_function_is_called_and_its_result_is_read(running):
    client = running.client()
    first = client.responses.create(model="tiny", input="Weather?", tools=[FLAT])
    message, call = first.output
    assert (message.type, message.content[0].text) == ("message", "Let me see.")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", json.loads(ARGUMENTS))
    assert call.call_id.startswith("call_") and call.id.startswith("fc_") and first.tools[0].name == "get_weather"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    turns = [{"role": "user", "content": "Weather?"}, *[item.model_dump(exclude_none=True) for item in first.output], result]
    assert client.responses.create(model="tiny", input=turns, tools=[FLAT]).output_text == "It is sunny."
    seen = events(running, BODY | {"tools": [FLAT]})
    pieces = [event for event in seen if event.type == "response.function_call_arguments.delta"]
    done = next(event for event in seen if event.type == "response.function_call_arguments.done")
    assert "".join(p.delta for p in pieces) == done.arguments == ARGUMENTS and len(pieces) > 5
    assert {p.output_index for p in pieces} == {1} and {p.item_id for p in pieces} == {done.item_id}
    added = [event.item for event in seen if event.type == "response.output_item.added"]
    assert [(item.type, item.status) for item in added] == [("message", "in_progress"), ("function_call", "in_progress")]
    assert without_ids(i.model_dump() for i in seen[-1].response.output) == without_ids(i.model_dump() for i in first.output)
    with client.responses.stream(model="tiny", input="Weather?", tools=[FLAT]) as stream:
        assert stream.get_final_response().output[1].arguments == ARGUMENTS
    assert client.responses.create(model="tiny", input="Hi", tools=[FLAT], tool_choice="none").output_text == "You said Hi."


def test_text_behind_a_call_that_comes_with_its_end(running):
    """As where many tokens are sent at once."""
    body = ResponsesRequest(model="tiny", input="Weather?", tools=[FLAT], seed=1)
    batch = running.served.prepare(parse_data(body.chat(), ChatRequest))
    builder = ResponseBuilder(True, "tiny", batch, None, TokenText(running.served.model.base.vocabulary))
    encoder = ResponseEncoder(ResponseObjects(builder, body))
    for text in (CALLED[: CALLED.index(ARGUMENTS) + 5], CALLED + "\nDone. "):
        assert b"".join(encoder.update(Progress(0, text, (), (), ())))
    said, call = encoder.output
    assert said["content"][0]["text"] == "Let me see." and (call["type"], call["arguments"]) == ("function_call", ARGUMENTS)


def test_an_answer_that_is_cut_thinking_and_logprobs(running):
    cut = running.client().responses.create(model="tiny", input="Hi", max_output_tokens=4)
    assert (cut.output_text, cut.status, cut.incomplete_details.reason) == ("You ", "incomplete", "max_output_tokens")
    assert cut.output[0].status == "incomplete" and events(running, BODY | {"max_output_tokens": 4})[-1].type == "response.incomplete"
    thinking = BODY | {"guidance": {"guide_after": "</think>", "thinking_budget": 3}}
    thought = Response.model_validate(running.post(thinking, PATH).json())
    assert [item.type for item in thought.output] == ["reasoning", "message"] and thought.output_text == "You said Hi."
    assert thought.usage.output_tokens_details.reasoning_tokens >= 3
    seen = events(running, thinking)
    text = "".join(e.delta for e in seen if e.type == "response.reasoning_text.delta")
    assert text == thought.output[0].content[0].text != ""
    include = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    found = Response.model_validate(running.post(BODY | include, PATH).json()).output[0].content[0].logprobs
    assert (
        "".join(t.token for t in found) == "You said Hi." and all(t.token for t in found) and all(len(t.top_logprobs) == 2 for t in found)
    )


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "responses are not stored: send the conversation as input"),
        ({"conversation": "c"}, "conversation", "not supported"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
        ({"input": []}, "input", "must be text or a list of items"),
        ({"input": 5}, "input", "must be text or a list of items, got 5"),
        ({"input": [5]}, "input[0]", "must be an object"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "not supported"),
        ({"input": [{"role": "user"}]}, "input[0].content", "is missing"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input", "must be one of system, developer"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "other tools are not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "name"),
        ({"tools": [FLAT], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "'f', which is not among tools (get_weather)"),
        ({"tools": [FLAT], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice", "must have a list of tools, got null"),
        (
            {"tools": [FLAT | {"parameters": {"type": "null"}}], "tool_choice": "required"},
            "tools[0].parameters",
            "tools[0].parameters is a",
        ),
        ({"include": ["file_search_call.results"]}, "include", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"max_output_tokens": 100_000}, None, "context"),
        ({"messages": []}, "messages", "unknown field"),
        ({"model": "x"}, "model", "does not exist"),
    ],
)
def test_what_is_refused(running, change, param, words):
    error = well_formed(running.post({**BODY, **change}, PATH), 404 if param == "model" else 400, param)
    assert words in error["message"] and "messages[" not in error["message"]


def test_neutral_values_are_accepted(running):
    neutral = {"store": False, "background": False, "truncation": "disabled", "reasoning": {"effort": None, "summary": None}}
    neutral |= {"text": {"format": {"type": "text"}}, "service_tier": "auto", "previous_response_id": None, "tool_choice": "auto"}
    neutral |= {"include": [], "tools": []}
    assert running.post(BODY | neutral, PATH).json()["output"][0]["content"][0]["text"] == "You said Hi."


def test_an_error_in_the_middle_of_a_stream(running, monkeypatch):
    original = running.served.model.values["script"].deltas
    calls = []

    def failing(hypotheses):
        calls.append(1)
        if len(calls) > 4:
            raise ZeroDivisionError("secret")
        return original(hypotheses)

    monkeypatch.setattr(running.served.model.values["script"], "deltas", failing)
    seen = events(running, BODY)
    assert [event.type for event in seen[-2:]] == ["error", "response.failed"]
    assert seen[-1].response.status == "failed" and "secret" not in seen[-2].message
    kinds = [event.type for event in running.client().responses.create(model="tiny", input="Hi", stream=True)]
    assert kinds[-2:] == ["error", "response.failed"]
