"""Candidates of the next token: guides read only where texts differ, and score as if they had read each whole text by itself."""

from functools import cache

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import naive
import tokenizers_zoo as zoo
from architectures import tiny
from ivg.engines.transformers.engine import TransformersEngine
from ivg.engines.transformers.guidance import apply_guidance
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.models.value_head import ValueModel
from ivg.models.vocabulary import Vocabulary
from ivg.search.searcher import Request, Search, Searcher
from ivg.testing import byte_tokenizer, tiny_lm, tiny_model, tiny_value
from ivg.types import Beam, Prompt, SamplingParams, TokenCounter, TokenGuidance, new_key
from ivg.values.base import CompositeValue, WorstCaseValue
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue

pytestmark = pytest.mark.numerics

BASE = Vocabulary(byte_tokenizer(), owner="base")
TEXT = "the movie is a film. é日 th mo"
TOKENS = sorted(set(byte_tokenizer()(TEXT).input_ids))
(END,) = BASE.eos_ids
TOKENIZERS = {
    "byte level": lambda: byte_tokenizer([("t", "h"), ("th", "e"), ("Ġ", "the"), ("m", "o"), ("i", "s"), ("Ã", "©")]),
    "byte level with bos": lambda: byte_tokenizer([("t", "h"), ("m", "o"), ("mo", "v")], permute=True, bos=True),
    "the base's": byte_tokenizer,
    **{
        f"sentencepiece {kind} {prefix}": (lambda kind=kind, prefix=prefix: zoo.sentencepiece(kind, prefix))
        for kind in ("unigram", "bpe")
        for prefix in ("first", "legacy")
    },
    "metaspace": zoo.metaspace,
    "wordpiece": zoo.wordpiece,
}
VALUES = ["implicit", "arm", "vocabulary head", "scalar head"]
NETWORKS = {"slots": "llama", "learned positions": "gpt2", "windows": "gemma3_text", "state": "mamba"}


@cache
def network(kind, seed, size):
    name = NETWORKS[kind]
    return tiny(name, seed, vocab_size=size) if kind == "state" else tiny_model(name, seed, vocab_size=size)


def make_value(value, tokenizer, kind="slots"):
    """(a value, its score of a text by itself: a function of prompt and token ids behind it)."""

    def lm(name, seed, head=None):
        body = network(kind, seed, len(tokenizer))
        if head is not None:
            body = ValueModel(body.base_model, head)
            torch.manual_seed(seed)
            torch.nn.init.normal_(body.head.weight, std=0.3)
        return CachedLM(ModelRunner(body, name), tokenizer)

    if value == "implicit":
        made = ImplicitValue(lm("tuned", 1), lm("untuned", 2))
        return made, naive.Implicit(made.tuned.network, made.untuned.network)
    if value == "arm":
        made = AutoregressiveReward(lm("arm", 1))
        return made, Logps(made.model.network)
    made = ExplicitValue(lm("explicit", 3, value.split()[0]))
    return made, (naive.QHead if value.startswith("vocabulary") else naive.VHead)(made.network)


class Logps:
    def __init__(self, network):
        self.network = network

    def score(self, prompt, y):
        logps = naive.outputs(self.network, prompt + y).log_softmax(-1)
        return sum(float(logps[len(prompt) + i - 1, t]) for i, t in enumerate(y))


def whole(oracle, tokenizer, h):
    """The oracle's score of a hypothesis whose text is read from its beginning; with the base's tokenizer, its tokens."""
    before = list(tokenizer(h.prompt.content).input_ids)
    if Vocabulary(tokenizer).same_as(BASE):
        return oracle.score(before, list(h.token_ids))
    ids = list(tokenizer(h.prompt.content + h.text).input_ids) if h.text else before
    same = max(1, next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))))
    ids = ids + [tokenizer.eos_token_id] * (END in h.token_ids)
    return oracle.score(ids[:same], ids[same:])


def beam(prompt, tokens, parent=None, inherits=True, counter=None):
    state, ended = BASE.start_decoding(BASE.response_ids((), prompt)), END in tokens
    text, state = BASE.continue_text(tokens[:-1] if ended else tokens, state, final=ended)
    key = None if parent is None else parent.key
    return Beam(
        new_key(), key, Prompt(prompt), tuple(tokens), text, None, counter or TokenCounter(), BASE, decoded=state, inherits=inherits
    )


def candidate_scores(value, beams, choices):
    """The value of every candidate: {token: score} for each row. Token guidance asks for them, but for values of the base's tokens."""
    if all(model.vocabulary.same_as(BASE) for model in value.cached_lms()):  # which guidance needs up to a constant alone
        candidates = [beam(h.prompt.content, (*h.token_ids, t), h) for h, tokens in zip(beams, choices, strict=True) for t in tokens]
        scores = iter(value.score_candidates(beams, candidates))
        return [{t: next(scores) for t in tokens} for tokens in choices]
    logits = torch.full((len(beams), len(BASE.pieces)), -5.0)
    for row, tokens in enumerate(choices):
        logits[row, tokens] = 0.0
    out = apply_guidance(logits, beams, TokenGuidance(value, beta=1.0, candidates=len(choices[0])))
    return [{t: float(row[t]) for t in tokens} for row, tokens in zip(out, choices, strict=True)]


def check(oracle, tokenizer, beams, choices, found):
    for h, tokens, scores in zip(beams, choices, found, strict=True):
        for token in tokens:
            candidate = beam(h.prompt.content, (*h.token_ids, token))
            assert scores[token] == pytest.approx(whole(oracle, tokenizer, candidate), abs=3e-3), (h.prompt.content, candidate.text)


steps = st.lists(
    st.tuples(
        st.lists(st.lists(st.sampled_from([*TOKENS, END]), min_size=4, max_size=4, unique=True), min_size=3, max_size=3),
        st.lists(st.tuples(st.integers(0, 2), st.sampled_from(TOKENS), st.booleans()), min_size=1, max_size=3),
        st.sampled_from(["read", "read", "read", "skip", "score", "one"]),
    ),
    min_size=1,
    max_size=5,
)


def walk(value, tokenizer, prompts, plan):
    """Rows that grow, branch, skip steps and are scored in between; every candidate's score is that of its whole text."""
    made, exact = value
    if exact.__class__ is naive.QHead:  # which needs two tokens
        prompts = [f"a film {prompt}" for prompt in prompts]
    counter = TokenCounter()
    rows = [beam(prompt, (), counter=counter) for prompt in prompts]
    for choices, growth, action in plan:
        offered = [choices[i][: 1 if action == "one" else None] for i in range(len(rows))]
        if action == "skip":
            made.inherit_cache(rows)
        elif action == "score":
            for h, score in zip(rows, made.score(rows), strict=True):
                assert score == pytest.approx(whole(exact, tokenizer, h), abs=3e-3)
        else:
            check(exact, tokenizer, rows, offered, candidate_scores(made, rows, offered))
        children = []
        for i, token, inherits in growth:
            parent = rows[i % len(rows)]
            children.append(beam(parent.prompt.content, (*parent.token_ids, token), parent, inherits, counter))
        made.inherit_cache(children)
        made.release([h.key for h in rows])
        rows = children
    made.release([h.key for h in rows])
    assert all(model.model.live_rows == 0 for model in made.cached_lms())


PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # examples are small; making them smaller takes minutes
prompts = st.lists(st.text(TEXT, min_size=1, max_size=8).filter(str.strip), min_size=3, max_size=3)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=4, deadline=None, phases=PHASES)
@given(value=st.sampled_from(VALUES), prompts=prompts, plan=steps)
def test_candidates_score_as_whole_texts(tokenizer, value, prompts, plan):
    tokenizer = TOKENIZERS[tokenizer]()
    walk(make_value(value, tokenizer), tokenizer, prompts, plan)


@pytest.mark.parametrize("kind", NETWORKS)
@settings(max_examples=6, deadline=None, phases=PHASES)
@given(tokenizer=st.sampled_from(sorted(TOKENIZERS)), value=st.sampled_from(VALUES), prompts=prompts, plan=steps)
def test_candidates_score_as_whole_texts_on_other_networks(kind, tokenizer, value, prompts, plan):
    tokenizer = TOKENIZERS[tokenizer]()
    walk(make_value(value, tokenizer, kind), tokenizer, prompts, plan)


def test_a_first_token_that_the_response_changes_is_not_scored():
    """Nothing comes before it that could say how likely it is: both models of a pair give it 0."""
    tokenizer = TOKENIZERS["byte level"]()
    made, exact = make_value("implicit", tokenizer)
    h = beam("t", BASE.response_ids((), "he m"))
    assert made.score([h])[0] == pytest.approx(whole(exact, tokenizer, h), abs=3e-3)
    assert made.token_scores([h])[0][0] == 0


def test_several_values_of_other_tokenizers():
    first, second = TOKENIZERS["byte level"](), TOKENIZERS["sentencepiece unigram first"]()
    (pair, of_pair), (head, of_head) = make_value("implicit", first), make_value("scalar head", second)
    rows, tokens = [beam("the movie", ()), beam("a film", tuple(BASE.response_ids((), " is th")))], TOKENS[:4]
    for made, combine in (
        (CompositeValue([(0.5, pair), (2.0, head)]), lambda a, b: 0.5 * a + 2 * b),
        (WorstCaseValue([(0.5, pair), (2.0, head)]), lambda a, b: min(0.5 * a, 2 * b)),
    ):
        for h, scores in zip(rows, candidate_scores(made, rows, [tokens, tokens]), strict=True):
            for token in tokens:
                candidate = beam(h.prompt.content, (*h.token_ids, token))
                both = [whole(o, t, candidate) for o, t in ((of_pair, first), (of_head, second))]
                assert scores[token] == pytest.approx(combine(*both), abs=5e-3)
        made.release([h.key for h in rows])


def generated(value, tokens=12, **settings):
    """A completion of a tiny base with token guidance by ``value`` over 8 candidates."""
    engine = TransformersEngine(tiny_lm("base", seed=1, tokenizer=byte_tokenizer()))
    search = Search(guidance=TokenGuidance(value, candidates=8), value=settings.pop("select", None), **settings)
    sampling = SamplingParams(max_new_tokens=tokens, temperature=1.0, ignore_eos=True)
    ((_, completion),) = Searcher(engine).run([Request(Prompt("the movie"), search, sampling, seed=3)])
    return completion


@pytest.mark.parametrize("kind", ["slots", "state"])
@pytest.mark.parametrize("value", VALUES)
def test_what_candidates_share_is_read_once(value, kind):
    made, _ = make_value(value, TOKENIZERS["byte level"](), kind)
    usage = generated(made).usage
    for name in {model.name for model in made.cached_lms()}:
        assert usage.forward_tokens[name] <= 2.5 * 12 * 8, usage.forward_tokens
    assert all(model.model.live_rows == 0 for model in made.cached_lms())


def test_beams_with_a_pair_of_another_tokenizer_that_guides_and_selects():
    made, _ = make_value("implicit", TOKENIZERS["byte level"]())
    usage = generated(made, select=made, width=2, successors=3, chunk_length=4).usage
    assert usage.forward_tokens["tuned"] == usage.forward_tokens["untuned"] <= 1.5 * 12 * 8 * 6
    assert all(model.model.live_rows == 0 for model in made.cached_lms())


def test_reports_count_the_tokens_that_the_network_reads(monkeypatch):
    made, _ = make_value("scalar head", TOKENIZERS["sentencepiece bpe first"]())
    read, forward = [], made.model.model.cache.forward
    monkeypatch.setattr(made.model.model.cache, "forward", lambda rows, pieces, keep: read.extend(pieces) or forward(rows, pieces, keep))
    assert generated(made).usage.forward_tokens["explicit"] == sum(map(len, read))


def test_a_candidate_that_cannot_be_read_is_the_only_one_without_a_score():
    made = tiny_value("scalar", seed=5, tokenizer=TOKENIZERS["byte level"](), name="explicit")
    made.model.model.max_positions = 8
    rows = [beam("a film", ()), beam("a", ())]
    faults = {}
    logits = torch.zeros(2, len(BASE.pieces))
    logits[:, TOKENS[:3]] = 5.0
    rows[0] = beam("a film", BASE.response_ids((), " is"))
    out = apply_guidance(logits, rows, TokenGuidance(made, candidates=3), faults=faults)
    assert list(faults) == [rows[0].key]
    assert "reads at most 8 tokens" in str(faults[rows[0].key])
    assert out[1, TOKENS[:3]].isfinite().all()


def test_a_pair_tokenises_texts_once_where_both_read_alike():
    tokenizer = TOKENIZERS["byte level"]
    tuned, untuned = tiny_lm("tuned", seed=1, tokenizer=tokenizer()), tiny_lm("untuned", seed=2, tokenizer=tokenizer())
    assert untuned.encodes_as(tuned)
    assert not tiny_lm("other", tokenizer=byte_tokenizer([("t", "h")])).encodes_as(tuned)
    framed = CachedLM(untuned.model, tokenizer(), "Q: {prompt} A:", name="untuned")
    assert not framed.encodes_as(tuned)
    rows = [beam("a film", BASE.response_ids((), " is"))]
    for pair in (ImplicitValue(tuned, untuned), ImplicitValue(tuned, framed)):
        candidates = [beam("a film", (*rows[0].token_ids, t), rows[0]) for t in TOKENS]
        got = pair.score_candidates(rows, candidates)
        pair.reset_caches()
        for h, score in zip(candidates, got, strict=True):
            assert pair.score([h])[0] == pytest.approx(score, abs=1e-3)
            pair.release([h.key])
