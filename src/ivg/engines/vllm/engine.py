"""The engine over vLLM: whole chunks of all beams; every request ends at its own time (:class:`~ivg.types.AsyncEngine`).

A chunk is one request to vLLM, its K children sampled side by side. What the beams share is in vLLM's prefix cache, so a chunk reads
what is new and the last unfinished block. Nothing of a beam is kept here: tokens go in, tokens come out.

Draws are vLLM's own, seeded by request, place in the search tree and position: a seed reproduces an answer, but another one than the
transformers engine's, from the same distribution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ivg.engines.grammar import GrammarMasks
from ivg.engines.sequences import TokenSequence, append_token, as_beams, fail, fork
from ivg.engines.token_penalties import TokenPenalties
from ivg.engines.vllm.client import EngineClient, EngineOutput
from ivg.engines.vllm.config import KEY, RESPONSE_KEY
from ivg.engines.vllm.response_grammar import ResponseGrammar
from ivg.engines.vllm.scoring import GivenTokens, score_tokens
from ivg.engines.vllm.value import VLLMGuide
from ivg.errors import ConfigError, ModelError
from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.vocabulary import Vocabulary
from ivg.settings.sampling import IN_CHUNKS, LOOK_BACK, ONLY_TRANSFORMERS, STOPS_BESIDE_EOS, STRUCTURES
from ivg.types import AsyncEngine, ExpandOutput, ExpandRequest, LogprobsRequest, SamplingParams, TokenGuidance, TokenLogprobs, Value
from ivg.utils.rng import mix

_ELSEWHERE = "leave --engine out: the transformers engine can"
_LEAVE_DRAFTS_OUT = f"leave num_speculative_tokens (speculative_config) out of [vllm], or {_ELSEWHERE}"
_SPECULATIVE = {
    **dict.fromkeys(
        ["bad_words", STOPS_BESIDE_EOS, *(f"{name}{IN_CHUNKS}" for name in LOOK_BACK.difference(STRUCTURES))],
        f"ivg's own rules for tokens do not run with vLLM's speculative decoding; {_LEAVE_DRAFTS_OUT}",
    ),
    "logit_bias": f"vLLM's speculative decoding cannot; {_LEAVE_DRAFTS_OUT}",
    "min_p": f"vLLM's speculative decoding cannot; {_LEAVE_DRAFTS_OUT}; where the base's generation_config.json sets it: min_p = 0",
}


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
    """A request inside vLLM.

    Attributes:
        request: what the search asked for.
        family: its children.
        length: tokens submitted: prompt and response so far.
        copies: equal children that vLLM samples once (greedy).
        drawn: tokens that vLLM drew, by sample; a child may have fewer.
    """

    request: ExpandRequest
    family: list[TokenSequence]
    length: int
    copies: int = 1
    drawn: dict[int, int] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Is it a request's first chunk?"""
        return not self.request.beam.token_ids


class VLLMEngine(AsyncEngine):
    """Extends beams with a composite (or plain) model inside vLLM.

    Args:
        client: runs it.
        base: how the base reads prompts.
        submodels: names of all models inside, for usage: each reads the same tokens.
        guides: the values that guide inside, by group.
    """

    name = "vllm"
    logprobs_after_generation = True
    unsupported: Mapping[str, str] = {
        "pause": _ELSEWHERE,
        "until": f"chunks inside vLLM have a length in tokens, so no chunk_until; {_ELSEWHERE}",
        "return_log_ratio": _ELSEWHERE,
        "alternatives": "vLLM gives them once an answer is complete: see Engine.logprobs",
        "thinking": f"guidance inside vLLM begins with the first token, so no guide_after; {_ELSEWHERE}",
        **dict.fromkeys(
            ONLY_TRANSFORMERS,
            f"{_ELSEWHERE}; where the base's generation_config.json sets it: --generation-config ignore",
        ),
    }

    def __init__(self, client: EngineClient, base: PromptEncoder, submodels: Sequence[str], guides: Mapping[str, VLLMGuide]) -> None:
        super().__init__()
        self.client, self.base, self.submodels, self.guides = client, base, tuple(submodels), dict(guides)
        if not client.looks_back:
            self.unsupported = {**self.unsupported, **_SPECULATIVE}
        base.reads_given_ids = True
        self.vocabulary: Vocabulary = base.vocabulary
        self.grammars = GrammarMasks(base.vocabulary)
        self.prefix = PrefixStats()
        self._running: dict[str, _RunningRequest] = {}

    def check(self, guidance: TokenGuidance | None) -> None:
        """Raise for guidance that is no sum of logits inside the composite.

        Raises:
            ConfigError: names what vLLM cannot do.
        """
        if guidance is None:
            return
        for name in ("candidates", "gate", "draft", "plausibility", "kl_budget"):
            if (got := getattr(guidance, name)) or (got is not None and name == "kl_budget"):
                instead = "for drafts set num_speculative_tokens in [vllm]" if name == "draft" else _ELSEWHERE
                raise ConfigError(f"{name}={got}: the engine vllm adds whole logits at every token\n  {instead}")
        for _, value in _weighted_guides(guidance.value, 1.0):
            if self.guides.get(value.name) is not value:
                have = ", ".join(self.guides) or "none"
                raise ConfigError(
                    f'{value.name} does not guide inside this engine\n  got guides: {have}; set [vllm] guides = ["{value.name}", …]'
                )

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Raise where the grammar of structured output cannot be used."""
        self.grammars.check(sampling)

    def check_logprobs(self, sampling: SamplingParams) -> None:
        """Raise where tokens are drawn with ``sampling`` from another distribution than vLLM's log-probabilities are of."""
        forbidding = [name for name in ("ignore_eos", *STRUCTURES) if getattr(sampling, name)]
        if forbidding:
            raise ConfigError(
                f"alternatives (logprobs) beside {forbidding[0]}: vLLM's log-probabilities count the tokens that it forbids\n"
                f"  leave one of them out, or {_ELSEWHERE}"
            )
        if not self.guides and sampling.temperature not in (0.0, 1.0):
            raise ConfigError(
                f"alternatives (logprobs) of a base without guides: vLLM's log-probabilities are those at temperature 1, "
                f"got {sampling.temperature:g}\n  set temperature to 1 (or 0), put a guide inside ([vllm] guides), or {_ELSEWHERE}"
            )

    def logprobs(self, requests: Sequence[LogprobsRequest]) -> list[list[TokenLogprobs]]:
        """Log-probabilities of given tokens; chunks that other requests have begun go on meanwhile.

        Raises:
            ConfigError: settings besides a temperature, or guidance that cannot be inside.
            ModelError: vLLM died.
        """
        for request in requests:
            self.check(request.guidance)
            self.check_logprobs(request.sampling)
            if others := sorted(request.sampling.changed.keys() - {"temperature", "max_new_tokens"}):
                raise ConfigError(f"log-probabilities with {others[0]}: the engine vllm cannot do that\n  leave it out, or {_ELSEWHERE}")
        asked = [GivenTokens(r, self.base.prompt_ids(r.beam.prompt), self._weights(r.guidance), self._weights(None)) for r in requests]
        return [list(tokens) for tokens in score_tokens(self.client, asked, self.submodels, self._keep_other)]

    def _keep_other(self, result: EngineOutput) -> None:
        """Keep what vLLM returned of another request meanwhile."""
        if (output := self._read(result)) is not None:
            self.keep([output])

    def release(self, keys: Sequence[int]) -> None:
        """Abort the requests of these beams, drop their outputs, and forget where they are in their grammars."""
        super().release(keys)
        self.grammars.release(keys)

    def submit(self, requests: Sequence[ExpandRequest]) -> None:
        """Begin these chunks; a request that vLLM refuses returns error beams."""
        for request in requests:
            beam, family = request.beam, fork(request)
            prompt = self.base.prompt_ids(beam.prompt)
            copies = request.successors if request.sampling.temperature == 0 else 1  # greedy children are equal
            try:
                number = self.client.add([*prompt, *beam.token_ids], self._params(request, family[0].limit - len(beam.token_ids), copies))
            except ValueError as e:
                self.keep([ExpandOutput(beam.key, fail(request, f"vLLM refuses this request: {str(e).strip().splitlines()[0]}"))])
                continue
            self._running[number] = _RunningRequest(request, family, len(prompt) + len(beam.token_ids), copies)

    def poll(self, seconds: float) -> list[ExpandOutput]:
        """The outputs of one step of vLLM; it takes as long as it takes."""
        return [output for result in self.client.step() if (output := self._read(result)) is not None]

    @property
    def running(self) -> bool:
        """Does any request run?"""
        return bool(self._running)

    def abort(self, beams: Collection[int] | None = None) -> None:
        """Abort the requests of these beams (None: of all) in vLLM.

        Raises:
            ModelError: vLLM died.
        """
        numbers = [number for number, running in self._running.items() if beams is None or running.request.beam.key in beams]
        for number in numbers:
            del self._running[number]
        self.client.abort(numbers)

    def reset_caches(self) -> None:
        """Abort all requests, drop their outputs, and forget where beams are in their grammars."""
        self.grammars.reset()
        with suppress(ModelError):  # vLLM may be dead; restart() follows
            super().reset_caches()

    def restart(self) -> bool:
        """Start vLLM again if it died. True if it had."""
        return self.client.restart()

    def close(self) -> None:
        """Stop vLLM."""
        self.client.close()

    def _params(self, request: ExpandRequest, tokens: int, copies: int) -> Any:
        from vllm import SamplingParams as Params
        from vllm.sampling_params import RequestOutputKind

        s = request.sampling
        least, never_ends = self._least(request, tokens), s.ignore_eos and not s.stop_token_ids
        looks_back = self._look_back(request)
        own = TokenPenalties() if looks_back else TokenPenalties(s.repetition_penalty, s.frequency_penalty, s.presence_penalty)
        seed = mix(request.seed, request.beam.rng_path, len(request.beam.token_ids), request.first) >> 2  # child i has seed + i
        return Params(
            n=request.successors // copies,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            repetition_penalty=own.repetition_penalty,
            frequency_penalty=own.frequency_penalty,
            presence_penalty=own.presence_penalty,
            structured_outputs=ResponseGrammar.of_chunk(s, request.beam.token_ids, self.vocabulary.eos_ids, least),
            logit_bias=dict(s.logit_bias) or None,
            seed=None if s.temperature == 0 else seed,
            max_tokens=tokens,
            # forbids the tokens that stop, for so long; a grammar does that by itself
            min_tokens=0 if s.structure else tokens if never_ends else least,
            stop_token_ids=sorted({*self.vocabulary.eos_ids, *s.stop_token_ids}),
            ignore_eos=True,  # of the model's files; the search gives its own as stop_token_ids
            stop=list(s.stop) or None,
            detokenize=bool(s.stop),
            skip_special_tokens=True,
            output_kind=RequestOutputKind.CUMULATIVE if request.stream or s.end_at_sentence else RequestOutputKind.FINAL_ONLY,
            extra_args={**self._weights(request.guidance), **looks_back} or None,
        )

    def _least(self, request: ExpandRequest, tokens: int) -> int:
        """Least number of tokens of a chunk, so that the response does not end before its own minimum."""
        s, already = request.sampling, len(request.beam.token_ids)
        wanted = s.min_new_tokens - already
        if s.min_length:
            wanted = max(wanted, s.min_length - already - len(self.base.prompt_ids(request.beam.prompt)))
        return min(max(wanted, 0), tokens)

    def _look_back(self, request: ExpandRequest) -> dict[str, Any]:
        """Penalties and bad words for our processor; none where vLLM's own mean the same: without bad words, in the first chunk.

        Where a token stops and the end of sequence must not, the latter is a bad word: vLLM's ``min_tokens`` would forbid both.
        """
        s, already = request.sampling, len(request.beam.token_ids)
        ends = self.vocabulary.eos_ids if s.ignore_eos and s.stop_token_ids and not s.structure else ()
        if not (s.bad_words or ends or (already and (s.frequency_penalty or s.presence_penalty))):
            return {}
        own = TokenPenalties.of(s, self.vocabulary)
        own = replace(own, bad_words=(*own.bad_words, *((end,) for end in sorted(ends))))
        return {RESPONSE_KEY: {"tokens": already, **own.to_dict()}}

    def _weights(self, guidance: TokenGuidance | None) -> dict[str, float]:
        """The guidance weight of every group: 0 for those that do not guide this request."""
        found = dict.fromkeys(self.guides, 0.0)
        if guidance is not None:
            for weight, value in _weighted_guides(guidance.value, guidance.beta):
                found[value.name] += weight
        return {f"{KEY}.{name}": weight for name, weight in found.items()}

    def _read(self, result: EngineOutput) -> ExpandOutput | None:
        """Append what vLLM sampled to the children of a request; their output, if they are complete or streamed."""
        output = result.output
        running = self._running.get(output.request_id)
        if running is None:  # aborted meanwhile
            return None
        request, already = running.request, len(running.request.beam.token_ids)
        for completion in output.outputs:
            running.drawn[completion.index] = len(completion.token_ids)
            family = running.family if running.copies > 1 else running.family[completion.index : completion.index + 1]
            for child in family:
                self._append(child, list(completion.token_ids)[len(child.token_ids) - already :], completion.finish_reason)
                if completion.finish_reason is not None:
                    _check_finished(child, str(completion.finish_reason), already)
        done = all(child.finish is not None for child in running.family) or bool(output.finished)
        if done:  # vLLM does not know of ends of sentences
            cached = result.cached if output.finished else self.client.end(output.request_id)
            del self._running[output.request_id]
            self._count(running, cached)
        return ExpandOutput(request.beam.key, as_beams(request.beam, running.family), done) if done or request.stream else None

    def _append(self, child: TokenSequence, tokens: list[int], reason: str | None) -> None:
        """Append tokens until one ends the response, or its grammar is complete."""
        sampling, complete = child.request.sampling, False
        if sampling.structure and reason is not None:
            ends = {*self.vocabulary.eos_ids, *sampling.stop_token_ids}
            if reason == "error" or (tokens and tokens[-1] in ends and self.grammars.completes(child, *tokens[:-1])):
                tokens = tokens[:-1]  # refused; or it is there because vLLM needs a token to stop, and nothing else could follow
            complete = self.grammars.completes(child, *tokens)
        for left, token in zip(range(len(tokens) - 1, -1, -1), tokens, strict=True):
            if child.finish is None:
                append_token(child, token, complete=complete and not left)
        if complete and child.finish is None:
            child.end("stop")

    def _count(self, running: _RunningRequest, cached: Sequence[int]) -> None:
        """Count the tokens that every submodel read: those of the prompt that were not cached, for each child, and the children's own.

        What all children of a request's first chunk found in the cache came from other requests: it counts as forward and as cached
        tokens. The last token of a child is not read.
        """
        children, counter = running.family[:: running.copies], running.request.beam.token_counter
        read = max(0, running.length * len(children) - sum(cached) + sum(running.drawn.values()) - len(children))
        spared = min(cached, default=0) if running.first else 0
        for submodel in self.submodels:
            counter.add(submodel, read + spared, spared)
        if not running.first:
            self.prefix.submitted += running.length * len(children)
            self.prefix.cached += sum(cached)


def _check_finished(child: TokenSequence, reason: str, already: int) -> None:
    """Set an error where vLLM stopped without a result, or without a token: the same request might repeat forever."""
    if child.finish is None and (reason in ("error", "abort") or len(child.token_ids) == already):
        child.finish, child.error = "error", f"vLLM stopped this request: {reason}"
        if reason == "error" and (structure := child.request.sampling.structure):  # its scheduler refuses a token that is masked
            child.error += f"; {structure[0]} and other settings (bad_words …) seem to forbid all tokens after {len(child.token_ids)}"


def _weighted_guides(value: Value, weight: float) -> Iterable[tuple[float, Value]]:
    """(weight, value) of the guides that ``value`` is made of."""
    if isinstance(value, VLLMGuide) or not (value.parts and value.is_sum):
        yield weight, value
        return
    for share, part in value.parts:
        yield from _weighted_guides(part, weight * share)
