"""Conversations with tools: turns with calls and results are read, and templates are made to show them or refused."""

import json

import pytest

from ivg.errors import ConfigError, PromptError
from ivg.jobs.prompts import prompt_key, prompt_of
from ivg.model import GuidedModel
from ivg.models.chat_template import render
from ivg.models.image_prompts import ImageEncoder
from ivg.settings.chat import ChatSettings
from ivg.settings.tools import Tools
from ivg.testing import tiny_lm, tiny_value
from ivg.training.data import read_prompts, read_sft_examples
from ivg.types import Message, Prompt, ToolCall
from ivg.utils.jsonl import as_lines
from ivg.values.implicit import ImplicitValue
from ivg.values.truncation import drop_beginning
from tool_chats import ANSWERED, ARGUMENTS, ASKED, CALL, CALLED, PLAIN, TOOL, tokenizer

FAMILIES = ("qwen2_5", "qwen3", "llama3_1", "llama3_2", "mistral")


def chat(messages, **settings):
    return Prompt(Prompt.of(messages).content, chat=ChatSettings(**settings))


def test_turns_of_a_tool_conversation():
    found = Prompt.of(ANSWERED)
    call, result = found.content[1], found.content[2]
    assert call == Message("assistant", "", tool_calls=(ToolCall("get_weather", ARGUMENTS, "callabcde"),))
    assert result == Message("tool", "sunny, 21 degrees", tool_call_id="callabcde")
    assert Prompt.of(json.loads(json.dumps(found.plain))) == found and hash(found) == hash(Prompt.of(ANSWERED))
    as_object = {**CALL, "function": {"name": "get_weather", "arguments": json.loads(ARGUMENTS)}}
    assert Prompt.of([*ASKED, {"role": "assistant", "tool_calls": [as_object]}]) == Prompt.of(CALLED)
    said = Prompt.of([*ASKED, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}]).content[1]
    assert said.text == f'Let me see.\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
    named = Prompt.of([{"role": "tool", "name": "get_weather", "content": [{"type": "text", "text": "a"}], "tool_call_id": None}])
    assert named.content[0] == Message("tool", "a", name="get_weather")
    assert Prompt.of([{"role": "user", "name": "Ann", "tool_call_id": "x", "content": "Hi"}]).content[0] == Message("user", "Hi")


@pytest.mark.parametrize(
    ("turn", "line"),
    [
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls, but the role is 'user'"),
        ({"role": "assistant", "content": "", "tool_calls": CALL}, "messages[0].tool_calls is {"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0] is {'id': '1'}"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "messages[0].tool_calls[0].type is 'custom'"),
        ({"role": "assistant", "tool_calls": [{**CALL, "id": 5}]}, "messages[0].tool_calls[0].id is 5"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}, "messages[0].tool_calls[0].function.name is ''"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "messages[0].tool_calls[0].function.arguments is '[1]'",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "function.arguments is '{'"),
        ({"role": "assistant", "content": None}, "messages[0].content is null"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "messages[0].function_call is not supported"),
        ({"role": "tool", "content": None}, "messages[0].content is null"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "messages[0].tool_call_id is 5"),
    ],
)
def test_what_is_refused(turn, line):
    with pytest.raises(PromptError) as caught:
        Prompt.of([turn])
    assert line in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_templates_are_rendered_as_transformers_does(family):
    tok = tokenizer(family)
    given = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [Prompt.of(CALLED).content[1].tool_calls[0].parsed]}, ANSWERED[2]]
    text = render(chat(ANSWERED, tools=[TOOL]), tok, None)
    assert text == tok.apply_chat_template(given, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    for part in ("get_weather", "Weather of a city.", "Zürich", "sunny, 21 degrees"):
        assert part in text
    assert '\\"city' not in text and "'city'" not in text  # neither text within text, nor Python's form
    asked = render(chat(ASKED, tools=[TOOL]), tok, None)
    assert asked == tok.apply_chat_template(ASKED, tools=[TOOL], tokenize=False, add_generation_prompt=True)


def test_a_template_that_reads_arguments_as_text():
    calls = "{% for c in m.tool_calls %}CALL "
    names = PLAIN.replace("{{ m.content }}", "{{ m.content }}" + calls + "{{ c.function.name }} ")
    printing = names.replace("{{ c.function.name }} ", "{{ c.function.name }} {{ c.function.arguments }}{% endfor %}")
    joining = names.replace("{{ c.function.name }} ", "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}")
    for own in (printing, joining):
        assert f"CALL get_weather {ARGUMENTS}" in render(Prompt.of(ANSWERED), tokenizer(own), None)


class PictureProcessor:
    """Renders texts and parts in a chat template of its own; a picture is <image>."""

    image_token = "<image>"

    def __init__(self, argument):
        parts = "{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}"
        content = "{% if m.content is string %}{{ m.content }}{% else %}" + parts + "{% endif %}"
        called = "{% for c in m.tool_calls %}{{ c.function.name }} " + argument + "{% endfor %}"
        self.tokenizer = tokenizer(PLAIN.replace("{{ m.content }}", content + called))
        self.chat_template = self.tokenizer.chat_template

    def apply_chat_template(self, messages, tokenize, **settings):
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **{"return_dict": False, **settings, "return_tensors": None})
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt") if tokenize else text


@pytest.mark.parametrize(
    "argument", ["{{ c.function.arguments }}", "{{ '' + c.function.arguments }}", "{{ c.function.arguments | tojson }}"]
)
def test_calls_beside_pictures_are_written_as_without(argument):
    pytest.importorskip("PIL.Image")
    from vision import asking, picture

    processor = PictureProcessor(argument)
    encoder = ImageEncoder("base", lambda: processor)
    prompt = encoder.reader.read(Prompt.of([*asking("Which city?", picture()), *ANSWERED[1:]]))
    text = processor.tokenizer.decode(encoder.inputs(prompt).ids)
    assert text.startswith("<user><image>Which city?") and "<assistant>get_weather " + ARGUMENTS in text
    sly = {**CALL, "function": {**CALL["function"], "arguments": '{"city": ["<image>"]}'}}
    with pytest.raises(PromptError, match="holds <image>, which stands for a picture"):
        encoder.inputs(encoder.reader.read(Prompt.of([*asking("a", picture()), {**CALLED[1], "tool_calls": [sly]}, ANSWERED[2]])))


def test_a_template_that_leaves_tools_out_is_refused():
    with pytest.raises(PromptError, match="the chat template of base leaves tools out\n  give this model a chat template that reads tools"):
        render(chat(ASKED, tools=[TOOL]), tokenizer(PLAIN), None, "base")
    with pytest.raises(PromptError, match="the chat template of base leaves the calls of tools out"):
        render(Prompt.of(ANSWERED), tokenizer(PLAIN), None, "base")
    deaf = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    with pytest.raises(PromptError, match="the chat template of base leaves the results of tools out"):
        render(Prompt.of(ANSWERED), tokenizer(deaf), None, "base")
    results = [*ASKED, {"role": "tool", "content": "sunny"}]
    assert render(Prompt.of(results), tokenizer(PLAIN), None) == "<user>How is the weather?\n<tool>sunny\n<assistant>"


def test_a_template_of_parts_reads_tools():
    parts = (
        "{{ tools | tojson if tools }}{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
        "{% endif %}{% endfor %}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    )
    text = render(chat(ANSWERED, tools=[TOOL]), tokenizer(parts), None)
    assert text.startswith('[{"type": "function"') and '"arguments": {"city": "Zürich"' in text and text.endswith("<tool>sunny, 21 degrees")
    silent = parts.removeprefix("{{ tools | tojson if tools }}")
    with pytest.raises(PromptError, match="leaves tools out"):
        render(chat(ANSWERED, tools=[TOOL]), tokenizer(silent), None)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{prompt}\nA:", 'user: How is the weather?\nassistant: {"name": "get_weather", "arguments": %s}\ntool: sunny, 21 degrees\nA:'),
        ("raw", 'How is the weather?{"name": "get_weather", "arguments": %s}sunny, 21 degrees'),
        ("last_turn", "How is the weather?"),
    ],
)
def test_models_without_a_template_for_tools_read_text(template, expected):
    text = render(chat(ANSWERED, tools=[TOOL]), tokenizer(PLAIN), template)
    assert text == (expected % ARGUMENTS if "%s" in expected else expected)


def test_the_last_turn_with_calls_is_not_continued():
    assert Prompt.of(CALLED).continued is None
    assert render(Prompt.of(CALLED), tokenizer("qwen2_5"), None).endswith("</tool_call><|im_end|>\n<|im_start|>assistant\n")


def model(family, **more):
    tok = tokenizer(family)
    base, tuned, untuned = (tiny_lm(n, seed=i, tokenizer=tok, context=4096) for i, n in enumerate(("base", "tuned", "untuned")))
    return GuidedModel(base, {"implicit": ImplicitValue(tuned, untuned), **more})


def test_all_models_read_the_tools():
    guided = model("qwen3")
    request = guided.request(ANSWERED, "eft", tools=[TOOL])
    text = guided.base.tokenizer.apply_chat_template(
        [*ASKED, {"role": "assistant", "content": "", "tool_calls": [ToolCall.of(CALL).parsed]}, ANSWERED[2]],
        tools=[TOOL], tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert {lm.tokenizer.decode(lm.prompt_ids(request.prompt)) for lm in guided.readers} == {text}
    answer = guided.generate(ANSWERED, "eft", tools=[TOOL], seed=1, max_new_tokens=8)
    assert answer.usage.prompt_tokens == len(guided.base.prompt_ids(request.prompt)) == len(text.encode())
    untold = guided.generate(ANSWERED, "eft", seed=1, max_new_tokens=8)
    assert untold.usage.prompt_tokens < answer.usage.prompt_tokens


def test_a_value_that_cannot_read_tools_says_what_to_do():
    guided = model("qwen3", explicit=tiny_value(tokenizer=tokenizer(PLAIN)))
    with pytest.raises(PromptError, match="the chat template of explicit leaves tools out"):
        guided.generate(ASKED, "cbs-explicit", tools=[TOOL], max_new_tokens=4)


@pytest.mark.parametrize(
    ("tools", "line"),
    [
        ("f", "tools must be a list of tools"),
        ([5], "tools must be a list of tools"),
        ([{"type": "web_search"}], r"tools\[0\].type is 'web_search'"),
        ([TOOL, {"type": "function"}], r"tools\[1\] has no function"),
        ([{"type": "function", "function": {"name": ""}}], r"tools\[0\].function.name is ''"),
        ([TOOL, TOOL], r"tools\[1\].function.name is 'get_weather', as that of another tool"),
        ([{"function": {"name": "f", "parameters": []}}], r"tools\[0\].function.parameters is \[\]"),
        ([{"function": {"name": "f", "description": 5}}], r"tools\[0\].function.description is 5"),
    ],
)
def test_unusable_tools(tools, line):
    with pytest.raises(ConfigError, match=line):
        ChatSettings(tools=tools)


def test_tools_are_known_by_their_json():
    assert Tools([TOOL]) == Tools([json.loads(json.dumps(TOOL))]) and list(Tools([TOOL])) == [TOOL]
    assert Tools([{"a": 1, "b": 2}]) != Tools([{"b": 2, "a": 1}])  # a template writes the keys in their order
    assert Tools([TOOL]).names == ("get_weather",) and not Tools()
    with pytest.raises(ConfigError, match="tools, but the base reads this prompt in no chat template"):
        model("qwen3").request("a text", "base", tools=[TOOL])


# Rows


def test_rows_with_tools(ivg, tmp_path):
    lm = tiny_lm("base", seed=3, tokenizer=tokenizer("qwen2_5"), context=4096)
    for part in (lm.network, lm.tokenizer):
        part.save_pretrained(tmp_path / "base")
    rows = [{"id": 0, "messages": ANSWERED, "tools": [TOOL]}, {"id": 1, "messages": json.dumps(ANSWERED), "tools": json.dumps([TOOL])}]
    rows += [{"id": 2, "messages": ANSWERED}, {"id": 3, "messages": ASKED, "tools": "[{}]"}]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(as_lines(rows), encoding="utf-8")
    settings = (
        "--base",
        tmp_path / "base",
        "--method",
        "base",
        "--temperature",
        0,
        "--max-new-tokens",
        4,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--seed",
        1,
    )
    command = ("generate", *settings, "--input", source, "--output", output)
    code, _, err = ivg(*command)
    assert code == 1 and "in.jsonl, line 4: tools[0] has no function" in err
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    first, second, third = found
    assert first["token_ids"] == second["token_ids"] and first["prompt"] == second["prompt"] == Prompt.of(ANSWERED).plain
    assert first["tools"] == [TOOL] and third["usage"]["prompt_tokens"] < first["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens"] == len(lm.prompt_ids(prompt_of(rows[0])))
    assert "already done 3" in ivg(*command)[2]
    assert prompt_key(ASKED, {"tools": [TOOL]}) == prompt_key(ASKED, {"tools": json.dumps([TOOL])}) != prompt_key(ASKED)


def test_rows_of_training(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(as_lines([{"prompt": ANSWERED, "tools": [TOOL], "response": "Sunny."}]), encoding="utf-8")
    assert read_prompts(path) == [chat(ANSWERED, tools=[TOOL])] == [read_sft_examples(path)[0].prompt]
    path.write_text(as_lines([{"prompt": ASKED, "response": CALLED[1:]}]), encoding="utf-8")
    with pytest.raises(ConfigError, match="the response calls tools"):
        read_sft_examples(path)


def test_a_shortened_prompt_keeps_its_calls():
    kept = drop_beginning(Prompt.of(ANSWERED), 4)
    assert kept.content[0].content == "is the weather?" and kept.content[1:] == Prompt.of(ANSWERED).content[1:]
    assert [m.role for m in drop_beginning(Prompt.of(ANSWERED), 25).content] == ["user", "tool"]


def test_developer_turns_are_system_turns_unless_the_template_knows_them():
    messages = [{"role": "developer", "content": "Be brief."}, *ASKED]
    as_system = [{"role": "system", "content": "Be brief."}, *ASKED]
    assert render(Prompt.of(messages), tokenizer("qwen2_5"), None) == render(Prompt.of(as_system), tokenizer("qwen2_5"), None)
    knowing = PLAIN + "{# developer #}"
    assert render(Prompt.of(messages), tokenizer(knowing), None).startswith("<developer>Be brief.\n<user>")
    joined = render(Prompt.of(messages), tokenizer(knowing), None, system="Rhyme.")
    assert joined.startswith("<developer>Rhyme.\n\nBe brief.\n<user>")
