"""Streams, asyncio, generators of prompts and progress give the answers of ``generate``, and leave nothing behind."""

import asyncio
import copy
import gc
import itertools
import pickle
import threading
import time
import warnings
from dataclasses import dataclass

import pytest

from ivg import FunctionValue, GuidedModel
from ivg.errors import ConfigError, GenerationError, PromptError
from ivg.search.background import BackgroundSearch
from ivg.search.searcher import Request, Searcher
from ivg.search.unused import warn_of_unused
from ivg.testing import FakeEngine, tiny_lm, tiny_value
from ivg.types import Completion, Prompt, SamplingParams, Usage, likeliest
from ivg.values.implicit import ImplicitValue

PROMPTS = ["The movie", "I", "A film that", "Well,", "Some say"]


@pytest.fixture(scope="module")
def model():
    pair = ImplicitValue(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3))
    values = {"implicit": pair, "explicit": tiny_value("vocabulary", seed=5)}
    return GuidedModel(tiny_lm("base", seed=1), values, SamplingParams(max_new_tokens=12))


@pytest.fixture(autouse=True)
def nothing_is_left(model):
    yield
    gc.collect()
    with model.lock:
        pass
    assert not any(r.model.live_rows for r in model.readers)


def without_seconds(completion):
    score = completion.score and pytest.approx(completion.score, abs=1e-4)  # other batches round sums otherwise
    return completion.token_ids, completion.text, score, completion.finish_reason, completion.usage


def texts(answers):
    return [texts(a) for a in answers] if isinstance(answers, list) else answers.text


# Streams


@pytest.mark.parametrize("settings", [{"method": "base"}, {"method": "eft"}, {"method": "ivg"}, {"method": "eft", "draft": 3}])
@pytest.mark.parametrize("stop", [(), ("e",)])
def test_a_stream_gives_the_text_of_generate(model, settings, stop):
    expected = model.generate("The movie", **settings, seed=3, stop=stop)
    stream = model.stream("The movie", **settings, seed=3, stop=stop)
    assert stream.completion is None
    pieces = list(stream)
    assert "".join(pieces) == expected.text and all(pieces)
    usage = slice(None) if "draft" not in settings else slice(4)  # how far is drafted depends on what was accepted before
    assert without_seconds(stream.completion)[usage] == without_seconds(expected)[usage]
    assert stream.read() == stream.completion and next(stream, None) is None
    assert settings["method"] != "base" or stop or len(pieces) > 4  # token by token


def test_text_is_given_before_the_answer_is_complete(model):
    stream = model.stream("The movie", "base", seed=3)
    assert next(stream) and stream.completion is None
    assert model.reader.model.live_rows
    stream.close()
    assert not model.reader.model.live_rows and list(stream) == []
    with pytest.raises(GenerationError, match="closed before its end"):
        stream.read()


@pytest.mark.parametrize("begin", [False, True])
def test_a_stream_that_is_dropped_or_left_is_cancelled(model, begin):
    stream = model.stream("The movie", "ivg")
    if begin:
        next(stream)
    del stream
    gc.collect()
    assert not any(r.model.live_rows for r in model.readers)
    with model.stream("The movie", "base") as stream:
        next(stream)
    assert not model.reader.model.live_rows


def test_a_stream_raises_what_generate_returns_as_error(model):
    model.add_value("broken", lambda prompt, response: 1 / 0)
    settings = {"select": "broken", "width": 2, "successors": 1, "chunk_length": 2}
    try:
        failed = model.generate("The movie", "custom", **settings)
        stream = model.stream("The movie", "custom", **settings)
        with pytest.raises(GenerationError, match="the value broken"):
            "".join(stream)
        assert stream.completion.error == failed.error and list(stream) == []
        with pytest.raises(GenerationError, match="the value broken"):
            stream.read()  # again
    finally:
        del model.values["broken"]


def test_a_stream_refuses_at_once(model):
    with pytest.raises(PromptError):
        model.stream("")
    with pytest.raises(ConfigError, match="temprature"):
        model.stream("I", temprature=1)
    with pytest.raises(PromptError, match="context"):
        model.stream("x" * 300, max_new_tokens=9)


def test_streams_of_two_prompts_may_be_interleaved(model):
    expected = [model.generate(p, "base", seed=1).text for p in PROMPTS[:2]]
    pairs = list(itertools.zip_longest(*(model.stream(p, "base", seed=1) for p in PROMPTS[:2]), fillvalue=""))
    assert ["".join(pieces) for pieces in zip(*pairs, strict=True)] == expected


# asyncio


def test_coroutines_share_batches_and_get_the_answers_of_generate(model):
    jobs = [(p, m, s) for p in PROMPTS[:3] for m in ("base", "ivg") for s in (0, 1)]
    expected = [model.generate(p, m, seed=s) for p, m, s in jobs]

    async def together():
        return await asyncio.gather(*(model.agenerate(p, m, seed=s) for p, m, s in jobs))

    assert [without_seconds(c) for c in asyncio.run(together())] == [without_seconds(c) for c in expected]


def test_agenerate_has_the_shapes_of_generate(model):
    async def shapes():
        return (
            await model.agenerate("I", "base", n=2),
            await model.agenerate(["I"], "base"),
            await model.agenerate(PROMPTS[:2], "base", n=2, index=3),
            await model.agenerate([], "base"),
        )

    found = asyncio.run(shapes())
    expected = (
        model.generate("I", "base", n=2),
        model.generate(["I"], "base"),
        model.generate(PROMPTS[:2], "base", n=2, index=3),
        [],
    )
    assert [texts(answers) for answers in found] == [texts(answers) for answers in expected]


def test_astream_and_agenerate_run_in_one_loop(model):
    expected = [model.generate(p, "ivg", seed=2).text for p in PROMPTS]

    async def read(prompt):
        async with model.astream(prompt, "ivg", seed=2) as stream:
            return "".join([piece async for piece in stream]), stream.completion

    async def together():
        return await asyncio.gather(*(read(p) for p in PROMPTS), model.agenerate(PROMPTS, "ivg", seed=2))

    *streams, batch = asyncio.run(together())
    assert [text for text, _ in streams] == expected == [c.text for c in batch] == [done.text for _, done in streams]


def test_the_event_loop_is_free_meanwhile(model):
    async def count():
        ticks, task = 0, asyncio.create_task(model.agenerate(PROMPTS, "ivg"))
        while not task.done():
            ticks += 1
            await asyncio.sleep(0)
        return ticks, await task

    ticks, answers = asyncio.run(count())
    assert ticks > 10 and len(answers) == len(PROMPTS)


def test_a_cancelled_coroutine_takes_its_requests_with_it(model):
    async def cancel():
        task = asyncio.create_task(model.agenerate(["I"] * 8, "ivg", max_new_tokens=200))
        stream = model.astream("I", "base", max_new_tokens=200)
        await anext(stream)
        task.cancel()
        await stream.aclose()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [piece async for piece in stream] == []
        with pytest.raises(GenerationError, match="closed"):
            await stream.read()
        await model.agenerate("I", "base", max_new_tokens=1)  # a later round: what was cancelled has left
        return any(r.model.live_rows for r in model.readers)

    assert asyncio.run(cancel()) is False


def test_errors_reach_the_coroutine_that_caused_them(model):
    async def ask():
        fine = asyncio.create_task(model.agenerate("I", "ivg"))
        with pytest.raises(PromptError):
            await model.agenerate("", "base")
        with pytest.raises(PromptError, match="context"):
            await model.agenerate("x" * 300, "base", max_new_tokens=9)
        with pytest.raises(PromptError, match="context"):
            await model.astream("x" * 300, "base", max_new_tokens=9).read()
        with pytest.raises(ConfigError):
            await model.agenerate("I", "base", n=0)
        return await fine

    assert texts(asyncio.run(ask())) == texts(model.generate("I", "ivg"))


class FailingEngine(FakeEngine):
    """Fails in the third call, once."""

    failed = False

    def extend(self, requests):
        if len(self.calls) == 2 and not self.failed:
            self.failed = True
            raise OSError("out of memory")
        return super().extend(requests)


def test_a_failed_step_ends_its_requests_and_no_others():
    engine = FailingEngine()
    background = BackgroundSearch(lambda: Searcher(engine))
    request = Request(Prompt("x"), sampling=SamplingParams(max_new_tokens=64, ignore_eos=True))

    def ask():
        events, done = [], threading.Event()

        def deliver(event):
            events.append(event)
            if isinstance(event, Exception) or event.completion is not None:
                done.set()

        background.submit(request, deliver)
        assert done.wait(60)
        return events[-1]

    assert isinstance(ask(), OSError)
    assert ask().completion.text == dict(Searcher(FakeEngine()).run([request]))[0].text
    assert not engine.held


def test_the_thread_ends_when_there_is_nothing_to_do():
    background = BackgroundSearch(lambda: Searcher(FakeEngine()), idle=0.01)
    before = threading.active_count()
    done = threading.Event()
    for _ in range(2):  # the second time with a new thread
        done.clear()
        background.submit(Request(Prompt("x")), lambda step: step.completion and done.set())
        assert done.wait(60)
        deadline = time.monotonic() + 60
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() == before


def test_a_closed_event_loop_cancels_what_runs_for_it(model):
    loop = asyncio.new_event_loop()
    stream = model.astream("I", "base", max_new_tokens=200)
    loop.run_until_complete(anext(stream))
    loop.close()
    asyncio.run(model.agenerate("I", "base", max_new_tokens=30))
    assert not any(r.model.live_rows for r in model.readers)


# Generators of prompts


@pytest.mark.parametrize("n", [None, 2])
def test_a_generator_of_prompts_gives_the_answers_in_order(model, n):
    expected = model.generate(PROMPTS, "ivg", n=n, seed=4)
    assert texts(list(model.generate_iter((p for p in PROMPTS), "ivg", n=n, seed=4))) == texts(expected)


def test_prompts_are_taken_as_there_is_room(model):
    taken = []

    def prompts():
        for i in itertools.count():
            taken.append(i)
            yield f"Number {i}"

    model.max_beams, before = 6, model.max_beams
    try:
        answers = model.generate_iter(prompts(), "base", max_new_tokens=3)
        first = list(itertools.islice(answers, 10))
        assert 10 <= len(taken) <= 10 + 2 * 6
        answers.close()
    finally:
        model.max_beams = before
    assert first == model.generate([f"Number {i}" for i in range(10)], "base", max_new_tokens=3)


def test_an_error_comes_behind_the_answers_before_it(model):
    def prompts():
        yield from PROMPTS[:2]
        yield ""
        yield PROMPTS[2]

    found = []
    with pytest.raises(PromptError, match="empty prompt"):
        found.extend(model.generate_iter(prompts(), "base"))  # a list keeps what came before the error
    assert found == model.generate(PROMPTS[:2], "base")

    def broken():
        yield PROMPTS[0]
        raise OSError("the file is gone")

    answers = model.generate_iter(broken(), "base")
    assert next(answers) == model.generate(PROMPTS[0], "base")
    with pytest.raises(OSError, match="the file is gone"):
        next(answers)


@pytest.mark.parametrize("prompts", ["The movie", {"role": "user", "content": "x"}, Prompt("x"), [{"role": "user", "content": "x"}]])
def test_one_prompt_is_no_generator_of_prompts(model, prompts):
    with pytest.raises(PromptError, match="generate_iter"):
        next(model.generate_iter(prompts, "base"))


# Several samples, of which the likeliest are returned


def test_best_of_returns_the_likeliest_first(model):
    drawn = model.generate(PROMPTS[:2], "eft", n=5, seed=6, alternatives=0)
    expected = [sorted(samples, key=lambda c: -c.mean_logprob)[:2] for samples in drawn]
    assert texts(expected) != texts([samples[:2] for samples in drawn])
    settings = {"n": 2, "best_of": 5, "seed": 6}
    assert texts(model.generate(PROMPTS[:2], "eft", **settings)) == texts(expected)
    assert texts(model.generate(PROMPTS[:2], "eft", **settings, alternatives=None)) == texts(expected)
    assert texts(list(model.generate_iter(PROMPTS[:2], "eft", **settings))) == texts(expected)
    assert texts(asyncio.run(model.agenerate(PROMPTS[:2], "eft", **settings))) == texts(expected)
    assert model.generate(PROMPTS[0], "eft", best_of=5, seed=6).text == expected[0][0].text
    with pytest.raises(ConfigError, match=r"best_of must be at least n \(2\), got 1"):
        model.generate(PROMPTS[0], "eft", n=2, best_of=1)


def test_best_of_says_how_many_samples_failed():
    """They are left out; where all fail, the answers are their errors."""

    def made(*errors):
        return [Completion("", (i,), None, "stop", Usage({}, 1, 1, 0.0), error=why) for i, why in enumerate(errors)]

    best, second = likeliest(made("no\n  give another", None, "late", None), 2)
    assert best.notes == ("best_of: 2 of 4 samples failed: no - give another",) and second.notes == ()
    assert [c.notes for c in likeliest(made(None, None, None), 1)] == [()]
    assert [(c.error, c.notes) for c in likeliest(made("a", "b"), 1)] == [("a", ())]


@pytest.mark.parametrize("n", [None, 2])
def test_a_prompt_that_comes_again_in_a_list_gets_new_samples(model, n):
    prompts = ["I", "Well,", "I"]
    answers = model.generate(prompts, "base", n=n, seed=4, index=1)
    samples = model.generate("I", "base", n=2 * (n or 1), seed=4, index=1)
    assert texts([answers[0], answers[2]]) == (texts(samples) if n is None else [texts(samples[:2]), texts(samples[2:])])
    assert texts(answers[0]) != texts(answers[2])
    assert texts(answers[1]) == texts(model.generate("Well,", "base", n=n, seed=4, index=1))
    assert texts(list(model.generate_iter(iter(prompts), "base", n=n, seed=4, index=1))) == texts(answers)


# Progress, copies, devices


@pytest.mark.parametrize("call", ["generate", "stream", "agenerate", "generate_iter"])
@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("base", {"beta": 2.0, "width": 1}, ["beta has no effect: the method base guides no tokens (token=VALUE makes it do so)"]),
        ("eft", {"beta": 2.0, "candidates": 0}, []),
        ("bon", {"gate": 1.0, "soft_scale": 2.0}, ["gate has no effect: the method bon guides", "soft_scale has no effect: it belongs to"]),
        ("custom", {"token": "implicit", "beta": 0.5}, []),
        ("eft", {"weights": None, "select_weights": None, "beta": None, "token": None, "rule": None}, []),
        ("base", {"beta": None, "gate": None, "rule": None}, []),
    ],
)
def test_settings_without_effect_are_named(model, call, method, settings, expected):
    """Those that change nothing, by name or as a method object; no others."""
    for chosen in (method, model.get_method(method)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            given = settings | {"max_new_tokens": 2}
            if call == "agenerate":
                asyncio.run(model.agenerate("good", chosen, **given))
            elif call == "generate_iter":
                list(model.generate_iter(["good"], chosen, **given))
            elif call == "stream":
                list(model.stream("good", chosen, **given))
            else:
                model.generate("good", chosen, **given)
        texts = [str(w.message) for w in found if w.category is UserWarning]
        assert call == "agenerate" or all(w.filename == __file__ for w in found if w.category is UserWarning)
        assert len(texts) == len(expected) and all(map(str.startswith, texts, expected)), texts


def test_a_rule_of_ones_own_may_use_every_setting():
    @dataclass
    class Rule:  # has no hash
        depth: int = 2

        def __call__(self, request):
            raise NotImplementedError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unused("custom", {"rule": Rule(), "successors": 2, "chunk_length": 2, "decay": 0.5, "soft_scale": 2.0})
        with pytest.raises(UserWarning, match="beta has no effect"):
            warn_of_unused("custom", {"rule": Rule(), "beta": 2.0})


@pytest.mark.parametrize("settings", [{"n": 2.0}, {"n": "2"}, {"n": True}, {"best_of": "3"}, {"n": 1, "best_of": 3.0}, {"n": 0}])
def test_numbers_of_samples_are_whole(model, settings):
    for call in (model.generate, lambda p, m, **s: list(model.generate_iter([p], m, **s))):
        with pytest.raises(ConfigError, match=r"(n|best_of) must be (a whole number|at least 1 sample), got "):
            call("good", "base", max_new_tokens=1, **settings)


def test_progress_is_told_after_every_answer(model):
    seen = []
    model.generate(PROMPTS, "base", n=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 10) for i in range(10)]
    aseen = []
    asyncio.run(model.agenerate(PROMPTS, "base", n=2, on_progress=lambda done, total: aseen.append((done, total))))
    assert aseen == seen


def test_what_progress_raises_ends_the_run(model):
    def enough(done, total):
        if done == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        model.generate(PROMPTS, "ivg", on_progress=enough)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_is_not_copied(model, copied):
    with pytest.raises(ConfigError, match="cannot be pickled or copied"):
        copied(model)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy])
def test_a_value_that_reads_with_a_model_is_not_copied(model, copied):
    with pytest.raises(ConfigError, match=r"tuned .*cannot be pickled or copied.*\n  send its path"):
        copied(model.values["implicit"])
    assert copied(FunctionValue(len, "length"))


def test_a_model_is_not_moved(model):
    with pytest.raises(ConfigError, match=r"GuidedModel.to\('cuda', dtype=1\).*\n.*LoadOptions"):
        model.to("cuda", dtype=1)
