"""Clients of agents over a real socket: OpenAI's, its Agents SDK, LangChain, Pydantic AI, and Vercel's AI SDK in Node.

Run by ``make test-clients``.

What they ask a model for that answers at random is structured output, so that each client's own schema accepts it.
"""

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field

from scripted import RECIPE, random_chat, scripted
from serving_tools import Running
from tool_chats import ARGUMENTS, ASKED, TOOL

pytestmark = pytest.mark.long
SCRIPTS = Path(__file__).parents[1] / "clients"
NODE_MODULES = Path(os.environ.get("IVG_NODE_MODULES", Path(__file__).parents[2] / ".venv" / "clients" / "node_modules"))
CALLED = {
    "qwen2_5": ("Let me see.", f'\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>', ()),
    "llama3_1": ("", f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}', ()),
    "mistral": ("", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}}}]', ("[TOOL_CALLS]", "[INST]")),
}
"""How a family says something and calls: text, call, special tokens of its tokenizer."""


@pytest.fixture(scope="module", params=[*CALLED])
def running(request):
    said, call, special = CALLED[request.param]

    def write(prompt):
        last = prompt.content[-1]
        return f"It is {last.content}." if last.role == "tool" else said + call if prompt.chat.tools else "Hello."

    with Running(scripted(write, request.param, special), RECIPE) as server:
        server.said = said
        yield server


class Weather(BaseModel):
    """Weather of a city."""

    city: str = Field(max_length=3)
    sunny: bool
    level: Literal["low", "high"]


LONG_ENOUGH = 2000
"""Tokens of any answer by the schema, with the white space that JSON may have."""


@pytest.fixture(scope="module")
def by_chance():
    pytest.importorskip("llguidance", reason="needs the extra structured")
    with Running(random_chat()) as server:
        yield server


def langchain(server, model, **more):
    module = pytest.importorskip("langchain_openai", reason="needs langchain-openai (make test-clients)")
    return module.ChatOpenAI(model=model, base_url=f"{server.url}/v1", api_key="none", max_retries=0, **more)


def in_node(script, server, folder):
    """What a script prints."""
    if shutil.which("node") is None or not (NODE_MODULES / "ai").is_dir():
        pytest.skip(f"needs node, and the AI SDK in {NODE_MODULES} (make test-clients)")
    shutil.copy(SCRIPTS / script, folder)
    (folder / "node_modules").symlink_to(NODE_MODULES)
    done = subprocess.run(["node", script, f"{server.url}/v1"], cwd=folder, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_openai_parses(by_chance):
    client = by_chance.client(timeout=1800)
    ask = {"model": "tiny:eft", "messages": ASKED, "max_tokens": LONG_ENOUGH}
    choice = client.chat.completions.parse(**ask, response_format=Weather).choices[0]
    assert isinstance(choice.message.parsed, Weather) and choice.finish_reason == "stop"
    tools = {"tools": [openai.pydantic_function_tool(Weather)], "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = client.chat.completions.parse(**ask, **tools).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**ask, response_format=Weather) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Weather)
    ask = {"model": "tiny:eft", "input": "Weather?", "max_output_tokens": LONG_ENOUGH}
    assert isinstance(client.responses.parse(**ask, text_format=Weather).output_parsed, Weather)
    tools = {
        "tools": [openai.pydantic_function_tool(Weather)["function"] | {"type": "function"}],
        "tool_choice": {"type": "function", "name": "Weather"},
    }
    (item,) = client.responses.create(**ask, **tools).output
    assert Weather.model_validate_json(item.arguments)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_with_structured_output(by_chance, method):
    for more in ({}, {"use_responses_api": True}):
        llm = langchain(by_chance, "tiny:eft", max_tokens=LONG_ENOUGH, timeout=1800, **more)
        assert isinstance(llm.with_structured_output(Weather, method=method).invoke("How is the weather?"), Weather)


def test_the_ai_sdk_makes_objects(by_chance, tmp_path):
    for found in in_node("objects.mjs", by_chance, tmp_path).values():
        assert Weather.model_validate(found["object"]) and Weather.model_validate(found["output"])
        for ((name, arguments, invalid),) in found["calls"]:
            assert (name, invalid) == ("get_weather", False) and Weather.model_validate(arguments)


def test_langchain_binds_tools(running):
    pytest.importorskip("langchain_openai", reason="needs langchain-openai (make test-clients)")
    from langchain_core.messages import HumanMessage, ToolMessage

    for more in ({}, {"use_responses_api": True}):
        bound = langchain(running, "tiny", **more).bind_tools([TOOL])
        first = bound.invoke([HumanMessage(ASKED[0]["content"])])
        (call,) = first.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", json.loads(ARGUMENTS)) and not first.invalid_tool_calls
        assert first.text == running.said
        turns = [HumanMessage(ASKED[0]["content"]), first, ToolMessage("sunny", tool_call_id=call["id"])]
        assert bound.invoke(turns).text == "It is sunny."
        streamed = None
        for piece in bound.stream(ASKED[0]["content"]):
            streamed = piece if streamed is None else streamed + piece
        assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], call["args"])] and streamed.text == first.text


def test_the_ai_sdk_calls_tools(running, tmp_path):
    arguments = json.loads(ARGUMENTS)
    for found in in_node("agent.mjs", running, tmp_path).values():
        assert found["calls"] == found["streamedCalls"] == [["get_weather", arguments]]
        assert found["text"] == "It is sunny in Zürich." and found["streamed"].endswith(found["text"])
        assert found["reasons"] == ["tool-calls", "stop"]


def get_weather(city: str, days: list[int]) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


def agents_model(server, kind, name):
    """The module of the Agents SDK, and a model of its."""
    agents = pytest.importorskip("agents", reason="needs openai-agents (make test-clients)")
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=1800)
    return agents, getattr(agents, kind)(model=name, openai_client=client)


AGENTS_KINDS = ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"]


@pytest.mark.parametrize("kind", AGENTS_KINDS)
def test_the_agents_sdk_calls_tools(running, kind):
    agents, model = agents_model(running, kind, "tiny")

    async def ask():
        caller = agents.Agent("caller", instructions="Help.", model=model, tools=[agents.function_tool(get_weather)])
        answer = await agents.Runner.run(caller, "How is the weather?")
        streamed = agents.Runner.run_streamed(caller, "How is the weather?")
        async for _ in streamed.stream_events():
            pass
        return answer.final_output, streamed.final_output

    assert set(asyncio.run(ask())) == {"It is sunny in Zürich."}


@pytest.mark.parametrize("kind", AGENTS_KINDS)
def test_the_agents_sdk_makes_objects(by_chance, kind):
    agents, model = agents_model(by_chance, kind, "tiny:eft")
    settings = agents.ModelSettings(max_tokens=LONG_ENOUGH)
    maker = agents.Agent("maker", model=model, output_type=Weather, model_settings=settings)
    assert isinstance(asyncio.run(agents.Runner.run(maker, "Weather?")).final_output, Weather)


def pydantic_model(server, kind, name):
    """The module of Pydantic AI, and a model of its."""
    ai = pytest.importorskip("pydantic_ai", reason="needs pydantic-ai-slim (make test-clients)")
    from pydantic_ai.models import openai as models
    from pydantic_ai.providers.openai import OpenAIProvider

    return ai, getattr(models, kind)(name, provider=OpenAIProvider(base_url=f"{server.url}/v1", api_key="none"))


PYDANTIC_KINDS = ["OpenAIChatModel", "OpenAIResponsesModel"]


@pytest.mark.parametrize("kind", PYDANTIC_KINDS)
def test_pydantic_ai_calls_tools(running, kind):
    ai, model = pydantic_model(running, kind, "tiny")

    async def stream(_, events):
        async for _ in events:
            pass

    async def ask():
        caller = ai.Agent(model, tools=[get_weather])
        return [(await caller.run("How is the weather?", event_stream_handler=handler)).output for handler in (None, stream)]

    assert set(asyncio.run(ask())) == {"It is sunny in Zürich."}


@pytest.mark.parametrize("kind", PYDANTIC_KINDS)
def test_pydantic_ai_makes_objects(by_chance, kind):
    """By a required call, and by ``response_format``."""
    ai, model = pydantic_model(by_chance, kind, "tiny:eft")
    settings = {"max_tokens": LONG_ENOUGH, "timeout": 1800}
    for output in (Weather, ai.NativeOutput(Weather)):
        maker = ai.Agent(model, output_type=output, model_settings=settings, retries=0)
        assert isinstance(asyncio.run(maker.run("Weather?")).output, Weather)


def test_openai_s_allowed_tools(by_chance):
    """By OpenAI's own types; the response says what was asked for."""
    client, clock = by_chance.client(timeout=1800), {"name": "clock", "parameters": {"type": "object", "properties": {}}}
    weather = openai.pydantic_function_tool(Weather)
    ask = {"model": "tiny:eft", "parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "Weather"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    tools = [{"type": "function", "function": clock}, weather]
    found = client.chat.completions.create(**ask, messages=ASKED, max_tokens=LONG_ENOUGH, tools=tools, tool_choice=choice)
    (call,) = found.choices[0].message.tool_calls
    assert call.function.name == "Weather" and Weather.model_validate_json(call.function.arguments)
    flat = [{"type": "function", **clock}, {**weather["function"], "type": "function"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "Weather"}]}
    made = client.responses.create(**ask, input="Weather?", max_output_tokens=LONG_ENOUGH, tools=flat, tool_choice=choice)
    (item,) = made.output
    assert Weather.model_validate_json(item.arguments) and made.tool_choice.mode == "required"
