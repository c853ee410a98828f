"""Laws of engines: functions that raise AssertionError where an engine breaks its promises.

:func:`check_engine` runs all that hold for any engine. ``deterministic=False`` leaves out what needs draws that depend on the seed alone
(an endpoint whose server ignores seeds). Every law releases what it opens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace

from ivg.errors import ConfigError
from ivg.settings.sampling import COMBINATIONS
from ivg.types import AsyncEngine, Beam, Engine, ExpandRequest, Prompt, SamplingParams, new_key

LIMIT_SECONDS = 60.0
"""How long the laws wait for an :class:`~ivg.types.AsyncEngine`, unless told otherwise."""


def check_engine(engine: Engine, prompts: Sequence[Prompt], *, deterministic: bool = True) -> None:
    """All laws that hold for any engine, without :func:`check_chunks`; closes it.

    Args:
        engine: not closed.
        prompts: at least two that it can read.
        deterministic: the same seed gives the same tokens.
    """
    check_children(engine, prompts)
    if deterministic:
        check_engine_batch(engine, prompts)
    check_unsupported(engine, prompts[0])
    if isinstance(engine, AsyncEngine):
        check_outputs_are_kept(engine, prompts)
    check_engine_life_cycle(engine, prompts[0])


def _requests(engine: Engine, prompts: Sequence[Prompt], *, tokens: int = 4, successors: int = 2, limit: int = 8) -> list[ExpandRequest]:
    sampling = SamplingParams(max_new_tokens=limit)
    return [ExpandRequest(engine.open(p, sampling), successors, tokens, sampling, None, seed) for seed, p in enumerate(prompts)]


def _release(engine: Engine, requests: Sequence[ExpandRequest], families: Sequence[Sequence[Beam]]) -> None:
    engine.release([*(r.beam.key for r in requests), *(b.key for family in families for b in family)])


def check_children(engine: Engine, prompts: Sequence[Prompt]) -> None:
    """Children extend their beam by 1 to ``tokens`` tokens, have keys of their own, and end at ``max_new_tokens``."""
    requests = _requests(engine, prompts)
    for request in requests:
        assert request.beam.token_ids == () and request.beam.text == "" and not request.beam.finished, "an opened beam is not empty"
        assert engine.prompt_tokens(request.beam.prompt) > 0
    while requests:
        families = engine.extend(requests)
        assert len(families) == len(requests), f"{len(families)} families for {len(requests)} requests"
        for request, family in zip(requests, families, strict=True):
            assert len(family) == request.successors, f"{len(family)} children, {request.successors} requested"
            for child in family:
                _check_child(request, child)
        children = [child for family in families for child in family]
        assert len({child.key for child in children}) == len(children), "two children have one key"
        engine.release([r.beam.key for r in requests])
        requests = [replace(r, beam=f[0], successors=1) for r, f in zip(requests, families, strict=True) if not f[0].finished]
        engine.release([child.key for child in children if child.key not in {r.beam.key for r in requests}])


def _check_child(request: ExpandRequest, child: Beam) -> None:
    parent, limit = request.beam, request.sampling.max_new_tokens
    new = len(child.token_ids) - len(parent.token_ids)
    assert child.error is None, child.error
    assert child.parent == parent.key and child.key != parent.key, "a child names another parent"
    assert child.prompt == parent.prompt and child.token_counter is parent.token_counter, "prompt or token counter is not the parent's"
    assert child.token_ids[: len(parent.token_ids)] == parent.token_ids, "a child begins with other tokens than its parent"
    assert 1 <= new <= request.tokens, f"{new} new tokens, 1 to {request.tokens} requested"
    assert child.finished or (new == request.tokens and len(child.token_ids) < limit), "an unfinished child is too short, or too long"
    assert child.finish != "length" or len(child.token_ids) == limit, f"finish is length after {len(child.token_ids)} of {limit} tokens"


def check_engine_batch(engine: Engine, prompts: Sequence[Prompt]) -> None:
    """The same seed gives the same tokens, alone and in a batch; other seeds and other children draw for themselves."""
    requests = _requests(engine, prompts)
    together = engine.extend(requests)
    _release(engine, requests, together)
    for request, expected in zip(_requests(engine, prompts), together, strict=True):
        (family,) = engine.extend([request])
        _release(engine, [request], [family])
        got, wanted = [b.token_ids for b in family], [b.token_ids for b in expected]
        assert got == wanted, f"{got} alone, {wanted} in a batch of {len(requests)}"


def check_chunks(engine: Engine, prompt: Prompt, tokens: int = 8) -> None:
    """First children draw the same tokens whatever the chunk length; for engines whose draws are keyed by position."""
    texts = []
    for chunk in (tokens, 1, 3):
        (request,) = _requests(engine, [prompt], tokens=chunk, successors=1, limit=tokens)
        while True:
            ((child,),) = engine.extend([request])
            engine.release([request.beam.key])
            if child.finished:
                break
            request = replace(request, beam=child)
        engine.release([child.key])
        texts.append(child.token_ids)
    assert texts[0] == texts[1] == texts[2], f"chunks of {tokens}, 1 and 3 tokens gave {texts}"


def check_unsupported(engine: Engine, prompt: Prompt) -> None:
    """What an engine does not support are known features, each with advice, and requests for them are refused."""
    known = {*COMBINATIONS, *(f.name for f in (*fields(ExpandRequest), *fields(SamplingParams)))}
    assert set(engine.unsupported) <= known, f"unsupported: {sorted(set(engine.unsupported) - known)} are no settings"
    for name, advice in engine.unsupported.items():
        assert advice, f"unsupported[{name!r}] gives no advice"
        try:
            engine.check_features({name})
        except ConfigError as e:
            assert name in str(e) and advice in str(e), f"the error for {name} should name it and say what to do: {e}"
        else:
            raise AssertionError(f"check_features does not refuse {name}")
    (request,) = _requests(engine, [prompt])
    engine.check_request(request)
    engine.check(None)
    engine.release([request.beam.key])


def check_outputs_are_kept(engine: AsyncEngine, prompts: Sequence[Prompt], *, limit_seconds: float = LIMIT_SECONDS) -> None:
    """A blocking ``extend`` keeps the outputs of other requests until they are collected; released requests have no output.

    Args:
        engine: not closed.
        prompts: at least two that it can read.
        limit_seconds: an output that has not come by then is lost.
    """
    first, second, third = _requests(engine, [prompts[0], prompts[1], prompts[0]])
    engine.submit([first, third])
    engine.release([third.beam.key])
    families = engine.extend([second])
    assert [len(family) for family in families] == [second.successors]
    found: list[Beam] = []
    deadline = time.monotonic() + limit_seconds
    while not found and time.monotonic() < deadline:
        for output in engine.collect([first.beam.key]):
            assert output.beam == first.beam.key, "collect gave the output of another request"
            found = output.children if output.done else found
    assert len(found) == first.successors, "extend lost the output of another request"
    assert engine.collect() == [], "there are outputs of a released request"
    _release(engine, [first, second], [found, *families])


def check_engine_life_cycle(engine: Engine, prompt: Prompt) -> None:
    """Releasing, resetting, restarting and closing need no special state; closes the engine."""
    requests = _requests(engine, [prompt])
    families = engine.extend(requests)
    _release(engine, requests, families)
    _release(engine, requests, families)
    engine.release([new_key()])
    engine.release_memory()
    engine.reset_caches()
    assert engine.restart() is False, f"the engine {engine.name} reports a restart, but nothing had stopped"
    requests = _requests(engine, [prompt])
    again = engine.extend(requests)
    assert [len(family) for family in again] == [len(family) for family in families]
    engine.reset_caches()  # while it holds beams
    _release(engine, requests, again)
    engine.close()
    engine.close()
