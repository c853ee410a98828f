"""What goes back: OpenAI's objects and errors as plain dictionaries, with one of ours called ``ivg``. Knows no HTTP, no threads."""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from ivg.errors import ServeError
from ivg.models.vocabulary import Vocabulary
from ivg.serving.served_models import Order
from ivg.types import Completion, TokenLogprobs

NEVER = -9999.0
"""OpenAI's number for the logarithm of nothing."""


class Texts:
    """Tokens by themselves as text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.of = lru_cache(maxsize=65536)(self._of)
        self._before = vocabulary.tokenizer("a", add_special_tokens=False).input_ids

    def _of(self, token: int) -> str:
        """Behind other text, because some tokenizers drop a leading space; a special token by its name."""
        return self._vocabulary.response_text(self._before, [token]) or self._vocabulary.pieces.get(token, "")


@dataclass
class Answer:
    """One answer as far as its client has it."""

    index: int
    text: str = ""
    tokens: int = 0
    covered: int = 0
    """Characters that the tokens sent make up."""
    numbers: dict[int, int] = field(default_factory=dict)
    """Beams by their keys, counted as they appear."""
    completion: Completion | None = None

    def take(self, details: Sequence[TokenLogprobs], limit: int, *, final: bool) -> list[TokenLogprobs]:
        """Tokens not sent yet whose text lies within the first ``limit`` characters; at the end, what a stop string cut is left out."""
        out = []
        for detail in details[self.tokens :]:
            end = self.covered + len(detail.text)
            if final and self.covered < limit < end:  # a stop string begins inside this token
                detail, end = replace(detail, text=detail.text[: limit - self.covered]), limit
            if end > limit or (not detail.text and final and self.covered >= limit) or (not detail.text and not final and end == limit):
                break  # without text: a part of a character, which the next token completes, or the end
            out.append(detail)
            self.covered = end
        self.tokens += len(out)
        return out


class ResponseBuilder:
    """Chat or plain completions: how the objects of one response look.

    Args:
        chat: which of the two.
        model: as the client called it.
        order: what is answered.
        alternatives: to every token, as the client asked; None: no log-probabilities.
        texts: of tokens.
    """

    def __init__(self, chat: bool, model: str, order: Order, alternatives: int | None, texts: Texts) -> None:
        self.chat, self.model, self.order, self.alternatives, self.texts = chat, model, order, alternatives, texts
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    def envelope(self, choices: list[dict[str, Any]], *, stream: bool = False) -> dict[str, Any]:
        """What stands around ``choices``."""
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def choice(self, answer: Answer, completion: Completion) -> dict[str, Any]:
        """A whole answer."""
        tokens = answer.take(completion.details, len(completion.text), final=True)
        out: dict[str, Any] = {"index": answer.index, "finish_reason": completion.finish_reason, "logprobs": self.logprobs(tokens, 0)}
        if self.chat:
            return out | {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
        return out | {"text": completion.text}

    def delta(self, index: int, text: str, tokens: Sequence[TokenLogprobs], offset: int, finish: str | None = None) -> dict[str, Any]:
        """A piece of an answer; its tokens begin ``offset`` characters behind the answer's beginning."""
        out: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": self.logprobs(tokens, offset) if tokens else None}
        if self.chat:
            return out | {"delta": {"content": text} if text or finish is None else {}}
        return out | {"text": text}

    def logprobs(self, tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any] | None:
        """Of the guided distribution, in OpenAI's form for this kind of response."""
        if self.alternatives is None:
            return None
        n = self.alternatives
        if self.chat:
            return {"content": [self._chat_token(t, n) for t in tokens], "refusal": None}
        offsets = [offset + sum(len(t.text) for t in tokens[:i]) for i in range(len(tokens))]
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [finite(t.logprob) for t in tokens],
            "top_logprobs": [{self.texts.of(i): finite(p) for i, p in t.top[:n]} for t in tokens] if n else None,
            "text_offset": offsets,
        }

    def _chat_token(self, t: TokenLogprobs, n: int) -> dict[str, Any]:
        top = [{**_named(self.texts.of(i)), "logprob": finite(p)} for i, p in t.top[:n]]
        return {**_named(t.text), "logprob": finite(t.logprob), "top_logprobs": top}

    def looks(self, tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """Tokens with what guidance did to them and to their rivals, for whoever watches."""
        return [
            {
                "text": t.text,
                "shift": finite(t.logprob - t.base_logprob),
                "logprob": finite(t.logprob),
                "base_logprob": finite(t.base_logprob),
                "top": [{"text": self.texts.of(i), "logprob": finite(p)} for i, p in t.top],
                "top_base": [{"text": self.texts.of(i), "logprob": finite(p)} for i, p in t.top_base],
            }
            for t in tokens
        ]

    def usage(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """OpenAI's: tokens of prompts, each once, those of them that the base had in its cache, and tokens of answers."""
        first = completions[:: self.order.each]
        cached = sum(min(c.usage.prompt_tokens, c.usage.cached_tokens.get("base", 0)) for c in first)
        counts = self.counts(sum(c.usage.completion_tokens for c in completions))
        return counts | {"prompt_tokens_details": {"cached_tokens": cached}}

    def counts(self, written: int) -> dict[str, int]:
        """Usage with so many tokens of answers."""
        prompt = self.order.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def ours(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The object ``ivg``: method, seed, score, what it cost (tokens read by each model, all together, seconds); if there are any,
        notes, and settings that neither client nor recipe gave but the checkpoint.
        """
        own = completions[0].generation_config
        read: Counter[str] = Counter()
        for c in completions:
            read.update(c.usage.forward_tokens)
        return {
            "method": self.order.method,
            "seed": self.order.seed,
            "score": known(completions[0].score),
            "usage": dict(read),
            "tokens_read": sum(read.values()),
            "seconds": round(max(c.usage.seconds for c in completions), 4),
            **({"notes": notes} if (notes := list(dict.fromkeys(note for c in completions for note in c.notes))) else {}),
            **({"generation_config": dict(own)} if own else {}),
        }


def whole(form: ResponseBuilder, completions: Sequence[Completion]) -> dict[str, Any]:
    """A response that is not streamed."""
    choices = [form.choice(Answer(i), c) for i, c in enumerate(completions)]
    ours = form.ours(completions) | {"choices": [form.ours([c]) | {"index": i} for i, c in enumerate(completions)]}
    return form.envelope(choices) | {"usage": form.usage(completions), "ivg": ours}


def error_body(error: ServeError) -> dict[str, Any]:
    """OpenAI's shape."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def finite(number: float) -> float:
    """JSON has no infinity."""
    return max(NEVER, min(-NEVER, number))


def known(score: float | None) -> float | None:
    """A score that JSON can carry."""
    return score if score is not None and math.isfinite(score) else None


def _named(text: str) -> dict[str, Any]:
    return {"token": text, "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())}
