"""The base behind any OpenAI-compatible completions endpoint (vLLM, SGLang, llama.cpp): chunks of text over HTTP.

Knows: one expand request is one HTTP request for so many continuations of prompt and response. Must not know sockets and threads
(``engine.asking``), nor which beams are worth keeping (``search.searcher``). An endpoint gives text, no logits: nothing can guide its
tokens, everything that selects chunks works. Every chunk is sent again as text, so the server should cache prefixes (vLLM and SGLang
do), and its tokenizer may cut the border of two chunks otherwise than the base had drawn it. What is drawn is the server's affair: a
seed goes along with every request, and whether it reproduces the answer depends on the server.

Settings that a request leaves at "off" (top-k, min-p, repetition penalty) are not sent, because strict servers refuse fields of others;
vLLM then takes the model's own defaults (its ``generation_config.json``) unless it was started with ``--generation-config vllm``. With
``explicit`` they are sent all the same: then the server's defaults apply to nothing. ``extra`` says more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ivg.engines.endpoint.choices import CompletionChoice, cached_of, heard, spelled, stop_at, used
from ivg.engines.endpoint.client import CompletionClient, api_url
from ivg.engines.endpoint.text_vocabulary import END, FILLER, EndpointPromptEncoder, TextVocabulary
from ivg.errors import ConfigError
from ivg.settings.sampling import ONLY_TRANSFORMERS
from ivg.types import Beam, ExpandOutput, ExpandRequest, FinishReason, Prompt, SamplingParams, TokenGuidance, new_key
from ivg.utils.rng import child_rng_path, mix

MOMENT = 0.05
"""Seconds that :meth:`EndpointEngine.collect` waits for news."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class EndpointEngine:
    """Extends beams by asking a server; a :class:`~ivg.types.AsyncEngine`.

    All requests run at once in one event loop, in a thread of their own. A beam that is released while its request runs gives the
    request up: the connection is closed, which tells the server to stop.

    Args:
        url: of the server or of its API: ``http://localhost:8000`` or ``http://localhost:8000/v1``.
        model: as the server calls it.
        api_key: where the server wants one.
        tokenizer: the base's own (an object), to render chat messages;
            see ``EndpointPromptEncoder``.
        template: how the base reads a prompt (see ``models.chat``).
        timeout: seconds that the server may be silent; a request that is slower in all its tries together than that allows ends too.
        retries: further tries where the server is busy, silent or away.
        concurrency: requests at once.
        name: in errors.
        token_pieces: ask the server to spell the tokens (``logprobs``), so that lengths are exact and traces show tokens.
        extra: further fields of every request.
        explicit: send what is off, too, so that no default of the server's takes its place (vLLM, SGLang).

    Raises:
        ConfigError: unusable settings.
        MissingDependencyError: no ``openai`` package.
    """

    unsupported: Mapping[str, str] = {
        "pause": "an endpoint gives text, not the base's entropy; use a method that selects chunks (cbs-explicit, bon …)",
        "alternatives": "an endpoint gives text, not distributions; leave them out",
        "return_log_ratio": "an endpoint gives text, not probabilities; leave token guidance out",
        **dict.fromkeys(
            ("min_new_tokens", "min_length", *ONLY_TRANSFORMERS),
            "endpoints share no field for it; set it on the server, or use the transformers engine",
        ),
    }

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        tokenizer: Any = None,
        template: str | None = None,
        timeout: float = 120.0,
        retries: int = 2,
        concurrency: int = 64,
        name: str = "endpoint",
        token_pieces: bool = False,
        extra: Mapping[str, Any] | None = None,
        explicit: bool = False,
    ) -> None:
        self.explicit = explicit
        self.url, self.model, self.name, self.token_pieces, self.extra = api_url(url), model, name, token_pieces, dict(extra or {})
        self.vocabulary = TextVocabulary(f"{model} at {self.url}", getattr(tokenizer, "chat_template", None))
        self.base = EndpointPromptEncoder(self.vocabulary, tokenizer, template)
        self.asker = CompletionClient(self.url, api_key=api_key, timeout=timeout, retries=retries, concurrency=concurrency)
        self._running: dict[int, tuple[ExpandRequest, Future[None] | None]] = {}
        self._refused: list[tuple[ExpandRequest, str]] = []
        self._kept_back: list[ExpandOutput] = []

    # What it can do

    def open(self, prompt: Prompt, sampling: SamplingParams) -> Beam:
        """The empty response to ``prompt``. How long a context the server has, only the server knows.

        Raises:
            PromptError: empty, or messages that cannot be rendered here.
        """
        self.base.text(prompt)
        return Beam(new_key(), None, prompt, vocabulary=self.vocabulary, inherits=False)

    def prompt_tokens(self, prompt: Prompt) -> int:
        """Length of the prompt: in tokens where there is a tokenizer, else in words."""
        return len(self.base.prompt_ids(prompt))

    def check(self, guidance: TokenGuidance | None) -> None:
        """Raise where tokens are to be guided.

        Raises:
            ConfigError: always, but for None.
        """
        if guidance is not None:
            raise ConfigError(
                f"token guidance by {guidance.value.name} needs the base's logits, and {self.url} gives text\n"
                "  use a method that selects chunks (cbs-explicit, bon …), or serve the composite of `ivg pack` with vLLM"
            )

    def check_order(self, request: ExpandRequest) -> None:
        """Raise where ``request`` asks for what a text does not tell.

        Raises:
            ConfigError: token guidance, or something that this engine does not support.
        """
        self.check(request.guidance)
        asked = {
            "pause": request.pause is not None,
            "alternatives": request.alternatives is not None,
            "return_log_ratio": request.return_log_ratio,
        }
        for name in (n for n, wanted in asked.items() if wanted):
            raise ConfigError(f"{name}: the engine {self.name} cannot do that\n  {self.unsupported[name]}")

    # Orders

    def submit(self, requests: Sequence[ExpandRequest]) -> None:
        """Send one HTTP request for each. Invalid requests return error beams, and affect no others.

        Raises:
            ModelError: the engine is closed.
        """
        for request in requests:
            future = None
            try:
                self.check_order(request)
            except ConfigError as e:
                self._refused.append((request, str(e)))
            else:
                wanted = _answers(request)
                future = self.asker.ask(request, self._body(request), [_seed(request, i) for i in range(wanted)])
            self._running[request.beam.key] = (request, future)

    def collect(self, beams: Collection[int] | None = None) -> list[ExpandOutput]:
        """Orders of ``beams`` that are done; waits up to :data:`MOMENT` seconds for one. Orders under way are not shown.

        Raises:
            ModelError: the engine is closed.
        """
        if not (found := self._taken(beams)):
            self._kept_back += self._news()
            found = self._taken(beams)
        return found

    def _taken(self, beams: Collection[int] | None) -> list[ExpandOutput]:
        """Output that was kept back, of ``beams``; it is not kept any longer."""
        found = [g for g in self._kept_back if beams is None or g.beam in beams]
        self._kept_back = [g for g in self._kept_back if beams is not None and g.beam not in beams]
        return found

    def extend(self, requests: Sequence[ExpandRequest]) -> list[list[Beam]]:
        """The children of every request's beam; returns when all are done. Output of other requests is kept for :meth:`collect`.

        Raises:
            ModelError: the engine is closed.
        """
        self.submit(requests)
        wanted, found = {o.beam.key for o in requests}, dict[int, list[Beam]]()
        while wanted - set(found):
            found |= {growth.beam: growth.children for growth in self.collect(wanted)}
        return [found[o.beam.key] for o in requests]

    def release(self, keys: Sequence[int]) -> None:
        """Give up the requests of these beams, where any run; nothing else is kept for a beam."""
        for key in keys:
            _, future = self._running.pop(key, (None, None))
            if future is not None:
                future.cancel()
        gone = set(keys)
        self._kept_back = [g for g in self._kept_back if g.beam not in gone]

    def restart(self) -> None:
        """Give up all requests: whoever sent them is gone."""
        self.release(list(self._running))
        self._refused.clear()
        self._kept_back.clear()

    def close(self) -> None:
        """Give up everything that runs and end the thread; the engine is of no use afterwards."""
        self._running.clear()
        self.asker.close()

    def __enter__(self) -> EndpointEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # From beams to requests

    def _body(self, request: ExpandRequest) -> dict[str, Any]:
        beam, s = request.beam, request.sampling
        given = {
            "top_k": (s.top_k, s.top_k > 0),
            "min_p": (s.min_p, s.min_p > 0),
            "repetition_penalty": (s.repetition_penalty, s.repetition_penalty != 1),
            "ignore_eos": (s.ignore_eos, s.ignore_eos),
        }
        extra = {name: value for name, (value, wanted) in given.items() if wanted or self.explicit} | self.extra
        body = {
            "model": self.model,
            "prompt": self.base.text(beam.prompt) + beam.text,
            "max_tokens": _limit(request),
            "temperature": s.temperature,
            "top_p": s.top_p,
        }
        return body | ({"stop": list(s.stop)} if s.stop else {}) | ({"logprobs": 0} if self.token_pieces else {}) | {"extra_body": extra}

    # From replies to beams

    def _news(self) -> list[ExpandOutput]:
        refused, self._refused = self._refused, []
        out = []
        for request, outcome in (*refused, *self.asker.outcomes(0.0 if refused else MOMENT)):
            running = self._running.get(request.beam.key)
            if running is not None and running[0] is request:  # nobody gave it up meanwhile
                del self._running[request.beam.key]
                out.append(ExpandOutput(request.beam.key, self._children(request, outcome)))
        return out

    def _children(self, request: ExpandRequest, outcome: list[Any] | str) -> list[Beam]:
        if isinstance(outcome, str):
            return [self._beam(request, i, request.beam.token_ids, request.beam.text, "error", outcome) for i in range(request.successors)]
        for reply in outcome:
            request.beam.token_counter.add("base", sum(used(reply)), cached_of(reply))
        answers = [answer for reply in outcome for answer in heard(reply, _limit(request))]
        wanted = _answers(request)
        return [self._child(request, i, answers[i % wanted]) for i in range(request.successors)]

    def _child(self, request: ExpandRequest, index: int, answer: CompletionChoice) -> Beam:
        before, text, stopped, ended = request.beam.text, request.beam.text + answer.text, answer.stopped, answer.ended
        cut = stop_at(text, len(before), request.sampling.stop)  # the server saw the chunk alone, not what came before it
        if cut is not None:
            text, stopped, ended = text[:cut], True, False
        elif not stopped and len(request.beam.token_ids) + answer.tokens < request.sampling.max_new_tokens:
            text = before + answer.text.rstrip(_UNFINISHED)  # the bytes of half a character would come back as another one
        ids = self._ids(request.beam, text, answer, ended=ended)
        finish: FinishReason | None = "stop" if stopped else "length" if len(ids) >= request.sampling.max_new_tokens else None
        return self._beam(request, index, ids, text, finish)

    def _ids(self, beam: Beam, text: str, answer: CompletionChoice, *, ended: bool) -> tuple[int, ...]:
        """Numbers whose texts make up ``text``: one new piece or the server's tokens, and as many fillers as it has tokens more.

        A text that a stop string cut before its parent's end is one piece, so that decoding gives the text whatever was cut.
        """
        if text.startswith(beam.text):
            ids, new = list(beam.token_ids), text[len(beam.text) :]
        else:
            ids, new = [], text
        ids += [self.vocabulary.intern(piece) for piece in spelled(new, answer.names)]
        ids += [FILLER] * (len(beam.token_ids) + answer.tokens - ended - len(ids))
        return (*ids, END) if ended else tuple(ids)

    def _beam(
        self, request: ExpandRequest, index: int, ids: tuple[int, ...], text: str, finish: FinishReason | None, error: str | None = None
    ) -> Beam:
        beam = request.beam
        return Beam(
            new_key(),
            beam.key,
            beam.prompt,
            ids,
            text,
            finish,
            beam.token_counter,
            self.vocabulary,
            inherits=not request.keep,
            rng_path=child_rng_path(beam.rng_path, len(beam.token_ids), request.first + index),
            guide_shift=(0.0,) * len(ids) if request.record else (),  # nothing guides here
            log_ratio=beam.log_ratio,
            pieces=tuple(self.vocabulary.decode([i]) for i in ids) if request.record else (),
            error=error,
        )


def load_endpoint(url: str, model: str, *, tokenizer: str | Path | None = None, **settings: Any) -> EndpointEngine:
    """The engine of a server; ``GuidedModel(engine.base, values, engine=engine)`` searches with it.

    Args:
        url: of the server.
        model: as the server calls it.
        tokenizer: directory or hub id of the base's tokenizer, for prompts that are chat messages.
        settings: see :class:`EndpointEngine`.

    Raises:
        ConfigError: unusable settings.
        ModelError: no such tokenizer.
        MissingDependencyError: no ``openai`` package.
    """
    if tokenizer is None:
        return EndpointEngine(url, model, **settings)
    from ivg.models.loading import LoadOptions, load_tokenizer

    return EndpointEngine(url, model, tokenizer=load_tokenizer(tokenizer, LoadOptions(), f"the endpoint's {model}"), **settings)


def _limit(request: ExpandRequest) -> int:
    """Tokens to ask for: the request's, or what the response has left."""
    return min(request.tokens, request.sampling.max_new_tokens - len(request.beam.token_ids))


def _answers(request: ExpandRequest) -> int:
    """How many answers to ask for: greedy ones would all be the same, and vLLM refuses to make several."""
    return 1 if request.sampling.temperature == 0 else request.successors


def _seed(request: ExpandRequest, index: int) -> int:
    """31 bits, which every server takes."""
    beam = request.beam
    return mix(request.seed, beam.rng_path, len(beam.token_ids), request.first, index) & 0x7FFFFFFF
