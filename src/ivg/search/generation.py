"""Answers of a model: all at once, one after the other, as a stream, and for ``asyncio``. Each is a way to run the same requests."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, overload

from ivg.errors import ConfigError, GenerationError, PromptError
from ivg.search.background import BackgroundSearch
from ivg.search.methods import Method
from ivg.search.request import RepeatedPrompts, Request, streaming_stride
from ivg.search.searcher import Searcher
from ivg.search.text_stream import AsyncTextStream, TextStream
from ivg.search.unused import warn_of_unused
from ivg.types import Completion, Message, Posterior, Prompt, Step, likeliest
from ivg.types.messages import Conversation, PromptLike, read_prompts
from ivg.utils.locks import FairLock

OnProgress = Callable[[int, int], object]
"""Called with (answers that are done, answers in all)."""
Answers = Completion | list[Completion] | list[list[Completion]]


class GenerationMixin(ABC):
    """What a model does with requests. A subclass makes the requests and the search loops.

    Attributes:
        lock: shared by all loops over the model.
    """

    lock: FairLock
    _background: BackgroundSearch | None = None

    @abstractmethod
    def request(self, prompt: PromptLike, method: str | Method = "ivg", **settings: Any) -> Request:
        """One request from its settings."""

    @abstractmethod
    def searcher(self, max_beams: int | None = None) -> Searcher:
        """A new search loop."""

    def run(self, requests: Iterable[Request], max_beams: int | None = None) -> Iterator[tuple[int, Completion]]:
        """Run requests together; yields (position, completion) as each is done. Abandoning the iteration cancels the rest."""
        return self.searcher(max_beams).run(requests)

    @overload
    def generate(
        self, prompts: PromptLike, method: str | Method = "ivg", *, n: None = None, on_progress: OnProgress | None = None, **settings: Any
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Conversation],
        method: str | Method = "ivg",
        *,
        n: None = None,
        on_progress: OnProgress | None = None,
        **settings: Any,
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompts: PromptLike, method: str | Method = "ivg", *, n: int, on_progress: OnProgress | None = None, **settings: Any
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Conversation],
        method: str | Method = "ivg",
        *,
        n: int,
        on_progress: OnProgress | None = None,
        **settings: Any,
    ) -> list[list[Completion]]: ...
    def generate(
        self,
        prompts: PromptLike | Sequence[Conversation],
        method: str | Method = "ivg",
        *,
        n: int | None = None,
        on_progress: OnProgress | None = None,
        **settings: Any,
    ) -> Answers:
        """Answer one prompt (text, one message, or the messages of one conversation), or a list of them in one batch.

        Args:
            prompts: one prompt, or a list of prompts. One that comes again in the list gets new samples, with the indices behind those
                of its earlier places; every other prompt is answered as alone.
            method: a name of :attr:`GuidedModel.methods`, ``custom``, or a :class:`~ivg.Method`.
            n: samples for each prompt; None: one. Sample i has index i of :meth:`request`, so sample 0 is that of a single answer.
            on_progress: called with (done, total) after each answer; what it raises ends the run.
            settings: see :meth:`request`; a warning names those that have no effect on the method. And ``best_of``: generate so many
                samples, more than n, and return the n (None: the one) with the highest :attr:`Completion.mean_logprob`, best first.

        Returns:
            A completion for one prompt, a list in the same order for a list; with ``n``, a list of n completions in place of each.
        """
        requests, single = self._requests(prompts, method, n, settings)
        done: dict[int, Completion] = {}
        for position, completion in self.run(requests):
            done[position] = completion
            if on_progress is not None:
                on_progress(len(done), len(requests))
        return _in_order(done, n, single, _drawn(n, settings))

    @overload
    def generate_iter(
        self, prompts: Iterable[Conversation], method: str | Method = "ivg", *, n: None = None, **settings: Any
    ) -> Iterator[Completion]: ...
    @overload
    def generate_iter(
        self, prompts: Iterable[Conversation], method: str | Method = "ivg", *, n: int, **settings: Any
    ) -> Iterator[list[Completion]]: ...
    def generate_iter(
        self, prompts: Iterable[Conversation], method: str | Method = "ivg", *, n: int | None = None, **settings: Any
    ) -> Iterator[Completion] | Iterator[list[Completion]]:
        """Answer prompts that a generator gives, in their order, in batches: no more prompts are taken than run together.

        Abandoning the iteration cancels what runs. An error of a prompt, or of the generator, is raised in its place, behind the answers
        of all prompts before it.

        Args:
            prompts: any iterable, endless ones too.
            method, n, settings: as in :meth:`generate`.
        """
        for answers in self._iterate(prompts, method, _drawn(n, settings), settings):
            chosen = likeliest(answers, n or 1)
            yield chosen if n is not None else chosen[0]  # type: ignore[misc]

    def _iterate(
        self, prompts: Iterable[Conversation], method: str | Method, n: int, settings: dict[str, Any]
    ) -> Iterator[list[Completion]]:
        """The n answers of each prompt."""
        if isinstance(prompts, str | bytes | Mapping | Message | Prompt):
            raise PromptError(f"generate_iter got one prompt, a {type(prompts).__name__}\n  expected several: a list, a generator …")
        searcher, source = self.searcher(), iter(prompts)
        place: dict[int, tuple[int, int]] = {}  # of a running request: its prompt and its sample
        done: dict[int, dict[int, Completion]] = {}
        repeated = _repeated(n, settings)
        taken, given, stopped = 0, 0, None
        try:
            while stopped is None or given < taken:
                while stopped is None and not searcher.full:
                    try:
                        for sample, request in enumerate(self._samples(_conversation(next(source)), method, repeated, settings)):
                            place[searcher.add(request)] = taken, sample
                    except Exception as error:  # the end, or a prompt that cannot be read
                        stopped = error
                    else:
                        if taken == 0:
                            warn_of_unused(method, settings)
                        done[taken] = {}
                        taken += 1
                for step in searcher.step():
                    if step.completion is not None and step.request in place:
                        prompt, sample = place.pop(step.request)
                        done.get(prompt, {})[sample] = step.completion
                while given < taken and len(done[given]) == n:
                    yield [done[given][i] for i in range(n)]
                    del done[given]
                    given += 1
            if not isinstance(stopped, StopIteration):
                raise stopped
        finally:
            for number in place:
                self.lock.later(partial(searcher.cancel, number))

    def posterior(self, prompt: PromptLike, method: str | Method = "smc", **settings: Any) -> Posterior:
        """All weighted responses of a particle filter, with the effective sample size and log Z, in place of one draw.

        Args:
            prompt, method, settings: as in :meth:`request`; the rule of the method is ``particles``.

        Raises:
            ConfigError: another rule.
            GenerationError: the filter failed.
        """
        request = self.request(prompt, method, **settings)
        warn_of_unused(method, settings)
        if request.search.particles is None:
            raise ConfigError("posterior needs weighted responses, which the rule particles has\n  give method='smc', or rule='particles'")
        ((_, completion),) = self.run([request])
        if completion.posterior is None:
            raise GenerationError(completion.error or "the filter has no particles")
        return completion.posterior

    def stream(self, prompt: PromptLike, method: str | Method = "ivg", **settings: Any) -> TextStream:
        """Answer one prompt piece by piece: an iterator over texts that join to the answer.

        A method with several beams gives text as soon as all of them share it. The answer is that of :meth:`generate`.

        Args:
            prompt, method, settings: as in :meth:`request`.

        Raises:
            ConfigError, PromptError: as :meth:`generate`.
        """
        return TextStream(self.searcher(), self._streamed(prompt, method, settings))

    def astream(self, prompt: PromptLike, method: str | Method = "ivg", **settings: Any) -> AsyncTextStream:
        """As :meth:`stream`, for ``async for``; requests of all coroutines share batches. Errors are raised at the first piece."""
        return AsyncTextStream(lambda: self._streamed(prompt, method, settings), self._shared)

    @overload
    async def agenerate(
        self, prompts: PromptLike, method: str | Method = "ivg", *, n: None = None, on_progress: OnProgress | None = None, **settings: Any
    ) -> Completion: ...
    @overload
    async def agenerate(
        self,
        prompts: Sequence[Conversation],
        method: str | Method = "ivg",
        *,
        n: None = None,
        on_progress: OnProgress | None = None,
        **settings: Any,
    ) -> list[Completion]: ...
    @overload
    async def agenerate(
        self, prompts: PromptLike, method: str | Method = "ivg", *, n: int, on_progress: OnProgress | None = None, **settings: Any
    ) -> list[Completion]: ...
    @overload
    async def agenerate(
        self,
        prompts: Sequence[Conversation],
        method: str | Method = "ivg",
        *,
        n: int,
        on_progress: OnProgress | None = None,
        **settings: Any,
    ) -> list[list[Completion]]: ...
    async def agenerate(
        self,
        prompts: PromptLike | Sequence[Conversation],
        method: str | Method = "ivg",
        *,
        n: int | None = None,
        on_progress: OnProgress | None = None,
        **settings: Any,
    ) -> Answers:
        """As :meth:`generate`, without blocking the event loop; requests of all coroutines share batches.

        A coroutine that is cancelled takes its requests with it. ``on_progress`` is called in the event loop.
        """
        requests, single = await asyncio.to_thread(self._requests, prompts, method, n, settings)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Step | Exception]]()

        def deliver(position: int, event: Step | Exception) -> None:
            if isinstance(event, Exception) or event.completion is not None:
                loop.call_soon_threadsafe(events.put_nowait, (position, event))

        background = self._shared()
        jobs = [background.submit(request, partial(deliver, i)) for i, request in enumerate(requests)]
        done: dict[int, Completion] = {}
        try:
            while len(done) < len(requests):
                position, event = await events.get()
                if isinstance(event, Exception):
                    raise event
                assert event.completion is not None
                done[position] = event.completion
                if on_progress is not None:
                    on_progress(len(done), len(requests))
        finally:
            for job in jobs:
                job.cancel()
        return _in_order(done, n, single, _drawn(n, settings))

    def _requests(
        self, prompts: PromptLike | Sequence[Conversation], method: str | Method, n: int | None, settings: dict[str, Any]
    ) -> tuple[list[Request], bool]:
        """(n requests for each prompt, is it one prompt alone)."""
        items, single = read_prompts(prompts)
        repeated = _repeated(_drawn(n, settings), settings)
        requests = [request for item in items for request in self._samples(item, method, repeated, settings)]
        warn_of_unused(method, settings)
        return requests, single

    def _samples(self, prompt: PromptLike, method: str | Method, repeated: RepeatedPrompts, settings: dict[str, Any]) -> list[Request]:
        rest = {name: value for name, value in settings.items() if name not in ("index", "best_of")}
        if settings.get("best_of") is not None and rest.get("alternatives") is None:
            rest["alternatives"] = 0  # it selects by log-probabilities
        request = self.request(prompt, method, index=repeated.first, **rest)
        return [replace(request, index=i) for i in repeated.indices(request.prompt)]

    def _streamed(self, prompt: PromptLike, method: str | Method, settings: dict[str, Any]) -> Request:
        request = self.request(prompt, method, **settings)
        warn_of_unused(method, settings)
        return replace(request, stride=streaming_stride(request))

    def _shared(self) -> BackgroundSearch:
        """The loop in the background that all coroutines share."""
        with self.lock:
            if self._background is None:
                self._background = BackgroundSearch(self.searcher)
            return self._background


def _repeated(n: int, settings: Mapping[str, Any]) -> RepeatedPrompts:
    return RepeatedPrompts(n, settings.get("index", 0))


def _drawn(n: int | None, settings: Mapping[str, Any]) -> int:
    """Samples that are generated for each prompt.

    Raises:
        ConfigError: none, or fewer than are returned; no whole number.
    """
    best_of = settings.get("best_of")
    for name, number in (("n", n), ("best_of", best_of)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, Integral)):
            raise ConfigError(f"{name} must be a whole number, got {number!r}")
    if n is not None and n < 1:
        raise ConfigError(f"n must be at least 1 sample, got {n}")
    if best_of is not None and best_of < (n or 1):
        raise ConfigError(f"best_of must be at least n ({n or 1}), got {best_of}")
    return int(best_of or n or 1)


def _conversation(item: Any) -> Conversation:
    """One prompt of several; a lone message would be taken for a conversation of its own.

    Raises:
        PromptError: a message.
    """
    if isinstance(item, Mapping | Message):
        raise PromptError(
            "generate_iter got a message where a prompt should be\n  expected texts, or a list of messages for each conversation"
        )
    return item  # type: ignore[no-any-return]


def _in_order(done: dict[int, Completion], n: int | None, single: bool, drawn: int) -> Answers:
    """The answers of each prompt: of the ``drawn`` samples the n likeliest."""
    samples = [likeliest([done[i] for i in range(start, start + drawn)], n or 1) for start in range(0, len(done), drawn)]
    out: Any = samples if n is not None else [some[0] for some in samples]
    return out[0] if single else out
