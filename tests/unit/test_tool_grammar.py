"""Required calls as structured output: which texts the grammar of a format takes, and that they are read as the calls that they are."""

import json

import pytest

from ivg.errors import ConfigError
from ivg.models.tool_formats import FORMATS
from ivg.models.tool_grammar import call_grammar
from ivg.models.vocabulary import Vocabulary
from ivg.testing import byte_tokenizer

llguidance = pytest.importorskip("llguidance", reason="needs the extra structured")
CITY = {"type": "object", "properties": {"city": {"enum": ["Zürich", "Bern"]}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "a ::= b", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
SPECIAL = {
    "mistral": ["[TOOL_CALLS]"],
    "new": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    "tags": ["<tool_call>", "</tool_call>"],
}
BERN = '{"city": "Bern"}'
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def vocabulary(special=()):
    tokenizer = byte_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return Vocabulary(tokenizer)


def accepts(grammar, words, text, *, begins=False):
    """Does the grammar take the tokens of ``text``, of which special ones are one token?"""
    import llguidance.hf

    tokenizer = llguidance.hf.from_tokenizer(words.tokenizer, eos_token=sorted(words.eos_ids))
    whole = [{"lark_grammar": '%llguidance {"no_forcing": true}\nstart: @inner'}, {"name": "inner", "lark_grammar": grammar}]
    matcher = llguidance.LLMatcher(tokenizer, json.dumps({"grammars": whole}), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = words.tokenizer(text, add_special_tokens=False).input_ids
    return matcher.try_consume_tokens(ids) == len(ids) and (begins or matcher.is_accepting())


def made(name, tools=(WEATHER, CLOCK), special=(), **settings):
    words = vocabulary(special)
    return call_grammar(FORMATS[name], tools, words.special_id, **{"several": False, **settings}), words


FORMS = [
    ("hermes", (), HERMES, '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>', "\n"),
    ("hermes", "tags", HERMES, '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>', "\n"),
    ("llama3_json", (), f'{{"name": "get_weather", "parameters": {BERN}}}', '{"name": "clock", "parameters": {}}', "; "),
    ("mistral", "new", f"[TOOL_CALLS]get_weather[ARGS]{BERN}", "[TOOL_CALLS]clock[CALL_ID]abcde1234[ARGS]{}", ""),
]


@pytest.mark.parametrize(("name", "special", "weather", "clock", "between"), FORMS)
def test_one_call_and_several(name, special, weather, clock, between):
    special = SPECIAL.get(special, ())
    one, words = made(name, special=special)
    several, _ = made(name, special=special, several=True)
    both = weather + between + clock
    for text, is_one in ((weather, True), (clock, True), (both, False), (both + between + weather, False)):
        assert accepts(one, words, text) == is_one and accepts(several, words, text)
        calls = FORMATS[name].parse(text, {"get_weather", "clock"}).calls
        assert [c.name for c in calls] == ["get_weather", "clock", "get_weather"][: len(calls)] or text == clock
        assert all(json.loads(c.arguments) == ({} if c.name == "clock" else {"city": "Bern"}) for c in calls) and calls
    for wrong in ("", " ", weather.replace("Bern", "Rome"), weather.replace("get_weather", "clock"), weather + "x", "Hi", weather[:-1]):
        assert not accepts(several, words, wrong), wrong
    assert accepts(one, words, weather[: weather.index("Bern")], begins=True)


def test_mistral_s_list():
    one, words = made("mistral", special=SPECIAL["mistral"])
    several, _ = made("mistral", special=SPECIAL["mistral"], several=True)
    call = f'{{"name": "get_weather", "arguments": {BERN}}}'
    assert accepts(one, words, f"[TOOL_CALLS][{call}]") and accepts(one, words, f"[TOOL_CALLS] [{call}]")
    both = f"[TOOL_CALLS] [{call}, {call}]"
    assert accepts(several, words, both) and not accepts(one, words, both)
    assert len(FORMATS["mistral"].parse(both, {"get_weather"}).calls) == 2
    plain, without = made("mistral")
    assert accepts(plain, without, f"[TOOL_CALLS] [{call}]") and without.special_id("[TOOL_CALLS]") is None


def test_a_special_token_is_not_spelled_out():
    """Where the tokenizer has one, the model was trained to write that."""
    grammar, words = made("mistral", special=SPECIAL["mistral"])
    spelled = words.tokenizer("[TOOL", add_special_tokens=False).input_ids
    assert words.special_id("[TOOL_CALLS]") not in spelled and not accepts(grammar, words, "[TOOL", begins=True)
    assert accepts(grammar, words, "[TOOL_CALLS]", begins=True)
    words.show(["[TOOL_CALLS]"])
    assert words.special_id("[TOOL_CALLS]") is not None


def test_json_instead_of_calls():
    for name, call in (("hermes", HERMES), ("llama3_json", f'{{"name": "get_weather", "parameters": {BERN}}}')):
        grammar, words = made(name, instead={"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False})
        assert accepts(grammar, words, call) and accepts(grammar, words, '{"n": 7}') and not accepts(grammar, words, '{"n": "7"}')
        free, _ = made(name, instead={"type": "object"})
        assert accepts(free, words, '{"name": "get_weather", "parameters": 5}') and accepts(free, words, '{"n": "7"}')


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({"type": "object", "properties": {}}, "{}", '{"a": 1}'),
        ({}, '{"a": 1}', "[]"),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}', '"a"'),
        ({"properties": {"a": {"type": "integer"}}}, "{}", '{"b": 1}'),
        ({"properties": {"a": {"type": "integer"}}, "additionalProperties": True}, '{"b": 1}', '{"a": "x"}'),
        ({"type": ["object", "null"], "properties": {"a": {}}}, '{"a": null}', "null"),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"a": {"const": 1}}}}}, '{"a": 1}', '{"a": 2}'),
        ({"properties": {"a": {"$ref": "#/$defs/N"}}, "$defs": {"N": {"type": "integer"}}}, '{"a": 3}', '{"a": true}'),
        ({"properties": {"default": {"$ref": "#/$defs/N"}}, "$defs": {"N": {"type": "integer"}}}, '{"default": 3}', '{"default": true}'),
        ({"properties": {"a": {"$ref": "#"}, "b": {"const": {"$ref": "#/b"}}}}, '{"a": {"b": {"$ref": "#/b"}}}', '{"a": 1}'),
        ({"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]}, '{"a": 1, "b": 2}', '{"a": 3}'),
        ({"properties": {'q"é': {"const": 'x"\n'}}}, '{"q\\"é": "x\\"\\n"}', '{"q": "x"}'),
    ],
    ids=json.dumps,
)
def test_arguments_follow_the_schema(parameters, good, bad):
    """Also one with definitions of its own; arguments that the function does not have are left out unless the schema allows some."""
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for name in ("hermes", "llama3_json"):
        grammar, words = made(name, [tool, CLOCK])
        key = "parameters" if name == "llama3_json" else "arguments"
        around = "{}" if name == "llama3_json" else "<tool_call>\n{}\n</tool_call>"
        for arguments, expected in ((good, True), (bad, False)):
            text = around.replace("{}", f'{{"name": "f", "{key}": {arguments}}}')
            assert accepts(grammar, words, text) == expected, text


def test_names_are_json():
    """Also one that looks like a special token, or like the notation of another grammar."""
    tool = {"type": "function", "function": {"name": 'a"[ARGS] é::=', "parameters": {"type": "object", "properties": {}}}}
    grammar, words = made("hermes", [tool])
    call = '{"name": "a\\"[ARGS] é::=", "arguments": {}}'
    assert accepts(grammar, words, f"<tool_call>\n{call}\n</tool_call>")
    assert FORMATS["hermes"].parse(f"<tool_call>\n{call}\n</tool_call>", ()).calls[0].name == tool["function"]["name"]
    grammar, words = made("mistral", [tool], SPECIAL["new"])
    assert f"<[{words.special_id('[TOOL_CALLS]')}]>" in grammar and f"<[{words.special_id('[ARGS]')}]>" not in grammar


def test_arguments_that_are_no_object():
    for kind in ("string", ["array", "null"]):
        with pytest.raises(ConfigError, match=r"tools\[1\].function.parameters is a schema of .*\n  expected one of an object"):
            made("hermes", [CLOCK, {"type": "function", "function": {"name": "f", "parameters": {"type": kind}}}])
