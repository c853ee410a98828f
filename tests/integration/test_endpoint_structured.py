"""Structured output over endpoints: what is asked for in each dialect, and that an answer which does not follow it is an error."""

import json
import re
import sys

import pytest

from fake_endpoint import Server
from ivg.engines.endpoint.engine import EndpointEngine, load_endpoint
from ivg.engines.endpoint.structured import EndpointGrammars
from ivg.errors import ConfigError, MissingDependencyError
from ivg.factory.recipe import load_models
from ivg.model import GuidedModel
from ivg.models.tool_formats import FORMATS
from ivg.models.tool_grammar import call_grammar
from ivg.settings.recipe import Recipe
from ivg.types import SamplingParams
from ivg.values.base import FunctionValue
from scripted import random_chat

pytest.importorskip("llguidance", reason="needs the extra structured")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x y", "z\n"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
LENGTH = FunctionValue(lambda prompt, response: len(response))


@pytest.fixture
def asked():
    """Makes (server, model) pairs; the server answers with the texts in turn."""
    made = []

    def make(*texts, finish="stop", **settings):
        server = Server(text=lambda i: (texts[i % len(texts)], finish, None, list(texts[i % len(texts)])))
        engine = EndpointEngine(server.url, "m", retries=0, **settings)
        made.extend([engine.close, server.stop])
        return server, GuidedModel(engine.base, {"length": LENGTH}, engine=engine)

    yield make
    for end in made:
        end()


FORM = {"type": "json_schema", "json_schema": {"name": "response", "schema": SCHEMA, "strict": True}}
GOOD = '{"a": 7, "b": "x y"}'


@pytest.mark.parametrize(
    ("dialect", "settings", "text", "sent"),
    [
        ("vllm", {"json_schema": SCHEMA}, GOOD, {"structured_outputs": {"json": SCHEMA}}),
        ("vllm", {"regex": "[ab]{2}"}, "ab", {"structured_outputs": {"regex": "[ab]{2}"}}),
        ("vllm", {"choice": ["yes", "no"]}, "no", {"structured_outputs": {"choice": ["yes", "no"]}}),
        ("vllm", {"grammar": 'start: "é"+'}, "éé", {"structured_outputs": {"grammar": 'start: "é"+'}}),
        ("openai", {"json_schema": SCHEMA}, GOOD, {"response_format": FORM}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("method", ["base", "bon"])
def test_what_is_sent(asked, dialect, settings, text, sent, method):
    server, model = asked(text, structured_output=dialect)
    select = {} if method == "base" else {"select": "length"}
    done = model.generate("p", method, max_new_tokens=60, **select, **settings)
    assert (done.text, done.finish_reason, done.error) == (text, "stop", None)
    assert all({name: r[name] for name in ("structured_outputs", "response_format") if name in r} == sent for r in server.requests)


@pytest.mark.parametrize(
    ("settings", "text", "finish", "fine"),
    [
        ({"regex": "[ab]{3}"}, "abc", "stop", False),
        ({"regex": "[ab]{3}"}, "ab", "stop", False),
        ({"regex": "[ab]{3}"}, "ab", "length", True),
        ({"regex": "[ab]{3}"}, "ac", "length", False),
        ({"regex": "[ab]{3}"}, "abab", "length", False),
        ({"regex": "[ab]{3}"}, "", "stop", False),
        ({"regex": "[ab]{3}", "stop": ["c"]}, "ab", "stop", True),
        ({"regex": "é+"}, "é\N{REPLACEMENT CHARACTER}", "length", True),
        ({"choice": ["yes", "no"]}, "yes, sir", "stop", False),
        ({"json_schema": SCHEMA}, "Here you are: " + GOOD, "stop", False),
        ({"json_schema": SCHEMA}, GOOD.replace("7", "700"), "stop", False),
        ({"json_schema": SCHEMA}, GOOD.replace("y", "\\u0079"), "stop", True),  # an escape that it does not need
        ({"json_schema": SCHEMA}, '{"\\u0061": 7, "b": "\\u0078 ', "length", True),
        ({"json_schema": SCHEMA}, '{"\\u0061": 7, "b": "\\u0078 \\u00', "length", True),
        ({"json_schema": SCHEMA}, '{"\\u0061": 7, "b": "\\u0079 ', "length", False),
        ({"regex": "[ab]{3}"}, "ab\ud83d", "stop", False),  # half of a character
        ({"json_schema": SCHEMA}, '{"b": "x y"}', "stop", False),
        ({"json_schema": SCHEMA}, json.dumps(json.loads(GOOD), indent=32) + "\n", "stop", True),
        ({"json_schema": SCHEMA}, GOOD.replace(" ", "\t \t"), "stop", False),  # within a string it is no white space of JSON's
        ({"json_schema": SCHEMA}, GOOD.replace("7", "7 7"), "stop", False),  # which would be a number without the space
        ({"json_schema": SCHEMA}, '{"a"  :\t\t7,\n\n\n"b":   "z\\', "length", True),
        ({"json_schema": SCHEMA}, '{"a"  :\t\t7,\n\n\n"b":   "y', "length", False),
    ],
)
def test_answers_are_read_by_the_grammar(asked, settings, text, finish, fine):
    """A server that ignores a field gives an error, not another text."""
    server, model = asked(text, finish=finish)
    done = model.generate("p", "base", max_new_tokens=max(1, len(text)), **settings)
    if fine:
        assert done.error is None and text.startswith(done.text)
    else:
        (name,) = settings.keys() - {"stop"}
        assert done.finish_reason == "error" and f"the endpoint's answer does not follow {name}: " in done.error
        assert "may not know the field structured_outputs: see structured_output in the table [endpoint]" in done.error
        assert server.url not in done.error


def test_one_answer_of_several_that_is_wrong(asked):
    server, model = asked("ab", "abab")
    done = model.generate("p", "bon", select="length", successors=2, regex="[ab]{2}", max_new_tokens=9)
    assert "does not follow regex: 'abab'" in done.error and len(server.requests) == 1


def test_what_is_refused_before_anything_is_sent(asked, monkeypatch):
    server, model = asked("ab", structured_output="openai")
    vllm = asked("ab")[1]
    tools = [{"type": "function", "function": {"name": "f"}}]
    calls = call_grammar(FORMATS["hermes"], tools, lambda name: 7, several=False)
    for one, settings, message in (
        (model, {"regex": "a"}, 'regex: response_format .* JSON schemas alone\n .*structured_output = "vllm"'),
        (model, {"json_schema": SCHEMA, "method": "custom", "select": "length", "chunk_length": 4}, "json_schema in chunks"),
        (vllm, {"regex": "a["}, "regex cannot be used"),
        (vllm, {"grammar": calls}, "grammar is in llguidance's own notation"),
    ):
        with pytest.raises(ConfigError, match=message):
            one.generate("p", **{"method": "base", **settings})
    with pytest.raises(ConfigError, match="structured_output of an endpoint must be vllm or openai, got 'x'"):
        EndpointGrammars("x")
    fresh = asked("ab")[1]
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match="llguidance"):
        fresh.generate("p", "base", regex="[a-c]")
    assert fresh.generate("p", "base", max_new_tokens=4).error is None and not server.requests


def test_a_recipe_says_which_dialect(asked):
    server, _ = asked(GOOD)
    tables = {"run": {"engine": server.url}, "endpoint": {"model": "m", "structured_output": "openai"}}
    with load_models(Recipe.parse(tables)).engine as engine:
        assert engine.grammars.fields(SamplingParams(json_schema=json.dumps(SCHEMA))) == {"response_format": FORM}


def test_over_our_own_server():
    """In both dialects."""
    pytest.importorskip("fastapi")
    from serving_tools import Running

    settings = {"max_new_tokens": 300, "temperature": 1.0, "seed": 2}
    with Running(random_chat()) as server:
        for dialect in ("vllm", "openai"):
            with load_endpoint(server.url, "tiny:base", structured_output=dialect) as engine:
                model = GuidedModel(engine.base, {"length": LENGTH}, engine=engine)
                for method, more in (("base", {"n": 3}), ("bon", {"select": "length", "successors": 3, "n": 2})):
                    answers = model.generate("The film", method, json_schema=SCHEMA, **more, **settings)
                    assert all(c.error is None and c.finish_reason == "stop" for c in answers)
                    assert all(set(json.loads(c.text)) == {"a", "b"} for c in answers)
                cut = model.generate("The film", "base", json_schema=SCHEMA, **settings | {"max_new_tokens": 5})
                assert (cut.finish_reason, cut.error) == ("length", None)
                if dialect == "vllm":
                    assert re.fullmatch("[ab]{9}", model.generate("The film", "base", regex="[ab]{9}", **settings).text)
                    assert model.generate("The film", "base", choice=["yes", "no"], **settings).text in ("yes", "no")
