"""The engine over vLLM: whole chunks of all beams, each request at its own pace (``types.AsyncEngine``).

A chunk is one request of vLLM's, its K children drawn side by side; what the beams share is in vLLM's prefix cache, so a chunk
reads what is new and the last unfinished block. Nothing of a beam is kept here: tokens go in, tokens come out.

Draws are vLLM's own, seeded by request, place in the search tree and position: a seed reproduces an answer, but it is another
answer than the transformers engine's, of the same distribution.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ivg.engines.sequences import TokenSequence, append_token, as_beams, fork
from ivg.engines.vllm.client import EngineClient, EngineOutput
from ivg.engines.vllm.config import KEY
from ivg.engines.vllm.value import InnerValue
from ivg.errors import ConfigError, ModelError
from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.vocabulary import Vocabulary
from ivg.settings.sampling import ONLY_TRANSFORMERS
from ivg.types import Beam, ExpandOutput, ExpandRequest, Prompt, SamplingParams, TokenGuidance, Value
from ivg.utils.rng import mix

NEWS_SECONDS = 0.05
"""How long :meth:`VLLMEngine.collect` waits for news."""

_ELSEWHERE = "leave --engine out: the transformers engine can"


@dataclass
class PrefixStats:
    """Tokens that chunks submitted again, and how many of them the prefix cache held."""

    submitted: int = 0
    cached: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the tokens that had been submitted before; 0 where there were none."""
        return self.cached / self.submitted if self.submitted else 0.0


@dataclass
class _RunningRequest:
    """A request inside vLLM."""

    request: ExpandRequest
    family: list[TokenSequence]
    prompt: int
    again: bool
    copies: int = 1


class VLLMEngine:
    """Extends beams with a composite (or plain) model inside vLLM.

    Args:
        core: runs it.
        base: how the base reads prompts.
        parts: names of all models inside, for usage: each reads the same tokens.
        guides: the values that guide inside, by group.
    """

    name = "vllm"
    unsupported: Mapping[str, str] = {
        "pause": _ELSEWHERE,
        "return_log_ratio": _ELSEWHERE,
        "alternatives": _ELSEWHERE,
        **dict.fromkeys(
            ONLY_TRANSFORMERS,
            f"{_ELSEWHERE}; where the base's generation_config.json sets it: --generation-config ignore",
        ),
    }

    def __init__(self, core: EngineClient, base: PromptEncoder, parts: Sequence[str], guides: Mapping[str, InnerValue]) -> None:
        self.core, self.base, self.parts, self.guides = core, base, tuple(parts), dict(guides)
        base.reads_given_ids = True
        self.vocabulary: Vocabulary = base.vocabulary
        self.prefix = PrefixStats()
        self._running: dict[str, _RunningRequest] = {}
        self._news: list[ExpandOutput] = []

    # types.Engine

    def open(self, prompt: Prompt, sampling: SamplingParams) -> Beam:
        """The empty response to ``prompt``.

        Raises:
            PromptError: empty, or too long together with ``sampling.max_new_tokens``.
        """
        return self.base.root(prompt, sampling.max_new_tokens)

    def prompt_tokens(self, prompt: Prompt) -> int:
        """Length of the prompt in base tokens."""
        return len(self.base.prompt_ids(prompt))

    def check(self, guidance: TokenGuidance | None) -> None:
        """Raise for guidance that is no sum of logits inside the composite.

        Raises:
            ConfigError: names what vLLM cannot do.
        """
        if guidance is None:
            return
        for name in ("candidates", "gate", "draft"):
            if got := getattr(guidance, name):
                raise ConfigError(f"{name}={got}: the engine vllm adds up whole logits at every token\n  {_ELSEWHERE}")
        for _, value in _parts_of(guidance.value, 1.0):
            if not isinstance(value, InnerValue) or self.guides.get(value.name) is not value:
                have = ", ".join(self.guides) or "none"
                raise ConfigError(
                    f"{getattr(value, 'name', value)} does not guide inside this engine\n  got guides: {have}; "
                    'name those that shall with [vllm] guides = ["implicit", …]'
                )

    def extend(self, requests: Sequence[ExpandRequest]) -> list[list[Beam]]:
        """The children of every request's beam, all together."""
        self.submit(requests)
        wanted, found = {o.beam.key for o in requests}, dict[int, list[Beam]]()
        while len(found) < len(wanted):
            found |= {g.beam: g.children for g in self.collect(wanted) if g.done}
        return [found[o.beam.key] for o in requests]

    def release(self, keys: Sequence[int]) -> None:
        """Abort the requests of these beams; else nothing is kept for them."""
        gone = set(keys)
        numbers = [number for number, running in self._running.items() if running.request.beam.key in gone]
        for number in numbers:
            del self._running[number]
        self._news = [growth for growth in self._news if growth.beam not in gone]
        self.core.abort(numbers)

    # types.AsyncEngine

    def submit(self, requests: Sequence[ExpandRequest]) -> None:
        """Begin these chunks; one that vLLM refuses ends its children with an error."""
        for request in requests:
            beam, family = request.beam, fork(request)
            prompt = self.base.prompt_ids(beam.prompt)
            copies = request.successors if request.sampling.temperature == 0 else 1  # greedy children are all the same
            try:
                number = self.core.add([*prompt, *beam.token_ids], self._params(request, family[0].limit - len(beam.token_ids), copies))
            except ValueError as e:
                for child in family:
                    child.finish, child.error = "error", f"vLLM refuses this: {str(e).strip().splitlines()[0]}"
                self._news.append(ExpandOutput(beam.key, as_beams(beam, family)))
                continue
            length = len(prompt) + len(beam.token_ids)
            self._running[number] = _RunningRequest(request, family, length, bool(beam.token_ids), copies)

    def collect(self, beams: Collection[int] | None = None) -> list[ExpandOutput]:
        """Chunks of ``beams`` that are done, and what has grown of those that are watched."""
        until = time.monotonic() + NEWS_SECONDS
        while self._running and not any(beams is None or growth.beam in beams for growth in self._news):
            for news in self.core.step():
                self._hear(news)
            if time.monotonic() > until:
                break
        grown = [growth for growth in self._news if beams is None or growth.beam in beams]
        self._news = [growth for growth in self._news if beams is not None and growth.beam not in beams]
        return grown

    def restart(self) -> bool:
        """Forget all requests; where vLLM's engine died it begins anew. Had it died?"""
        with suppress(ModelError):  # it may be dead without our knowing, and shall live again
            self.core.abort(list(self._running))
        self._running.clear()
        self._news.clear()
        return self.core.restart()

    def close(self) -> None:
        """Stop vLLM."""
        self.core.close()

    # Inside

    def _params(self, request: ExpandRequest, tokens: int, copies: int) -> Any:
        from vllm import SamplingParams as Params
        from vllm.sampling_params import RequestOutputKind

        s, eos = request.sampling, sorted(self.vocabulary.eos_ids)
        seed = mix(request.seed, request.beam.rng_path, len(request.beam.token_ids), request.first) >> 2  # child i has seed + i
        return Params(
            n=request.successors // copies,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            seed=None if s.temperature == 0 else seed,
            max_tokens=tokens,
            min_tokens=tokens if s.ignore_eos else self._least(request, tokens),  # forbids the tokens that stop, for so long
            stop_token_ids=eos,
            ignore_eos=True,  # those of the model's files; ours are in stop_token_ids
            stop=list(s.stop) or None,
            detokenize=bool(s.stop),
            skip_special_tokens=True,
            output_kind=RequestOutputKind.CUMULATIVE if request.stream else RequestOutputKind.FINAL_ONLY,
            extra_args=self._weights(request.guidance),
        )

    def _least(self, request: ExpandRequest, tokens: int) -> int:
        """Tokens of a chunk at least; a text that has fewer than it must does not end in it."""
        s, already = request.sampling, len(request.beam.token_ids)
        wanted = s.min_new_tokens - already
        if s.min_length:
            wanted = max(wanted, s.min_length - already - len(self.base.prompt_ids(request.beam.prompt)))
        return min(max(wanted, 0), tokens)

    def _weights(self, guidance: TokenGuidance | None) -> dict[str, float] | None:
        """Of every group: what is not named guides nothing."""
        if not self.guides:
            return None
        found = dict.fromkeys(self.guides, 0.0)
        if guidance is not None:
            for weight, value in _parts_of(guidance.value, guidance.beta):
                found[value.name] += weight
        return {f"{KEY}.{name}": weight for name, weight in found.items()}

    def _hear(self, news: EngineOutput) -> None:
        """Let the children of a request grow by what vLLM says of them."""
        output = news.output
        running = self._running.get(output.request_id)
        if running is None:
            return
        request, already = running.request, len(running.request.beam.token_ids)
        for completion in output.outputs:
            family = running.family if running.copies > 1 else running.family[completion.index : completion.index + 1]
            for child in family:
                _grow(child, list(completion.token_ids)[len(child.token_ids) - already :])
                if completion.finish_reason is not None:
                    _settle(child, str(completion.finish_reason), already)
        done = bool(output.finished)
        if done:
            del self._running[output.request_id]
            self._count(running, news.cached)
        if done or request.stream:
            self._news = [growth for growth in self._news if growth.beam != request.beam.key]
            self._news.append(ExpandOutput(request.beam.key, as_beams(request.beam, running.family), done))

    def _count(self, running: _RunningRequest, cached: Sequence[int]) -> None:
        """Tokens that every part read: of the prompt what each child did not find in the cache, of the children all but the last.

        What all children of a request's first chunk found there came from other requests: it is asked for, and cached.
        """
        children = running.family[:: running.copies]
        grown = sum(len(child.token_ids) - len(running.request.beam.token_ids) for child in children)
        read = max(0, running.prompt * len(children) - sum(cached) + grown - len(children))
        spared = 0 if running.again else min(cached, default=0)
        for part in self.parts:
            running.request.beam.token_counter.add(part, read + spared, spared)
        if running.again:
            self.prefix.submitted += running.prompt * len(children)
            self.prefix.cached += sum(cached)


def _grow(child: TokenSequence, tokens: Iterable[int]) -> None:
    """One token after the other, until one ends the response."""
    for token in tokens:
        if child.finish is not None:
            return
        append_token(child, int(token))


def _settle(child: TokenSequence, reason: str, already: int) -> None:
    """End a child that vLLM broke off, or that got nothing: asked for again it might go on like that for ever."""
    if child.finish is None and (reason in ("error", "abort") or len(child.token_ids) == already):
        child.finish, child.error = "error", f"vLLM broke this off: {reason}"


def _parts_of(value: Value, weight: float) -> Iterable[tuple[float, Value]]:
    """(weight, value) of what a composite value is made of."""
    parts = getattr(value, "parts", None)
    if parts is None:
        yield weight, value
        return
    for share, part in parts:
        yield from _parts_of(part, weight * share)
