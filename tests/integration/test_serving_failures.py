"""Models that fail, clients that disconnect, a full queue, deadlines and the signal to stop."""

import asyncio
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from ivg.errors import ModelError, ServeError
from ivg.serving.completions import EventStream
from ivg.serving.metrics import Metrics
from ivg.serving.protocol import CompletionRequest
from ivg.serving.requests import Progress, RequestHandle
from ivg.serving.served_models import ServedModels
from ivg.serving.worker import Worker
from ivg.settings.recipe import Recipe
from ivg.settings.serve import ServeSettings
from ivg.values.base import FunctionValue
from serving_tools import GOOD, SAMPLING, SLOW, Running, Slow, chunks, connect, expected, numbers, raw, tiny, values, wait_for, well_formed

ASK = {"model": "tiny", "prompt": "Film", "max_tokens": 4}


@pytest.fixture(scope="module")
def running():
    with Running(tiny(**values()), max_tokens=2048) as server:
        yield server


def test_nan_fails_its_own_request(running, library):
    def ask(prompt):
        return running.post({"model": "tiny", "prompt": prompt, "seed": 3, **SAMPLING, "guidance": {"method": "custom", "token": "nan"}})

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, ["Film", "poison", "Other", "poison 2"]))
    for prompt, answer in zip(["Film", "Other"], answers[::2], strict=True):
        assert answer.json()["choices"][0]["text"] == expected(library, prompt, "custom", 3, token="implicit").text
    for answer in answers[1::2]:
        assert "NaN" in well_formed(answer, 500, code="model_error")["message"]
    running.wait_until_idle()


def test_a_value_that_raises_fails_its_own_request(running, library):
    """Streams of other requests continue where they were."""
    guidance = {"method": "custom", "token": "implicit", "select": "mine", "successors": 2, "chunk_length": 3}

    def stream(prompt):
        body = {"model": "tiny", "prompt": prompt, "seed": 3, "stream": True, "guidance": guidance, **SAMPLING}
        sent = chunks(running.post(body))
        error = sent[-1].get("error")
        return "".join(data["choices"][0]["text"] for data in sent if "error" not in data), error

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(stream, ["Film", "dynamite", "Other", "More", "dynamite too"]))
    settings = {"token": "implicit", "select": "length", "successors": 2, "chunk_length": 3}
    for i, prompt in ((0, "Film"), (2, "Other"), (3, "More")):
        assert answers[i] == (expected(library, prompt, "custom", 3, **settings).text, None)
    for i in (1, 4):
        assert answers[i][1]["code"] == "model_error" and "secret" not in answers[i][1]["message"]
    running.wait_until_idle()
    assert httpx.get(f"{running.url}/health").status_code == 200
    assert numbers(running)["ivg_model_failures_total"] >= 1


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_cache_rows(running, stream):
    body = {"model": "tiny", "prompt": "Long", "max_tokens": 200, "stream": stream, "guidance": SLOW}
    before = running.served.model.values["slow"].calls
    with connect(running) as line:
        line.sendall(raw(body))
        wait_for(lambda: running.served.model.values["slow"].calls >= before + 3)
        assert running.worker.searcher.live_requests == 1
    running.wait_until_idle()
    assert running.worker.searcher.live_requests == 0
    assert running.served.model.values["slow"].calls - before < 200  # rounds of a whole answer


def test_short_requests_finish_before_a_long_one():
    """They share its steps; the order of the completions does not depend on speed."""
    served = ServedModels(tiny(), Recipe(), ServeSettings(name="tiny"))
    worker, finished = Worker(served), []

    async def serve():
        async def wait(handle):
            event = await handle.events.get()
            while not (isinstance(event, Progress) and event.completion):
                event = await handle.events.get()
            finished.append(handle.body.prompt)

        body = {"model": "tiny:base", "ignore_eos": True}
        lengths = {"long": 240, "short 1": 4, "short 2": 4}
        bodies = [CompletionRequest.model_validate(body | {"prompt": p, "max_tokens": n}) for p, n in lengths.items()]
        handles = [RequestHandle(b, 1, 200.0) for b in bodies]
        for handle in handles:
            worker.submit(handle)
        worker.start()
        await asyncio.gather(*map(wait, handles))
        worker.drain()
        worker.thread.join(200)

    asyncio.run(serve())
    assert finished[-1] == "long"


def test_full_queue_deadline_and_drain(caplog):
    server = Running(tiny(**values()), queue_limit=2, max_beams=2, deadline=5.0, drain=200.0)
    ask = {"model": "tiny", "prompt": "Long and private", "max_tokens": 200, "guidance": SLOW}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.post(ask), range(6)))
        refused = [a for a in answers if a.status_code == 429]
        late = [a for a in answers if a.status_code == 504]
        assert len(refused) + len(late) == 6 and len(refused) >= 2 and len(late) >= 2
        assert all(a.headers["retry-after"] for a in refused)
        well_formed(refused[0], 429, code="queue_full")
        well_formed(late[0], 504, code="deadline_exceeded")
        server.wait_until_idle()
        quick = {"model": "tiny", "prompt": "x", "max_tokens": 8, "guidance": SLOW}
        finishing = pool.submit(server.post, quick)  # a quarter of a second: may be finished
        wait_for(lambda: server.worker.searcher.live_requests or finishing.done())
        server.stop()
        assert finishing.result().status_code == 200
    assert "private" not in caplog.text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_requests_unfinished_after_drain_fail():
    server = Running(tiny(**values()), drain=0.3)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.post, {"model": "tiny", "prompt": "Long", "max_tokens": 200, "guidance": SLOW})
        wait_for(lambda: server.worker.searcher.live_requests)
        server.stop()
        well_formed(whole.result(), 503, code="unavailable")


def test_a_dead_worker_is_reported(monkeypatch):
    def step():
        raise SystemExit("the thread ends")

    server = Running(tiny())
    monkeypatch.setattr(server.worker.searcher, "step", step)
    with server:
        well_formed(server.post({"model": "tiny:base", "prompt": "x", "max_tokens": 2}), 503)
        assert httpx.get(f"{server.url}/health").json() == {"status": "dead"}
        well_formed(server.post({"model": "tiny:base", "prompt": "x", "max_tokens": 2}), 503)


def test_forty_mixed_requests(running, library):
    """Completions equal the library's, errors are well-formed, and no row is left."""
    wanted = {i: expected(library, f"Film {i}", "ivg", i).text for i in range(4)}

    async def one(client, i):
        kind = i % 5
        if kind == 0:
            answer = await client.post("/v1/completions", json={"model": "tiny:ivg", "prompt": f"Film {i % 4}", "seed": i % 4, **SAMPLING})
            assert answer.json()["choices"][0]["text"] == wanted[i % 4]
        elif kind == 1:
            body = {"model": "tiny:eft", "prompt": "x", "stream": True, "max_tokens": 100}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    break
        elif kind == 2:
            well_formed(await client.post("/v1/completions", content=b"{" * i, headers={"content-type": "application/json"}), 400)
        elif kind == 3:
            well_formed(await client.post("/v1/completions", json={"model": "none", "prompt": "x"}), 404)
        else:
            body = {"model": "tiny", "prompt": "poison", "guidance": {"method": "custom", "token": "nan"}}
            well_formed(await client.post("/v1/completions", json=body), 500)

    async def all_of_them():
        async with httpx.AsyncClient(base_url=running.url, timeout=300) as client:
            await asyncio.gather(*(one(client, i) for i in range(40)))

    asyncio.run(all_of_them())
    running.wait_until_idle()


def test_restart_of_models_is_retried(monkeypatch):
    """No memory for the new engine yet: requests are refused at once meanwhile, and the server lives."""

    def bomb(prompt, response):
        if "dynamite" in prompt:
            raise ModelError("the engine died")
        return len(response)

    model = tiny(bomb=FunctionValue(bomb, "bomb"))
    server, again, failed, reset_caches, memory = Running(model), [], [], model.reset_caches, threading.Event()
    monkeypatch.setattr("ivg.serving.worker.RESTART_SECONDS", 1.0)

    def hard():
        again.append(time.monotonic())
        if not memory.is_set():
            wait_for(lambda: failed or server.worker.waiting)  # requests come during the first attempt
            failed.append(again[-1])
            raise ModelError("no memory yet")
        return reset_caches()

    def ask(prompt):
        guidance = {"method": "custom", "select_value": "bomb", "successors": 2, "chunk_length": 8}
        return server.post(ASK | {"prompt": prompt, "max_tokens": 8, "guidance": guidance})

    monkeypatch.setattr(model, "reset_caches", hard)
    with server:
        with ThreadPoolExecutor(5) as pool:
            dying = pool.submit(ask, "dynamite")
            wait_for(lambda: again)
            refused = list(pool.map(ask, ["Film"] * 12))
        assert httpx.get(f"{server.url}/ready").json() == {"status": "restarting"}
        wait_for(lambda: len(failed) >= 2)
        memory.set()
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 200)  # without a request
        last = ask("Film")
        server.wait_until_idle()
        assert server.worker.alive
    well_formed(dying.result(), 503, code="unavailable")
    assert {answer.status_code for answer in refused} == {503}
    assert last.status_code == 200 and len(again) >= 3
    assert all(b - a >= 1.0 for a, b in itertools.pairwise(again))


def test_a_single_request_is_retried_once_when_an_engine_stops(monkeypatch):
    """The first failure need not be its fault, a second one is."""
    tries = []

    def deadly(prompt, response):
        tries.append(prompt)
        if "dynamite" in prompt or len(tries) == 1:
            raise ModelError("the engine died")
        return len(response)

    model = tiny(deadly=FunctionValue(deadly, "deadly"))
    reset_caches = model.reset_caches
    monkeypatch.setattr(model, "reset_caches", lambda: reset_caches() or True)
    guidance = {"method": "custom", "select_value": "deadly", "chunk_length": 4}
    with Running(model) as server:
        good, bad = (server.post(ASK | {"prompt": p, "max_tokens": 4, "guidance": guidance}) for p in ("Film", "dynamite"))
        server.wait_until_idle()
    assert good.status_code == 200 and tries.count("Film") >= 2
    well_formed(bad, 500, code="model_error")
    assert tries.count("dynamite") == 2


def test_engine_stops_during_a_cancellation(monkeypatch):
    model = tiny()
    release, dead = model.engine.release, []

    def deadly(keys):
        if not dead and leaving:
            dead.append(keys)
            raise ModelError("the engine died")
        release(keys)

    leaving = []
    monkeypatch.setattr(model.engine, "release", deadly)
    body = ASK | {"max_tokens": 200, "seed": 3, "guidance": {"method": "base", "ignore_eos": True}}
    with Running(model) as server:
        alone = server.post(body | {"prompt": "Other"})
        with ThreadPoolExecutor(1) as pool, httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}) as response:
            other = pool.submit(server.post, body | {"prompt": "Other"})
            next(response.iter_bytes())
            leaving.append(True)
            response.close()
            answer = other.result()
        server.wait_until_idle()
        assert server.worker.alive
    assert dead and answer.status_code == 200
    assert answer.json()["choices"][0]["text"] == alone.json()["choices"][0]["text"]


def test_memory_is_released_periodically(monkeypatch):
    model = tiny()
    given = []
    monkeypatch.setattr(model, "release_memory", lambda: given.append(len(model.readers)))
    monkeypatch.setattr("ivg.serving.worker.RELEASE_SECONDS", 0.0)
    with Running(model) as server:
        assert server.post(ASK | {"max_tokens": 4}).status_code == 200
        server.wait_until_idle()
    assert given


def test_new_requests_wait_while_a_failed_step_is_bisected():
    """Else, under constant load, the suspects would never run alone."""
    scored, handles = [], {}

    def value(prompt, response):
        if not scored or scored[-1] != prompt:
            scored.append(prompt)
        if prompt == "b" and "failed" not in scored:
            scored.append("failed")
            worker.submit(handles["c"])
            raise ModelError("the engine died")
        if prompt == "b" and "d" in handles:
            worker.submit(handles.pop("d"))
        return len(response)

    served = ServedModels(tiny(mine=FunctionValue(value, "mine")), Recipe(), ServeSettings(name="tiny"))
    worker = Worker(served)

    async def serve():
        guidance = {"method": "custom", "select_value": "mine", "successors": 2, "chunk_length": 4}
        body = {"model": "tiny", "max_tokens": 12, "guidance": guidance, "ignore_eos": True}
        for p in "abcd":
            handles[p] = RequestHandle(CompletionRequest.model_validate(body | {"prompt": p}), 1, 200.0)
        waiting = list(handles.values())
        worker.submit(handles["a"])
        worker.submit(handles["b"])
        worker.start()
        for handle in waiting:
            event = await handle.events.get()
            while not (isinstance(event, Progress) and event.completion):
                assert not isinstance(event, ServeError), event
                event = await handle.events.get()
        worker.drain()
        worker.thread.join(200)

    asyncio.run(serve())
    again = scored[scored.index("failed") + 1 :]
    assert scored[:3] == ["a", "b", "failed"] and again[:2] == ["a", "b"]  # each alone
    assert again[2:] == ["c", "d"] * 3  # then both together, a chunk of 4 tokens at a time


def test_disconnect_at_the_same_time_as_an_event():
    """Disconnect and event in one iteration of the loop: the writer must not take the event and wait for ever."""

    async def leave():
        handle, waiting, left = RequestHandle(None, 1, 60.0), asyncio.Event(), asyncio.Event()
        worker = SimpleNamespace(thread=threading.current_thread(), seconds_left=60.0, metrics=Metrics())
        worker.cancel = lambda handle: handle.events.put_nowait(Progress(0, "", (), (), (), None))  # just before the writer is cancelled
        stream = SimpleNamespace(start=list, update=lambda progress: [])

        async def receive():
            waiting.set()  # the writer began before, and waits for an event
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        writing = asyncio.ensure_future(EventStream(stream, handle, worker)({}, receive, send))
        await waiting.wait()
        left.set()
        done, _ = await asyncio.wait({writing}, timeout=200)
        writing.cancel()
        return bool(done)

    assert asyncio.run(leave())


def test_a_draining_server_answers_with_503():
    server = Running(tiny(slow=Slow()))
    ask = GOOD | {"model": "tiny", "max_tokens": 60, "guidance": SLOW}
    with ThreadPoolExecutor(1) as pool:
        finishing = pool.submit(server.post, ask)
        wait_for(lambda: server.worker.searcher.live_requests)
        server.server.handle_exit(15, None)
        ready = httpx.get(f"{server.url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert httpx.get(f"{server.url}/health").status_code == 200
        late = server.post(GOOD)
        well_formed(late, 503, code="unavailable")
        assert late.headers["retry-after"]
        assert finishing.result().status_code == 200
        server.thread.join(20)
    assert not server.thread.is_alive()
