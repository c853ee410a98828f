"""Contrast of prompts: one network against itself behind an instruction. One set of weights, and the tokens of the naive implementation."""

import re

import pytest

import naive
from architectures import tiny
from ivg import GuidedModel
from ivg.errors import ConfigError, PromptError
from ivg.evaluation.methods import method_rows
from ivg.integrations.transformers import GuidanceLogitsProcessor, GuidedGenerate
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.search.methods import get_method
from ivg.settings.recipe import Recipe
from ivg.testing import FakeEngine, byte_tokenizer, hypothesis, tiny_lm
from ivg.types import Prompt, TokenGuidance
from ivg.values.contrast import PromptContrast
from ivg.values.implicit import ImplicitValue

PROMPTS = ["The movie was", "I", "What a long prompt this one is"]
KIND, RUDE = "Be kind.", "Be rude, please:\n"


def ids(text):
    return byte_tokenizer()(text).input_ids


def naive_contrast(model, contrast=None, negative=None):
    prefixes = [[] if text is None else ids(text if text[-1].isspace() else f"{text}\n\n") for text in (contrast, negative)]
    return {"contrast": naive.Contrast(model.base.network, *prefixes)}


@pytest.fixture(scope="module")
def llama():
    return GuidedModel(tiny_lm("base", "llama", seed=1))


SETTINGS = {
    "method": {},
    "beta": {"beta": 2.5},
    "drafted": {"draft": 3},
    "drafted, beta": {"draft": 4, "beta": 0.4},
    "gated": {"gate": 4.3},
    "candidates": {"candidates": 5},
    "selected, too": {"select": "contrast", "width": 2, "successors": 2, "chunk_length": 3},
    "selected only": {"token": "none", "select": "contrast", "width": 2, "successors": 2, "chunk_length": 3},
}
INSTRUCTIONS = {"contrast": {"contrast": KIND}, "negative": {"negative": RUDE}, "both": {"contrast": KIND, "negative": RUDE}}


@pytest.mark.numerics
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("texts", INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_tokens_of_the_naive_implementation(llama, settings, texts):
    check_against_naive(llama, settings, texts)


@pytest.mark.numerics
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text", "mamba"])
def test_any_architecture(architecture):
    if architecture == "mamba":
        base = CachedLM(ModelRunner(tiny("mamba", 1), "base"), byte_tokenizer())
    else:
        base = tiny_lm("base", architecture, seed=1)
    check_against_naive(GuidedModel(base), {"select": "contrast", "successors": 2, "chunk_length": 3}, INSTRUCTIONS["both"])


def check_against_naive(model, settings, texts):
    made, values = get_method("contrast", **texts, **settings), naive_contrast(model, **texts)
    done = model.generate(PROMPTS, made, temperature=1.3, max_new_tokens=8, seed=5)
    for prompt, got in zip(PROMPTS, done, strict=True):
        tokens, score = naive.search(model.base.network, values, made, ids(prompt), 5, 1.3, 8)
        assert list(got.token_ids) == tokens
        assert got.score == (pytest.approx(score, abs=2e-4) if made.select else None)
    assert model.base.model.live_rows == 0


def test_requests_with_other_instructions_share_the_batch(llama):
    asked = [{"contrast": KIND}, {"negative": RUDE}, {"contrast": RUDE, "negative": KIND}, {"contrast": KIND}]
    requests = [
        llama.request(p, "contrast", seed=3, temperature=1.0, max_new_tokens=10, **a) for p, a in zip([*PROMPTS, "I"], asked, strict=True)
    ]
    together = dict(llama.run(requests))
    for i, (request, texts) in enumerate(zip(requests, asked, strict=True)):
        tokens, _ = naive.search(
            llama.base.network,
            naive_contrast(llama, **texts),
            get_method("contrast", **texts),
            ids(request.prompt.content),
            3,
            1.0,
            10,
        )
        assert list(together[i].token_ids) == tokens


def passes(model, monkeypatch, **settings):
    """Forward passes of the network, and rows read in them."""
    network, counts = model.base.network, []
    plain = network.forward

    def forward(**inputs):
        counts.append(len(inputs["input_ids"]))
        return plain(**inputs)

    monkeypatch.setattr(network, "forward", forward)
    done = model.generate("The movie was", seed=1, max_new_tokens=10, ignore_eos=True, **settings)
    monkeypatch.undo()
    assert len(done.token_ids) == 10
    return len(counts), sum(counts), done.usage.forward_tokens


def test_one_set_of_weights_and_one_pass_for_each_token(llama, monkeypatch):
    networks = {id(lm.network) for lm in llama.readers}
    assert len(llama.readers) == 3
    assert len(networks) == 1
    assert passes(llama, monkeypatch, method="base")[:2] == (10, 10)
    number, rows, tokens = passes(llama, monkeypatch, method="contrast", contrast=KIND)
    assert (number, rows) == (10, 20)  # the base, and the base behind the instruction; the third is the base itself
    assert set(tokens) == {"base", "contrast.tuned"}
    number, rows, tokens = passes(llama, monkeypatch, method="contrast", negative=RUDE, contrast=KIND)
    assert (number, rows) == (10, 30)  # with the two instructions
    assert set(tokens) == {"base", "contrast.tuned", "contrast.untuned"}


def test_a_pair_of_the_base_itself_takes_its_outputs(monkeypatch):
    base = tiny_lm("base", "llama", seed=1)
    pair = ImplicitValue(base.sharing("tuned", system=KIND), base.sharing("untuned"))
    model = GuidedModel(base, {"implicit": pair})
    number, _, tokens = passes(model, monkeypatch, method="eft")
    assert number == 10
    assert "untuned" not in tokens
    contrast = model.generate(PROMPTS, "contrast", contrast=KIND, seed=2, max_new_tokens=9)
    assert [c.token_ids for c in model.generate(PROMPTS, "eft", seed=2, max_new_tokens=9)] == [c.token_ids for c in contrast]


def test_an_emptied_cache_changes_nothing(llama):
    searcher = llama.searcher()
    request = llama.request("The movie was", "contrast", contrast=KIND, seed=4, max_new_tokens=12, ignore_eos=True)
    request = type(request)(**{**{f: getattr(request, f) for f in request.__slots__}, "stride": 1})
    searcher.add(request)
    done = None
    while searcher.busy:
        for step in searcher.step():
            done = step.completion or done
        for lm in llama.readers[1:2]:
            lm.reset_cache()
    assert (
        done.token_ids == llama.generate("The movie was", "contrast", contrast=KIND, seed=4, max_new_tokens=12, ignore_eos=True).token_ids
    )


# What the instruction is read as


def read(prompt, system, chat=True, template=None, tokenizer=None):
    lm = tiny_lm("guide", tokenizer=tokenizer or byte_tokenizer(chat=chat))
    reader = lm.sharing("guide", template, system=system)
    return reader.tokenizer.decode(reader.prompt_ids(Prompt.of(prompt)))


def test_what_the_model_reads():
    chat = [{"role": "user", "content": "Hi"}]
    assert read(chat, "Be kind.") == "<system>Be kind.\n<user>Hi\n<assistant>"
    assert read([{"role": "system", "content": "Short."}, *chat], "Be kind.") == "<system>Be kind.\n\nShort.\n<user>Hi\n<assistant>"
    assert read("Hi", "Be kind.", template="chat") == "<system>Be kind.\n<user>Hi\n<assistant>"
    assert read("Hi", "Be kind.") == "Be kind.\n\nHi"
    assert read("Hi", "Be kind: ") == "Be kind: Hi"
    assert read("Hi", "Be kind.", template="Q: {prompt}\nA:") == "Be kind.\n\nQ: Hi\nA:"
    assert read(Prompt("Hi", tuple(ids("Hi"))), "Be kind.") == "Be kind.\n\nHi"


def test_an_instruction_of_the_request_stands_behind_the_models_own():
    base = tiny_lm("base", tokenizer=byte_tokenizer(chat=True))
    base.system = "Short."
    model = GuidedModel(base)
    request = model.request("Hi", "contrast", contrast="Be kind.")
    tuned, untuned = request.search.guidance.value.cached_lms()
    assert [tuned.tokenizer.decode(lm.prompt_ids(request.prompt)) for lm in (tuned, untuned)] == [
        "Short.\n\nBe kind.\n\nHi",
        "Short.\n\nHi",
    ]


def test_a_template_without_system_turn_is_an_error():
    silent, strict = byte_tokenizer(chat=True), byte_tokenizer(chat=True)
    silent.chat_template = "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% endif %}{% endfor %}<assistant>"
    strict.chat_template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}x"
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(PromptError, match=r"the chat template of guide leaves the instruction 'Be kind\.' out"):
        read(chat, "Be kind.", tokenizer=silent)
    with pytest.raises(PromptError, match="refuses these messages \\(roles: system, user\\): no system"):
        read(chat, "Be kind.", tokenizer=strict)


def test_tokens_of_a_chat_are_not_read_behind_an_instruction():
    base = tiny_lm("base", tokenizer=byte_tokenizer(chat=True))
    with pytest.raises(PromptError, match=r"rendered already .*contrast\.tuned has an instruction"):
        GuidedModel(base).generate(Prompt("Hi", (5, 0, 7)), "contrast", contrast=KIND)


# Errors


ERRORS = {
    "no instruction": (("contrast", {}), "contrast: the value contrast needs an instruction\n  give contrast=TEXT, negative=TEXT"),
    "another method": (("base", {"contrast": KIND}), "base: contrast is an instruction for the value contrast, which this method does not"),
    "another value": (("eft", {"negative": KIND}), "eft: negative is an instruction for the value contrast"),
    "empty": (("contrast", {"contrast": " "}), "contrast must be some text, got ' '"),
    "no text": (("contrast", {"contrast": 3}), "contrast must be a text, some text, got 3"),
}


@pytest.mark.parametrize(("asked", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(llama, asked, message):
    method, settings = asked
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        llama.request("Hi", method, **settings)


def test_a_base_in_another_engine_gives_no_contrast():
    model = GuidedModel(tiny_lm(), engine=FakeEngine())
    assert "contrast" not in model.methods
    with pytest.raises(ConfigError, match="the base runs in another engine\n  leave engine out"):
        model.request("Hi", "contrast", contrast=KIND)


def test_a_value_of_this_name_is_used(llama):
    assert "contrast" in llama.methods
    base = tiny_lm("base", "llama", seed=1)
    own = ImplicitValue(base.sharing("tuned", system=KIND), base.sharing("untuned"), "contrast")
    model = GuidedModel(base, {"contrast": own})
    assert "contrast" in model.methods
    same = llama.generate(PROMPTS, "contrast", contrast=KIND, seed=2, max_new_tokens=9)
    assert [c.token_ids for c in model.generate(PROMPTS, "contrast", seed=2, max_new_tokens=9)] == [c.token_ids for c in same]
    with pytest.raises(ConfigError, match="reads prompts of its own\n  leave contrast and negative out"):
        model.request("Hi", "contrast", contrast=KIND)


# Inside transformers' generate


def test_inside_generate(llama):
    tokenizer, network = llama.base.tokenizer, llama.base.network
    inputs = tokenizer("The movie was", return_tensors="pt")
    search = GuidedGenerate(tokenizer, {}, "contrast", contrast=KIND, negative=RUDE, seed=4)
    out = network.generate(**inputs, custom_generate=search, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=9)
    same = llama.generate("The movie was", "contrast", contrast=KIND, negative=RUDE, seed=4, temperature=1.0, max_new_tokens=9)
    assert tuple(out[0, inputs.input_ids.shape[1] :].tolist()) == same.token_ids
    with pytest.raises(ConfigError, match="contrast: the value contrast needs an instruction"):
        network.generate(**inputs, custom_generate=GuidedGenerate(tokenizer, {}, "contrast"), max_new_tokens=2)


def test_a_prompt_without_instruction_is_an_error_and_not_zero(llama):
    value = PromptContrast(llama.base)
    beam = hypothesis("The movie", " was", llama.base)
    for call in (value.deltas, value.score):
        with pytest.raises(ConfigError, match=r"contrast: a prompt without instruction\n  give Prompt\(…, contrast=TEXT\)"):
            call([beam])
    processor = GuidanceLogitsProcessor(TokenGuidance(value), llama.base.tokenizer)
    inputs = llama.base.tokenizer("The movie was", return_tensors="pt")
    with pytest.raises(ConfigError, match="a prompt without instruction"):
        llama.base.network.generate(**inputs, logits_processor=[processor], max_new_tokens=2)


def test_rows_of_an_evaluation_need_an_instruction():
    recipe = {"eval": {"task": "sentiment", "methods": [{"method": "contrast", "label": "kind"}]}}
    with pytest.raises(ConfigError, match="kind: the value contrast needs an instruction"):
        method_rows(Recipe.parse(recipe), {})
    recipe["eval"]["methods"][0]["contrast"] = KIND
    assert [row.label for row in method_rows(Recipe.parse(recipe), {})] == ["base", "kind"]
