"""Fair scheduling, measured in tokens, never in seconds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivg.search import scheduling
from ivg.search.searcher import Request, Search, Searcher
from ivg.settings.serve import ServeSettings
from ivg.testing import FakeEngine
from ivg.types import Prompt, SamplingParams
from ivg.values.base import FunctionValue

COUNT_A = FunctionValue(lambda p, r: r.count("a"))
WIDE = Search(width=4, successors=4, chunk_length=5, value=COUNT_A)


class Counting(FakeEngine):
    """Counts beams times tokens of each seed, for every step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def extend(self, orders):
        work = {}
        for o in orders:
            work[o.seed] = work.get(o.seed, 0) + o.successors * o.tokens
        self.steps.append(work)
        return super().extend(orders)


def request(search, seed, tokens=50):
    return Request(Prompt("p"), search, SamplingParams(max_new_tokens=tokens, ignore_eos=True), seed)


def run_until(searcher, number):
    """The completion of one request."""
    while searcher.busy:
        for step in searcher.step():
            if step.request == number and step.completion is not None:
                return step.completion
    raise AssertionError("never answered")


def test_a_server_runs_32_usual_requests_at_once():
    """None of them waits for its first text until another is done."""
    searcher = Searcher(FakeEngine(), ServeSettings().max_beams)
    for seed in range(32):
        searcher.add(request(WIDE, seed))
    searcher.step()
    assert searcher.live_requests == 32 and not searcher.waiting_requests


def test_a_cheap_request_does_not_wait_for_expensive_ones():
    """Beside four requests of 16 beams, a request of one beam waits as if there were 8 beams, not 64."""
    engine = Counting()
    searcher = Searcher(engine)
    for seed in range(4):
        searcher.add(request(WIDE, seed))
    searcher.step()
    engine.steps.clear()
    cheap = request(Search(), 9)
    done = run_until(searcher, searcher.add(cheap))
    others = sum(n for work in engine.steps for seed, n in work.items() if seed != cheap.draw_seed)
    assert others <= 4 * 16 * (50 / scheduling.MAX_COST_RATIO + 10)  # a chunk on either side; without fair scheduling: 3200
    alone = Searcher(FakeEngine())
    assert done.text == run_until(alone, alone.add(cheap)).text


def test_expensive_requests_do_not_starve():
    engine = Counting()
    searcher = Searcher(engine)
    wide = request(WIDE, 1)
    number, seed = searcher.add(wide), 100
    cheap = set()
    for _ in range(10_000):
        while len(cheap) < 8:
            seed += 1
            cheap.add(searcher.add(request(Search(), seed, tokens=4)))
        ended = {step.request for step in searcher.step() if step.completion is not None}
        if number in ended:
            break
        cheap -= ended
    given = sum(work.get(wide.draw_seed, 0) > 0 for work in engine.steps)
    # 5 tokens of a chunk in one round, up to 8 of the others for each
    assert len(engine.steps) <= given * (scheduling.MAX_COST_RATIO + 1) * 5


@pytest.mark.parametrize("search", [Search(), WIDE])
def test_requests_of_the_same_shape_share_every_step(search):
    engine = Counting()
    searcher = Searcher(engine)
    requests = [request(search, seed) for seed in range(6)]
    for r in requests[:4]:
        searcher.add(r)
    searcher.step()
    for r in requests[4:]:
        searcher.add(r)
    while searcher.busy:
        searcher.step()
    first, late = ({r.draw_seed for r in group} for group in (requests[:4], requests[4:]))
    together = [set(work) for work in engine.steps]
    shared = together.count(first | late)
    assert together == [first] + [first | late] * shared + [late] * (len(together) - 1 - shared)
    assert len(together) == (10 + 1 if search is WIDE else 4 + 1)  # 50 tokens, 5 or 16 a round; the late ones' last


def test_a_cheap_request_does_not_wait_behind_a_queue_of_expensive_ones():
    """It bypasses requests of eight times its size, each of them a limited number of times."""
    searcher = Searcher(FakeEngine(), max_beams=16)
    wide = [searcher.add(request(WIDE, seed)) for seed in range(4)]
    cheap = [searcher.add(request(Search(), seed)) for seed in range(10, 30)]
    ended = []
    while searcher.busy:
        ended += [step.request for step in searcher.step() if step.completion is not None]
    assert set(ended[:8]) == set(cheap[:8]) and ended[8:12] == wide and set(ended[12:]) == set(cheap[8:])
    alike = Searcher(FakeEngine(), max_beams=16)
    numbers = [alike.add(request(WIDE, seed)) for seed in range(4)]
    order = []
    while alike.busy:
        order += [step.request for step in alike.step() if step.completion is not None]
    assert order == numbers


class Fake:
    def __init__(self, rows):
        self.virtual_time, self.rows, self.tokens, self.bypassed = 0.0, rows, 0, 0

    @property
    def rule(self):
        return self


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=8), st.integers(1, 16))
def test_every_request_gets_tokens_in_inverse_proportion_to_its_cost(rows, quantum):
    requests = [Fake(r) for r in rows]
    for _ in range(400):
        turns = scheduling.select(requests)
        assert turns
        scheduling.advance(requests, turns, quantum)
        for i in turns:
            requests[i].tokens += quantum
    spent = [request.tokens * cost for request, cost in zip(requests, scheduling.costs(requests), strict=True)]
    assert max(spent) - min(spent) <= scheduling.MAX_COST_RATIO * (quantum + 1)
