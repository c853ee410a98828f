"""Log-probabilities of responses that are given, under the distribution from which a method draws tokens.

It exists where every token is drawn from one distribution: the base's, with or without token guidance. A search that compares whole
chunks has none. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ivg.errors import ConfigError, ContextLengthError, PromptError
from ivg.search.request import Request, Search
from ivg.search.searcher import check_engine
from ivg.settings.per_request import RequestSettings
from ivg.types import Beam, Engine, LogprobsRequest, Prompt, ResponseLogprobs, SamplingParams, TokenCounter, Value
from ivg.utils.locks import FairLock

BATCH = 32
"""Responses that are read together."""
NEUTRAL = SamplingParams()
"""Settings that leave the distribution as it is: temperature 1, no filters, no processors."""


def given_logprobs(
    engine: Engine, lock: FairLock, requests: Sequence[Request], responses: Sequence[tuple[int, ...]], alternatives: int = 1
) -> list[ResponseLogprobs]:
    """Log-probabilities of each request's response.

    Args:
        engine: has the base.
        lock: held for one batch at a time.
        requests: prompt, search and sampling.
        responses: tokens of the base, one sequence for each request.
        alternatives: so many of the likeliest tokens at each position.

    Raises:
        ConfigError: a method without such a distribution, or settings that have no meaning here; or the engine cannot.
        PromptError: prompt and response that a model cannot read.
    """
    RequestSettings(alternatives=alternatives)  # raises where that is no number of tokens
    for request in requests:
        check_distribution(request)
    out = [ResponseLogprobs(())] * len(requests)
    some = [i for i, tokens in enumerate(responses) if tokens]
    for start in range(0, len(some), BATCH):
        index = some[start : start + BATCH]
        with lock:
            counters: dict[Prompt, TokenCounter] = {}
            batch = [replace(_engine_request(engine, requests[i], responses[i], counters), alternatives=alternatives) for i in index]
            for i, given, found in zip(index, batch, engine.logprobs(batch), strict=True):
                out[i] = ResponseLogprobs(tuple(found), dict(given.beam.token_counter.forward_tokens))
    return out


def _engine_request(engine: Engine, request: Request, tokens: tuple[int, ...], counters: dict[Prompt, TokenCounter]) -> LogprobsRequest:
    """Responses to one prompt share a counter, by which the models know that they may share its cache."""
    check_engine(engine, request)
    try:
        root = _open(engine, request, tokens)
    except ContextLengthError as e:
        if e.new_tokens == len(tokens) or e.length >= e.limit:
            raise
        raise ContextLengthError(
            f"prompt of {e.length} tokens + {len(tokens)} given tokens, the last unread, > context of {e.model} ({e.limit})\n"
            f"  shorten the prompt, or give at most {e.limit - e.length + 1} tokens",
            model=e.model,
            length=e.length,
            new_tokens=len(tokens),
            limit=e.limit,
        ) from None
    root = replace(root, token_counter=counters.setdefault(request.prompt.without_data, root.token_counter))
    return LogprobsRequest(root, tokens, request.sampling, request.search.guidance)


def _open(engine: Engine, request: Request, tokens: tuple[int, ...]) -> Beam:
    """The prompt, to which every model can read the response."""
    if engine.reads_last_token(None):
        root = engine.open(request.prompt, replace(request.sampling, max_new_tokens=len(tokens)))
    else:
        root = engine.base.root(request.prompt, len(tokens) - 1)
    guidance = request.search.guidance
    if guidance is not None:
        guidance.value.check(root.prompt, len(tokens) - (not engine.reads_last_token(guidance)))
    return root


def check_distribution(request: Request) -> None:
    """Raise where tokens are not drawn from one distribution each, or where settings have no meaning for given texts.

    Raises:
        ConfigError: names what, and what to do instead.
    """
    search, sampling = request.search, request.sampling
    if (why := _selects(search)) is not None:
        raise ConfigError(
            f"log-probabilities: {why}, so whole texts have no normalised distribution\n"
            "  give a method that guides tokens alone (eft, token-explicit, genarm …), or base"
        )
    if search.thinking is not None:
        raise ConfigError("log-probabilities of a response that begins with thinking are not supported\n  leave guide_after out")
    if search.guidance is not None and search.guidance.kl_budget is not None:
        raise ConfigError(
            "log-probabilities: with kl_budget a token's distribution depends on max_new_tokens, which a given text has not\n"
            "  leave kl_budget out"
        )
    if sampling.temperature == 0:
        raise ConfigError("log-probabilities need a temperature above 0, got 0\n  leave it out for the distribution at temperature 1")
    if sampling.structure is not None:
        raise ConfigError(f"log-probabilities: {sampling.structure[0]} forbids tokens of texts that are generated\n  leave it out")
    for name in ("stop", "end_at_sentence", "stop_token_ids", "forced_eos_token_id"):
        if getattr(sampling, name):
            raise ConfigError(f"log-probabilities: {name} is about where an answer ends, and this one is given\n  leave it out")


def _selects(search: Search) -> str | None:
    """What in ``search`` chooses among texts; None: nothing."""
    if search.width * search.successors > 1:
        return f"the method selects among {search.width * search.successors} beams"
    rules = {"reject": search.rejection, "particles": search.particles, "speculate": search.speculation, "tree": search.tree}
    if named := [rule for rule, settings in rules.items() if settings is not None]:
        return f"rule={named[0]} selects chunks"
    return "make_rule selects chunks" if search.make_rule is not None else None


def split_prompt(prompt: Prompt, base: Any, value: Value | None) -> tuple[Prompt, tuple[int, ...]]:
    """(the first token of ``prompt`` as a prompt, its other tokens as the response): for log-probabilities of the prompt itself.

    Args:
        prompt: with the base's vocabulary, where it has tokens.
        base: reads prompts as the base does (:class:`ivg.models.prompt_encoder.PromptEncoder`).
        value: guides tokens; None: there is none.

    Raises:
        PromptError: a model reads other tokens than the base, or texts of prompt and response, so it cannot tell which this is; names it.
    """
    ids = tuple(base.prompt_ids(prompt))
    text = base.vocabulary.prompt_text(ids[:1])
    first = replace(prompt, content=text, token_ids=ids[:1], vocabulary=base.vocabulary)
    require_same_tokens(prompt, base, value, first)
    return first, ids[1:]


def require_same_tokens(prompt: Prompt, base: Any, value: Value | None, *beginnings: Prompt) -> None:
    """Raise unless the models of ``value`` read ``prompt`` as the base's very tokens, maybe behind an instruction of their own.

    Args:
        prompt: as for :func:`split_prompt`.
        base: likewise.
        value: likewise.
        beginnings: of the prompt, which are read as its beginning.

    Raises:
        PromptError: as :func:`split_prompt`.
    """
    ids = tuple(base.prompt_ids(prompt))
    for model in _readers(value):
        try:
            read = tuple(model.prompt_ids(prompt))
        except PromptError:  # empty for its template
            read = ()
        before = len(read) - len(ids)
        same = before >= 0 and read[before:] == ids
        if not same or any(tuple(model.prompt_ids(b)) != read[: before + len(base.prompt_ids(b))] for b in beginnings):
            raise PromptError(
                f"log-probabilities of a prompt: {model.name} reads it as other tokens than the base (a template, another tokenizer)\n"
                "  give prompt and response apart (GuidedModel.logprobs), or all models the template raw"
            )


def _readers(value: Value | None) -> list[Any]:
    """The language models of ``value``.

    Raises:
        PromptError: a part of it has none.
    """
    if value is None:
        return []
    if value.parts:
        return [model for _, part in value.parts for model in _readers(part)]
    if not (models := value.cached_lms()):
        raise PromptError(
            f"log-probabilities of a prompt: {value.name} scores a response to a prompt, and this is a prompt alone\n"
            "  give prompt and response apart (GuidedModel.logprobs)"
        )
    return models
