"""One parser of prompts: what is a prompt, what is refused and in which words; chat templates that refuse."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivg.engines.endpoint.text_vocabulary import EndpointPromptEncoder, TextVocabulary
from ivg.engines.transformers.engine import TransformersEngine
from ivg.errors import PromptError, ServeError
from ivg.model import GuidedModel
from ivg.models.chat_template import encode, render, text_ids
from ivg.search.searcher import Request, Search, Searcher
from ivg.serving.protocol import ChatRequest
from ivg.serving.served_models import ServedModels
from ivg.settings.recipe import Recipe
from ivg.settings.serve import ServeSettings
from ivg.testing import EOS, byte_tokenizer, tiny_lm, tiny_model, tiny_value
from ivg.types import Beam, SamplingParams, TokenGuidance, new_key
from ivg.types.messages import Message, Prompt, content_text, read_prompts
from ivg.values.base import FunctionValue
from ivg.values.reward import RewardModel
from tokenizers_zoo import sentencepiece

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


IMAGE = {"type": "image_url", "image_url": {"url": "data:…", "detail": "low"}}


def test_pictures_keep_their_place_and_their_shape():
    parts = [{"type": "text", "text": "a "}, IMAGE, {"type": "text", "text": "b"}, {"type": "image", "path": "x.png"}]
    found = Prompt.of([USER, {"role": "user", "content": parts}])
    assert found.plain == [USER, {"role": "user", "content": parts}]
    assert Prompt.of(json.loads(json.dumps(found.plain))) == found
    assert found.content[1].content == "a b"
    assert [image.source for image in found.images] == ["data:…", "x.png"]
    assert [image.kind for image in found.images] == ["data", "path"]
    other = Prompt.of([USER, {"role": "user", "content": [*parts[:3], {"type": "image", "path": "y.png"}]}])
    assert other != found


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
        ([USER, {"role": "user", "content": [{"type": "image_url"}]}], "messages[1].content[0] is a picture with type"),
        (
            [{"role": "user", "content": [{"type": "image", "path": "a", "url": "b"}]}],
            "messages[0].content[0] is a picture with type, path, url",
        ),
        ([{"role": "user", "content": [{"type": "image", "image": 7}]}], "messages[0].content[0] is a picture of type int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": " "}}]}], "messages[0].content[0] is a picture with"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0]: parts of type 'input_audio'"),
        ([{**USER, "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls, but the role is 'user'"),
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


# Templates


REFUSALS = {
    "a system turn": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
    "two user turns": "{% if messages[0].role == messages[1].role %}{{ raise_exception('Roles must alternate') }}{% endif %}",
    "what is not there": "{{ tools[0].name.upper() }}",
    "wrong types": "{{ messages[0].content + 1 }}",
}
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def templated(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("why", [*REFUSALS])
def test_a_template_that_refuses_fails_its_own_row(why):
    messages = [{"role": "system" if why == "a system turn" else "user", "content": "a"}, USER]
    tokenizer = templated(REFUSALS[why] + PLAIN)
    own_words = {"a system turn": "System role not supported", "two user turns": "Roles must alternate"}.get(why, "")
    roles = ", ".join(m["role"] for m in messages)
    line = rf"the chat template of base refuses these messages \(roles: {roles}\): .*{own_words}"
    base = tiny_lm("base", tokenizer=tokenizer)
    searcher = Searcher(TransformersEngine(base))
    with pytest.raises(PromptError, match=line):
        searcher.add(Request(Prompt.of(messages)))
    searcher.add(Request(Prompt("a"), sampling=SamplingParams(max_new_tokens=2)))
    while searcher.busy:
        searcher.step()
    served = ServedModels(GuidedModel(base), Recipe.model_validate({"search": {"method": "base"}}), ServeSettings(name="m"))
    with pytest.raises(ServeError, match=line) as caught:
        served.prepare(ChatRequest.model_validate({"model": "m", "messages": messages}))
    assert caught.value.status == 400 and "/" not in str(caught.value).replace("{prompt}", "")


PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def test_a_template_that_reads_parts_alone_is_given_parts():
    """With a text it would write nothing, and say nothing."""
    messages = [{"role": "system", "content": "Be brief."}, USER]
    silent = templated(PARTS)
    assert "Hi" not in silent.apply_chat_template(messages, tokenize=False)
    assert render(Prompt.of(messages), silent, None) == "<system>Be brief.<user>Hi"
    failing = templated("{{ messages[0].content[0].text }}{{ messages[0].content[0].type.upper() }}")  # with a text it raises
    assert render(Prompt.of(USER), failing, None) == "HiTEXT"
    loud = templated("{% for m in messages %}{{ m.content | upper if m.content is string else m.content }}{% endfor %}")
    assert render(Prompt.of(USER), loud, None) == "HI"  # no list is printed as it is
    both = templated("{% for m in messages %}{{ m.content | upper if m.content is string else m.content[0].text }}{% endfor %}")
    assert render(Prompt.of(USER), both, None) == both.apply_chat_template([USER], tokenize=False) == "HI"  # it reads texts
    letters = templated(PARTS.replace("{% endif %}", "{% else %}.{% endif %}"))  # goes through a text letter by letter
    assert letters.apply_chat_template([USER], tokenize=False) == "<user>.."
    assert render(Prompt.of(USER), letters, None) == "<user>Hi"
    dropping = templated("{% for m in messages if m.role == 'user' %}<{{ m.content | trim }}>{% endfor %}")  # its own business
    assert render(Prompt.of(messages), dropping, None) == "<Hi>"


def test_a_values_template_that_refuses_fails_its_own_row():
    base, value = tiny_lm("base", tokenizer=templated(PLAIN)), tiny_value(tokenizer=templated(REFUSALS["a system turn"] + PLAIN))
    messages = Prompt.of([{"role": "system", "content": "a"}])
    with pytest.raises(PromptError, match="the chat template of explicit refuses these messages"):
        Searcher(TransformersEngine(base)).add(Request(messages, Search(guidance=TokenGuidance(value))))
    reward = object.__new__(RewardModel)  # no classifier is needed to refuse
    reward.network = tiny_model()
    reward.tokenizer, reward.template, reward.name = templated(REFUSALS["a system turn"] + PLAIN), None, "reward"
    with pytest.raises(PromptError, match="the chat template of reward refuses these messages"):
        Searcher(TransformersEngine(base)).add(Request(messages, Search(value=reward)))
    reward.check(Prompt.of([USER]), 9)


def test_a_model_without_a_template_is_named_by_its_part():
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path = "/srv/models/secret"
    with pytest.raises(PromptError, match=r"^base has no chat template"):
        Searcher(TransformersEngine(tiny_lm("base", tokenizer=tokenizer))).add(Request(Prompt.of([USER])))


def test_a_prompt_beyond_the_context_is_an_error():
    base = tiny_lm("base", context=32)
    for length in (32, 40):
        with pytest.raises(
            PromptError, match=rf"prompt of {length} tokens leaves no room .*\(32\)\n  shorten .* by at least {length - 31} "
        ):
            base.check_length(Prompt("x" * length), 5)
    with pytest.raises(PromptError, match="ask for at most 1 new tokens"):
        base.check_length(Prompt("x" * 31), 5)
    assert base.check_length(Prompt("x" * 32), 0) == 32  # nothing is to be written


def test_lone_surrogates_do_not_reach_tokenizers():
    with pytest.raises(PromptError, match="half of a surrogate pair"):
        tiny_lm("base").prompt_ids(Prompt("a\ud83d"))
    with pytest.raises(PromptError, match="half of a surrogate pair"):
        tiny_lm("base", tokenizer=templated(PLAIN)).prompt_ids(Prompt((Message("user", "\ud83d"),)))


# One token begins a prompt


BEGUN = [("chat", "bos + plain"), ("chat", "plain"), ("BOS{prompt}", None), ("Q: {prompt}", None), (None, None)]


@pytest.mark.parametrize("make", [lambda: byte_tokenizer(bos=True), sentencepiece, lambda: sentencepiece("bpe", "legacy")])
@pytest.mark.parametrize(("template", "chat"), BEGUN)
def test_a_prompt_begins_once(make, template, chat):
    tokenizer = make()
    bos, word = tokenizer.bos_token_id, tokenizer.bos_token
    tokenizer.chat_template = ("{{ bos_token }}" if chat == "bos + plain" else "") + PLAIN if chat else None
    try:
        prompt = Prompt.of([USER]) if chat else Prompt("the film")
        template = template and template.replace("BOS", word)
        ids = encode(prompt, tokenizer, template)
        assert ids.count(bos) == (0 if chat == "plain" else 1) and (chat == "plain" or ids[0] == bos)
        if chat:
            assert ids == list(tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False))
            text = EndpointPromptEncoder(TextVocabulary(chat_template=tokenizer.chat_template), tokenizer).text(prompt)
            assert not text.startswith(word)  # the server writes it
        begun = encode(Prompt(word + "the film"), tokenizer, None)  # a text that was rendered elsewhere
        assert begun.count(bos) == 1 and begun == tokenizer(word + "the film", add_special_tokens=False).input_ids
        assert text_ids(word + "the", tokenizer, special=False).count(bos) == 1
        reward = object.__new__(RewardModel)
        reward.network = tiny_model(vocab_size=len(tokenizer))
        reward.tokenizer, reward.template, reward.name = tokenizer, template, "reward"
        assert reward.ids(reward.text(prompt, " is")).count(bos) == 1
    finally:
        tokenizer.chat_template = None


# Prompts that are tokens


def test_models_of_one_vocabulary_read_the_very_tokens():
    tokenizer = byte_tokenizer([("t", "h")])
    base, guide = tiny_lm("base", tokenizer=tokenizer), tiny_lm("tuned", tokenizer=byte_tokenizer([("t", "h")]))
    engine = TransformersEngine(base)
    ids = (0, *tokenizer("t").input_ids, *tokenizer("he").input_ids, 0)  # special tokens, and a cut that the tokenizer would not make
    root = engine.open(Prompt(base.vocabulary.prompt_text(ids), ids), SamplingParams())
    assert root.prompt.content == "the"
    assert base.prompt_ids(root.prompt) == guide.prompt_ids(root.prompt) == ids
    h = Beam(new_key(), None, root.prompt, (5, 6), "xy", vocabulary=base.vocabulary)
    assert guide.ids(h) == base.ids(h) == ([*ids, 5, 6], len(ids))
    again = tiny_lm("base", tokenizer=tokenizer)
    again.template, again.reads_given_ids = "Q: {prompt}", True
    assert again.prompt_ids(Prompt("the", ids)) == ids  # tokens are as the base shall read them


def test_a_template_of_ones_own_reads_the_text_of_tokens_and_refuses_rendered_ones():
    tokenizer = byte_tokenizer(chat=True)
    base = tiny_lm("base", tokenizer=tokenizer)
    engine = TransformersEngine(base)
    plain = tuple(tokenizer("Hi").input_ids)
    chat = (*plain, 0, *plain)
    for template, expected in (("Q: {prompt}", "Q: Hi"), ("chat", "<user>Hi\n<assistant>")):
        guide = tiny_lm("tuned", tokenizer=tokenizer)
        guide.template = template
        for ids in (plain, (0, *plain)):  # as if it had been given as text
            root = engine.open(Prompt(base.vocabulary.prompt_text(ids), ids), SamplingParams())
            assert tokenizer.decode(guide.prompt_ids(root.prompt)) == expected
        root = engine.open(Prompt(base.vocabulary.prompt_text(chat), chat), SamplingParams())
        with pytest.raises(PromptError, match=rf"rendered already \(they hold '{EOS}'\), and tuned has a template of its own"):
            guide.prompt_ids(root.prompt)


def test_other_vocabularies_read_the_text_with_the_special_tokens_that_they_know():
    tokenizer, other = sentencepiece(), byte_tokenizer()
    base = tiny_lm("base", tokenizer=tokenizer)
    text = "<s>[INST] the film</s> a"
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    root = TransformersEngine(base).open(Prompt(base.vocabulary.prompt_text(ids), ids), SamplingParams())
    assert root.prompt.content == "the film a"
    guide = tiny_lm("tuned", tokenizer=other)
    assert other.decode(guide.prompt_ids(root.prompt)) == "the film a"
    knowing = byte_tokenizer()
    knowing.add_special_tokens({"additional_special_tokens": ["[INST]", "</s>"]})
    guide = tiny_lm("tuned", tokenizer=knowing)
    assert knowing.decode(guide.prompt_ids(root.prompt)) == "[INST]the film</s> a"
    h = Beam(new_key(), None, root.prompt, (5,), " is", vocabulary=base.vocabulary)
    assert knowing.decode(guide.ids(h)[0]) == "[INST]the film</s> a is"


def test_a_function_reads_text_alone():
    seen = []
    base = tiny_lm("base")
    ids = (0, *base.tokenizer("Hi").input_ids)
    search = Search(successors=2, value=FunctionValue(lambda p, r: seen.append(p) or 0.0))
    done = dict(Searcher(TransformersEngine(base)).run([Request(Prompt("Hi", ids), search, SamplingParams(max_new_tokens=2))]))
    assert set(seen) == {"Hi"} and done[0].usage.prompt_tokens == 3


def test_one_refused_conversation_leaves_the_others_of_a_file(monkeypatch):
    """The command line: the row is reported, all others are answered."""
    from ivg.jobs.backends import run_tasks
    from ivg.jobs.runner import Task

    base = tiny_lm("base", tokenizer=templated(REFUSALS["two user turns"] + PLAIN))
    monkeypatch.setattr("ivg.factory.recipe.load_models", lambda recipe: GuidedModel(base))
    recipe = Recipe.model_validate({"search": {"method": "base"}, "sampling": {"max_new_tokens": 2}})
    fine = [{**USER, "role": "system"}, USER]
    tasks = [Task(messages, 0, 0, i) for i, messages in enumerate([fine, [USER, USER], fine])]
    results = list(run_tasks(recipe, tasks))
    assert sorted(r.task.source for r in results if r.completion is not None) == [0, 2]
    (failed,) = (r for r in results if r.completion is None)
    assert failed.task.source == 1
    assert "refuses these messages (roles: user, user): Roles must alternate" in failed.error


@pytest.mark.parametrize("ids", [(5, 10**6), (-1, 5)])
def test_tokens_outside_the_vocabulary_are_refused(ids):
    """They are not read as other tokens."""
    model = GuidedModel(tiny_lm("base"))
    with pytest.raises(PromptError, match=r"prompt token (1000000|-1) is outside the vocabulary of base"):
        model.generate(Prompt("x", ids), "base", max_new_tokens=2)
