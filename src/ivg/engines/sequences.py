"""Children of a beam while they grow, token by token: length limits, stop strings, recorded values. Shared by the engines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ivg.types import Beam, DecodeState, ExpandRequest, FinishReason, Prompt, TokenCounter, TokenLogprobs, new_key
from ivg.types.steps import finished_steps
from ivg.utils.rng import child_rng_path


@dataclass(slots=True)
class TokenSequence:
    """A child while it grows; a :class:`~ivg.types.Hypothesis`, so that models can read it."""

    request: ExpandRequest
    parent: int
    rng_path: int
    limit: int
    prompt: Prompt
    token_counter: TokenCounter
    vocabulary: Any
    token_ids: list[int]
    decoded: DecodeState
    written: str
    key: int = field(default_factory=new_key)
    finish: FinishReason | None = None
    error: str | None = None
    ancestor_key: int | None = None
    inherits: bool = True
    paused: bool = False
    answer_start: int | None = 0
    answer_text: int = 0
    log_ratio: float = 0.0
    kl_spent: float = 0.0
    kl_rate: float = 0.0
    guide_shift: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    details: list[TokenLogprobs] = field(default_factory=list)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end it, besides end-of-sequence tokens."""
        return self.request.sampling.stop_token_ids

    def ends_at(self, token: int) -> bool:
        """Does ``token`` end the response?"""
        sampling = self.request.sampling
        return token in sampling.stop_token_ids or (token in self.request.beam.vocabulary.eos_ids and not sampling.ignore_eos)

    @property
    def text(self) -> str:
        """The response so far; decoded on access."""
        if self.decoded.tokens < len(self.token_ids):
            self._decode(final=False)
        return self.written

    def end(self, finish: FinishReason) -> None:
        """Finish the sequence and decode the text that was held back. A token that ends the response adds no text."""
        self.finish = finish
        if finish == "stop" and self.token_ids and self.ends_at(self.token_ids[-1]):
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
            answer_start=beam.answer_start,
            answer_text=beam.answer_text,
            log_ratio=beam.log_ratio,
            kl_spent=beam.kl_spent,
            kl_rate=beam.kl_rate,
            guide_shift=list(beam.guide_shift),
            pieces=list(beam.pieces),
            details=list(beam.details),
        )
        for index in range(request.successors)
    ]


def fail(request: ExpandRequest, message: str) -> list[Beam]:
    """The children of ``request`` where none can be made: as long as their parent, with an error."""
    family = fork(request)
    for child in family:
        child.finish, child.error = "error", message
    return as_beams(request.beam, family)


def append_token(
    child: TokenSequence, token: int, shift: float = 0.0, detail: TokenLogprobs | None = None, *, complete: bool = False
) -> None:
    """Append a token; finishes the sequence at an end-of-sequence token, a stop string, a sentence's end or the length limit.

    At the end of a step it pauses.

    ``complete``: structured output is complete with it, which finishes the sequence, too.
    """
    request, sampling = child.request, child.request.sampling
    watched = bool(sampling.stop) or request.thinking is not None or request.until is not None or request.record or detail is not None
    before = len(child.text) if watched else 0
    child.token_ids.append(token)
    if child.ends_at(token):
        child.end("stop")
    elif sampling.stop and (cut := stop_at(child.text, before, sampling.stop)) is not None:
        child.written, child.finish = child.text[:cut], "stop"
    elif complete or (sampling.end_at_sentence and _ends_sentence(child)):
        child.end("stop")
    elif len(child.token_ids) >= sampling.max_new_tokens:
        child.end("length")
    if not watched:
        return  # decoded when its text is needed, all new tokens at once
    new = child.text[before:]  # decodes the token
    if child.answer_start is None:
        _find_answer(child, before)
    if request.until is not None and child.answer_start is not None and child.finish is None:
        child.paused = ends_step(child.text[child.answer_text :], before - child.answer_text, request.until)
    if request.record:
        child.guide_shift.append(shift)
        child.pieces.append(new)
    if detail is not None:
        child.details.append(replace(detail, text=new))


def _ends_sentence(child: TokenSequence) -> bool:
    """Is the answer as long as it should be, and at the end of a sentence?"""
    if child.answer_start is None or len(child.token_ids) < child.request.sampling.end_at_sentence:
        return False
    return ends_sentence(child.text[child.answer_text :])


def _find_answer(child: TokenSequence, before: int) -> None:
    """Note where the answer begins, if the marker ends behind position ``before`` of the text, and limit its first chunk."""
    request = child.request
    if request.thinking is None:
        return
    marker = request.thinking.guide_after
    if (found := stop_at(child.text, before, [marker])) is not None:
        child.answer_start, child.answer_text = len(child.token_ids), found + len(marker)
        if request.answer_tokens is not None:
            child.limit = min(child.limit, child.answer_start + request.answer_tokens)


def stop_at(text: str, before: int, stops: Sequence[str]) -> int | None:
    """Start of the first stop string that ends after position ``before``."""
    found = [text.find(s, max(0, before - len(s) + 1)) for s in stops if s]
    return min((f for f in found if f >= 0), default=None)


def ends_sentence(text: str) -> bool:
    """Does ``text`` end with a sentence or with a line?

    The full stop of a number ("3."), of one letter ("J.", "e.g.", "U.S.") or of an abbreviation that words follow ("Dr.") is no end. What
    follows is not known yet, so a sentence that does end with one of those goes on to the next end.
    """
    found = _SENTENCE_END.search(text)
    if found is not None and "\n" in found[0]:
        return True  # a line
    return found is not None and (found["stop"] is None or not _ABBREVIATION.search(text[: found.end("stop")]))


_SENTENCE_END = re.compile(
    r"""(?:
        (?:[!?…。！？] | \.\.\. | (?<![\d.]) (?<!\b[A-Za-z]) (?P<stop>\.)) ["'”’»)\]*_]* \s*
        | \S\s*\n\s*
    )\Z""",
    re.VERBOSE,
)
_ABBREVIATION = re.compile(
    r"""\b(?:
        Mr|Mrs|Ms|Mx|Messrs|Mme|Mlle|Dr|Drs|Prof|Ph|Rev|Hon|St|Gen|Col|Maj|Capt|Cmdr|Lt|Sgt|Cpl|Pvt|Gov|Sen|Rep|Pres|Supt|Mt|Ft
        |Jan|Feb|Aug|Sept|Oct|Nov|Dec|Fig|Figs|Eq|Vol|Nr|approx|ca|cf|resp|incl|vs|al|pp|bzw
    )\.\Z""",
    re.VERBOSE,
)


def ends_step(text: str, before: int, separator: str) -> bool:
    """Has the part of ``text`` behind position ``before`` ended a step?"""
    if stop_at(text, max(0, before), [separator]) is None:
        return False
    return finished_steps(text, separator) > finished_steps(text[: max(0, before)], separator)


def as_beams(beam: Beam, family: list[TokenSequence]) -> list[Beam]:
    """Children as beams; or the parent itself, paused, if they paused before their first token."""
    if all(child.paused and len(child.token_ids) == len(beam.token_ids) for child in family):
        return [replace(beam, paused=True)]
    return [_as_beam(child) for child in family]


def _as_beam(child: TokenSequence) -> Beam:
    return Beam(
        key=child.key,
        parent=child.parent,
        prompt=child.prompt,
        token_ids=tuple(child.token_ids),
        text=child.text,
        finish=child.finish,
        token_counter=child.token_counter,
        vocabulary=child.vocabulary,
        inherits=child.inherits,
        rng_path=child.rng_path,
        guide_shift=tuple(child.guide_shift),
        pieces=tuple(child.pieces),
        details=tuple(child.details),
        decoded=child.decoded,
        error=child.error,
        stop_token_ids=child.stop_token_ids,
        paused=child.paused,
        answer_start=child.answer_start,
        answer_text=child.answer_text,
        log_ratio=child.log_ratio,
        kl_spent=child.kl_spent,
        kl_rate=child.kl_rate,
    )
