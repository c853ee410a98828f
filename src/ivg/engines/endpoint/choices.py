"""Reads replies of a completions endpoint: texts, finish reasons, numbers of tokens. Pure functions over the client's objects.

A server reports the tokens of all choices together (``usage``). Where a reply has several choices without the text of their tokens,
those cut at the limit have as many tokens as requested, and the finished ones share the rest evenly: they will not grow, so the number
is only reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivg.errors import ModelError


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One continuation: its text, and whether the model stopped by itself.

    Attributes:
        text: from the server, without a stop string.
        stopped: the response is complete.
        ended: by the model's own end-of-sequence token. Servers name a stop string that they found (vLLM ``stop_reason``, SGLang
            ``matched_stop``); without one, an end-of-sequence token is assumed.
        tokens: their number, end-of-sequence included: at least one, so that every chunk makes progress, at most as many as requested.
        names: texts of the tokens, where the server reports them.
        logprobs: of the tokens, in nats, likewise.
        top: the likeliest tokens at each position, likewise: (text, log-probability), best first.
    """

    text: str
    stopped: bool
    ended: bool
    tokens: int
    names: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[str, float], ...], ...] = ()


def check_reply(reply: Any) -> None:
    """Raise unless ``reply`` is a completion whose choices ended normally.

    Raises:
        ModelError: not a completion (a web page, no choices), or an unknown finish reason.
    """
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices or not all(isinstance(getattr(c, "text", None), str) for c in choices):
        raise ModelError(f"returned {str(reply)[:80]!r}; expected a completion: is this an OpenAI-compatible server?")
    for c in choices:
        if c.finish_reason not in ("stop", "length"):
            raise ModelError(f"stopped with finish_reason {c.finish_reason!r}; expected stop or length: see the server's log")


def read_choices(reply: Any, limit: int) -> list[CompletionChoice]:
    """The choices of a checked reply, in order; ``limit`` tokens were requested."""
    choices = sorted(reply.choices, key=lambda c: _number(c, "index"))
    total = used_tokens(reply)[1]
    cut = sum(c.finish_reason == "length" for c in choices)
    rest = (total - limit * cut) // max(1, len(choices) - cut)
    out = []
    for c in choices:
        reported = getattr(c, "logprobs", None)
        names = tuple(str(name) for name in getattr(reported, "tokens", None) or ())
        count = len(names) or (total if total and len(choices) == 1 else limit if c.finish_reason == "length" else rest)
        stopped = c.finish_reason == "stop"
        why = next((w for w in (getattr(c, n, None) for n in ("stop_reason", "matched_stop")) if w is not None), None)
        out.append(
            CompletionChoice(c.text, stopped, stopped and not isinstance(why, str), min(max(count, 1), limit), names, *_logprobs(reported))
        )
    return out


def used_tokens(reply: Any) -> tuple[int, int]:
    """(prompt tokens, completion tokens) as the server reports them; zeros where it does not."""
    usage = getattr(reply, "usage", None)
    return _number(usage, "prompt_tokens"), _number(usage, "completion_tokens")


def cached_tokens(reply: Any) -> int:
    """Prompt tokens from the server's cache, where it reports them."""
    details = getattr(getattr(reply, "usage", None), "prompt_tokens_details", None)
    return min(_number(details, "cached_tokens"), used_tokens(reply)[0])


def _logprobs(reported: Any) -> tuple[tuple[float, ...], tuple[tuple[tuple[str, float], ...], ...]]:
    """Of the tokens and of the likeliest ones at each position; empty where the server sent something else than numbers."""
    drawn, top = getattr(reported, "token_logprobs", None), getattr(reported, "top_logprobs", None)
    try:
        ranked = [sorted(((str(k), float(v)) for k, v in (entry or {}).items()), key=lambda pair: -pair[1]) for entry in top or ()]
        return tuple(map(float, drawn or ())), tuple(map(tuple, ranked))
    except (AttributeError, TypeError, ValueError):
        return (), ()


def _number(thing: Any, name: str) -> int:
    """A count from a reply, which may hold anything; 0 where there is none."""
    found = getattr(thing, name, None)
    return max(found, 0) if isinstance(found, int) else 0


def split_tokens(text: str, names: Sequence[str]) -> list[str]:
    """``text`` split into the texts of its tokens, ``names``; unsplit where they do not add up to it (bytes, a dropped space).

    Tokens after the text (an end-of-sequence token, a stop string) are left out; of a token in which the text ends, the first part.
    """
    out: list[str] = []
    rest = text
    for name in names:
        if not rest:
            break
        piece = name if rest.startswith(name) else rest if name.startswith(rest) else ""
        if name and not piece:
            return [text]
        if piece:
            out.append(piece)
            rest = rest[len(piece) :]
    return [text] if rest else out
