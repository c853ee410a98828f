"""An HTTP client of a completions endpoint: many requests at once, in one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

from ivg.engines.endpoint.choices import check_reply
from ivg.errors import ConfigError, MissingDependencyError, ModelError, UpstreamError, shortened

PAUSE = 8.0
"""Longest delay in seconds before the openai client retries."""


class CompletionClient:
    """Sends requests and collects their outcomes: replies, or an error of one line.

    Args:
        url: of the API (see :func:`api_url`).
        api_key: where the server needs one.
        timeout: seconds without an answer after which a request is tried again; all attempts together are bounded accordingly.
        retries: further attempts where the server is busy, does not answer or cannot be reached.
        concurrency: requests at once.

    Raises:
        ConfigError: unusable settings.
        MissingDependencyError: no ``openai`` package.
    """

    def __init__(self, url: str, *, api_key: str | None, timeout: float, retries: int, concurrency: int) -> None:
        _check_settings(timeout, retries, concurrency)
        self.url, self.timeout, self.retries = url, timeout, retries
        openai = _openai()
        self._client = openai.AsyncOpenAI(base_url=self.url, api_key=api_key or "none", timeout=timeout, max_retries=retries)
        self._refusals: tuple[type[Exception], ...] = (openai.BadRequestError, openai.UnprocessableEntityError)
        self._several = True  # until the server turns out to return one choice at a time
        self._slots = asyncio.Semaphore(concurrency)
        self._done: queue.SimpleQueue[tuple[Any, list[Any] | str]] = queue.SimpleQueue()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ivg-endpoint", daemon=True)
        self._thread.start()

    def send(self, key: Any, body: Mapping[str, Any], seeds: Sequence[int]) -> Future[None]:
        """Begin a request for as many choices as there are seeds; the first seed is used where one HTTP request returns them all.

        Cancelling the returned future closes the connection; ``key`` then has no outcome.

        Raises:
            ModelError: closed.
        """
        self.check_open()
        return asyncio.run_coroutine_threadsafe(self._run(key, body, seeds), self._loop)

    def outcomes(self, wait: float) -> list[tuple[Any, list[Any] | str]]:
        """(key, checked replies or the error) of all requests that are done; waits up to ``wait`` seconds for the first.

        Raises:
            ModelError: closed.
        """
        self.check_open()
        out = []
        try:
            out.append(self._done.get(timeout=wait) if wait > 0 else self._done.get_nowait())
            while True:
                out.append(self._done.get_nowait())
        except queue.Empty:
            return out

    def close(self) -> None:
        """Abort everything and end the thread."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._shutdown(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def check_open(self) -> None:
        """Raise ModelError after :meth:`close`."""
        if self._closed:
            raise ModelError(f"the engine of {self.url} is closed\n  create a new one")

    # In the thread of the loop

    async def _shutdown(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    async def _run(self, key: Any, body: Mapping[str, Any], seeds: Sequence[int]) -> None:
        outcome: list[Any] | str
        try:
            outcome = await self._replies(body, seeds)
        except Exception as e:  # whatever the client or the server do: this request fails, others go on
            try:
                outcome = self._error(e)
            except Exception as worse:  # a request without an outcome would be waited for forever
                outcome = UpstreamError(f"{self.url} failed: {type(e).__name__} ({type(worse).__name__} while reading that error)")
        self._done.put((key, outcome))

    async def _replies(self, body: Mapping[str, Any], seeds: Sequence[int]) -> list[Any]:
        """One reply with all choices, or several from a server that returns one choice at a time.

        Some of those refuse ``n`` > 1 (llama.cpp), others ignore it (llama-cpp-python).
        """
        replies = []
        if len(seeds) == 1 or self._several:
            try:
                replies.append(await self._post(body, len(seeds), seeds[0]))
            except self._refusals:
                if len(seeds) == 1:
                    raise
        had = sum(len(reply.choices) for reply in replies)
        if had < len(seeds):
            replies += await _all([self._post(body, 1, seed) for seed in seeds[had:]])
            self._several = False  # one choice at a time
        return replies

    async def _post(self, body: Mapping[str, Any], n: int, seed: int) -> Any:
        async with self._slots, asyncio.timeout((self.retries + 1) * self.timeout + self.retries * PAUSE):
            reply = await self._client.completions.create(**body, n=n, seed=seed)
        check_reply(reply)
        return reply

    def _error(self, e: Exception) -> UpstreamError:
        """The error in one line that names the server."""
        openai, status, message = _openai(), None, ""
        if isinstance(e, openai.APIStatusError):
            own = e.body.get("message") if isinstance(e.body, dict) else None  # some send a list or an object
            status, message = e.status_code, str(own or e.message)
            text = f"answered {status}: {message}"
        elif isinstance(e, openai.APITimeoutError | TimeoutError):
            text = f"timed out after {self.retries + 1} attempts of {self.timeout:g} s; check the server, or raise the timeout"
        elif isinstance(e, openai.APIConnectionError):
            text = f"cannot be reached ({e.__cause__ or e}); is the server running?"
        elif isinstance(e, ModelError):
            text = str(e)
        else:
            text = f"failed: {type(e).__name__}: {e}"
        return UpstreamError(f"{self.url} {_one_line(text)}", status, _one_line(message))


def api_url(url: str) -> str:
    """Where the API begins: ``/v1`` where only a server is named.

    Raises:
        ConfigError: no http address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"unusable address {url!r} of an endpoint\n  expected one such as http://localhost:8000/v1")
    whole = url.rstrip("/").removesuffix("/completions")
    return whole if parts.path.strip("/") else f"{whole}/v1"


def _one_line(text: str) -> str:
    return shortened(" ".join(text.split()), 500)


def _check_settings(timeout: float, retries: int, concurrency: int) -> None:
    rules = (
        ("timeout", timeout, timeout > 0, "positive (seconds)"),
        ("retries", retries, retries >= 0, "0 or more"),
        ("concurrency", concurrency, concurrency >= 1, "at least 1 request"),
    )
    for name, got, fine, expected in rules:
        if not fine:
            raise ConfigError(f"{name} of an endpoint must be {expected}, got {got}")


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise MissingDependencyError("an endpoint needs the package openai\n  pip install 'ivg[endpoint]'") from None
    return openai


async def _all(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All results in order; where one fails the others are cancelled."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
