"""Threads that share one model take turns: their answers are those of a single thread, and nothing that is left waits for ever."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ivg import GuidedModel
from ivg.search.searcher import Request, Search, Searcher
from ivg.testing import AsyncFakeEngine, tiny_lm, tiny_value
from ivg.types import Prompt, SamplingParams
from ivg.utils.locks import FairLock
from ivg.values.base import FunctionValue
from ivg.values.implicit import ImplicitValue

GUARD = 120
"""Seconds after which a test that hangs fails."""
COUNT = FunctionValue(lambda prompt, response: float(response.count("a")), "count")


@pytest.fixture(scope="module")
def model():
    pair = ImplicitValue(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3))
    values = {"implicit": pair, "explicit": tiny_value("vocabulary", seed=5)}
    return GuidedModel(tiny_lm("base", seed=1), values, SamplingParams(max_new_tokens=12))


JOBS = [(method, prompt, seed) for seed in range(2) for method in ("ivg", "eft", "bon") for prompt in ("The movie", "I")]


def test_threads_get_the_answers_of_one(model):
    alone = [model.generate(p, m, seed=s) for m, p, s in JOBS]
    model.reset_caches()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: model.generate(job[1], job[0], seed=job[2]), JOBS, timeout=GUARD))
        scores = list(pool.map(lambda c: model.score("I", [c.text]), alone, timeout=GUARD))
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.usage for c in together] == [c.usage for c in alone]
    assert scores == [pytest.approx(model.score("I", [c.text]), abs=1e-4) for c in alone]  # what is cached rounds sums otherwise
    assert not model.reader.model.live_rows


def test_loops_in_one_thread_may_be_interleaved_and_left(model):
    requests = [model.request(p, "ivg", seed=s) for p in ("One", "Two") for s in range(3)]
    alone = dict(model.run(requests))
    first, second = model.run(requests), model.run(requests)
    found = [dict([pair]) for pair in (next(first), next(second))]
    left = model.run(requests)
    next(left)  # suspended for good: holds nothing
    answers = [{**found[0], **dict(first)}, {**found[1], **dict(second)}]
    assert [{k: c.token_ids for k, c in a.items()} for a in answers] == [{k: c.token_ids for k, c in alone.items()}] * 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(model.generate, "One", seed=0).result(GUARD).token_ids == alone[0].token_ids
    left.close()
    assert not model.reader.model.live_rows
    assert not any(r.model.live_rows for r in model.readers)


def test_a_loop_that_is_dropped_or_refused_leaves_nothing(model):
    for _ in model.run([model.request("One", "ivg"), model.request("Two", "ivg", seed=3)]):
        break
    gc.collect()
    with pytest.raises(ValueError, match="context"):
        list(model.run([model.request("One", "ivg"), model.request("x" * 300, "ivg", max_new_tokens=9)]))
    assert not any(r.model.live_rows for r in model.readers)


def test_a_value_may_use_the_model_itself(model):
    def asks(prompt, response):
        return float(len(model.generate(prompt, "base", max_new_tokens=2).text))

    model.add_value("asks", asks)
    try:
        assert model.generate("One", "cbs-explicit", select="asks", width=2, successors=2).score >= 0
    finally:
        del model.values["asks"]


def test_two_loops_over_an_engine_that_works_by_itself():
    """Output of one loop's orders is not lost on the other."""

    def requests(seeds):
        search = Search(width=2, successors=3, chunk_length=4, value=COUNT)
        return [Request(Prompt("p"), search, SamplingParams(max_new_tokens=20), seed) for seed in seeds]

    alone = [{i: c.text for i, c in Searcher(AsyncFakeEngine()).run(requests(seeds))} for seeds in (range(4), range(4, 8))]
    engine, lock = AsyncFakeEngine(), FairLock()
    loops = [Searcher(engine, lock=lock).run(requests(seeds)) for seeds in (range(4), range(4, 8))]
    found = [{}, {}]
    while any(len(f) < 4 for f in found):
        for f, loop in zip(found, loops, strict=True):
            f.update({i: c.text for i, c in [next(loop, (None, None))] if c is not None})
    assert found == alone and not engine.held


def test_turns_go_in_the_order_of_asking():
    lock, order, waiting = FairLock(), [], []
    with lock, lock:  # reentrant
        for n in range(5):
            thread = threading.Thread(target=lambda n=n: _turn(lock, order, n))
            thread.start()
            waiting.append(thread)
            while lock.waiting <= n:
                pass
        lock.later(lambda: order.append("later"))
        assert order == []
    for thread in waiting:
        thread.join(GUARD)
    assert order == ["later", 0, 1, 2, 3, 4]
    lock.later(lambda: order.append("at once"))
    assert order[-1] == "at once"


def _turn(lock, order, n):
    with lock:
        order.append(n)


def test_a_failing_clean_up_is_logged_and_frees_the_lock(caplog):
    """A clean-up that fails is logged, and the lock stays in order."""
    lock = FairLock()

    def fail():
        raise RuntimeError("an engine that died")

    with lock:
        thread = threading.Thread(target=lock.later, args=(fail,))
        thread.start()
        thread.join(GUARD)
    with lock:
        pass
    assert "cleaning up failed" in caplog.text and "an engine that died" in caplog.text
    with ThreadPoolExecutor(1) as pool:  # the lock is free for others
        pool.submit(_turn, lock, order := [], 1).result(GUARD)
    assert order == [1]


def test_a_finaliser_may_use_the_lock_in_the_middle_of_acquiring_it(monkeypatch):
    """Garbage is collected anywhere, even inside the lock's own methods: here where a waiting thread makes its event."""
    lock, done, event = FairLock(), [], threading.Event
    holding, leave, waits = event(), event(), event()

    def hold():
        with lock:
            holding.set()
            leave.wait(GUARD)

    def make_event():
        lock.later(lambda: done.append("cleaned up"))
        made = event()
        wait = made.wait
        made.wait = lambda *given: waits.set() or wait(*given)
        return made

    threads = [threading.Thread(target=hold, daemon=True), threading.Thread(target=_turn, args=(lock, [], 0), daemon=True)]
    threads[0].start()
    assert holding.wait(GUARD)
    monkeypatch.setattr(threading, "Event", make_event)
    threads[1].start()
    assert waits.wait(GUARD) and lock.waiting, "the thread waits for itself"
    leave.set()
    for thread in threads:
        thread.join(GUARD)
    assert len(done) == 1
