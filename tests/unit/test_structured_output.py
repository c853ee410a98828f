"""Structured output: every answer follows its grammar, and has the method's own distribution over the texts that do."""

import itertools
import json

import pytest
import torch

import architectures
from grammar_texts import PROMPT, close, enumerated, mixed, spellings
from ivg.engines.transformers.engine import TransformersEngine
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.settings.recipe import Recipe
from ivg.settings.sampling import STRUCTURES
from ivg.testing import EOS, byte_tokenizer, tiny_lm, tiny_value
from ivg.types import SamplingParams
from ivg.values.implicit import ImplicitValue
from naive import outputs

pytest.importorskip("llguidance", reason="needs the extra structured")
pytestmark = pytest.mark.numerics

REGEX = "(an|a)?(th|t)*b|ab{0,2}"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.fixture(scope="module")
def model():
    tokens = byte_tokenizer([("a", "n"), ("t", "h"), ('"', ":")])
    pair = ImplicitValue(tiny_lm("tuned", seed=1, tokenizer=tokens), tiny_lm("untuned", seed=2, tokenizer=tokens))
    values = {"implicit": pair, "explicit": tiny_value(seed=3, tokenizer=tokens)}
    return GuidedModel(tiny_lm("base", tokenizer=tokens), values, SamplingParams(max_new_tokens=40))


def recurrent():
    """A base with transformers' own cache for each row."""
    return GuidedModel(CachedLM(ModelRunner(architectures.tiny("mamba").eval(), "base"), byte_tokenizer()))


TEXTS = ["b", "ab", "an", "anb", "tb", "atb", "antb", "thb", "anthb", "qanth"]
"""One is the beginning of another; and behind q all characters are forced, but not their tokens."""


# Exact


@pytest.mark.parametrize(
    ("method", "settings", "beta"),
    [
        ("base", {}, 0.0),
        ("eft", {"beta": 1.3}, 1.3),
        ("eft", {"beta": 1.3, "draft": 3}, 1.3),
        ("eft", {"beta": 1.3, "temperature": 0.6}, 1.3),
        ("custom", {"token": "implicit", "beta": 0.8, "candidates": 300}, 0.8),
        ("custom", {"token": "implicit", "beta": 0.8, "chunk_length": 2}, 0.8),
    ],
    ids=lambda x: json.dumps(x) if isinstance(x, dict) else str(x),
)
def test_the_distribution_is_the_method_s_over_the_texts_of_the_grammar(model, method, settings, beta):
    settings = {"temperature": 1.0, **settings}
    answers = model.generate(PROMPT, method, n=800, choice=TEXTS, seed=4, **settings)
    expected = enumerated(model, TEXTS, mixed(model, beta), settings["temperature"])
    assert sum(expected.values()) == pytest.approx(1)
    counts = close(answers, expected)
    assert len(counts) > 2 and {c.finish_reason for c in answers} == {"stop"}


def test_transformers_own_cache():
    model = recurrent()
    close(model.generate(PROMPT, "base", n=400, choice=TEXTS, temperature=1.0, seed=1), enumerated(model, TEXTS, mixed(model)))


def test_log_probabilities_are_those_of_the_allowed_tokens(model):
    """Guided and base: both over what may be drawn."""
    done = model.generate(PROMPT, "eft", beta=1.0, choice=TEXTS, alternatives=3, seed=2, temperature=1.0)
    y = ()
    for detail in done.details:
        allowed = sorted({p[len(y)] for p in _paths(model) if len(p) > len(y) and p[: len(y)] == y})
        guided = mixed(model, 1.0)(list(y))[allowed].log_softmax(-1)
        base = mixed(model)(list(y))[allowed].log_softmax(-1)
        at = allowed.index(detail.token)
        assert detail.logprob == pytest.approx(float(guided[at]), abs=1e-4)
        assert detail.base_logprob == pytest.approx(float(base[at]), abs=1e-4)
        y = (*y, detail.token)


def _paths(model):
    return [(*ids, 0) for ids in spellings(model, TEXTS)]


def test_candidates_are_the_likeliest_allowed_tokens(model):
    """The mask comes before the candidates are chosen: with two of them there are two, not none."""
    value = model.values["explicit"].network
    prompt = list(model.base.tokenizer(PROMPT).input_ids)
    done = model.generate(PROMPT, "custom", token="explicit", candidates=2, beta=2.0, temperature=0, choice=TEXTS)
    y = ()
    for token in done.token_ids:
        allowed = sorted({p[len(y)] for p in _paths(model) if len(p) > len(y) and p[: len(y)] == y})
        z = outputs(model.base.network, prompt + list(y))[-1]
        v = outputs(value, prompt + list(y))[-1]
        two = sorted(allowed, key=lambda i: -float(z[i]))[:2]
        assert token == max(two, key=lambda i: float(z[i] + 2.0 * v[i]))
        y = (*y, token)


# Every answer


BEAMS = {
    "base": ("base", {}),
    "guided": ("eft", {"beta": 1.0}),
    "drafts": ("eft", {"beta": 1.0, "draft": 4}),
    "candidates": ("custom", {"token": "explicit", "candidates": 4}),
    "chunks": ("ivg", {"width": 2, "successors": 2, "chunk_length": 3}),
    "steps": ("cards", {"chunk_length": 4, "segment_min": 2, "tries": 3}),
    "tree": ("mcts", {"width": 2, "successors": 2, "chunk_length": 8}),
    "particles": ("smc", {"width": 2, "successors": 2, "chunk_length": 4}),
    "drafted chunks": ("gsi", {"successors": 2, "chunk_length": 4}),
    "budget": ("eft-kl", {"kl_budget": 2.0}),
}


@pytest.mark.parametrize(("method", "settings"), BEAMS.values(), ids=BEAMS.keys())
def test_every_answer_parses(model, method, settings):
    jsonschema = pytest.importorskip("jsonschema")
    names = {"explicit": model.values["explicit"], "implicit": model.values["implicit"]}
    count = 1000 if method == "base" else 8
    done = GuidedModel(model.base, names, model.sampling).generate(
        PROMPT, method, n=count, json_schema=SCHEMA, max_new_tokens=90, temperature=1.0, seed=7, **settings
    )
    assert not [c.error for c in done if c.error]
    for c in done:
        assert c.finish_reason == "stop"
        jsonschema.validate(json.loads(c.text), SCHEMA)
    assert len({c.text for c in done}) > 1


def test_a_beam_whose_grammar_is_complete_ends(model):
    """Without a further pass for an end-of-sequence token; finished beams compete with those that grow."""
    done = model.generate(PROMPT, "ivg", width=2, successors=2, chunk_length=2, regex="[ab]{3}", trace=True, seed=1)
    assert len(done.text) == 3 and done.finish_reason == "stop" and EOS not in done.text
    assert 0 not in done.token_ids
    last = done.trace[-1]
    assert all(node.finish == "stop" for node in last.kept)


def test_a_stop_token_ends_complete_texts_alone(model):
    stop = model.base.tokenizer("b").input_ids[0]
    for seed in range(20):
        done = model.generate(PROMPT, "base", regex="a{2,4}|ab", stop_token_ids=[stop], seed=seed, temperature=1.0)
        assert done.finish_reason == "stop" and set(done.text) == {"a"} and len(done.text) in (2, 3, 4)


def test_an_end_is_forbidden_until_the_text_is_complete(model):
    done = model.generate(PROMPT, "base", n=50, regex="(ab)+", seed=1, temperature=1.5)
    assert all(c.text == "ab" * (len(c.text) // 2) for c in done if c.finish_reason == "stop")
    never = model.generate(PROMPT, "base", regex="(ab)+", ignore_eos=True, max_new_tokens=15, seed=1)
    assert never.finish_reason == "length" and never.text.startswith("ab" * 5)


def test_thinking_is_free_and_the_answer_is_not(model):
    pytest.importorskip("jsonschema")
    done = model.generate(PROMPT, "eft", n=8, guide_after="#", thinking_budget=6, choice=["an", "th"], max_new_tokens=20, seed=3)
    for c in done:
        assert c.answer in ("an", "th") and c.reasoning_content is not None


def test_requests_with_and_without_a_grammar_share_batches(model):
    alone = [model.generate(PROMPT, "eft", seed=s, regex=r, max_new_tokens=8) for s, r in ((1, None), (2, "[ab]+"), (3, "[0-9]{4}"))]
    requests = [model.request(PROMPT, "eft", seed=s, regex=r, max_new_tokens=8) for s, r in ((1, None), (2, "[ab]+"), (3, "[0-9]{4}"))]
    together = dict(model.run(requests))
    assert [together[i].token_ids for i in range(3)] == [c.token_ids for c in alone]
    model.reset_caches()
    again = model.generate(PROMPT, "eft", seed=3, regex="[0-9]{4}", max_new_tokens=8)
    assert again.token_ids == alone[2].token_ids


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"grammar": 'start: "a" | "b" start'}, "b*a"),
        ({"grammar": 'root ::= "a" | "b" root'}, "b*a"),
        ({"json_schema": '{"type": "boolean"}'}, "true|false"),
        ({"choice": ["a/b", 'q"c', "é"]}, 'a/b|q"c|é'),
        ({"regex": "é{1,2}/[0-9]"}, "é{1,2}/[0-9]"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_forms_of_grammars(model, settings, pattern):
    import re

    done = model.generate(PROMPT, "base", n=30, seed=5, temperature=1.0, **settings)
    ended = [c for c in done if c.finish_reason == "stop"]
    assert ended and all(re.fullmatch(pattern, c.text) for c in ended), [c.text for c in done]


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regex": "a["}, "regex cannot be used"),
        ({"json_schema": {"type": "objekt"}}, "json_schema cannot be used: .*objekt"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema cannot be used: .*uniqueItems"),
        ({"json_schema": "{"}, "json_schema must be a JSON schema"),
        ({"json_schema": [1]}, "json_schema must be a JSON schema"),
        ({"grammar": "nonsense {"}, "grammar cannot be"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice: a response follows one of them"),
        ({"regex": ""}, "regex must be no empty text"),
        ({"choice": []}, "choice must be one text or more"),
    ],
)
def test_unusable_grammars_are_refused_before_anything_runs(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        model.generate(PROMPT, "base", **settings)


def test_nothing_valid_left_is_a_clear_error(model):
    """Settings that forbid what the grammar needs: an error of the answer, not another text."""
    b = model.base.tokenizer("b").input_ids[0]
    for method, more in (("base", {}), ("eft", {"draft": 2}), ("ivg", {"width": 2, "successors": 2, "chunk_length": 2})):
        done = model.generate(PROMPT, method, regex="aab", suppress_tokens=[b], seed=1, **more)
        assert done.finish_reason == "error"
        assert "no token may be drawn after 2 tokens: the grammar of structured output" in done.error


def test_engines_that_see_one_chunk_alone_refuse_grammars():
    from ivg.engines.endpoint.engine import EndpointEngine
    from ivg.engines.vllm.engine import VLLMEngine

    for name in STRUCTURES:
        assert name not in EndpointEngine.unsupported and f"{name} in chunks" in EndpointEngine.unsupported
        assert not {name, f"{name} in chunks"} & set(VLLMEngine.unsupported)


def test_matchers_are_freed(model):
    engine = TransformersEngine(model.base)
    fresh = GuidedModel(model.base, {"explicit": model.values["explicit"]}, model.sampling, engine=engine)
    fresh.generate(PROMPT, "cbs-explicit", width=2, successors=2, chunk_length=2, regex="[ab]{9}", n=3)
    assert engine.grammars.live == 0


def test_taking_tokens_back_changes_nothing(model):
    """Drafts of any length give the same tokens."""
    found = []
    for ahead in (0, 1, 4):
        engine = model.engine
        engine.speculation.draft_length = ahead
        try:
            found.append([c.token_ids for c in model.generate(PROMPT, "eft", n=6, draft=4, json_schema=SCHEMA, max_new_tokens=60, seed=9)])
        finally:
            engine.speculation.draft_length = None
    assert found[0] == found[1] == found[2]
    assert len(set(itertools.chain(*found))) > 1 and torch.is_grad_enabled()


# Command line, recipe


def test_the_command_line_reads_a_schema_from_a_file(ivg, tmp_path):
    """On the embedded models, in every row."""
    (tmp_path / "colour.json").write_text('{"enum": ["red", "blue"]}', encoding="utf-8")
    options = ["--seed", 1, "--n", 2, "--output", tmp_path / "out.jsonl"]
    code, _, err = ivg("generate", "The movie was", "--method", "eft", "--schema", tmp_path / "colour.json", *options)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(json.loads(row["text"]) in ("red", "blue") for row in rows)
    code, out, err = ivg("generate", "The movie was", "--method", "eft", "--regex", " (good|bad)", "--seed", 1)
    assert code == 0 and out.strip() in ("The movie was good", "The movie was bad"), err
    code, _, err = ivg("generate", "x", "--schema", tmp_path / "none.json")
    assert code == 2 and "--schema" in err and "No such file" in err
    code, _, err = ivg("generate", "x", "--regex", "a[")
    assert code == 2 and "regex cannot be used" in err


def test_a_recipe_has_them_by_vllm_s_names(model):
    table = {"guided_json": {"type": "integer"}}
    made = SamplingParams(**Recipe(sampling=table).sampling.settings())
    assert made.structure == ("json_schema", '{"type": "integer"}')
    assert SamplingParams(choice=["a", "b"]).structure == ("choice", '["a", "b"]')
