"""Log-probabilities of given tokens inside vLLM: for each token a request that draws it, and nothing else, behind those before it.

VLLM reports log-probabilities of its model's logits at temperature 1, before it forbids any token. So the request forbids all tokens but
one, and the composite has the logits at the request's temperature. The base alone is the composite with all weights 0. What the requests
share is in the prefix cache: each reads a block of tokens at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ivg.engines.vllm.client import EngineClient, EngineOutput
from ivg.engines.vllm.config import TEMPERATURE_KEY
from ivg.errors import ConfigError
from ivg.types import LogprobsRequest, TokenLogprobs


@dataclass(frozen=True)
class GivenTokens:
    """Tokens whose log-probabilities are asked for.

    Attributes:
        request: has the tokens.
        prompt: tokens before them.
        guided: weight of each guide; empty where there is none inside.
        base: those of the base alone.
    """

    request: LogprobsRequest
    prompt: Sequence[int]
    guided: Mapping[str, Any]
    base: Mapping[str, Any]

    def params(self, token: int, weights: Mapping[str, Any]) -> Any:
        """VLLM's parameters of a request for ``token`` under ``weights``."""
        from vllm import SamplingParams as Params
        from vllm.sampling_params import RequestOutputKind

        return Params(
            temperature=0.0,
            max_tokens=1,
            logprobs=self.request.alternatives,
            allowed_token_ids=[token],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={**weights, TEMPERATURE_KEY: self.request.sampling.temperature or 1.0} if weights else None,
        )


def score_tokens(
    client: EngineClient, asked: Sequence[GivenTokens], submodels: Sequence[str], other: Callable[[EngineOutput], None]
) -> list[list[TokenLogprobs]]:
    """Log-probabilities of each token of each request.

    Args:
        client: runs them.
        asked: prompts and tokens.
        submodels: names of all models inside, which read the tokens.
        other: gets outputs of other requests.

    Raises:
        ConfigError: vLLM refuses a request.
        ModelError: the engine is dead.
    """
    pending: dict[str, tuple[int, int, bool]] = {}
    found: dict[tuple[int, int, bool], _Score] = {}
    try:
        for k, given in enumerate(asked):
            kinds = {True: given.guided, False: given.base} if given.guided != given.base else {False: given.base}
            for i, token in enumerate(given.request.token_ids):
                for kind, weights in kinds.items():
                    number = _add(client, [*given.prompt, *given.request.token_ids[:i]], given.params(token, weights))
                    pending[number] = (k, i, kind)
        while pending:
            for result in client.step():
                place = pending.pop(result.output.request_id, None)
                if place is None:
                    other(result)
                    continue
                request = asked[place[0]].request
                found[place] = _read(result, request.token_ids[place[1]], request.alternatives)
                for name in submodels:
                    cached = sum(result.cached)
                    request.beam.token_counter.add(name, len(asked[place[0]].prompt) + place[1] - cached)
    finally:
        client.abort(list(pending))
    return [list(_with_text(given.request, k, found)) for k, given in enumerate(asked)]


def _add(client: EngineClient, token_ids: list[int], params: Any) -> str:
    try:
        return client.add(token_ids, params)
    except ValueError as e:
        raise ConfigError(f"vLLM refuses to give log-probabilities: {str(e).strip().splitlines()[0]}") from e


_Score = tuple[float, tuple[tuple[int, float], ...]]
"""Log-probability of a token, and its likeliest alternatives."""


def _read(result: EngineOutput, token: int, alternatives: int) -> _Score:
    (sample,) = result.output.outputs
    if not sample.logprobs:
        raise ConfigError(f"vLLM gave no log-probabilities: {sample.finish_reason}\n  see its log, or leave them out")
    (entries,) = sample.logprobs
    known = {int(i): float(entry.logprob) for i, entry in entries.items()}
    top = sorted(known.items(), key=lambda pair: -pair[1])[:alternatives]
    return known[token], tuple(pair for pair in top if pair[1] > float("-inf"))


def _with_text(request: LogprobsRequest, k: int, found: Mapping[tuple[int, int, bool], _Score]) -> Iterator[TokenLogprobs]:
    """What was found of the tokens of request ``k``, with the text that each adds."""
    vocabulary, state, ids = request.beam.vocabulary, request.beam.decoded, request.token_ids
    for i, token in enumerate(ids):
        text, state = vocabulary.continue_text(ids[: i + 1], state, final=i + 1 == len(ids))
        base = found[k, i, False]
        own = found.get((k, i, True), base)
        yield TokenLogprobs(token, text, own[0], base[0], own[1], base[1])
