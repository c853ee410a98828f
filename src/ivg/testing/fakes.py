"""Engines over letters, for exact and fast tests of the search. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from ivg.errors import ConfigError
from ivg.types import (
    AsyncEngine,
    Beam,
    Engine,
    ExpandOutput,
    ExpandRequest,
    FinishReason,
    Prompt,
    SamplingParams,
    TokenGuidance,
    Value,
    new_key,
)
from ivg.types.steps import finished_steps
from ivg.utils.rng import child_rng_path, uniform


class FakeEngine(Engine):
    """Letters instead of tokens: id i is the letter ``alphabet[i]``, the last id ends the text; drawn uniformly.

    Args:
        alphabet: letters.
        weights: of the letters and the end, given the text so far; the base's distribution up to a factor.
        proposal: the same for requests with guidance, and for drafts; the value itself is not called.

    Attributes:
        held: keys of beams that are not released.
        calls: number of requests in each call.
    """

    name = "fake"

    def __init__(
        self,
        alphabet: str = "abcdefgh",
        weights: Callable[[str], Sequence[float]] | None = None,
        proposal: Callable[[str], Sequence[float]] | None = None,
    ) -> None:
        self.alphabet, self.weights, self.proposal = alphabet, weights, proposal
        self.eos = len(alphabet)
        self.held: set[int] = set()
        self.calls: list[int] = []

    def open(self, prompt: Prompt, sampling: SamplingParams) -> Beam:
        """The empty response."""
        beam = Beam(new_key(), None, prompt, inherits=False)
        self.held.add(beam.key)
        return beam

    def prompt_tokens(self, prompt: Prompt) -> int:
        """One for each letter."""
        return len(str(prompt.content))

    def check(self, guidance: TokenGuidance | None) -> None:
        """Anything goes."""

    def check_drafter(self, drafter: Value | None, sampling: SamplingParams, *, compared: bool = False) -> None:
        """Anything goes."""

    def release(self, keys: Sequence[int]) -> None:
        """Forget these beams."""
        self.held -= set(keys)

    def extend(self, requests: Sequence[ExpandRequest]) -> list[list[Beam]]:
        """Children of every beam."""
        self.calls.append(len(requests))
        return [self._family(request) for request in requests]

    def _family(self, request: ExpandRequest) -> list[Beam]:
        beam = request.beam
        if self._pauses(request, beam.text, len(beam.token_ids)):
            return [replace(beam, paused=True)]
        return [self._child(request, request.first + i) for i in range(request.successors)]

    def _pauses(self, request: ExpandRequest, text: str, length: int) -> bool:
        """Does the request's chunk end behind ``text``?"""
        if request.pause is None or length < request.pause.after:
            return False
        base = self._distribution(text)
        return -sum(p * math.log(p) for p in base if p) >= request.pause.entropy

    def _child(self, request: ExpandRequest, index: int) -> Beam:
        beam = request.beam
        rng_path, ids = child_rng_path(beam.rng_path, len(beam.token_ids), index), list(beam.token_ids)
        text, ratio, paused = beam.text, beam.log_ratio, False
        finish: FinishReason | None = None
        for _ in range(request.tokens):
            if self._pauses(request, text, len(ids)):
                paused = True
                break
            base = self._distribution(text, allow_eos=not request.sampling.ignore_eos)
            guided = self.proposal is not None and (request.guidance is not None or request.drafted)
            used = self._distribution(text, allow_eos=not request.sampling.ignore_eos, guided=True) if guided else base
            token = sample_from_weights(used, uniform(request.seed, rng_path, len(ids)))
            if request.return_log_ratio:
                ratio += (math.log(base[token]) if base[token] else -math.inf) - math.log(used[token])
            ids.append(token)
            beam.token_counter.add("draft" if request.drafted else "fake", 1)
            text += "" if token == self.eos else self.alphabet[token]
            found = [text.find(s) for s in request.sampling.stop if s in text]
            if token == self.eos or found:
                text, finish = text[: min(found, default=len(text))], "stop"
                break
            if len(ids) == request.sampling.max_new_tokens:
                finish = "length"
                break
            if request.until is not None and finished_steps(text, request.until) > finished_steps(text[:-1], request.until):
                paused = True
                break
        key = new_key()
        self.held.add(key)
        pieces = tuple("" if i == self.eos else self.alphabet[i] for i in ids) if request.record else ()
        shifts = (0.0,) * len(ids) if request.record else ()
        return Beam(
            key,
            beam.key,
            beam.prompt,
            tuple(ids),
            text,
            finish,
            beam.token_counter,
            rng_path=rng_path,
            pieces=pieces,
            guide_shift=shifts,
            log_ratio=ratio,
            paused=paused,
        )

    def _distribution(self, text: str, *, allow_eos: bool = True, guided: bool = False) -> list[float]:
        source = self.proposal if guided else self.weights
        weights = list(source(text)) if source else [1.0] * (len(self.alphabet) + 1)
        if not allow_eos:
            weights[self.eos] = 0.0
        return [w / sum(weights) for w in weights]


class AsyncFakeEngine(AsyncEngine, FakeEngine):
    """As :class:`FakeEngine`, but each request ends at its own time, in no particular order.

    Unfinished children are shown with half of their new letters where ``stream`` is set.

    Attributes:
        given_up: beams whose requests were aborted.
        rounds: calls of :meth:`poll`; decides which requests end in the next one.
    """

    name = "async-fake"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        AsyncEngine.__init__(self)
        FakeEngine.__init__(self, *args, **kwargs)
        self.given_up: list[int] = []
        self._requests: dict[int, ExpandRequest] = {}
        self.rounds = 0

    def submit(self, requests: Sequence[ExpandRequest]) -> None:
        """Begin them; invalid ones return error beams."""
        self.calls.append(len(requests))
        for request in requests:
            try:
                self.check_request(request)
            except ConfigError as e:
                errors = [replace(child, finish="error", error=str(e)) for child in self._family(request)]
                self.keep([ExpandOutput(request.beam.key, errors)])
            else:
                self._requests[request.beam.key] = request

    def poll(self, seconds: float) -> list[ExpandOutput]:
        """Some of the requests, complete; of the others those that are streamed."""
        self.rounds += 1
        out: list[ExpandOutput] = []
        requests = list(self._requests.items())
        for place, (key, request) in enumerate(requests):
            if len(requests) == 1 or uniform(place, self.rounds) < 0.3:
                del self._requests[key]
                out.append(ExpandOutput(key, self._family(request)))
            elif request.stream and request.tokens > 1:
                half = self._family(replace(request, tokens=request.tokens // 2))
                self.held -= {b.key for b in half}
                out.append(ExpandOutput(key, half, done=False))
        return out

    @property
    def running(self) -> bool:
        """Is any request unfinished?"""
        return bool(self._requests)

    def abort(self, beams: Collection[int] | None = None) -> None:
        """Drop these requests."""
        keys = list(self._requests) if beams is None else beams
        self.given_up += [k for k in keys if self._requests.pop(k, None) is not None]

    def release(self, keys: Sequence[int]) -> None:
        """Forget these beams, their requests, and children not collected yet."""
        lost = [child.key for key in keys if (output := self._outputs.get(key)) is not None for child in output.children]
        AsyncEngine.release(self, keys)
        FakeEngine.release(self, [*keys, *lost])


def sample_from_weights(distribution: Sequence[float], u: float) -> int:
    """The first position whose cumulated probability exceeds ``u``."""
    total = 0.0
    for i, p in enumerate(distribution):
        total += p
        if total > u:
            return i
    return max(i for i, p in enumerate(distribution) if p)
