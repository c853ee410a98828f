"""The text of one response piece by piece, while it is written.

What all beams of the request share is given as soon as they share it, and never taken back; the pieces join to the text of the completion.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from ivg.errors import GenerationError
from ivg.search.background import BackgroundSearch, Job
from ivg.search.request import Request
from ivg.search.searcher import Searcher
from ivg.types import Completion, Step


class _Pieces:
    """What of a response has been given, and its completion."""

    def __init__(self) -> None:
        self.given = 0
        self.completion: Completion | None = None

    def piece(self, step: Step) -> str:
        """The text that ``step`` adds.

        Raises:
            GenerationError: the response failed.
        """
        self.completion = done = step.completion
        if done is not None:
            _require_success(done)
        text = step.committed if done is None else done.text
        new, self.given = text[self.given :], max(self.given, len(text))
        return new


class TextStream:
    """An iterator over the pieces of one response::

        with model.stream("The movie was", "eft") as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        print(stream.completion.usage)

    To stop early, leave the ``with`` block, call :meth:`close` or drop the object: the request is then cancelled.

    Args:
        searcher: a search loop of its own.
        request: what to answer.

    Raises:
        PromptError, ConfigError: the request is refused; at once, not at the first piece.

    Attributes:
        completion: the whole answer, once all pieces have been read; until then None.
    """

    def __init__(self, searcher: Searcher, request: Request) -> None:
        self._searcher, self._pieces = searcher, _Pieces()
        self._number = searcher.add(request)
        self._cancel = weakref.finalize(self, searcher.lock.later, partial(searcher.cancel, self._number))

    @property
    def completion(self) -> Completion | None:
        """The whole answer, once all pieces have been read; until then None."""
        return self._pieces.completion

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """The next piece, never empty.

        Raises:
            GenerationError: the response failed; no piece comes after it.
        """
        while self.completion is None and self._cancel.alive:
            try:
                text = "".join([self._pieces.piece(step) for step in self._searcher.step() if step.request == self._number])
            except BaseException:
                self.close()
                raise
            if text:
                return text
        self.close()
        raise StopIteration

    def read(self) -> Completion:
        """Read what is left, and give the whole answer.

        Raises:
            GenerationError: the response failed, or the stream was closed before its end.
        """
        for _ in self:
            pass
        return _whole(self.completion)

    def close(self) -> None:
        """Cancel what is not written yet; of an ended stream: nothing."""
        self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncTextStream:
    """An asynchronous iterator over the pieces of one response::

        async with model.astream("The movie was", "eft") as stream:
            async for piece in stream:
                print(piece, end="", flush=True)

    The request runs with those of all other coroutines in one batch.

    Args:
        make: makes the request, in another thread.
        background: runs it.

    Attributes:
        completion: the whole answer, once all pieces have been read; until then None.
    """

    def __init__(self, make: Callable[[], Request], background: Callable[[], BackgroundSearch]) -> None:
        self._make, self._background, self._pieces = make, background, _Pieces()
        self._events: asyncio.Queue[Step | Exception] = asyncio.Queue()
        self._job: Job | None = None
        self._closed = False

    @property
    def completion(self) -> Completion | None:
        """The whole answer, once all pieces have been read; until then None."""
        return self._pieces.completion

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """The next piece, never empty.

        Raises:
            PromptError, ConfigError: the request is refused.
            GenerationError: the response failed; no piece comes after it.
        """
        while self.completion is None and not self._closed:
            try:
                text = await self._next_text()
            except BaseException:
                await self.aclose()
                raise
            if text:
                return text
        raise StopAsyncIteration

    async def _next_text(self) -> str:
        if self._job is None:
            request, loop = await asyncio.to_thread(self._make), asyncio.get_running_loop()
            put = self._events.put_nowait
            self._job = self._background().submit(request, lambda event: loop.call_soon_threadsafe(put, event))
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return self._pieces.piece(event)

    async def read(self) -> Completion:
        """Read what is left, and give the whole answer.

        Raises:
            GenerationError: the response failed, or the stream was closed before its end.
        """
        async for _ in self:
            pass
        return _whole(self.completion)

    async def aclose(self) -> None:
        """Cancel what is not written yet; of an ended stream: nothing."""
        self._closed = True
        if self._job is not None:
            self._job.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._job is not None:
            self._job.cancel()


def _whole(completion: Completion | None) -> Completion:
    if completion is None:
        raise GenerationError("the stream was closed before its end, so there is no completion\n  read it to its end")
    _require_success(completion)
    return completion


def _require_success(completion: Completion) -> None:
    if completion.error is not None:
        raise GenerationError(completion.error)
