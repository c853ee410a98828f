"""The server with tools: calls whole and streamed, for real families' templates, with OpenAI's client."""

import json
import runpy
from pathlib import Path

import pytest

from ivg.settings.recipe import Recipe
from scripted import RECIPE, scripted
from serving_tools import Running, chunks, well_formed
from tool_chats import ARGUMENTS, ASKED, PLAIN, TOOL

PATH = "/v1/chat/completions"
WRITTEN = {
    "qwen3": f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "llama3_1": f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}}}]',
}
WRITTEN["llama3_2"] = f"<|python_tag|>{WRITTEN['llama3_1']}"
WRITTEN["mistral_named"] = f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}"
_IN_LIST = WRITTEN["mistral"].removeprefix("[TOOL_CALLS] [").removesuffix("]")
TWICE = {
    "qwen3": "\n".join([WRITTEN["qwen3"].removeprefix("Let me see.\n")] * 2),
    "llama3_1": "; ".join([WRITTEN["llama3_1"]] * 2),
    "llama3_2": "; ".join([WRITTEN["llama3_2"], WRITTEN["llama3_1"]]),
    "mistral": f"[TOOL_CALLS] [{_IN_LIST}, {_IN_LIST}]",
    "mistral_named": WRITTEN["mistral_named"] * 2,
}
SPECIAL = {"llama3_2": ("<|python_tag|>",), "mistral": ("[TOOL_CALLS]", "[INST]"), "mistral_named": ("[TOOL_CALLS]", "[ARGS]")}
ONE_CALL = ("llama3_1", "llama3_2")
"""Their templates refuse several calls of one turn."""
BODY = {"model": "tiny", "messages": ASKED, "seed": 1, "tools": [TOOL]}


def script(family):
    """Calls the tool where there is one, and says what it gave."""

    def write(prompt):
        last = prompt.content[-1]
        if last.role == "tool":
            return f"It is {last.content}."
        if not prompt.chat.tools:
            return "Hello."
        call = WRITTEN["llama3_1" if "llama" in family else family].removeprefix("Let me see.\n")
        return {"twice": TWICE[family], "call": call, "chat": "Hi! <b>"}.get(last.content, WRITTEN[family])

    return write


@pytest.fixture(scope="module", params=[*WRITTEN])
def family(request):
    with Running(scripted(script(request.param), request.param, SPECIAL.get(request.param, ())), RECIPE) as server:
        yield request.param, server


@pytest.fixture(scope="module")
def qwen():
    with Running(scripted(script("qwen3"), "qwen3"), RECIPE) as server:
        yield server


def test_a_tool_is_called_and_its_result_is_read(family):
    name, running = family
    client = running.client()
    first = client.chat.completions.create(model="tiny", messages=ASKED, tools=[TOOL], seed=1, tool_choice="auto")
    (choice,) = first.choices
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "get_weather", json.loads(ARGUMENTS))
    assert choice.finish_reason == "tool_calls" and choice.message.content == ("Let me see." if name == "qwen3" else None)
    assert call.id.isalnum() and len(call.id) == 9 if "mistral" in name else call.id.startswith("call_")
    turns = [*ASKED, choice.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = client.chat.completions.create(model="tiny", messages=turns, tools=[TOOL], seed=1)
    assert second.choices[0].message.content == "It is sunny." and second.choices[0].message.tool_calls is None
    assert second.choices[0].finish_reason == "stop"


def test_calls_are_streamed(family):
    _, running = family
    with running.client().chat.completions.stream(model="tiny", messages=ASKED, tools=[TOOL], seed=1) as stream:
        seen = list(stream)
        final = stream.get_final_completion().choices[0]
    whole = running.client().chat.completions.create(model="tiny", messages=ASKED, tools=[TOOL], seed=1).choices[0]
    assert final.finish_reason == whole.finish_reason == "tool_calls" and (final.message.content or None) == whole.message.content
    (streamed,), (call,) = final.message.tool_calls, whole.message.tool_calls
    assert (
        (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments) == ("get_weather", ARGUMENTS)
    )
    deltas = [d for e in seen if e.type == "chunk" and e.chunk.choices for d in e.chunk.choices[0].delta.tool_calls or ()]
    assert (deltas[0].id, deltas[0].type, deltas[0].function.name, deltas[0].function.arguments) == (
        streamed.id,
        "function",
        "get_weather",
        "",
    )
    assert all((d.index, d.id, d.function.name) == (0, None, None) for d in deltas[1:]) and len(deltas) > 5
    text = "".join(e.delta for e in seen if e.type == "content.delta")
    assert text == (whole.message.content or "")


def test_several_calls(family):
    """One, where the template could not read more; what was answered can be sent back with the results."""
    name, running = family
    asked = [{"role": "user", "content": "twice"}]
    body, several = BODY | {"messages": asked}, name not in ONE_CALL
    message = running.post(body, PATH).json()["choices"][0]["message"]
    both = message["tool_calls"]
    assert [call["function"]["arguments"] for call in both] == [ARGUMENTS] * (2 if several else 1)
    assert len({call["id"] for call in both}) == len(both) and message["content"] is None
    (one,) = running.post(body | {"parallel_tool_calls": False}, PATH).json()["choices"][0]["message"]["tool_calls"]
    assert one["function"] == both[0]["function"]
    streamed = [
        c for chunk in chunks(running.post(body | {"stream": True}, PATH)) for c in chunk["choices"][0]["delta"].get("tool_calls", ())
    ]
    assert [c["index"] for c in streamed] == sorted(c["index"] for c in streamed) and streamed[-1]["index"] == len(both) - 1
    assert "".join(c["function"]["arguments"] for c in streamed) == ARGUMENTS * len(both)
    results = [{"role": "tool", "tool_call_id": call["id"], "content": f"sunny {i}"} for i, call in enumerate(both)]
    answered = running.post(body | {"messages": [*asked, message, *results]}, PATH)
    assert answered.status_code == 200, answered.text
    assert answered.json()["choices"][0]["message"]["content"] == f"It is sunny {len(both) - 1}."
    if not several:
        error = well_formed(
            running.post(body | {"messages": [*asked, message | {"tool_calls": both * 2}, *results]}, PATH), 400, "messages"
        )
        assert "This model only supports single tool-calls at once!" in error["message"]


def test_a_call_that_is_required(family):
    """What the guide writes is within the grammar of each format; again what was answered is read."""
    _, running = family
    days = {"type": "array", "items": {"type": "integer"}}
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "days": days}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    asked = [{"role": "user", "content": "call"}]
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        body = BODY | {"messages": asked, "tools": tools, "tool_choice": choice}
        whole = running.post(body, PATH)
        assert whole.status_code == 200, whole.text
        message = whole.json()["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS} and message["content"] is None
        deltas = [c["choices"][0]["delta"] for c in chunks(running.post(body | {"stream": True}, PATH))]
        assert "".join(c["function"]["arguments"] for d in deltas for c in d.get("tool_calls", ())) == ARGUMENTS
        turns = [*asked, message, {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
        assert running.post(BODY | {"messages": turns}, PATH).json()["choices"][0]["message"]["content"] == "It is sunny."


def test_text_is_unchanged_where_nothing_is_called(qwen):
    for more, text in (
        ({"messages": [{"role": "user", "content": "chat"}]}, "Hi! <b>"),
        ({"tool_choice": "none"}, "Hello."),
        ({"tools": []}, "Hello."),
        ({"tools": None, "tool_choice": "auto"}, "Hello."),
    ):
        for stream in (False, True):
            response = qwen.post({**BODY, **more, "stream": stream}, PATH)
            assert response.status_code == 200, response.text
            if stream:
                pieces = [c["choices"][0]["delta"] for c in chunks(response)]
                assert "".join(p.get("content") or "" for p in pieces) == text and not any("tool_calls" in p for p in pieces)
            else:
                choice = response.json()["choices"][0]
                assert choice["message"] == {"role": "assistant", "content": text, "refusal": None} and choice["finish_reason"] == "stop"


def test_a_call_that_is_cut_and_its_logprobs(qwen):
    whole = qwen.post(BODY | {"logprobs": True}, PATH).json()["choices"][0]
    assert "".join(t["token"] for t in whole["logprobs"]["content"]).startswith("Let me see.\n<tool_call>\n{")
    cut = qwen.post(BODY | {"max_tokens": len(WRITTEN["qwen3"].encode()) - 25}, PATH).json()["choices"][0]
    (call,) = cut["message"]["tool_calls"]
    assert (
        cut["finish_reason"] == "length"
        and ARGUMENTS.startswith(call["function"]["arguments"])
        and call["function"]["arguments"] != ARGUMENTS
    )


@pytest.mark.parametrize(("cut_behind", "arguments"), [('"arguments": ', ""), (f"{ARGUMENTS}}}\n</tool_", ARGUMENTS)])
def test_a_call_that_is_cut_leaves_no_markup_in_the_content(qwen, cut_behind, arguments):
    before, found, _ = WRITTEN["qwen3"].partition(cut_behind)
    cut = BODY | {"max_tokens": len((before + found).encode())}
    choice = qwen.post(cut, PATH).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": arguments}
    assert choice["message"]["content"] == "Let me see." and choice["finish_reason"] == "length"
    deltas = [c["choices"][0]["delta"] for c in chunks(qwen.post(cut | {"stream": True}, PATH)) if c["choices"]]
    assert "".join(d.get("content") or "" for d in deltas) == "Let me see."
    pieces = [call["function"] for d in deltas for call in d.get("tool_calls", ())]
    assert pieces[0]["name"] == "get_weather" and "".join(p.get("arguments", "") for p in pieces) == arguments


def test_calls_come_after_thinking(qwen):
    thinking = {"guide_after": "</think>", "thinking_budget": 3}  # the base thinks for itself, the script guides from the answer on
    body = BODY | {"messages": [{"role": "user", "content": "twice"}], "guidance": thinking}
    message = qwen.post(body, PATH).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 2 and message["content"] is None
    deltas = [c["choices"][0]["delta"] for c in chunks(qwen.post(body | {"stream": True}, PATH))]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == message["reasoning_content"] != ""
    assert "".join(c["function"]["arguments"] for d in deltas for c in d.get("tool_calls", ())) == ARGUMENTS * 2


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": "f"}, "tools"),
        ({"end_at_sentence": 3}, "end_at_sentence"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, None),
    ],
)
def test_what_is_refused(qwen, more, param):
    error = well_formed(qwen.post({**BODY, **more}, PATH), 400, param)
    assert "\n" not in error["message"]


def test_templates_without_tools():
    model = scripted(script("qwen3"), PLAIN)
    with Running(model, RECIPE) as running:
        error = well_formed(running.post(BODY, PATH), 400, "messages")
        assert "the chat template of base leaves tools out" in error["message"]
        assert running.post(BODY | {"tools": []}, PATH).status_code == 200
    reading = PLAIN + "{{ tools | tojson if tools }}"
    with Running(scripted(script("qwen3"), reading), RECIPE) as running:
        error = well_formed(running.post(BODY, PATH), 400, "tools")
        assert "writes calls in no known form" in error["message"] and "hermes, llama3_json, mistral" in error["message"]
    with Running(scripted(script("qwen3"), reading), RECIPE, tool_call_parser="hermes", strict=True) as running:
        message = running.post(BODY, PATH).json()["choices"][0]["message"]
        assert message["tool_calls"][0]["function"]["name"] == "get_weather"
    with Running(scripted(script("qwen3")), RECIPE, tool_call_parser="none") as running:
        well_formed(running.post(BODY, PATH), 400, "tools")


def test_a_base_without_a_chat_template():
    model = scripted(script("qwen3"))
    model.base.tokenizer.chat_template = None
    with Running(model, Recipe.model_validate({"search": {"method": "base"}})) as running:
        error = well_formed(running.post(BODY, PATH), 400, "tools")
        assert error["message"] == "tools is not supported by this model, which has no chat template; leave it out"


def test_agent_with_tools(qwen, monkeypatch, capsys):
    """As its docstring says; the model's call gives the function a list that it has a default for."""
    example = Path(__file__).parents[2] / "examples" / "agent_with_tools.py"
    monkeypatch.setattr("sys.argv", [example.name, qwen.url, "tiny", "How is the weather?"])
    runpy.run_path(str(example), run_name="__main__")
    called, answered = capsys.readouterr().out.splitlines()
    assert called == f"get_weather({ARGUMENTS}) -> sunny in Zürich, 21 degrees"
    assert answered == "It is sunny in Zürich, 21 degrees."
