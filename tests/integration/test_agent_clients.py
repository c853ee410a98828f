"""Clients of agents over a real socket: LangChain, and Vercel's AI SDK in Node. Run by ``make test-clients``."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from scripted import RECIPE, scripted
from serving_tools import Running
from tool_chats import ARGUMENTS, ASKED, TOOL

pytestmark = pytest.mark.long
SCRIPT = Path(__file__).parents[1] / "clients" / "agent.mjs"
NODE_MODULES = Path(os.environ.get("IVG_NODE_MODULES", Path(__file__).parents[2] / ".venv" / "clients" / "node_modules"))
CALLED = f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'


def write(prompt):
    last = prompt.content[-1]
    return f"It is {last.content}." if last.role == "tool" else CALLED if prompt.chat.tools else "Hello."


@pytest.fixture(scope="module")
def running():
    with Running(scripted(write), RECIPE) as server:
        yield server


def test_langchain_binds_tools(running):
    openai = pytest.importorskip("langchain_openai", reason="needs langchain-openai (make test-clients)")
    from langchain_core.messages import HumanMessage, ToolMessage

    for more in ({}, {"use_responses_api": True}):
        llm = openai.ChatOpenAI(model="tiny", base_url=f"{running.url}/v1", api_key="none", max_retries=0, **more)
        bound = llm.bind_tools([TOOL])
        first = bound.invoke([HumanMessage(ASKED[0]["content"])])
        (call,) = first.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", json.loads(ARGUMENTS)) and not first.invalid_tool_calls
        assert first.text == "Let me see."
        turns = [HumanMessage(ASKED[0]["content"]), first, ToolMessage("sunny", tool_call_id=call["id"])]
        assert bound.invoke(turns).text == "It is sunny."
        streamed = None
        for piece in bound.stream(ASKED[0]["content"]):
            streamed = piece if streamed is None else streamed + piece
        assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], call["args"])] and streamed.text == first.text


def test_the_ai_sdk_calls_tools(running, tmp_path):
    if shutil.which("node") is None or not (NODE_MODULES / "ai").is_dir():
        pytest.skip(f"needs node, and the AI SDK in {NODE_MODULES} (make test-clients)")
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    done = subprocess.run(["node", SCRIPT.name, f"{running.url}/v1"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    arguments = json.loads(ARGUMENTS)
    for found in json.loads(done.stdout).values():
        assert found["calls"] == found["streamedCalls"] == [["get_weather", arguments]]
        assert found["text"] == "It is sunny in Zürich." and found["streamed"].endswith(found["text"])
        assert found["reasons"] == ["tool-calls", "stop"]
