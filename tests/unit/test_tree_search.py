"""Tree search over chunks: a tree of depth 3 by hand, what it reduces to, and that it holds nothing afterwards."""

import math
from dataclasses import replace

import pytest

from ivg.errors import ConfigError
from ivg.search.methods import get_method
from ivg.search.request import Request, Search, Tree
from ivg.search.searcher import Searcher
from ivg.search.unused import unused_settings
from ivg.testing import AsyncFakeEngine, FakeEngine
from ivg.types import Prompt, SamplingParams, new_key
from ivg.values.base import FunctionValue

pytestmark = pytest.mark.numerics


class Spelled(FakeEngine):
    """The first child of every text goes on with a, the second with b; notes which texts were extended."""

    def __init__(self):
        super().__init__("ab")
        self.extended = []

    def extend(self, requests):
        out = []
        for request in requests:
            beam, limit = request.beam, request.sampling.max_new_tokens
            self.extended.append(beam.text)
            family = []
            for i in range(request.successors):
                ids = (*beam.token_ids, i)
                end = "length" if len(ids) == limit else None
                family.append(replace(beam, key=new_key(), parent=beam.key, token_ids=ids, text=beam.text + "ab"[i], finish=end))
            self.held |= {b.key for b in family}
            out.append(family)
        return out


WORTH = {
    "a": 1.0, "b": 0.7, "aa": 0.2, "ab": 0.75, "ba": 0.9, "bb": 0.1,
    "aaa": 0.5, "aab": 0.6, "aba": 0.95, "abb": 0.0, "baa": 0.3, "bab": 0.4, "bba": 0.99, "bbb": 0.98,
}  # fmt: skip


def run(engine, search, count=1, **sampling):
    settings = SamplingParams(**{"max_new_tokens": 12, "ignore_eos": True, **sampling})
    found = dict(Searcher(engine).run(Request(Prompt("p"), search, settings, seed) for seed in range(count)))
    return [found[i] for i in range(count)]


@pytest.mark.parametrize(
    "exploration,order",
    [
        # root, then a, of which Q becomes 0.75 by its child ab. N(root) = N(a) = 2, N(b) = 1, ln 2 = 0.693.
        # c = 0: 0.75 > 0.7, so ab. All its children are finished: Q(a) = Q(aa) = 0.2 < Q(b) = 0.7, so b, then ba; Q(b) = Q(bb) = 0.1, so aa
        (0.0, ["", "a", "ab", "b", "ba", "aa"]),
        # c = 0.5: a has 0.75 + 0.5 * sqrt(0.693 / 2) = 1.044, b has 0.7 + 0.5 * sqrt(0.693) = 1.116, so b, whose Q becomes 0.9. N = 3, 2,
        # 2, ln 3 = 1.099: both get 0.371, so b and ba; Q(b) = 0.1, N = 4, 2, 3: a has 0.75 + 0.416, b 0.1 + 0.340, so ab; then
        # a has 0.2 + 0.5 * sqrt(1.609 / 3) = 0.566, b 0.466, so aa
        (0.5, ["", "a", "b", "ba", "ab", "aa"]),
    ],
)
def test_a_tree_of_depth_three_by_hand(exploration, order):
    """W = 2, K = 2, L = 1, three tokens: six expansions, all inner nodes of the tree but bb, below which the best texts are."""
    engine = Spelled()
    search = Search(width=2, successors=2, chunk_length=1, value=FunctionValue(lambda p, r: WORTH[r]), tree=Tree(exploration))
    (done,) = run(engine, search, max_new_tokens=3)
    assert engine.extended == order
    assert (done.text, done.score) == ("aba", 0.95)
    assert engine.held == set()


def test_expansions_that_just_suffice_by_hand():
    """W = 1: three expansions for three levels, so only what was sampled last is extended, and b and ba are never looked at."""
    for exploration in (0.0, 50.0):
        engine = Spelled()
        search = Search(successors=2, chunk_length=1, value=FunctionValue(lambda p, r: WORTH[r]), tree=Tree(exploration))
        (done,) = run(engine, search, max_new_tokens=3)
        assert engine.extended == ["", "a", "ab"]
        assert done.text == "aba"


def worth(text):
    return 0.7 * text.count("ab") - 0.4 * text.count("cc") + 0.1 * text.count("d")


VALUE = FunctionValue(lambda p, r: worth(r))


@pytest.mark.parametrize("exploration", [0.0, 1.0, 100.0])
def test_one_beam_is_blockwise_controlled_decoding(exploration):
    engine = FakeEngine()
    blocks = run(engine, Search(successors=4, chunk_length=3, value=VALUE), 20)
    tree = run(engine, Search(successors=4, chunk_length=3, value=VALUE, tree=Tree(exploration)), 20)
    assert [(c.text, c.score, c.usage.forward_tokens) for c in tree] == [(c.text, c.score, c.usage.forward_tokens) for c in blocks]


def test_without_exploration_the_best_leaf_is_expanded():
    """The order of expansions in the trace is that of a queue sorted by value, as long as every leaf can still be finished."""
    search = Search(width=6, successors=3, chunk_length=3, value=VALUE, tree=Tree(0.0))
    for seed in range(10):
        settings = SamplingParams(max_new_tokens=12, ignore_eos=True)
        ((_, done),) = Searcher(FakeEngine()).run([Request(Prompt("p"), search, settings, seed, trace=True)])
        leaves = {}
        for left, step in zip(range(23, 0, -1), done.trace, strict=False):
            nodes = {n.key: n for n in step.kept if n.finish is None}
            if leaves and left > 4:
                (expanded,) = set(leaves) - set(nodes)
                assert leaves[expanded].score == max(n.score for n in leaves.values())
            leaves = nodes


def test_the_answer_is_the_best_finished_leaf_at_equal_budget():
    """As many chunks as beam search samples; the answer is the best of all finished texts that the trace shows, and about as good."""
    shape = {"width": 4, "successors": 4, "chunk_length": 3, "value": VALUE}
    beams, trees = run(FakeEngine(), Search(**shape), 30), []
    for seed in range(30):
        settings = SamplingParams(max_new_tokens=12, ignore_eos=True)
        request = Request(Prompt("p"), Search(**shape, tree=Tree(0.3)), settings, seed, trace=True)
        ((_, done),) = Searcher(FakeEngine()).run([request])
        finished = [n for step in done.trace for n in (*step.kept, *step.dropped) if n.finish]
        assert done.score == max(n.score for n in finished) == worth(done.text)
        assert done.usage.forward_tokens["fake"] == 4 * 4 * 4 * 3
        trees.append(done)
    assert {c.usage.forward_tokens["fake"] for c in beams} == {4 * 4 * 4 * 3}
    assert sum(c.score for c in trees) > 0.9 * sum(c.score for c in beams)


def test_exploration_changes_what_is_found():
    texts = {c: [x.text for x in run(FakeEngine(), Search(width=4, successors=3, chunk_length=2, value=VALUE, tree=Tree(c)), 10)]
             for c in (0.0, 0.5, 50.0)}  # fmt: skip
    assert len({tuple(t) for t in texts.values()}) == 3


def early(text):
    """After an a, the text most likely ends."""
    return [1] * 8 + [6 if text.endswith("a") else 0]


@pytest.mark.parametrize("kind", [FakeEngine, AsyncFakeEngine])
@pytest.mark.parametrize("length", [3, 20])
def test_rounds_company_and_ends_change_nothing(monkeypatch, kind, length):
    from ivg.search import searcher as module

    search = Search(width=3, successors=2, chunk_length=length, value=VALUE, tree=Tree(0.5))
    texts = set()
    for quantum in (1, 3, 16):
        monkeypatch.setattr(module, "QUANTUM", quantum)
        engine = kind(weights=early)
        together = run(engine, search, 6, ignore_eos=False, max_new_tokens=2 * length + 1, stop=("dd",))
        assert [c.text for c in together[:2]] == [run(engine, search, i + 1, ignore_eos=False, max_new_tokens=2 * length + 1,
                                                      stop=("dd",))[i].text for i in range(2)]  # fmt: skip
        assert not any("dd" in c.text or c.error for c in together)
        texts.add(tuple((c.text, c.finish_reason) for c in together))
        assert engine.held == set()
    assert len(texts) == 1
    assert len({reason for _, reason in texts.pop()}) == 2 or length == 20


def test_equal_children_are_kept_once():
    """Where all children of a text are equal, as in greedy decoding, there is one path, and the search ends with it."""
    engine = FakeEngine("ab", lambda t: [0, 1, 0])
    (done,) = run(engine, Search(width=5, successors=3, chunk_length=4, value=VALUE, tree=Tree()))
    assert done.text == "b" * 12
    assert done.usage.forward_tokens["fake"] == 3 * 12
    assert engine.held == set()


def test_chunks_that_end_at_steps_use_the_same_tokens():
    """Steps of different lengths: still no more tokens than beam search may sample, and always a finished answer."""
    for seed in range(20):
        search = Search(width=3, successors=3, chunk_length=5, chunk_until="b", value=VALUE, tree=Tree(0.5))
        engine, settings = FakeEngine("abcd"), SamplingParams(max_new_tokens=14, ignore_eos=True)
        ((_, done),) = Searcher(engine).run([Request(Prompt("p"), search, settings, seed, trace=True)])
        assert done.finish_reason == "length" and len(done.text) == 14
        assert 3 * 3 * 14 - 3 * 5 < done.usage.forward_tokens["fake"] <= 3 * 3 * 14
        assert max(len(step.kept) for step in done.trace) <= 1 + 3 * 14 * 2
        assert engine.held == set()


@pytest.mark.parametrize("bad", [
    {"exploration": -1.0}, {"exploration": math.inf}, {"select": "none"}, {"decay": 0.5}, {"original": True}, {"guide_after": "x"},
], ids=lambda bad: next(iter(bad)))  # fmt: skip
def test_impossible_settings_are_errors(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        get_method("mcts", **bad)


def test_impossible_searches_are_refused():
    with pytest.raises(ConfigError, match="rule=tree needs a value"):
        Searcher(FakeEngine()).add(Request(Prompt("p"), Search(tree=Tree())))
    with pytest.raises(ConfigError, match="got tree and soft"):
        Searcher(FakeEngine()).add(Request(Prompt("p"), Search(value=VALUE, rule="soft", tree=Tree())))
    assert unused_settings("bon", {"exploration": 0.5}) == {"exploration": "it belongs to rule=tree"}
    assert unused_settings("mcts", {"exploration": 0.5, "width": 2}) == {}
