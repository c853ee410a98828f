"""Formats of calls: what is read of a text, of any beginning of it, and which format a chat template writes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivg.models.tool_formats import FORMATS, ParsedResponse
from ivg.models.tool_guess import format_of_template, reads_several
from ivg.models.tool_reader import CallText
from ivg.testing import byte_tokenizer, tiny_lm
from tool_chats import PLAIN, template

NAMES = ("get_weather", "f")
SHOWS = (
    "{{{{ tools | tojson if tools }}}}{{% for m in messages %}}{{{{ m.content }}}}"
    "{{{{ m.tool_calls{}.function.arguments | tojson if m.tool_calls }}}}{{% endfor %}}"
)
ONE = CallText("f", '{"a": 1}')


def parse(name, text, *, final=True):
    return FORMATS[name].parse(text, NAMES, final=final)


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", "Sunny. \n", "Sunny. \n", []),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [ONE]),
        ("hermes", 'Let me see.\n<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "Let me see.", [ONE]),
        (
            "hermes",
            '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\nDone.',
            "Done.",
            [ONE, CallText("g", "{}")],
        ),
        ("hermes", '<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]</tool_call>', "", [ONE, CallText("g", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [ONE]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [CallText("f", "{}")]),
        ("hermes", '<tool_call>{"id": 7, "name": "f", "x": [{"y": "}"}], "arguments": {"a": 1}}</tool_call>', "", [ONE]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [ONE]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call>', "", [ONE]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [ONE]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x</tool_call>"}}', "", [CallText("f", '{"a": "x</tool_call>"}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, ', "", [CallText("f", '{"a": [1, ')]),
        ("hermes", '<tool_call>{"name": "f", "argu', "", [CallText("f", "")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": nu', "", [CallText("f", "")]),
        ("hermes", 'Yes.\n<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": ', "Yes.", [ONE, CallText("g", "")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}\n</tool_', "", [ONE]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}\n< b', "< b", [ONE]),
        ("hermes", '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
        ("hermes", "<tool_call>get_weather</tool_call> b", "<tool_call>get_weather</tool_call> b", []),
        ("hermes", "a <tool_call> and </tool_call>", "a <tool_call> and </tool_call>", []),
        ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ("hermes", '<tool_call>x<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "<tool_call>x", [ONE]),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", [ONE]),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [ONE]),
        ("llama3_json", '\n{"name": "f", "arguments": {"a": 1}}; {"name": "f", "parameters": {}}', "", [ONE, CallText("f", "{}")]),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}}\nDone.', "Done.", [ONE]),
        ("llama3_json", '{"name": "Ann", "parameters": {"a": 1}}', '{"name": "Ann", "parameters": {"a": 1}}', []),
        ("llama3_json", '{"name": "f"}', '{"name": "f"}', []),
        ("llama3_json", 'I call {"name": "f", "parameters": {"a": 1}}', 'I call {"name": "f", "parameters": {"a": 1}}', []),
        ("llama3_json", "<|python_tag|>brave.call()", "<|python_tag|>brave.call()", []),
        ("llama3_json", '{"name": "f", "parameters": ', "", [CallText("f", "")]),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}}; {"name": "get_weather", "para', "", [ONE, CallText("get_weather", "")]),
        ("llama3_json", '{"name": "Ann", "parameters": ', '{"name": "Ann", "parameters": ', []),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": ', "", [CallText("f", "")]),
        ("mistral", "Yes.[TOOL_CALLS]f[ARGS]", "Yes.", [CallText("f", "")]),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]1234[AR", "", [CallText("f", "")]),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]', "", [ONE]),
        ("mistral", 'Yes.[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]', "Yes.", [ONE, CallText("g", "{}")]),
        ("mistral", ' [{"name": "f", "arguments": {"a": 1}}]', "", [ONE]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather{"b": {}}', "", [ONE, CallText("get_weather", '{"b": {}}')]),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}', "", [ONE]),
        ("mistral", "[1, 2] is a list", "[1, 2] is a list", []),
        ("mistral", '[{"name": "Ann", "arguments": {}}]', '[{"name": "Ann", "arguments": {}}]', []),
        ("mistral", "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    ],
)  # fmt: skip
def test_what_is_read(name, text, content, calls):
    assert parse(name, text) == ParsedResponse(content, tuple(calls))
    check_beginnings(name, text)


def check_beginnings(name, text):
    """What is read of a beginning only ever grows: sent pieces are never taken back, however the text is split."""
    before, whole = ParsedResponse(""), parse(name, text)
    for end in range(len(text) + 1):
        now = parse(name, text[:end], final=False)
        for earlier, later in ((before, now), (now, whole)):
            assert later.content.startswith(earlier.content), text[:end]
            assert len(later.calls) >= len(earlier.calls), text[:end]
            for old, new in zip(earlier.calls, later.calls, strict=False):
                assert new.name == old.name and new.arguments.startswith(old.arguments), text[:end]
        before = now


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.sampled_from(["city", "name", "</tool_call>", "arguments", 'a"b\\']), json_values, max_size=3)
calls = st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=3)
WRITTEN = {
    "hermes": lambda made: "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in made),
    "llama3_json": lambda made: "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in made),
    "mistral": lambda made: "[TOOL_CALLS] [" + ", ".join(f'{{"name": "{n}", "arguments": {a}, "id": "aB3456789"}}' for n, a in made) + "]",
}


@pytest.mark.parametrize("name", [*FORMATS])
@settings(max_examples=40, deadline=None)
@given(calls, st.booleans(), st.sampled_from([None, 2]))
def test_calls_are_read_as_they_were_written(name, made, ascii_, indent):
    written = [(n, json.dumps(a, ensure_ascii=ascii_, indent=indent)) for n, a in made]
    text = WRITTEN[name](written)
    assert parse(name, text) == ParsedResponse("", tuple(CallText(n, a) for n, a in written))
    check_beginnings(name, text)


PIECES = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "f", ', '"arguments": {', '"parameters": '),
    *('{"name": "g", "arguments": {"a": 1}}', '"a"', ": ", '"', "{", "}", "[", "]", ", ", "; ", "\\", "\n", " "),
    *("f", "null", "1", "text", "<", "é"),
]


@pytest.mark.parametrize("name", [*FORMATS])
@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_whatever_is_written_is_never_taken_back(name, text):
    check_beginnings(name, text)
    if not any(marker in text for marker in ("<tool_call>", "[TOOL_CALLS]", "{")):
        assert parse(name, text) == ParsedResponse(text)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("qwen2_5", "hermes"), ("qwen3", "hermes"), ("llama3_1", "llama3_json"), ("llama3_2", "llama3_json"), ("mistral", "mistral"),
     ("qwen3_5_think", None), ("glm4moe", None), ("gptoss", None), ("deepseekv3", None), ("gemma3", None)],
)  # fmt: skip
def test_the_format_of_a_template(family, expected):
    """Also of templates whose calls begin with ``<tool_call>`` and go on in another way."""
    lm = tiny_lm("base")
    lm.template, lm.tokenizer.chat_template = "chat", template(family)
    found = format_of_template(lm)
    assert (found.name if found else None) == expected
    lm.template = "raw"
    assert format_of_template(lm) is None


@pytest.mark.parametrize(
    ("family", "several"),
    [("qwen2_5", True), ("qwen3", True), ("llama3_1", False), ("llama3_2", False), ("mistral", True), ("mistral_named", True),
     (SHOWS.format("[0]"), False),
     (SHOWS.format("[-1]"), False),
     (PLAIN, True), ("{{ raise_exception('no tools') if tools }}{{ messages[0].content }}", True)],
)  # fmt: skip
def test_whether_a_template_reads_several_calls_of_a_turn(family, several):
    """The last four show the first call alone, the last call alone, no calls, and nothing at all where there are tools: only where one call
    is read and two are not, a second one is in vain."""
    lm = tiny_lm("base")
    lm.template, lm.tokenizer.chat_template = "chat", template(family)
    assert reads_several(lm) is several
    lm.template = "raw"
    assert reads_several(lm) is True, "no chat template: nothing is known against several calls"


def test_a_template_without_tools_has_no_format():
    lm = tiny_lm("base")
    lm.template, lm.tokenizer.chat_template = "chat", PLAIN
    assert format_of_template(lm) is None


def test_special_tokens_of_a_format_can_be_text():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[INST]"]})
    ids = tokenizer("a[TOOL_CALLS]b[INST]c", add_special_tokens=False).input_ids
    vocabulary = tiny_lm("base", tokenizer=tokenizer).vocabulary
    assert vocabulary.decode(ids) == "abc" and vocabulary.response_text((), ids) == "abc"
    for _ in range(2):  # several servers in turn
        vocabulary.show(FORMATS["mistral"].tokens)
        assert vocabulary.decode(ids) == vocabulary.response_text((), ids) == "a[TOOL_CALLS]bc"
    text, state = "", vocabulary.start_decoding(())
    for end in range(len(ids) + 1):
        more, state = vocabulary.continue_text(ids[:end], state)
        text += more
    assert text == "a[TOOL_CALLS]bc"
    vocabulary.show(FORMATS["hermes"].tokens)
    assert vocabulary.decode(ids) == "abc"
