"""Response bodies: OpenAI's objects as dictionaries, with one more field called ``ivg``. Independent of HTTP and threads."""

from __future__ import annotations

import itertools
import math
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ivg.models.token_text import TokenText
from ivg.models.tool_reader import CallText
from ivg.serving.echo import EchoedPrompt
from ivg.serving.served_models import RequestBatch
from ivg.serving.tools import call_deltas, message_calls
from ivg.types import Completion, TokenLogprobs, likeliest
from ivg.types.thinking import split_reasoning

MIN_LOGPROB = -9999.0
"""OpenAI's number for log 0."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a response consists of; ``content`` is None where it has not begun."""

    thinking: str | None = None
    content: str | None = ""
    calls: tuple[CallText, ...] = ()


@dataclass
class ChoiceState:
    """One choice of a response, as far as it has been sent.

    Attributes:
        index: of the choice.
        text: sent so far.
        tokens: number of tokens whose log-probabilities were sent.
        characters: length of the text of those tokens.
        length: tokens of the committed text.
        selections: number of ``ivg.beams`` events sent.
        beam_numbers: small numbers for beam keys, in order of appearance.
        completion: set when it is finished.
        parts: thinking, answer and calls of tools, as far as they were sent.
        echoed: characters of the prompt that were sent before.
    """

    index: int
    text: str = ""
    tokens: int = 0
    characters: int = 0
    length: int = 0
    selections: int = 0
    beam_numbers: dict[int, int] = field(default_factory=dict)
    completion: Completion | None = None
    parts: Parts = Parts()
    echoed: int = 0

    def take_tokens(self, details: Sequence[TokenLogprobs], limit: int, *, final: bool) -> list[TokenLogprobs]:
        """Tokens not sent yet that lie within the first ``limit`` characters; at the end without what a stop string cut off."""
        out = []
        for detail in details[self.tokens :]:
            end = self.characters + len(detail.text)
            if final and self.characters < limit < end:  # a stop string begins inside this token
                detail, end = replace(detail, text=detail.text[: limit - self.characters]), limit
            if end > limit or (not detail.text and final and self.characters >= limit) or (not detail.text and not final and end == limit):
                break  # without text: part of a character that the next token completes, or the end
            out.append(detail)
            self.characters = end
        self.tokens += len(out)
        return out


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a choice: of its thinking, of its text, and ``tool_calls`` of deltas."""

    thinking: str = ""
    content: str = ""
    calls: tuple[dict[str, Any], ...] = ()


class ResponseBuilder:
    """Builds the JSON objects of one response.

    Args:
        chat: chat completions or completions.
        model: as the client named it.
        batch: what is answered.
        top_logprobs: alternatives for each token; None: no log-probabilities.
        token_text: text of tokens.
        echo: choices begin with their prompts.
        prompt_logprobs: alternatives for each token of the prompts, in vLLM's form; None: leave it out.
    """

    def __init__(
        self,
        chat: bool,
        model: str,
        batch: RequestBatch,
        top_logprobs: int | None,
        token_text: TokenText,
        *,
        echo: bool = False,
        prompt_logprobs: int | None = None,
    ) -> None:
        self.chat, self.model, self.batch, self.top_logprobs, self.token_text = chat, model, batch, top_logprobs, token_text
        self.echo, self.prompt_logprobs = echo, prompt_logprobs
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    def envelope(self, choices: list[dict[str, Any]], *, stream: bool = False) -> dict[str, Any]:
        """The object around ``choices``."""
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def choice(self, state: ChoiceState, completion: Completion) -> dict[str, Any]:
        """A whole choice."""
        tokens = state.take_tokens(completion.details, len(completion.text), final=True)
        prompt, parts = self.echoed(state.index), self.parts(state.index, completion.text)
        out: dict[str, Any] = {"index": state.index, "finish_reason": self.finish_reason(completion, parts)}
        out["logprobs"] = self.logprobs(tokens, len(prompt.text) if prompt else 0, prompt)
        if not self.chat:
            own = {} if self.prompt_logprobs is None else {"prompt_logprobs": self._vllm_prompt_logprobs(state.index)}
            return out | {"text": (prompt.text if prompt else "") + completion.text} | own
        message: dict[str, Any] = {"role": "assistant", "content": parts.content, "refusal": None}
        if parts.thinking is not None:
            message["reasoning_content"] = parts.thinking
        if parts.calls:
            message |= {"content": parts.content or None, "tool_calls": message_calls(parts.calls, self._call_ids(state.index, parts))}
        return out | {"message": message}

    def parts(self, index: int, text: str, *, final: bool = True) -> Parts:
        """What the text of a choice, or the beginning of it, consists of."""
        if not self.chat:
            return Parts(content=text)
        marker, tools = self.batch.thinking[index], self.batch.tools
        thinking, answer = (None, text) if marker is None else split_reasoning(text, marker, final=final)
        if tools is None or answer is None:
            return Parts(thinking, answer)
        found = tools.parse(answer, final=final)
        return Parts(thinking, found.content, found.calls)

    def take_delta(self, state: ChoiceState, *, final: bool) -> Delta:
        """What of :attr:`ChoiceState.text` was not sent yet."""
        sent, now = state.parts, self.parts(state.index, state.text, final=final)
        state.parts = now
        calls = tuple(call_deltas(sent.calls, now.calls, self._call_ids(state.index, now)))
        return Delta((now.thinking or "")[len(sent.thinking or "") :], (now.content or "")[len(sent.content or "") :], calls)

    def _call_ids(self, index: int, parts: Parts) -> list[str]:
        tools = self.batch.tools
        return [] if tools is None else [tools.call_id(self.id, index, i) for i in range(len(parts.calls))]

    def finish_reason(self, completion: Completion, parts: Parts) -> str:
        """``tool_calls`` where a response ended after calls; ``stop`` if the request named the function, as of OpenAI's API and vLLM."""
        if completion.finish_reason != "stop" or not parts.calls or self.batch.tools is None or self.batch.tools.named:
            return completion.finish_reason
        return "tool_calls"

    def delta(
        self, index: int, piece: Delta, tokens: Sequence[TokenLogprobs] = (), offset: int = 0, finish: str | None = None
    ) -> dict[str, Any]:
        """A piece of a choice; its tokens begin ``offset`` characters after the beginning of the choice."""
        out: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": self.logprobs(tokens, offset) if tokens else None}
        if not self.chat:
            return out | {"text": piece.content}
        reasoning = {"reasoning_content": piece.thinking} if piece.thinking else {}
        calls = {"tool_calls": list(piece.calls)} if piece.calls else {}
        is_text = piece.content or (finish is None and not reasoning and not calls)
        return out | {"delta": reasoning | ({"content": piece.content} if is_text else {}) | calls}

    def echoed(self, index: int) -> EchoedPrompt | None:
        """The prompt of a choice, where its text begins with it."""
        job = self.batch.echo
        return job.echoed[index // self.batch.returned] if self.echo and job is not None else None

    def echo_delta(self, index: int) -> dict[str, Any] | None:
        """The prompt of a choice, which begins its stream."""
        prompt = self.echoed(index)
        if prompt is None:
            return None
        return {"index": index, "finish_reason": None, "logprobs": self.logprobs([], 0, prompt), "text": prompt.text}

    def _vllm_prompt_logprobs(self, index: int) -> list[dict[str, Any] | None]:
        """VLLM's form: for each token of the prompt but the first, log-probability, rank and text by token id."""
        assert self.batch.echo is not None and self.prompt_logprobs is not None
        rest = self.batch.echo.echoed[index // self.batch.returned].rest
        out: list[dict[str, Any] | None] = [None]
        for t in () if rest is None else rest.tokens:
            ranks = {i: (rank, p) for rank, (i, p) in enumerate(t.top, 1)}
            own = {t.token: ranks.get(t.token, (t.rank, t.logprob))}
            shown = own | dict(list(ranks.items())[: self.prompt_logprobs])
            out.append({
                str(i): {"logprob": clamp(p), "rank": rank, "decoded_token": self.token_text.decode(i)} for i, (rank, p) in shown.items()
            })  # fmt: skip
        return out

    def logprobs(self, tokens: Sequence[TokenLogprobs], offset: int, prompt: EchoedPrompt | None = None) -> dict[str, Any] | None:
        """Log-probabilities under the guided distribution, in OpenAI's format for this endpoint.

        Args:
            tokens: of the completion.
            offset: characters of the choice before them.
            prompt: tokens that come first.
        """
        if self.top_logprobs is None:
            return None
        n = self.top_logprobs
        if self.chat:
            return {"content": [self._chat_token(t, n) for t in tokens], "refusal": None}
        first, before = ([], ()) if prompt is None or prompt.rest is None else ([prompt.first[1]], prompt.rest.tokens)
        texts = [*first, *(t.text for t in before)]
        starts = [0, *itertools.accumulate(map(len, texts))][: len(texts)]
        starts += itertools.accumulate([len(t.text) for t in tokens[:-1]], initial=offset) if tokens else []
        none: list[None] = [None] * len(first)
        return {
            "tokens": texts + [t.text for t in tokens],
            "token_logprobs": [*none, *(clamp(t.logprob) for t in (*before, *tokens))],
            "top_logprobs": [*none, *(self._tops(t, n) for t in before), *(self._tops(t, n) for t in tokens)],
            "text_offset": starts,
        }

    def _tops(self, t: TokenLogprobs, n: int) -> dict[str, float]:
        """The likeliest tokens by text, and the token itself by its text in the answer; another one with the same text by its piece."""
        out, taken = {}, {t.text}
        for i, p in {**dict(t.top[:n]), t.token: t.logprob}.items():
            name = t.text
            if i != t.token:
                name = next(name for name in (*self._names(i), f"token_id:{i}") if name not in taken)
            taken.add(name)
            out[name] = clamp(p)
        return out

    def _names(self, token: int) -> tuple[str, str]:
        return self.token_text.decode(token), self.token_text.piece(token)

    def _chat_token(self, t: TokenLogprobs, n: int) -> dict[str, Any]:
        own = {"token": t.text, "bytes": list(self.token_text.own_bytes(t.token, t.text))}
        return {**own, "logprob": clamp(t.logprob), "top_logprobs": [self._chat_top(t, i, p, own) for i, p in t.top[:n]]}

    def _chat_top(self, t: TokenLogprobs, token: int, logprob: float, own: dict[str, Any]) -> dict[str, Any]:
        if token == t.token:
            return {**own, "logprob": clamp(logprob)}
        text, piece = self._names(token)
        return {"token": piece if text == t.text else text, "bytes": list(self.token_text.own_bytes(token)), "logprob": clamp(logprob)}

    def guided_tokens(self, tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """Tokens with their log-probabilities before and after guidance, for the event ``ivg.tokens``."""
        return [
            {
                "text": t.text,
                "shift": clamp(t.logprob - t.base_logprob),
                "logprob": clamp(t.logprob),
                "base_logprob": clamp(t.base_logprob),
                "top": [{"text": self.token_text.decode(i), "logprob": clamp(p)} for i, p in t.top],
                "top_base": [{"text": self.token_text.decode(i), "logprob": clamp(p)} for i, p in t.top_base],
            }
            for t in tokens
        ]

    def usage(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """OpenAI's usage: prompt tokens (each prompt once), how many of them the base had cached, completion tokens."""
        first = completions[:: self.batch.n]
        cached = sum(min(c.usage.prompt_tokens, c.usage.cached_tokens.get("base", 0)) for c in first)
        usage = self.usage_so_far(sum(c.usage.completion_tokens for c in completions))
        return usage | {"prompt_tokens_details": {"cached_tokens": cached}}

    def usage_so_far(self, completion_tokens: int) -> dict[str, int]:
        """Usage while the response is being streamed."""
        prompt = self.batch.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion_tokens, "total_tokens": prompt + completion_tokens}

    def ivg_object(self, completions: Sequence[Completion], first: Completion | None = None) -> dict[str, Any]:
        """The field ``ivg``: method, seed, score, tokens read by each model and in all, seconds.

        If there are any, also nats of a budget of KL, tokens of a draft model, notes, and the settings that came from the checkpoint's
        ``generation_config.json``.

        Args:
            completions: all that were generated.
            first: of those that are returned, whose score and nats these are; None: the first of all.
        """
        first = completions[0] if first is None else first
        from_checkpoint = first.generation_config
        read: Counter[str] = Counter()
        for c in completions:
            read.update(c.usage.forward_tokens)
        if self.batch.echo is not None:
            read.update(self.batch.echo.forward_tokens)
        return {
            "method": self.batch.method,
            "seed": self.batch.seed,
            "score": finite_or_none(first.score),
            "usage": dict(read),
            "tokens_read": sum(read.values()),
            "seconds": round(max(c.usage.seconds for c in completions), 4),
            **({"kl_spent": round(spent, 6)} if (spent := first.kl_spent) is not None else {}),
            **({"drafted_tokens": drafted} if (drafted := sum(c.usage.drafted_tokens for c in completions)) else {}),
            **({"notes": notes} if (notes := list(dict.fromkeys(note for c in completions for note in c.notes))) else {}),
            **({"generation_config": dict(from_checkpoint)} if from_checkpoint else {}),
        }

    def build_response(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The body of a response that is not streamed; ``ivg.choices`` has the fields of ``ivg`` for each of several choices."""
        n = self.batch.n
        chosen = [c for i in range(0, len(completions), n) for c in likeliest(completions[i : i + n], self.batch.returned)]
        choices = [self.choice(ChoiceState(i), c) for i, c in enumerate(chosen)]
        ivg = self.ivg_object(completions, chosen[0])
        if len(chosen) > 1:
            ivg["choices"] = [self.ivg_object([c]) | {"index": i} for i, c in enumerate(chosen)]
        return self.envelope(choices) | {"usage": self.usage(completions), "ivg": ivg}


def clamp(number: float) -> float:
    """JSON has no infinity."""
    return max(MIN_LOGPROB, min(-MIN_LOGPROB, number))


def finite_or_none(score: float | None) -> float | None:
    """A score that JSON can hold."""
    return score if score is not None and math.isfinite(score) else None
