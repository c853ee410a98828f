"""The base behind any OpenAI-compatible completions endpoint (vLLM, SGLang, llama.cpp): chunks of text over HTTP.

One expand request is one HTTP request for several continuations of prompt and response. An endpoint returns text, no logits: nothing can
guide its tokens; every method that selects chunks works. Log-probabilities are those that the server reports (vLLM: at temperature 1,
before filters and penalties). Each chunk sends prompt and response again as text, so the server should cache prefixes (vLLM and SGLang
do), and its tokenizer may split the text at the end of a chunk in another way than it was sampled. A seed is sent with every request;
whether it reproduces the answer depends on the server.

Settings that a request leaves at "off" (top-k, min-p, repetition penalty) are not sent, because strict servers refuse unknown fields;
vLLM then takes the model's own defaults (its ``generation_config.json``) unless it was started with ``--generation-config vllm``. With
``explicit`` they are always sent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivg.engines.endpoint.choices import CompletionChoice, cached_tokens, read_choices, split_tokens, used_tokens
from ivg.engines.endpoint.client import CompletionClient, api_url
from ivg.engines.endpoint.structured import Dialect, EndpointGrammars
from ivg.engines.endpoint.text_vocabulary import END, FILLER, EndpointPromptEncoder, TextVocabulary
from ivg.engines.sequences import TokenSequence, as_beams, fail, fork, stop_at
from ivg.errors import IVGError
from ivg.models.prompt_template import PromptTemplate
from ivg.settings.sampling import IN_CHUNKS, LOOK_BACK, ONLY_TRANSFORMERS
from ivg.types import AsyncEngine, Beam, DecodeState, ExpandOutput, ExpandRequest, Prompt, SamplingParams, TokenLogprobs, new_key
from ivg.utils.rng import mix

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class EndpointEngine(AsyncEngine):
    """Extends beams by requests to a server.

    All requests run at once in one event loop, in a thread of its own. Releasing a beam while its request runs closes the connection,
    which makes the server stop.

    Args:
        url: of the server or of its API: ``http://localhost:8000`` or ``http://localhost:8000/v1``.
        model: as the server calls it.
        api_key: where the server needs one.
        tokenizer: the base's own (an object), to render chat messages; see :class:`EndpointPromptEncoder`.
        template: how the base reads a prompt (see :mod:`ivg.models.chat_template`).
        timeout: seconds without an answer after which a request is tried again.
        retries: further attempts where the server is busy, does not answer or cannot be reached.
        concurrency: requests at once.
        name: in errors.
        token_pieces: request the text of each token (``logprobs``), so that lengths are exact and traces show tokens.
        extra: further fields of every request.
        structured_output: the server's field for structured output: ``vllm`` (structured_outputs) or ``openai`` (response_format).
        explicit: also send settings that are off, so that the server's own defaults never apply (vLLM, SGLang).

    Raises:
        ConfigError: unusable settings.
        MissingDependencyError: no ``openai`` package.
    """

    unsupported: Mapping[str, str] = {
        "pause": "an endpoint gives text, not the base's entropy; use a method that selects chunks (cbs-explicit, bon …)",
        "until": "chunks of an endpoint have a length in tokens, so no chunk_until; use the transformers engine",
        "thinking": "chunks of an endpoint have a length in all, so no guide_after; use the transformers engine",
        "return_log_ratio": "an endpoint gives text, not probabilities; leave token guidance out",
        **dict.fromkeys(
            [f"{name}{IN_CHUNKS}" for name in LOOK_BACK],
            "the server sees one chunk at a time, not the response before it; use a method without chunks (bon)",
        ),
        **dict.fromkeys(
            ("min_length", "end_at_sentence", *ONLY_TRANSFORMERS),
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
        template: str | PromptTemplate | None = None,
        timeout: float = 120.0,
        retries: int = 2,
        concurrency: int = 64,
        name: str = "endpoint",
        token_pieces: bool = False,
        extra: Mapping[str, Any] | None = None,
        explicit: bool = False,
        structured_output: Dialect = "vllm",
    ) -> None:
        super().__init__()
        self.explicit, self.grammars = explicit, EndpointGrammars(structured_output)
        self.url, self.model, self.name, self.token_pieces, self.extra = api_url(url), model, name, token_pieces, dict(extra or {})
        self.vocabulary = TextVocabulary(f"{model} at {self.url}", getattr(tokenizer, "chat_template", None))
        self.base = EndpointPromptEncoder(self.vocabulary, tokenizer, template)
        self.client = CompletionClient(self.url, api_key=api_key, timeout=timeout, retries=retries, concurrency=concurrency)
        self._running: dict[int, tuple[ExpandRequest, Future[None]]] = {}

    def open(self, prompt: Prompt, sampling: SamplingParams) -> Beam:
        """The empty response to ``prompt``. Its length is not checked: only the server knows its context.

        Raises:
            PromptError: empty, or messages that cannot be rendered here.
        """
        self.base.text(prompt)
        return Beam(new_key(), None, prompt, vocabulary=self.vocabulary, inherits=False)

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Raise where structured output cannot be asked for, or could not be checked."""
        self.grammars.check(sampling)

    def submit(self, requests: Sequence[ExpandRequest]) -> None:
        """Send one HTTP request for each. Invalid requests return error beams, and affect no others.

        Raises:
            ModelError: the engine is closed.
        """
        for request in requests:
            try:
                self.check_request(request)
            except IVGError as e:
                self.keep([ExpandOutput(request.beam.key, fail(request, str(e)))])
            else:
                seeds = [_seed(request, i) for i in range(_answers(request))]
                self._running[request.beam.key] = (request, self.client.send(request, self._body(request), seeds))

    def collect(self, beams: Collection[int] | None = None) -> list[ExpandOutput]:
        """Outputs of ``beams``, see :meth:`AsyncEngine.collect`.

        Raises:
            ModelError: the engine is closed.
        """
        self.client.check_open()
        return super().collect(beams)

    def poll(self, seconds: float) -> list[ExpandOutput]:
        """Requests that are done; unfinished ones are not shown."""
        out = []
        for request, outcome in self.client.outcomes(seconds):
            running = self._running.get(request.beam.key)
            if running is not None and running[0] is request:  # it was not aborted meanwhile
                del self._running[request.beam.key]
                children = fail(request, outcome) if isinstance(outcome, str) else self._children(request, outcome)
                out.append(ExpandOutput(request.beam.key, children))
        return out

    @property
    def running(self) -> bool:
        """Does any request run?"""
        return bool(self._running)

    def abort(self, beams: Collection[int] | None = None) -> None:
        """Close the connections of these beams' requests (None: of all)."""
        for key in list(self._running) if beams is None else beams:
            if key in self._running:
                _, future = self._running.pop(key)
                future.cancel()

    def close(self) -> None:
        """Abort everything and end the thread; the engine cannot be used afterwards."""
        self._running.clear()
        self.client.close()

    def _body(self, request: ExpandRequest) -> dict[str, Any]:
        beam, s = request.beam, request.sampling
        given = {
            "top_k": (s.top_k, s.top_k > 0),
            "min_p": (s.min_p, s.min_p > 0),
            "repetition_penalty": (s.repetition_penalty, s.repetition_penalty != 1),
            "ignore_eos": (s.ignore_eos, s.ignore_eos),
            "min_tokens": (least := min(max(0, s.min_new_tokens - len(beam.token_ids)), _limit(request)), least > 0),
            "stop_token_ids": (list(s.stop_token_ids), bool(s.stop_token_ids)),
            "bad_words": (list(s.bad_words), bool(s.bad_words)),
        }
        extra = {name: value for name, (value, wanted) in given.items() if wanted or self.explicit}
        extra |= self.grammars.fields(s) | self.extra
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": self.base.text(beam.prompt) + beam.text,
            "max_tokens": _limit(request),
            "temperature": s.temperature,
            "top_p": s.top_p,
        }
        shared = {
            "frequency_penalty": s.frequency_penalty,
            "presence_penalty": s.presence_penalty,
            "logit_bias": {str(i): bias for i, bias in s.logit_bias},
            "stop": list(s.stop),
        }
        body |= {name: value for name, value in shared.items() if value}
        if self.token_pieces or request.alternatives is not None:
            body["logprobs"] = request.alternatives or 0
        return body | {"extra_body": extra}

    def _children(self, request: ExpandRequest, replies: Sequence[Any]) -> list[Beam]:
        for reply in replies:
            request.beam.token_counter.add("base", sum(used_tokens(reply)), cached_tokens(reply))
        answers = [answer for reply in replies for answer in read_choices(reply, _limit(request))]
        family = fork(request)
        for i, child in enumerate(family):
            self._append(child, answers[i % _answers(request)])
        return as_beams(request.beam, family)

    def _append(self, child: TokenSequence, answer: CompletionChoice) -> None:
        """Append what the server answered."""
        beam, sampling, stopped, ended = child.request.beam, child.request.sampling, answer.stopped, answer.ended
        child.written = beam.text + answer.text
        cut = stop_at(child.written, len(beam.text), sampling.stop)  # the server saw the chunk alone, not what came before it
        if cut is not None:
            child.written, stopped, ended = child.written[:cut], True, False
        elif not stopped and len(beam.token_ids) + answer.tokens < sampling.max_new_tokens:
            child.written = beam.text + answer.text.rstrip(_UNFINISHED)  # the bytes of half a character would come back as another one
        child.token_ids = self._ids(beam, child.written, answer, ended=ended)
        child.decoded = DecodeState(len(child.token_ids))
        child.finish = "stop" if stopped else "length" if len(child.token_ids) >= sampling.max_new_tokens else None
        whole = stopped and not (sampling.stop or sampling.stop_token_ids)  # those end the text wherever they stand
        if wrong := self.grammars.error(sampling, child.written if stopped else child.written.rstrip(_UNFINISHED), complete=whole):
            child.finish, child.error = "error", wrong
        if child.request.alternatives is not None:
            self._add_details(child, answer, child.request.alternatives)
        if child.request.record:
            child.guide_shift = [0.0] * len(child.token_ids)  # nothing guides here
            child.pieces = [self.vocabulary.decode([i]) for i in child.token_ids]

    def _add_details(self, child: TokenSequence, answer: CompletionChoice, alternatives: int) -> None:
        """The server's log-probabilities of its tokens, which nothing here guided; their texts add up to the response's."""
        count = len(answer.names)
        if len(answer.logprobs) != count or (answer.text and not count) or (alternatives and len(answer.top) != count):
            child.finish, child.error = "error", f"{self.url} sent no log-probabilities of its tokens; leave logprobs (best_of) out"
            return
        for logprob, top in zip(answer.logprobs, answer.top or ((),) * count, strict=True):
            likely = tuple((self.vocabulary.intern(name), p) for name, p in top[:alternatives])
            child.details.append(TokenLogprobs(END, "", logprob, logprob, likely, likely))
        known = zip(child.details, child.token_ids, strict=False)  # some servers leave the end out
        child.details = [replace(detail, token=token, text=self.vocabulary.decode([token])) for detail, token in known]

    def _ids(self, beam: Beam, text: str, answer: CompletionChoice, *, ended: bool) -> list[int]:
        """Numbers whose texts make up ``text``: one new piece or the server's tokens, and as many fillers as it has tokens more.

        A text that a stop string cut before its parent's end is one piece, so that decoding gives the text whatever was cut.
        """
        if text.startswith(beam.text):
            ids, new = list(beam.token_ids), text[len(beam.text) :]
        else:
            ids, new = [], text
        ids += [self.vocabulary.intern(piece) for piece in split_tokens(new, answer.names)]
        ids += [FILLER] * (len(beam.token_ids) + answer.tokens - ended - len(ids))
        return [*ids, END] if ended else ids


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
    """Tokens to request: the chunk's, or what the response has left."""
    return min(request.tokens, request.sampling.max_new_tokens - len(request.beam.token_ids))


def _answers(request: ExpandRequest) -> int:
    """How many choices to request: greedy ones would all be the same, and vLLM refuses several."""
    return 1 if request.sampling.temperature == 0 else request.successors


def _seed(request: ExpandRequest, index: int) -> int:
    """31 bits, which every server takes."""
    beam = request.beam
    return mix(request.seed, beam.rng_path, len(beam.token_ids), request.first, index) & 0x7FFFFFFF
