"""Log-probabilities of an answer from engines that do not give them while they draw (``Engine.logprobs_after_generation``)."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from ivg.search.request import Request
from ivg.types import Beam, Engine, LogprobsRequest, SamplingParams, TokenCounter, TokenLogprobs


def answer_details(engine: Engine, request: Request, answer: Beam, counter: TokenCounter) -> tuple[TokenLogprobs, ...]:
    """Those of ``answer``, where ``request`` asks for them: softmaxes at its temperature (greedy: 1), before filters and processors.

    Args:
        engine: has drawn it.
        request: of the answer.
        answer: without an error.
        counter: of the request.

    Raises:
        ConfigError: the engine refuses.
    """
    if request.alternatives is None or not engine.logprobs_after_generation or not answer.token_ids:
        return answer.details
    root = replace(engine.open(request.prompt, request.sampling), token_counter=counter)
    plain = SamplingParams(temperature=request.sampling.temperature or 1.0)
    try:
        (found,) = engine.logprobs([LogprobsRequest(root, answer.token_ids, plain, request.search.guidance, request.alternatives)])
    finally:
        engine.release([root.key])
    ends = accumulate(len(entry.text) for entry in found)  # a stop string may have cut the text within a token
    return tuple(replace(entry, text=answer.text[end - len(entry.text) : end]) for entry, end in zip(found, ends, strict=True))
