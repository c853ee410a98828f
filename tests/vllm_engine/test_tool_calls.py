"""``tool_choice`` of the server over real vLLM: required calls and calls by name, in beams, streamed, beside JSON. Random models."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from making import make, models
from transformers import AutoTokenizer

from serving_tools import Running, chunks
from tool_chats import ASKED, template

SCHEMAS = {
    "wx": {
        "type": "object",
        "properties": {"day": {"type": "integer", "minimum": 0, "maximum": 9}, "unit": {"enum": ["C", "F"]}},
        "required": ["day", "unit"],
        "additionalProperties": False,
    },
    "at": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
NAMED = {"type": "function", "function": {"name": "wx"}}
BODY = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "seed": 1, "max_tokens": 200, "parallel_tool_calls": False}
PATH = "/v1/chat/completions"
SEARCH = {"method": "custom", "token": "implicit", "select": "reward", "width": 2, "successors": 2, "chunk_length": 7}
HERMES = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}"
    '{% for call in m.tool_calls %}<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}<|assistant|>"
)
FAMILIES = {"hermes": (HERMES, ("<tool_call>", "</tool_call>")), "mistral": (template("mistral"), ("[TOOL_CALLS]",))}


def chat_model(folder: Path, family: str, seed: int) -> str:
    """A random network whose tokenizer has the family's template and special tokens."""
    written, special = FAMILIES[family]
    place = make(folder / family, "padded-llama", seed)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = written
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module", params=[*FAMILIES])
def running(request, folder):
    base, tuned, untuned = (chat_model(folder, request.param, seed) for seed in (1, 2, 3))
    paths = {"base": base, "tuned": tuned, "untuned": untuned, "reward": f"{__file__}:shortness"}
    with models("vllm", every_guide=True, models=paths) as model, Running(model) as server:
        yield server


def shortness(prompt: str, response: str) -> float:
    return -float(len(response))


def checked(calls):
    """Names of the calls, whose arguments follow their schemas."""
    assert calls
    for call in calls:
        found = json.loads(call["function"]["arguments"])
        assert call["type"] == "function" and call["id"]
        if call["function"]["name"] == "wx":
            assert set(found) == {"day", "unit"} and 0 <= found["day"] <= 9 and found["unit"] in "CF"
        else:
            assert call["function"]["name"] == "at" and found == {}
    return [call["function"]["name"] for call in calls]


@pytest.mark.parametrize(
    ("choice", "reason", "guidance"),
    [("required", "tool_calls", {"method": "eft", "beta": 1.0}), (NAMED, "stop", SEARCH), ("required", "tool_calls", SEARCH)],
    ids=["required", "named, in beams", "required, in beams"],
)
def test_a_call_that_is_required_is_a_valid_one(running, choice, reason, guidance):
    body = BODY | {"tool_choice": choice, "guidance": guidance}
    whole = running.post(body, PATH)
    assert whole.status_code == 200, whole.text
    (found,) = whole.json()["choices"]
    (name,) = checked(found["message"]["tool_calls"])
    assert (found["finish_reason"], found["message"]["content"]) == (reason, None) and (choice == "required" or name == "wx")
    calls, text = {}, ""
    for chunk in chunks(running.post(body | {"stream": True}, PATH)):
        for delta in (c["delta"] for c in chunk["choices"]):
            text += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                begun = calls.setdefault(call["index"], {"name": "", "arguments": ""})
                for part, piece in call["function"].items():
                    begun[part] += piece
    assert [calls[i] for i in sorted(calls)] == [found["message"]["tool_calls"][0]["function"]] and not text


def test_requests_of_every_kind_at_once(running):
    """JSON, calls, calls or JSON, and free text: one engine, in any order."""
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS["wx"]}}
    eft = {"guidance": {"method": "eft"}}
    plain = {name: value for name, value in BODY.items() if name not in ("tools", "parallel_tool_calls")} | eft
    for seed in range(3):
        asked = {"seed": seed}
        found = running.post(plain | asked | {"response_format": schema}, PATH).json()["choices"][0]
        assert set(json.loads(found["message"]["content"])) == {"day", "unit"} and found["finish_reason"] == "stop"
        found = running.post(BODY | eft | asked | {"response_format": schema}, PATH).json()["choices"][0]["message"]
        assert checked(found["tool_calls"]) if found.get("tool_calls") else set(json.loads(found["content"])) == {"day", "unit"}
        checked(running.post(BODY | eft | asked | {"tool_choice": "required"}, PATH).json()["choices"][0]["message"]["tool_calls"])
        free = running.post(BODY | eft | asked | {"max_tokens": 8}, PATH)
        assert free.status_code == 200, free.text


def test_responses(running):
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    for choice in ("required", {"type": "function", "name": "wx"}):
        body = {"model": "tiny:eft", "input": "Weather?", "tools": flat, "max_output_tokens": 200, "seed": 1, "tool_choice": choice}
        response = running.post(body | {"parallel_tool_calls": False}, "/v1/responses")
        assert response.status_code == 200, response.text
        (call,) = response.json()["output"]
        assert checked([{"id": call["call_id"], "type": "function", "function": call}]) and (choice == "required" or call["name"] == "wx")


def test_a_schema_that_cannot_be_followed_names_its_place(running):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools = [TOOLS[1], {"type": "function", "function": {"name": "f", "parameters": schema}}]
    refused: httpx.Response = running.post(BODY | {"tools": tools, "tool_choice": "required"}, PATH)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools[1].function.parameters", refused.text
