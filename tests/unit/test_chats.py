"""Conversations: variables of chat templates, turns that are continued, other renderings, template files."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivg.engines.transformers.engine import TransformersEngine
from ivg.errors import ConfigError, PromptError, ServeError
from ivg.factory.recipe import load_models
from ivg.jobs.provenance import answer_provenance
from ivg.model import GuidedModel
from ivg.models.chat_template import render
from ivg.models.prompt_template import PromptTemplate
from ivg.serving.parsing import parse_body
from ivg.serving.protocol import ChatRequest, CompletionRequest
from ivg.serving.served_models import ServedModels
from ivg.settings.chat import RESERVED, ChatSettings, TemplateKwargs
from ivg.settings.recipe import Recipe
from ivg.settings.serve import ServeSettings
from ivg.testing import EOS, byte_tokenizer, tiny_lm, tiny_value
from ivg.types import Message, Prompt
from ivg.values.implicit import ImplicitValue
from ivg.values.reward import RewardModel
from tokenizers_zoo import sentencepiece

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
HI = [{"role": "user", "content": "Hi"}]
BEGUN = [*HI, {"role": "assistant", "content": "Well, "}]
LONG = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}, *HI]


def chat_tokenizer(template=TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chat_lm(name="base", seed=0, template="chat", kwargs=(), tokenizer=None):
    lm = tiny_lm(name, seed=seed, tokenizer=tokenizer or chat_tokenizer())
    lm.template, lm.chat_settings = PromptTemplate(template, dict(kwargs)).resolved
    return lm


def text_of(lm, prompt):
    return lm.tokenizer.decode(lm.prompt_ids(prompt))


# Variables of the template


def test_variables_of_a_model_and_of_a_prompt():
    quiet, open_ended = "<user>Hi\n<assistant><think></think>", "<user>Hi\n<assistant>"
    off, on = ({"enable_thinking": value} for value in (False, True))
    for own, given_, expected in (({}, {}, open_ended), (off, {}, quiet), ({}, off, quiet), (off, on, open_ended), (on, off, quiet)):
        lm = chat_lm(kwargs=own)
        prompt = Prompt(Prompt.of(HI).content, chat=ChatSettings(chat_template_kwargs=given_))
        assert text_of(lm, prompt) == expected
        assert text_of(lm, prompt) == lm.tokenizer.apply_chat_template(HI, tokenize=False, add_generation_prompt=True, **{**own, **given_})


def test_variables_reach_every_model_of_a_request():
    pair = ImplicitValue(chat_lm("tuned", 1), chat_lm("untuned", 2))
    model = GuidedModel(chat_lm(), {"implicit": pair})
    request = model.request(HI, "eft", chat_template_kwargs={"enable_thinking": False})
    root = model.engine.open(request.prompt, request.sampling)
    assert {text_of(lm, root.prompt) for lm in model.readers} == {"<user>Hi\n<assistant><think></think>"}
    quiet, thinking = (
        model.generate(HI, "eft", seed=1, max_new_tokens=12, chat_template_kwargs={"enable_thinking": x}) for x in (False, True)
    )
    assert quiet.usage.prompt_tokens == thinking.usage.prompt_tokens + len("<think></think>")
    assert model.generate(HI, "eft", seed=1, max_new_tokens=12).token_ids == thinking.token_ids != quiet.token_ids


def test_a_prompt_is_known_by_its_variables():
    """True is not 1, and the order does not matter: rendered prompts are cached."""
    assert TemplateKwargs({"a": 1, "b": 2}) == TemplateKwargs({"b": 2, "a": 1})
    assert TemplateKwargs({"a": 1}) != TemplateKwargs({"a": True})
    assert json.loads(repr(TemplateKwargs({"a": [1, None]}))) == {"a": [1, None]}
    lm = chat_lm(tokenizer=chat_tokenizer("{{ messages[0].content }}{{ x }}"))
    texts = [text_of(lm, Prompt(Prompt.of(HI).content, chat=ChatSettings(chat_template_kwargs={"x": x}))) for x in (1, True, "1", 1.0)]
    assert texts == ["Hi1", "HiTrue", "Hi1", "Hi1.0"]


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_names_are_refused(name):
    for make in (lambda kwargs: ChatSettings(chat_template_kwargs=kwargs), lambda kwargs: PromptTemplate("chat", kwargs)):
        with pytest.raises(ConfigError, match=rf"chat_template_kwargs must be variables .*, got {{\"{name}\": true}}"):
            make({name: True})
    with pytest.raises(ConfigError, match=r"models.base.chat_template_kwargs must be variables of the chat template"):
        Recipe.parse({"models": {"base": {"path": "b", "chat_template_kwargs": {name: 1}}}})


@pytest.mark.parametrize("name", ["name", "tokenizer", "owner", "messages_", "settings", "kwargs", "compiled_template", "roles", "text"])
def test_variables_have_any_name(name):
    """Also the names of what passes them on."""
    lm = chat_lm(tokenizer=chat_tokenizer("{{ messages[0].content }}{{ " + name + " }}"))
    assert text_of(lm, Prompt(Prompt.of(HI).content, chat=ChatSettings(chat_template_kwargs={name: "Bob"}))) == "HiBob"
    assert text_of(chat_lm(kwargs={name: "Eve"}, tokenizer=lm.tokenizer), Prompt.of(HI)) == "HiEve"


@pytest.mark.parametrize("value", [5, [1], {1: 2}, {"": 1}, {"x": {1, 2}}, {"x": float("nan")}])
def test_variables_are_json(value):
    with pytest.raises(ConfigError, match="chat_template_kwargs must be a JSON object, variables"):
        ChatSettings(chat_template_kwargs=value)


def test_variables_without_a_chat_template_are_refused():
    with pytest.raises(ConfigError, match=r"the template 'Q: \{prompt\}' is no chat template"):
        PromptTemplate("Q: {prompt}", {"x": 1})
    for lm, prompt in ((chat_lm(template=None), "Hi"), (chat_lm(template="raw"), HI)):
        with pytest.raises(ConfigError, match="the base reads this prompt in no chat template"):
            GuidedModel(lm).request(prompt, "base", chat_template_kwargs={"x": 1})
    with pytest.raises(ConfigError, match="continue_final_message, but the prompt is a text"):
        GuidedModel(chat_lm()).request("Hi", "base", continue_final_message=True)


# Turns that are continued


@pytest.mark.parametrize(
    ("messages", "chat", "expected"),
    [
        (BEGUN, {}, "<user>Hi\n<assistant>Well, "),
        (BEGUN, {"continue_final_message": True}, "<user>Hi\n<assistant>Well, "),
        (BEGUN, {"add_generation_prompt": False}, "<user>Hi\n<assistant>Well, "),
        (BEGUN, {"add_generation_prompt": True}, "<user>Hi\n<assistant>Well, \n<assistant>"),
        (BEGUN, {"continue_final_message": False}, "<user>Hi\n<assistant>Well, \n<assistant>"),
        (BEGUN, {"continue_final_message": False, "add_generation_prompt": False}, "<user>Hi\n<assistant>Well, \n"),
        (HI, {}, "<user>Hi\n<assistant>"),
        (HI, {"add_generation_prompt": False}, "<user>Hi\n"),
        (HI, {"continue_final_message": True}, "<user>Hi"),
    ],
)
def test_the_last_turn_is_continued_as_transformers_does(messages, chat, expected):
    tokenizer = chat_tokenizer()
    text = render(Prompt(Prompt.of(messages).content, chat=ChatSettings(**chat)), tokenizer, None)
    assert text == expected
    continues = chat.get("continue_final_message", messages is BEGUN and not chat.get("add_generation_prompt"))
    begins = chat.get("add_generation_prompt", not continues)
    same = {"continue_final_message": continues, "add_generation_prompt": begins}
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, **same)


def test_both_at_once_are_refused():
    with pytest.raises(ConfigError, match="add_generation_prompt and continue_final_message are both true"):
        ChatSettings(add_generation_prompt=True, continue_final_message=True)


def test_a_template_that_drops_the_turn_says_so():
    dropping = chat_tokenizer("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(PromptError, match="the final message does not appear in the chat"):
        render(Prompt.of(BEGUN), dropping, None)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Q: {prompt}\nA: ", "Q: Hi\nA: Well, "),
        ("raw", "HiWell, "),
        ("last_turn", "HiWell, "),
        ("chat", "<user>Hi\n<assistant>Well, "),
        (None, "<user>Hi\n<assistant>Well, "),
    ],
)
def test_a_turn_is_continued_in_every_template(template, expected):
    assert text_of(chat_lm(template=template), Prompt.of(BEGUN)) == expected


def test_a_reward_reads_one_turn_of_the_assistant():
    reward = object.__new__(RewardModel)  # what it reads needs no network
    reward.tokenizer, reward.name = chat_tokenizer(), "reward"
    for template, expected in (
        ("chat", "<user>Hi\n<assistant>Well, yes\n"),
        (None, "<user>Hi\n<assistant>Well, yes\n"),
        ("Q: {prompt} A: {response}!", "Q: Hi A: Well, yes!"),
        ("raw", "HiWell, yes"),
    ):
        reward.template = template
        assert reward.text(Prompt.of(BEGUN), "yes") == expected
    reward.template = "chat"
    assert reward.text(Prompt.of(HI), "yes") == "<user>Hi\n<assistant>yes\n"


def test_guides_continue_the_same_turn():
    """Guided tokens are those of the rendered text as a prompt of its own."""
    pair = ImplicitValue(chat_lm("tuned", 1), chat_lm("untuned", 2))
    model = GuidedModel(chat_lm(), {"implicit": pair})
    plain = {lm.name: chat_lm(lm.name, seed, None) for seed, lm in enumerate((model.base, pair.tuned, pair.untuned))}
    text = GuidedModel(plain["base"], {"implicit": ImplicitValue(plain["tuned"], plain["untuned"])})
    one = model.generate(BEGUN, "eft", seed=3, max_new_tokens=12)
    assert one.token_ids == text.generate("<user>Hi\n<assistant>Well, ", "eft", seed=3, max_new_tokens=12).token_ids
    assert not one.text.startswith("Well")


characters = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(lambda t: EOS not in t)


@settings(max_examples=30, deadline=None)
@given(characters, st.integers(0, 50), st.sampled_from(["chat", "raw", "Q: {prompt} A: "]), st.booleans())
def test_prefill_and_response_are_the_text_of_their_tokens(prefill, seed, template, other):
    tokenizer = sentencepiece() if other else byte_tokenizer([("t", "h"), ("\u0120", "a")])
    kept, tokenizer.chat_template = tokenizer.chat_template, TEMPLATE
    try:
        lm = chat_lm(template=template, tokenizer=tokenizer)
        prompt = Prompt.of([*HI, {"role": "assistant", "content": prefill}])
        answer = GuidedModel(lm).generate(prompt, "base", seed=seed, max_new_tokens=8, ignore_eos=True)
        before = lm.prompt_ids(prompt)
        whole = lm.vocabulary.decode([*before, *answer.token_ids])
        assert whole == lm.vocabulary.prompt_text(before) + answer.text
        if not other:  # SentencePiece normalises some characters
            assert whole.endswith(prefill + answer.text)
    finally:
        tokenizer.chat_template = kept


# Renderings and files


def test_renderings_of_conversations_without_a_chat_template():
    raw, last = (tiny_lm("base") for _ in range(2))
    raw.template, last.template = "raw", "last_turn"
    assert text_of(raw, Prompt.of(LONG)) == "Be brief. One?Two.Hi"
    assert text_of(last, Prompt.of(LONG)) == "Hi"
    assert text_of(raw, Prompt("Hi")) == text_of(last, Prompt("Hi")) == "Hi"
    with pytest.raises(PromptError, match=r"reads the last user turn, and there is none \(roles: system\)"):
        last.prompt_ids(Prompt((Message("system", "x"),)))
    scores = {}
    for template in ("raw", "last_turn"):
        value = tiny_value()
        value.model.template = template
        scores[template] = GuidedModel(chat_lm(), {"explicit": value}).score(LONG, [" yes"])
    plain = GuidedModel(chat_lm(), {"explicit": tiny_value()})
    assert scores == {"raw": plain.score("Be brief. One?Two.Hi", [" yes"]), "last_turn": plain.score("Hi", [" yes"])}


def test_template_files(tmp_path):
    jinja, text = tmp_path / "base.jinja", tmp_path / "guide.txt"
    jinja.write_text("[{{ messages[-1].content }}]{{ end }}", encoding="utf-8")
    text.write_text("Frage: {prompt}\n", encoding="utf-8")
    lm = tiny_lm("base")
    lm.template, lm.chat_settings = PromptTemplate(str(jinja), {"end": "!"}).resolved
    assert text_of(lm, Prompt.of(HI)) == text_of(lm, Prompt("Hi")) == "[Hi]!"
    lm = tiny_lm("base")
    lm.template, lm.chat_settings = PromptTemplate(str(text)).resolved
    assert text_of(lm, Prompt("Hi")) == "Frage: Hi\n"
    with pytest.raises(ConfigError, match=r"cannot read the template .*none.jinja: No such file"):
        PromptTemplate(str(tmp_path / "none.jinja")).resolved  # noqa: B018
    with pytest.raises(ConfigError, match=r'unusable template .*\n.*"last_turn", a text with {prompt} .*, or a file \(.jinja, .txt\)'):
        PromptTemplate("none").resolved  # noqa: B018


@pytest.fixture
def models(tmp_path):
    for seed, role in enumerate(("base", "tuned", "untuned")):
        lm = chat_lm(role, seed)
        lm.network.save_pretrained(tmp_path / role)
        lm.tokenizer.save_pretrained(tmp_path / role)
    return tmp_path


def test_a_recipe_says_how_each_model_reads(models):
    (models / "file.jinja").write_text("({{ messages[-1].content }}){% if quiet %}.{% endif %}", encoding="utf-8")
    (models / "r.toml").write_text(
        "[models]\nbase = { path = 'base', chat_template_kwargs = { enable_thinking = false } }\n"
        "tuned = { path = 'tuned', template = 'file.jinja', chat_template_kwargs = { quiet = true } }\nuntuned = 'untuned'\n"
    )
    recipe = Recipe.load(models / "r.toml")
    model = load_models(recipe)
    readers = [model.base, *model.values["implicit"].cached_lms()]
    texts = [text_of(lm, Prompt.of(HI)) for lm in readers]
    assert texts == ["<user>Hi\n<assistant><think></think>", "(Hi).", "(Hi)."]  # untuned follows tuned
    other = Recipe.parse(
        {"models": {**recipe.models.model_dump(exclude_none=True), "untuned": {"path": f"{models}/untuned", "template": "raw"}}}
    )
    assert text_of(load_models(other).values["implicit"].untuned, Prompt.of(HI)) == "Hi"
    first = answer_provenance(recipe, "cpu")["provenance"]
    assert first["chat_template_kwargs"] == {"base": {"enable_thinking": False}, "tuned": {"quiet": True}}
    (models / "file.jinja").write_text("(other)", encoding="utf-8")
    assert answer_provenance(recipe, "cpu")["provenance"]["templates"] != first["templates"]


def test_the_terminal_shows_the_answer_of_a_chat(models, ivg):
    """A text that is continued stands before its continuation; a question does not."""
    base = ("--base", models / "base", "--method", "base", "--max-new-tokens", 6, "--seed", 1, "--dtype", "float32")
    alone = GuidedModel(chat_lm())
    answer = alone.generate(HI, "base", max_new_tokens=6, seed=1, temperature=0.7).text

    def shown(*words):
        code, out, err = ivg("generate", *base, *words)
        assert code == 0, err
        return out

    plain = alone.generate(BEGUN, "base", max_new_tokens=6, seed=1, temperature=0.7).text
    rows = models / "rows.jsonl"
    rows.write_text(json.dumps({"messages": HI}) + "\n" + json.dumps({"messages": BEGUN}) + "\n")
    assert flat(shown("Hi", "--template", "base=chat")) == flat(answer)
    assert shown("Hi").startswith("Hi") and shown("Hi", "--template", "base={prompt}").startswith("Hi")
    assert "Hi" not in shown("Hi", "--template", "base=Q: {prompt}\nA:")
    assert flat(shown("--input", rows)) == flat(answer) + flat(f"Well, {plain}")


def flat(text):
    """Without white space: the console breaks lines at control characters in its own way."""
    return "".join(text.split())


# The server


def served(lm=None):
    return ServedModels(GuidedModel(lm or chat_lm()), Recipe.parse({"search": {"method": "base"}}), ServeSettings(name="m"))


def asked(more, messages=HI, kind=ChatRequest):
    body = {"model": "m", "max_tokens": 4, **({"messages": messages} if kind is ChatRequest else {"prompt": "Hi"}), **more}
    return parse_body(json.dumps(body).encode(), {"content-type": "application/json"}, kind)


@pytest.mark.parametrize(
    ("messages", "more", "expected"),
    [
        (HI, {"chat_template_kwargs": {"enable_thinking": False}}, "<user>Hi\n<assistant><think></think>"),
        (HI, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, "<user>Hi\n<assistant><think></think>"),
        (BEGUN, {}, "<user>Hi\n<assistant>Well, "),
        (BEGUN, {"continue_final_message": True, "add_generation_prompt": False}, "<user>Hi\n<assistant>Well, "),
        (BEGUN, {"continue_final_message": False}, "<user>Hi\n<assistant>Well, \n<assistant>"),
    ],
)
def test_fields_of_vllm(messages, more, expected):
    models = served()
    (request,) = models.prepare(asked(more, messages)).requests
    assert text_of(models.model.base, request.prompt) == expected


@pytest.mark.parametrize(
    ("more", "param", "line"),
    [
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs",
            "chat_template_kwargs must be variables of the chat template",
        ),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs", "chat_template_kwargs must be a JSON object"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt", "are both true"),
        ({"continue_final_message": "yes"}, "continue_final_message", "continue_final_message must be true or false"),
    ],
)
def test_fields_that_are_refused(more, param, line):
    with pytest.raises(ServeError, match=line) as caught:
        asked(more)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_server_without_a_chat_template_has_no_variables():
    models = served(tiny_lm("base"))
    assert models.prepare(asked({"chat_template_kwargs": {}})).requests
    with pytest.raises(ServeError, match="this model, which has no chat template") as caught:
        models.prepare(asked({"chat_template_kwargs": {"x": 1}}))
    assert (caught.value.status, caught.value.param) == (400, "chat_template_kwargs")
    with pytest.raises(ServeError, match=r"chat_template_kwargs is not supported; leave it out or give \{\}"):
        asked({"chat_template_kwargs": {"x": 1}}, kind=CompletionRequest)


@pytest.mark.parametrize("method", ["base", "eft"])
def test_a_continued_chat_equals_generate(method):
    """Plain sampling of transformers behind the same tokens, greedily."""
    pair = ImplicitValue(chat_lm("tuned", 1), chat_lm("untuned", 2))
    model = GuidedModel(chat_lm(), {"implicit": pair}, engine=None)
    assert isinstance(model.engine, TransformersEngine)
    answer = model.generate(BEGUN, method, temperature=0, max_new_tokens=8, **({"beta": 0.0} if method == "eft" else {}))
    same = {"continue_final_message": True, "return_tensors": "pt", "return_dict": True}
    inputs = model.base.tokenizer.apply_chat_template(BEGUN, **same)
    with torch.no_grad():
        ids = model.base.network.generate(inputs["input_ids"], do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert list(answer.token_ids) == ids.tolist()
