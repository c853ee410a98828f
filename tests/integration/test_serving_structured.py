"""Structured output over HTTP, by OpenAI's own client: its ``response_format`` and ``parse``, and vLLM's fields."""

import json
import re

import pytest
from pydantic import BaseModel, Field

from serving_tools import Running, tiny

pytest.importorskip("llguidance", reason="needs the extra structured")


class Person(BaseModel):
    """What the model fills in."""

    name: str = Field(max_length=4)
    happy: bool


@pytest.fixture(scope="module")
def running():
    with Running(tiny()) as server:
        yield server


TURN = [{"role": "user", "content": "Film"}]
BEAMS = {"guidance": {"width": 2, "successors": 2, "chunk_length": 4}}


@pytest.mark.parametrize(("model", "more"), [("tiny:eft", {}), ("tiny:ivg", BEAMS)])
def test_openai_s_parse(running, model, more):
    ask = {"model": model, "messages": TURN, "max_tokens": 230, "n": 2, "seed": 1, "extra_body": more}
    got = running.client().chat.completions.parse(response_format=Person, **ask)
    assert [c.finish_reason for c in got.choices] == ["stop", "stop"]
    assert all(isinstance(c.message.parsed, Person) for c in got.choices)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"guided_choice": ["yes", "no"], "guided_decoding_backend": "xgrammar"}, "yes|no"),
        ({"guided_grammar": 'root ::= "x" [yz]'}, "x[yz]"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"structured_outputs": {"json": '{"type": "boolean"}'}}, "true|false"),
        ({"guidance": {"regex": "[ab]{3}"}}, "[ab]{3}"),
    ],
    ids=json.dumps,
)
def test_vllm_s_fields(running, fields, pattern):
    body = {"model": "tiny:eft", "prompt": "Film", "max_tokens": 12, "n": 3, "seed": 2, **fields}
    for choice in running.post(body).json()["choices"]:
        assert re.fullmatch(pattern, choice["text"]) and choice["finish_reason"] == "stop"


def test_a_stream_is_the_whole_answer(running):
    ask = {"model": "tiny:ivg", "messages": TURN, "max_tokens": 60, "seed": 3}
    ask["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["red", "green", "blue"]}}}
    whole = running.client().chat.completions.create(**ask, extra_body=BEAMS).choices[0].message.content
    pieces = running.client().chat.completions.create(**ask, extra_body=BEAMS, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == whole
    assert json.loads(whole) in ("red", "green", "blue")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"regex": "a["}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": 0}}, "structured_outputs.json"),
        ({"response_format": {"type": "json_object", "schema": []}}, "response_format.schema"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"guided_regex": "a["}, "regex"),
        ({"guided_choice": []}, "choice"),
        ({"choice": []}, "choice"),
        ({"guidance": {"choice": []}}, "guidance.choice"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guidance": {"regex": "a["}}, "guidance.regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a", "logit_bias": {"66": -100}, "guidance": {"suppress_tokens": list(range(257))}}, "regex"),
        ({"response_format": {"type": "json_object"}, "suppress_tokens": list(range(257))}, "response_format"),
        ({"logit_bias": {"66": -100}, "suppress_tokens": list(range(257))}, "guidance"),
    ],
    ids=json.dumps,
)
def test_errors_name_the_field(running, fields, param):
    response = running.post({"model": "tiny:eft", "prompt": "Film", "max_tokens": 5, **fields})
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
