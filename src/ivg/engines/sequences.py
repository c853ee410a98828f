"""Children of a beam while they grow, token by token: limits, ends, stop strings, what is recorded.

Knows: one request. Must not know where tokens come from: a network here (``engine.transformers``) or another engine (``ivg.engines.vllm``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ivg.types import Beam, DecodeState, ExpandRequest, FinishReason, Prompt, TokenCounter, TokenLogprobs, new_key
from ivg.utils.rng import child_rng_path


@dataclass(slots=True)
class TokenSequence:
    """A child while it grows; a :class:`~ivg.types.Hypothesis`, so base and guides can read it."""

    request: ExpandRequest
    parent: int
    rng_path: int
    limit: int
    prompt: Prompt
    token_counter: TokenCounter
    vocabulary: object
    token_ids: list[int]
    decoded: DecodeState
    written: str
    key: int = field(default_factory=new_key)
    finish: FinishReason | None = None
    error: str | None = None
    ancestor_key: int | None = None
    inherits: bool = True
    paused: bool = False
    log_ratio: float = 0.0
    guide_shift: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    details: list[TokenLogprobs] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The response so far; decoded when asked for."""
        if self.decoded.tokens < len(self.token_ids):
            self._decode(final=False)
        return self.written

    def end(self, finish: FinishReason) -> None:
        """Nothing will be added: what was held back of the text is shown. An end-of-sequence token adds no text, special or not."""
        self.finish = finish
        beam = self.request.beam
        if finish == "stop" and self.token_ids and self.token_ids[-1] in beam.vocabulary.eos_ids:
            self._decode(self.token_ids[:-1], final=True)
            self.decoded = replace(self.decoded, tokens=len(self.token_ids))
        else:
            self._decode(final=True)

    def _decode(self, ids: Sequence[int] | None = None, *, final: bool) -> None:
        new, self.decoded = self.request.beam.vocabulary.continue_text(self.token_ids if ids is None else ids, self.decoded, final=final)
        self.written += new


def fork(request: ExpandRequest) -> list[TokenSequence]:
    """The children of ``request`` before their first token."""
    beam, sampling = request.beam, request.sampling
    limit = min(len(beam.token_ids) + request.tokens, sampling.max_new_tokens)
    return [
        TokenSequence(
            request=request,
            parent=beam.key,
            rng_path=child_rng_path(beam.rng_path, len(beam.token_ids), request.first + index),
            limit=limit,
            prompt=beam.prompt,
            token_counter=beam.token_counter,
            vocabulary=beam.vocabulary,
            token_ids=list(beam.token_ids),
            decoded=beam.decoded,
            written=beam.text,
            inherits=not request.keep,
            log_ratio=beam.log_ratio,
            guide_shift=list(beam.guide_shift),
            pieces=list(beam.pieces),
            details=list(beam.details),
        )
        for index in range(request.successors)
    ]


def append_token(d: TokenSequence, token: int, shift: float = 0.0, look: TokenLogprobs | None = None) -> None:
    """Append a token and see whether it ends the response."""
    sampling = d.request.sampling
    before = len(d.text)
    d.token_ids.append(token)
    if token in d.request.beam.vocabulary.eos_ids and not sampling.ignore_eos:
        d.end("stop")
    elif sampling.stop and (cut := _stop_at(d.text, before, sampling.stop)) is not None:
        d.written, d.finish = d.text[:cut], "stop"
    elif len(d.token_ids) >= sampling.max_new_tokens:
        d.end("length")
    if d.request.record:
        d.guide_shift.append(shift)
        d.pieces.append(d.text[before:])
    if look is not None:
        d.details.append(replace(look, text=d.text[before:]))


def decoded(d: TokenSequence) -> DecodeState:
    """How far the text is decoded: all that can be."""
    return (d.text, d.decoded)[1]  # the text first: asking for it moves the state


def _stop_at(text: str, before: int, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins that the text beyond ``before`` completes."""
    found = [text.find(s, max(0, before - len(s) + 1)) for s in stops if s]
    return min((f for f in found if f >= 0), default=None)


def as_beams(beam: Beam, family: list[TokenSequence]) -> list[Beam]:
    """Children as beams; the parent itself where they paused before their first token."""
    if all(d.paused and len(d.token_ids) == len(beam.token_ids) for d in family):
        return [replace(beam, paused=True)]
    return [_finished(d) for d in family]


def _finished(d: TokenSequence) -> Beam:
    text = d.written if d.finish == "stop" else d.text
    return Beam(
        key=d.key,
        parent=d.parent,
        prompt=d.prompt,
        token_ids=tuple(d.token_ids),
        text=text,
        finish=d.finish,
        token_counter=d.token_counter,
        vocabulary=d.vocabulary,
        rng_path=d.rng_path,
        guide_shift=tuple(d.guide_shift),
        pieces=tuple(d.pieces),
        details=tuple(d.details),
        decoded=d.decoded,
        error=d.error,
        paused=d.paused,
        log_ratio=d.log_ratio,
    )
