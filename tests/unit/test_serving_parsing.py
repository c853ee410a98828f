"""Request bodies: accepted, ignored and refused fields, and the errors."""

import gzip
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivg.errors import ConfigError, ModelError, ServeError
from ivg.serving import ignored, parsing
from ivg.serving.errors import client_error, one_line, redact
from ivg.serving.keys import read_keys
from ivg.serving.protocol import ChatRequest, CompletionRequest
from ivg.settings.recipe import Recipe
from ivg.settings.serve import ServeSettings
from serving_tools import CHAT, GOOD, JSON

PLAIN = [
    ({}, b"", "the body is empty; expected a JSON object", None),
    ({}, b"  \n", "the body is empty; expected a JSON object", None),
    ({}, b"[1]", "the body must be a JSON object, got a list", None),
    ({}, b'{"model": "tiny",\n oops}', "the body is not JSON: Expecting property name enclosed in double quotes (line 2, column 2)", None),
    ({}, '{"prompt": "é"}'.encode("latin-1"), "the body is not UTF-8: byte 0xe9 at position 12", None),
    ({}, b'{"temperature": NaN}', "the body is not JSON: NaN is not a JSON number", None),
    ({}, b"[" * 100_000, "the body is nested too deeply", None),
    ({}, b'{"a":' * 100_000, "the body is nested too deeply", None),
    ({"content-type": ""}, b"{}", "the body has no content type; send the header Content-Type: application/json", None),
    ({"content-type": "text/plain"}, b"{}",
     "the body has the content type text/plain; send the header Content-Type: application/json", None),
    ({"content-type": "application/json; charset=latin-1"}, b"{}", "the body has the charset latin-1; send it as UTF-8", None),
    ({"content-encoding": "gzip"}, gzip.compress(b"{}"),
     "the body has Content-Encoding: gzip; send it uncompressed", None),
    ({}, {"model": "tiny"}, "prompt is missing", "prompt"),
    ({}, {"model": 5, "prompt": "x"}, "model must be text, got 5", "model"),
    ({}, {"max_tokens": "many"}, "max_tokens must be a whole number, at least 0, got 'many'", "max_tokens"),
    ({}, {"max_tokens": 2.5}, "max_tokens must be a whole number, at least 0, got 2.5", "max_tokens"),
    ({}, {"max_tokens": -1}, "max_tokens must be at least 0, got -1", "max_tokens"),
    ({}, {"temperature": 3000}, "temperature must be at most 1000, got 3000.0", "temperature"),
    ({}, {"top_p": 0}, "top_p must be in (0, 1], got 0.0", "top_p"),
    ({}, {"stream": "yes"}, "stream must be true or false, got 'yes'", "stream"),
    ({}, {"stop": ["a", ""]},
     "stop[1] must not be empty; leave it out", "stop[1]"),
    ({}, {"stop": 5}, "stop must be text or a list of texts, got 5", "stop"),
    ({}, {"stop": [5]}, "stop[0] is 5; expected text", "stop[0]"),
    ({}, {"prompt": ["a", 5]}, "prompt[1] is 5; expected text", "prompt[1]"),
    ({}, {"prompt": [1, "a"]}, "prompt[1] must be a token id (an integer of 0 or more), got 'a'", "prompt[1]"),
    ({}, {"prompt": [[1], [2, -3]]}, "prompt[1][1] must be a token id (an integer of 0 or more), got -3", "prompt[1][1]"),
    ({}, {"prompt": {}}, "prompt must be text, a list of texts, token ids, or a list of lists of token ids; got an object", "prompt"),
    ({}, {"guidance": {"weights": {"implicit": "x"}}},
     "guidance.weights must be names and finite numbers, each name once, e.g. {implicit = 1.0, plain = 0.5} or"
     " \"implicit=1.0,plain=0.5\", got 'x'", "guidance.weights"),
    ({}, {"guidance": {"width": "x"}}, "guidance.width must be a whole number, at least 1, got 'x'", "guidance.width"),
    ({}, {"guidance": {"width": 2, "W": 3}}, "guidance.width and W are the same setting; give one of them", "guidance.width"),
    ({}, {"guidance": {"forced_eos_token_id": "x"}},
     "guidance.forced_eos_token_id must be a token id or a list of them, token ids, 0 or more, got 'x'", "guidance.forced_eos_token_id"),
    ({}, {"top_k": -2}, "top_k must be 0 (off) or more, got -2", "top_k"),
    ({}, {"guidance": 5}, "guidance must be an object, got 5", "guidance"),
    ({}, {"frequency_penalty": 2.5}, "frequency_penalty must be in [-2, 2], got 2.5", "frequency_penalty"),
    ({}, {"logit_bias": {"1": 500}},
     "logit_bias must be token ids of 0 or more, and numbers in [-100, 100], got ((1, 500.0),)", "logit_bias"),
    ({}, {"stop_token_ids": "x"}, "stop_token_ids must be a list of token ids, token ids, 0 or more, got 'x'", "stop_token_ids"),
    ({}, {"length_penalty": 2}, "length_penalty is not supported; leave it out or give 1", "length_penalty"),
    ({}, {"min_tokens": 3, "min_new_tokens": 4}, "min_new_tokens and min_tokens are the same setting; give one of them", "min_new_tokens"),
    ({}, {"temprature": 0}, "unknown field temprature; did you mean temperature?", "temprature"),
    ({}, {"extra_body": 5}, "extra_body must be an object, got 5", "extra_body"),
    ({}, {"seed": 1, "extra_body": {"seed": 2}}, "seed and extra_body.seed differ; give one of them", "extra_body.seed"),
    ({}, {"top_k": 5, "guidance": {"top_k": 6}}, "top_k is 5 and guidance.top_k is 6; give one of them", "top_k"),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "body", "message", "param"), PLAIN, ids=lambda v: str(v)[:30] if isinstance(v, str) else "")
def test_invalid_bodies(headers, body, message, param):
    if isinstance(body, dict):
        body = json.dumps(body if "model" in body else {"model": "tiny", "prompt": "x", **body}).encode()
    with pytest.raises(ServeError) as e:
        parsing.parse_body(body, JSON | headers, CompletionRequest)
    assert (str(e.value), e.value.param) == (message, param)
    assert e.value.status == (415 if headers else 400)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


NAMES = sorted(
    {
        *ignored.OPENAI,
        *ignored.VLLM,
        *ignored.LABELS,
        *CompletionRequest.model_fields,
        *ChatRequest.model_fields,
        "extra_body",
        "unheard_of",
    }
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), ANY_JSON, max_size=4), st.booleans(), st.sampled_from([GOOD, CHAT]))
def test_any_body_is_parsed_or_refused(change, strict, good):
    """Messages contain no internal names."""
    kind = CompletionRequest if good is GOOD else ChatRequest
    try:
        body = parsing.parse_body(json.dumps(good | change).encode(), JSON, kind, strict=strict)
    except ServeError as e:
        assert e.status == 400 and not re.search(r"function-|pydantic|\bdict\b|_type\b|Traceback|validat", str(e))
    else:
        assert isinstance(body, kind)


CHATS = [
    ({"content": [{"type": "input_audio", "input_audio": {"data": "x"}}]},
     "messages[0].content[0]: parts of type 'input_audio' are not supported; only text and pictures are read; leave the part out",
     "messages[0].content[0]"),
    ({"content": None}, "messages[0].content is null; expected text", "messages[0].content"),
    ({"role": "critic"}, "messages[0].role must be one of system, developer, user, assistant, tool, got 'critic'", "messages[0].role"),
    ({"tool_calls": [{}]}, "messages[0].tool_calls, but the role is 'user'; expected them in turns of the assistant",
     "messages[0].tool_calls"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message", "param"), CHATS)
def test_invalid_messages(change, message, param):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x", **change}]}
    with pytest.raises(ServeError) as e:
        parsing.parse_body(json.dumps(body).encode(), JSON, ChatRequest)
    assert (str(e.value), e.value.param) == (message, param)


HARMLESS = {
    "metadata": {"run": "7"}, "store": True, "service_tier": "flex", "user": "me", "safety_identifier": "x", "prompt_cache_key": "k",
    "extra_body": {}, "response_format": None, "some_new_field": None, "length_penalty": 1.0,
    "skip_special_tokens": True,
}  # fmt: skip


NEW_MESSAGE = {"messages": [{"role": "user", "content": "Film", "name": "me", "reasoning_content": "hm", "cache_control": {"type": "x"}}]}


@pytest.mark.parametrize("change", [{k: v} for k, v in HARMLESS.items()] + [NEW_MESSAGE])
def test_fields_without_effect_are_ignored_unless_strict(change):
    body = json.dumps(CHAT | change).encode()
    assert parsing.parse_body(body, JSON, ChatRequest) == parsing.parse_body(json.dumps(CHAT).encode(), JSON, ChatRequest)
    welcome = set(change) & {"user", "safety_identifier", "prompt_cache_key", "response_format"}
    if not welcome:
        with pytest.raises(ServeError):
            parsing.parse_body(body, JSON, ChatRequest, strict=True)


@pytest.mark.parametrize("change", [{"functions": [{"name": "f"}]}, {"reasoning_effort": "high"}, {"x": 1}])
def test_unsupported_fields_are_refused(change):
    with pytest.raises(ServeError) as e:
        parsing.parse_body(json.dumps(CHAT | change).encode(), JSON, ChatRequest)
    assert e.value.param == next(iter(change))


def test_tools_that_are_not_offered():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for change in ({"tools": tools, "tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"tools": []}):
        body = parsing.parse_body(json.dumps(CHAT | change).encode(), JSON, ChatRequest)
        assert not body.offered_tools and "tools" not in body.chat
    body = parsing.parse_body(json.dumps(CHAT | {"tools": tools}).encode(), JSON, ChatRequest, strict=True)
    assert body.offered_tools == body.chat["tools"] == tools


def test_messages_contain_no_file_paths():
    error = client_error(ModelError("/home/me/models/tuned/model.safetensors is broken\n  look at ~/.cache/huggingface/hub/x"))
    assert str(error) == "model.safetensors is broken; look at x"
    assert redact("use /v1/completions, 1/2 or a/b") == "use /v1/completions, 1/2 or a/b"


def test_one_line():
    assert one_line("empty prompt\n  expected: some text") == "empty prompt; expected: some text"
    assert one_line("they differ:\n  one\n\n  other\n") == "they differ: one; other"


def test_settings(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key-1\n\nsecond-key-2\n")
    monkeypatch.setenv("IVG_API_KEYS", "third-key-3, second-key-2")
    assert read_keys(file) == ("first-key-1", "second-key-2", "third-key-3")
    monkeypatch.delenv("IVG_API_KEYS")
    assert read_keys(None) is None
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="no key"):
        read_keys(file)
    assert Recipe.parse({"serve": {"port": 1}}).override(serve={"port": 2, "host": None}).serve == ServeSettings(port=2)
    with pytest.raises(ConfigError, match=r"unknown setting serve\.prot; did you mean port\?"):
        Recipe.parse({"serve": {"prot": 1}})
    with pytest.raises(ConfigError, match=r"serve\.api_keys: an API key has at least 8 ASCII characters") as e:
        Recipe.parse({"serve": {"api_keys": ["short"]}})
    assert "short" not in str(e.value)


def test_vllm_s_top_k_that_is_off_wherever_it_is_given():
    for more in ({"top_k": -1}, {"guidance": {"top_k": -1}}, {"top_k": 0, "guidance": {"top_k": -1}}):
        assert CompletionRequest.model_validate({"model": "m", "prompt": "x", **more}).sampling["top_k"] == 0
