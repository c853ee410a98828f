"""One parser of prompts: what is a prompt, what is refused and in which words; chat templates that refuse."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivg.errors import PromptError
from ivg.prompts import Message, Prompt, content_text, read_prompts

USER = {"role": "user", "content": "Hi"}
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
turns = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts})


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("Hi", "Hi"),
        (" \n", " \n"),
        (USER, (Message("user", "Hi"),)),
        (Message("user", "Hi"), (Message("user", "Hi"),)),
        ([USER], (Message("user", "Hi"),)),
        ((USER, Message("assistant", "Ho")), (Message("user", "Hi"), Message("assistant", "Ho"))),
        ([{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "input_text", "text": "b"}]}], (Message("user", "a b"),)),
        ([{**USER, "name": "Ann", "tool_calls": [], "function_call": None, "weight": 3}], (Message("user", "Hi"),)),
        (iter([USER]), (Message("user", "Hi"),)),
    ],
)
def test_what_is_a_prompt(value, content):
    found = Prompt.of(value)
    assert found == Prompt(content)
    assert Prompt.of(found) is found
    assert Prompt.of(json.loads(json.dumps(found.plain))) == found


IMAGE = {"type": "image_url", "image_url": {"url": "data:…"}}


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (None, "unusable prompt null"),
        (3, "unusable prompt 3"),
        (b"Hi", "unusable prompt b'Hi'"),
        ([], "empty prompt: no messages"),
        ([1, 2], "unusable prompt [1, 2]"),
        (["a", "b"], "unusable prompt ['a', 'b']"),
        ([USER, "b"], "messages[1] is 'b'"),
        ({"prompt": "x"}, "got a row {'prompt'} as a prompt"),
        ({"id": 1, "messages": [USER]}, "got a row {'id', 'messages'} as a prompt"),
        ({"role": "user"}, "message has no content, got role"),
        ({}, "message has no role, got nothing"),
        ([USER, {"content": "x"}], "messages[1] has no role, got content"),
        ([{"role": "", "content": "x"}], "messages[0].role is ''"),
        ([{"role": None, "content": "x"}], "messages[0].role is null"),
        ([{"role": 7, "content": "x"}], "messages[0].role is 7"),
        ([{"role": "assistant", "content": None}], "messages[0].content is null"),
        ([{"role": "user", "content": 7}], "messages[0].content is 7"),
        ([{"role": "user", "content": b"x"}], "messages[0].content is b'x'"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "messages[0].content is {'type': 'text', 'text': 'x'}"),
        ([{"role": "user", "content": []}], "messages[0].content is an empty list"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0] is 'x'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text is null"),
        ([USER, {"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}], "messages[1].content[1]: parts of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0]: parts of type 'input_audio'"),
        ([{**USER, "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls is not supported"),
        ("a\ud83d b", "the prompt is no Unicode text: character 1 is half of a surrogate pair (U+D83D)"),
        ([{"role": "user", "content": "\udc00"}], "messages[0].content is no Unicode text"),
        ([{"role": "us\udc00", "content": "x"}], "messages[0].role is no Unicode text"),
        ([{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}], "messages[0].content[0].text is no Unicode text"),
        ([Message("user", None)], "messages[0].content is null"),  # type: ignore[arg-type]
    ],
)
def test_what_is_refused(value, line):
    with pytest.raises(PromptError) as caught:
        Prompt.of(value)
    first, advice = str(caught.value).split("\n", 1)
    assert first.startswith(line) and advice.strip()


@pytest.mark.parametrize(
    ("value", "contents", "alone"),
    [
        ("a", ["a"], True),
        (USER, [(Message("user", "Hi"),)], True),
        ([USER, USER], [(Message("user", "Hi"),) * 2], True),
        (["a", "b"], ["a", "b"], False),
        (["a"], ["a"], False),
        ([], [], False),
        ([[USER], "b", Prompt("c")], [(Message("user", "Hi"),), "b", "c"], False),
    ],
)
def test_one_prompt_or_several(value, contents, alone):
    prompts, single = read_prompts(value)
    assert [p.content for p in prompts] == contents and single is alone


def test_messages_among_prompts_are_refused():
    with pytest.raises(PromptError, match="messages and other prompts in one list"):
        read_prompts([USER, "b"])
    with pytest.raises(PromptError, match="unusable prompt b'x'"):
        read_prompts(b"x")


@given(st.lists(turns, min_size=1, max_size=4), st.data())
def test_parts_are_the_text_that_they_spell(messages, data):
    cut = []
    for m in messages:
        where = sorted(data.draw(st.lists(st.integers(0, len(m["content"])), max_size=3)))
        pieces = [m["content"][a:b] for a, b in zip([0, *where], [*where, None], strict=True)]
        cut.append({**m, "content": [{"type": "text", "text": piece} for piece in pieces]})
    assert Prompt.of(cut) == Prompt.of(messages)
    assert [content_text(m["content"]) for m in cut] == [m["content"] for m in messages]


everything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "prompt", "tool_calls", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(everything)
def test_any_value_is_a_prompt_or_refused_in_plain_words(value):
    try:
        found = Prompt.of(value)
    except PromptError as e:
        assert "\n  " in str(e) and "Traceback" not in str(e)
        return
    assert isinstance(found.content, str) or (found.content and all(m.role.strip() for m in found.content))
    json.dumps(found.plain, ensure_ascii=False).encode()  # tokenizers and files can hold it
