"""What a completions endpoint answered: texts, ends, numbers of tokens. Pure functions over the client's objects; no HTTP.

A server tells the tokens of all answers together (``usage``). Where it made several and does not spell their tokens, those cut for
their length have as many as were asked for, and those that ended share the rest evenly: they will not grow, so the number only
counts what was written. Answers of one reply that end with the same text get the same number: equal texts stay equal tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivg.errors import ModelError


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One answer: its text, and whether the model stopped by itself.

    Attributes:
        text: as the server gives it, stop strings cut.
        stopped: the response is complete.
        ended: by the model's own end-of-sequence token, as far as one can tell. Servers name a stop string that they found
            (vLLM ``stop_reason``, SGLang ``matched_stop``); where one says nothing, the end is taken to be the model's.
        tokens: of the answer, such an end included: at least one, so that every chunk makes headway, at most as many as asked.
        names: of the tokens, where the server spells them.
    """

    text: str
    stopped: bool
    ended: bool
    tokens: int
    names: tuple[str, ...] = ()


def check_reply(reply: Any) -> None:
    """Raise unless ``reply`` has answers that ended as answers do.

    Raises:
        ModelError: not a completion (a web page, no choices), or an answer that was broken off.
    """
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices or not all(isinstance(getattr(c, "text", None), str) for c in choices):
        raise ModelError(f"answered no completion but {str(reply)[:80]!r}; expected an OpenAI-compatible server at this address")
    for c in choices:
        if c.finish_reason not in ("stop", "length"):
            raise ModelError(f"broke an answer off (finish_reason {c.finish_reason!r}); its log says why")


def heard(reply: Any, limit: int) -> list[CompletionChoice]:
    """The answers of a checked reply, in order; ``limit`` tokens were asked for."""
    choices = sorted(reply.choices, key=lambda c: _number(c, "index"))
    total = used(reply)[1]
    cut = sum(c.finish_reason == "length" for c in choices)
    rest = (total - limit * cut) // max(1, len(choices) - cut)
    out = []
    for c in choices:
        names = tuple(str(name) for name in getattr(getattr(c, "logprobs", None), "tokens", None) or ())
        count = len(names) or (total if total and len(choices) == 1 else limit if c.finish_reason == "length" else rest)
        stopped = c.finish_reason == "stop"
        why = next((w for w in (getattr(c, n, None) for n in ("stop_reason", "matched_stop")) if w is not None), None)
        out.append(CompletionChoice(c.text, stopped, stopped and not isinstance(why, str), min(max(count, 1), limit), names))
    return out


def used(reply: Any) -> tuple[int, int]:
    """(tokens of the prompt, tokens of all answers) as the server counted them; zeros where it does not say."""
    usage = getattr(reply, "usage", None)
    return _number(usage, "prompt_tokens"), _number(usage, "completion_tokens")


def cached_of(reply: Any) -> int:
    """Tokens of the prompt that the server had in its cache, where it says so."""
    details = getattr(getattr(reply, "usage", None), "prompt_tokens_details", None)
    return min(_number(details, "cached_tokens"), used(reply)[0])


def _number(thing: Any, name: str) -> int:
    """A field of something that a server sent, which may be anything; 0 where it is no count."""
    found = getattr(thing, name, None)
    return max(found, 0) if isinstance(found, int) else 0


def spelled(text: str, names: Sequence[str]) -> list[str]:
    """``text`` cut into the pieces that ``names`` begin with; uncut where they do not spell it (bytes, a dropped space).

    What follows the text (an end, a stop string) is left out; a token in the middle of which the text ends gives its first part.
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


def stop_at(text: str, before: int, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins that the text beyond ``before`` completes; it may have begun sooner."""
    found = [text.find(s, max(0, before - len(s) + 1)) for s in stops if s]
    return min((f for f in found if f >= 0), default=None)
