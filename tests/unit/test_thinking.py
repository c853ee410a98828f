"""Responses that begin with thinking: guidance and values begin with the answer."""

import math
import random

import pytest
import torch

import naive
from architectures import tiny
from ivg.engines.endpoint.engine import EndpointEngine
from ivg.engines.transformers.engine import TransformersEngine
from ivg.engines.vllm.engine import VLLMEngine
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.search.methods import get_method
from ivg.search.request import required_features
from ivg.search.searcher import Request, Search, Searcher
from ivg.settings.chat import ChatSettings
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.types import Prompt, SamplingParams, Thinking
from ivg.types.thinking import split_reasoning
from ivg.values.base import FunctionValue
from ivg.values.implicit import ImplicitValue

pytestmark = pytest.mark.numerics

PROMPTS = ["The movie was", "I have"]
LIMIT = 16


@pytest.fixture(scope="module")
def bench():
    base, tuned, untuned = (tiny_lm(name, seed=seed) for seed, name in enumerate(("base", "tuned", "untuned"), 1))
    explicit, scalar = tiny_value("vocabulary", seed=5), tiny_value("scalar", seed=6, name="scalar")
    model = GuidedModel(base, {"implicit": ImplicitValue(tuned, untuned), "explicit": explicit, "scalar": scalar})
    oracle = {
        "implicit": naive.Implicit(tuned.network, untuned.network),
        "explicit": naive.QHead(explicit.network),
        "scalar": naive.VHead(scalar.network),
    }
    return model, oracle


def frequent_marker(model, prompts=PROMPTS):
    """A character that the base writes in answer to most prompts, before the end: there some hypotheses leave their thinking."""
    texts = [model.generate(p, "base", seed=s, temperature=1.0, max_new_tokens=LIMIT).text[:-3] for s, p in enumerate(prompts)]
    marks = sorted(c for c in set("".join(texts)) if 32 < ord(c) < 127)
    return max(marks, key=lambda c: (sum(c in text for text in texts), -min(text.find(c) % 99 for text in texts)))


METHODS = {
    "plain": {},
    "greedy": {"token": "implicit", "temperature": 0.0},
    "guided": {"token": "implicit"},
    "candidates": {"token": "scalar", "candidates": 5},
    "gated": {"token": "implicit", "gate": 2.0},
    "best of": {"select": "explicit", "successors": 4},
    "chunks": {"select": "implicit", "width": 2, "successors": 2, "chunk_length": 3},
    "both": {"token": "implicit", "select": "explicit", "width": 2, "successors": 2, "chunk_length": 4},
    "same": {"token": "implicit", "select": "implicit", "width": 2, "successors": 2, "chunk_length": 2},
    "long": {"token": "explicit", "select": "scalar", "width": 1, "successors": 3, "chunk_length": 20},
    "decay": {"select": "explicit", "width": 2, "successors": 3, "chunk_length": 3, "decay": 0.6},
    "original": {"select": "explicit", "width": 2, "successors": 2, "chunk_length": 3, "original": True},
}


CASES = [(name, budget, "answer") for name in METHODS for budget in (None, 5)]
CASES += [(name, budget, "all") for name, budget in (("guided", 5), ("candidates", 5), ("both", None), ("same", 5))]


@pytest.mark.parametrize(("name", "budget", "read"), CASES)
def test_tokens_and_scores_are_those_of_the_naive_search(bench, name, budget, read):
    model, oracle = bench
    settings = dict(METHODS[name])
    temperature = settings.pop("temperature", 1.0)
    marker = frequent_marker(model) if budget is None else "</t>"
    method = get_method("custom", guide_after=marker, values_read=read, **{} if budget is None else {"thinking_budget": budget}, **settings)
    ids = model.base.tokenizer(marker).input_ids
    requests = [model.request(p, method, seed=s, temperature=temperature, max_new_tokens=LIMIT) for s, p in enumerate(PROMPTS)]
    batch = dict(model.run(requests))
    answers = 0
    for seed, prompt in enumerate(PROMPTS):
        base, before = model.base.network, model.base.tokenizer(prompt).input_ids
        tokens, score = naive.search(base, oracle, method, before, seed, temperature, LIMIT, marker=ids)
        got = batch[seed]
        assert list(got.token_ids) == tokens
        if score == -math.inf or method.select is None:
            assert got.score is None
        else:
            assert got.score == pytest.approx(score, abs=2e-3)
        assert got.text == (got.text if marker not in got.text else got.reasoning_content + marker + got.answer)
        answers += marker in got.text
    assert answers == len(PROMPTS) if budget is not None else answers or name == "greedy"


def test_batches_chunks_and_late_joiners_change_nothing(bench):
    """Eight requests of different kinds together, some beginning later, each as alone; all caches are given back."""
    model, _ = bench
    rng = random.Random(1)
    marker = frequent_marker(model)
    requests = []
    for i in range(8):
        settings = dict(METHODS[rng.choice([n for n in METHODS if n != "greedy"])])
        thinking = (
            {"guide_after": marker, "thinking_budget": rng.choice([None, 3, 9]), "values_read": rng.choice(["answer", "all"])}
            if i % 4
            else {}
        )
        method = get_method("custom", **settings, **thinking)
        requests.append(model.request(rng.choice(PROMPTS), method, seed=i, temperature=1.0, max_new_tokens=LIMIT))
    alone = [dict(model.run([request]))[0] for request in requests]
    searcher, steps, done = model.searcher(), 0, {}
    waiting = list(range(8))
    number = {}
    while waiting or searcher.busy:
        if waiting and steps % 2 == 0:
            i = waiting.pop(0)
            number[searcher.add(requests[i])] = i
        steps += 1
        done |= {number[s.request]: s.completion for s in searcher.step() if s.completion is not None}
    for i, one in enumerate(alone):
        assert (done[i].token_ids, done[i].text) == (one.token_ids, one.text)
        assert done[i].score == one.score or done[i].score == pytest.approx(one.score, abs=1e-3)
    assert all(reader.model.live_rows == 0 for reader in model.readers)


def test_thinking_is_that_of_the_base(bench):
    """Before the marker nothing is shifted; behind it tokens are."""
    model, _ = bench
    plain = model.generate("I", "base", seed=3, temperature=1.0, max_new_tokens=LIMIT)
    guided = model.generate("I", "eft", seed=3, temperature=1.0, max_new_tokens=LIMIT, guide_after="</t>", thinking_budget=10, record=True)
    assert guided.token_ids[:10] == plain.token_ids[:10] and guided.text.count("</t>") == 1
    assert set(guided.guide_shift[:14]) == {0.0} and any(guided.guide_shift[14:])
    nothing = model.generate("I", "eft", seed=3, temperature=1.0, max_new_tokens=LIMIT, guide_after="no such text")
    assert nothing.token_ids == plain.token_ids and nothing.answer == "" and nothing.reasoning_content == plain.text


def test_a_budget_of_nothing_and_one_beyond_the_limit(bench):
    model, _ = bench
    at_once = model.generate("I", "eft", seed=3, max_new_tokens=LIMIT, guide_after="</t>", thinking_budget=0)
    assert at_once.text.startswith("</t>") and at_once.reasoning_content == ""
    behind = model.generate("I", "eft", seed=3, max_new_tokens=LIMIT, guide_after="</t>", thinking_budget=1 << 40)
    assert behind.token_ids == model.generate("I", "base", seed=3, max_new_tokens=LIMIT).token_ids


def test_values_see_answers_alone():
    """A function is called with answers; hypotheses that never answer lose against any that does."""
    seen = []
    base = tiny_lm("base", seed=1)
    value = FunctionValue(lambda prompt, response: seen.append(response) or -1e6, "bad")
    model = GuidedModel(base, {"bad": value})
    marker = frequent_marker(model, ["I"] * 8)
    one = model.generate(
        "I", "custom", select="bad", successors=8, seed=1, temperature=1.0, max_new_tokens=LIMIT, guide_after=marker, trace=True
    )
    nodes = [*one.trace[-1].kept, *one.trace[-1].dropped]
    thinking = [n for n in nodes if marker not in n.text]
    assert thinking and len(seen) == len(nodes) - len(thinking) > 0
    assert all(n.score is None for n in thinking) and one.score == -1e6 and one.answer in seen
    assert {n.text.partition(marker)[2] for n in nodes if marker in n.text} == set(seen)
    seen.clear()
    never = model.generate("I", "custom", select="bad", successors=2, max_new_tokens=4, guide_after="no such text")
    assert never.score is None and not seen and never.finish_reason == "length"


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("messages", "kwargs", "thinks"),
    [
        ([{"role": "user", "content": "Hi"}], {"enable_thinking": True}, True),
        ([{"role": "user", "content": "Hi"}], {"enable_thinking": False}, False),
        ([{"role": "user", "content": "Say </think> to me"}], {"enable_thinking": True}, True),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm </think> So"}], {"enable_thinking": True}, False),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm "}], {"enable_thinking": True}, True),
        ("Q <think> a </think>\n", {}, False),
        ("Q </think> more", {}, True),
    ],
)
def test_where_the_prompt_ends_the_thinking_the_answer_begins_at_once(messages, kwargs, thinks):
    base, pair = tiny_lm("base", seed=1), [tiny_lm(name, seed=s) for s, name in ((2, "tuned"), (3, "untuned"))]
    for lm in (base, *pair):
        lm.tokenizer.chat_template = TEMPLATE
    model = GuidedModel(base, {"implicit": ImplicitValue(*pair)})
    prompt = Prompt(Prompt.of(messages).content, chat=ChatSettings(chat_template_kwargs=kwargs))
    settings = {"seed": 1, "temperature": 1.0, "max_new_tokens": 8}
    gated = model.generate(prompt, "eft", guide_after="</think>", **settings)
    assert gated.token_ids == model.generate(prompt, "base" if thinks else "eft", **settings).token_ids
    assert (gated.reasoning_content is not None) == thinks and gated.answer == ("" if thinks else gated.text)
    ids = tuple(base.prompt_ids(prompt))
    if isinstance(messages, str):
        given = Prompt(messages, ids)
        assert (model.generate(given, "eft", guide_after="</think>", **settings).reasoning_content is not None) == thinks


def test_a_guide_with_another_tokenizer_reads_the_answers_text():
    tokenizer, other = byte_tokenizer(), byte_tokenizer(permute=True)
    base, value = tiny_lm("base", seed=1, tokenizer=tokenizer), tiny_value(seed=2, tokenizer=other)
    model = GuidedModel(base, {"explicit": value})
    settings = {"token": "explicit", "candidates": 4, "select": "explicit", "successors": 2, "chunk_length": 4, "temperature": 1.0}
    one = model.generate("I have", "custom", seed=1, max_new_tokens=LIMIT, guide_after="</t>", thinking_budget=5, **settings)
    assert one.answer and one.score == pytest.approx(model.score("I have", [one.answer])[0], abs=1e-3)


@pytest.mark.parametrize(
    ("method", "settings", "line"),
    [
        ("eft", {"draft": 3, "guide_after": "x"}, "draft must be 0 with guide_after"),
        ("cards", {"guide_after": "x"}, "rule must be top or soft with guide_after"),
        ("smc", {"guide_after": "x"}, "rule must be top or soft with guide_after"),
        ("eft", {"thinking_budget": 3}, "eft: thinking_budget needs guide_after, the text that ends the thinking"),
        ("eft", {"guide_after": ""}, "guide_after must be no empty text"),
        ("eft", {"guide_after": "x", "thinking_budget": -1}, "thinking_budget must be 0 or more tokens"),
        ("eft", {"guide_after": "x", "values_read": "some"}, "values_read must be answer or all"),
        ("eft", {"guide_after": "<eos>"}, "guide_after '<eos>' has special tokens"),
    ],
)
def test_what_is_refused(method, settings, line):
    pair = ImplicitValue(tiny_lm("tuned", seed=1), tiny_lm("untuned", seed=2))
    model = GuidedModel(tiny_lm("base"), {"implicit": pair, "explicit": tiny_value()})
    with pytest.raises(ConfigError, match=line):
        model.generate("I", method, max_new_tokens=2, **settings)


def test_an_answer_that_has_not_begun_is_noted():
    model = GuidedModel(tiny_lm("base"))
    settings = {"max_new_tokens": 8, "ignore_eos": True}
    never = model.generate("I", "base", guide_after="no such text", **settings)
    begun = model.generate("I", "base", guide_after="</t>", thinking_budget=0, **settings)
    assert never.notes == ("no answer: 'no such text' (guide_after) has not come",) and never.answer_start is None
    assert begun.notes == () and begun.token_ids[begun.answer_start :] and begun.answer == begun.text.removeprefix("</t>")


def test_rules_are_checked_without_methods():
    with pytest.raises(ConfigError, match="draft must be 0 with guide_after"):
        pair = ImplicitValue(tiny_lm("tuned", seed=1), tiny_lm("untuned", seed=2))
        model = GuidedModel(tiny_lm("base"), {"implicit": pair})
        search = model.request("I", "eft", draft=2).search
        Searcher(TransformersEngine(model.base)).add(
            Request(Prompt("I"), Search(guidance=search.guidance, thinking=Thinking("x")), SamplingParams())
        )


@pytest.mark.parametrize(
    ("text", "final", "parts"),
    [
        ("<think>\nHm.</think>\n\nYes", True, ("\nHm.", "\n\nYes")),
        ("Hm.</think>Yes</think>", True, ("Hm.", "Yes</think>")),
        ("Hm.", True, ("Hm.", None)),
        ("Hm.</th", False, ("Hm.", None)),
        ("Hm.</th", True, ("Hm.</th", None)),
        ("<thi", False, ("", None)),
        ("<thi", True, ("<thi", None)),
        ("\n<think>H", False, ("H", None)),
        ("", False, ("", None)),
        ("</think>", True, ("", "")),
    ],
)
def test_reasoning_and_answer(text, final, parts):
    assert split_reasoning(text, "</think>", final=final) == parts


def test_what_is_streamed_of_the_two_only_grows():
    text = "\n<think>Hm </thin no</think>\nYes </think>"
    for i in range(len(text)):
        (a, b), (c, d) = (split_reasoning(text[:n], "</think>", final=n == len(text)) for n in (i, i + 1))
        assert c.startswith(a) and (d or "").startswith(b or "")


def test_the_thinking_may_be_generated_like_transformers(bench):
    """Greedy thinking is that of generate, token for token, until the budget is spent."""
    model, _ = bench
    ids = torch.tensor([model.base.tokenizer("I").input_ids])
    with torch.no_grad():
        free = model.base.network.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :].tolist()
    got = model.generate("I", "eft", temperature=0, max_new_tokens=LIMIT, guide_after="</t>", thinking_budget=8)
    assert list(got.token_ids[:8]) == free[:8] and got.text.endswith(got.answer)


@pytest.mark.parametrize("engine", [EndpointEngine, VLLMEngine])
def test_engines_that_cannot_refuse_in_one_line(bench, engine):
    model, _ = bench
    features = required_features(model.request("I", "cbs-explicit", guide_after="x"))
    assert features & set(engine.unsupported) == {"thinking"} and "guide_after; " in engine.unsupported["thinking"]
    assert "thinking" not in required_features(model.request("I", "cbs-explicit"))


def test_recipes_and_rows_know_it(bench):
    model, _ = bench
    recipe = Recipe.parse({"search": {"method": "eft", "guide_after": "</t>", "thinking_token_budget": 4, "values_read": "all"}})
    settings = recipe.search.settings()
    assert settings == {"guide_after": "</t>", "thinking_budget": 4, "values_read": "all"}
    one = model.generate("I", "eft", seed=1, max_new_tokens=LIMIT, **settings)
    row = one.to_dict()
    assert row["reasoning_content"] + "</t>" + row["answer"] == row["text"] == one.text
    assert not {"reasoning_content", "answer"} & set(model.generate("I", "eft", max_new_tokens=2).to_dict())


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2"])
def test_hybrid_networks_think_alike(kind):
    """Their state cannot be cut back; a guide opens its rows where the answer begins."""
    lms = {
        role: CachedLM(ModelRunner(tiny(kind, seed), role), byte_tokenizer()) for seed, role in enumerate(("base", "tuned", "untuned"), 1)
    }
    pair = lms["tuned"], lms["untuned"]
    model = GuidedModel(lms["base"], {"implicit": ImplicitValue(*pair)})
    oracle = {"implicit": naive.Implicit(*(lm.network for lm in pair))}
    settings = {"width": 2, "successors": 2, "chunk_length": 3, "token": "implicit", "select": "implicit"}
    for read in ("answer", "all"):
        method = get_method("custom", guide_after="</t>", thinking_budget=3, values_read=read, **settings)
        ids = model.base.tokenizer("I am").input_ids
        marker = model.base.tokenizer("</t>").input_ids
        tokens, score = naive.search(lms["base"].network, oracle, method, ids, 5, 1.0, 14, marker=marker)
        got = model.generate("I am", method, seed=5, temperature=1.0, max_new_tokens=14)
        assert list(got.token_ids) == tokens and got.score == pytest.approx(score, abs=5e-3)
