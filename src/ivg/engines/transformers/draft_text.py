"""Drafts of a model with other tokens than the base's: the two exchange text.

The draft model reads the response as its own tokens of the text so far and writes a whole chunk in its own tokens; the text of that becomes
tokens of the base. It reads with rows of its own, because what it wrote need not be what its tokenizer makes of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ivg.engines.sequences import TokenSequence, append_token, fork
from ivg.errors import PromptError
from ivg.models.cached_lm import CachedLM
from ivg.types import Beam, ExpandRequest

MORE_TOKENS = 4
"""Tokens that a chunk may be longer, where it ends inside its only character."""


def reader_of(model: CachedLM) -> CachedLM:
    """A reader with the network of ``model`` and rows of its own."""
    reader = model.sharing(model.name, model.template, system=model.system)
    reader.chat_settings = model.chat_settings
    return reader


def in_own_tokens(reader: CachedLM, request: ExpandRequest, children: Sequence[TokenSequence]) -> tuple[Beam, list[TokenSequence]]:
    """(the beam of ``request``, its children) in the tokens of ``reader``, under the same keys."""
    beam, prompt = request.beam, reader.prompt_ids(request.beam.prompt)
    ids = tuple(reader.own_ids(reader.vocabulary.response_ids(prompt, beam.text))) if beam.text else ()
    decoded = reader.vocabulary.continue_text(ids, reader.vocabulary.start_decoding(prompt))[1]
    own = replace(beam, token_ids=ids, vocabulary=reader.vocabulary, decoded=decoded, guide_shift=(), pieces=(), details=())
    longest = len(ids) + request.tokens + MORE_TOKENS
    sampling = replace(request.sampling, stop=(), end_at_sentence=0, max_new_tokens=longest + 1)  # where to end is said in the base's
    out = fork(replace(request, beam=own, sampling=sampling, record=False))
    for s, child in zip(out, children, strict=True):
        s.key, s.rng_path = child.key, child.rng_path
    return own, out


def has_text(written: TokenSequence, before: str) -> bool:
    """Has a draft added any text to ``before``, or ended?"""
    return written.finish is not None or len(written.text) > len(before)


def take_over(base: CachedLM, child: TokenSequence, written: TokenSequence) -> None:
    """Append to ``child``, in the base's tokens, the text that ``written`` has added to it."""
    before = len(child.text)
    if written.error:
        child.finish, child.error = "error", written.error
        return
    ended = written.finish == "stop"
    if not has_text(written, child.text):
        written.end("length")  # an incomplete character becomes U+FFFD
    new = written.text[before:]
    try:
        ids = base.response_ids((*base.prompt_ids(child.prompt), *child.token_ids), new) if new else ()
    except PromptError as e:
        child.finish, child.error = "error", str(e)
        return
    end = base.vocabulary.eos_id
    for token in [*ids, *([end] if ended and end is not None else [])]:
        append_token(child, token)
        if child.finish is not None or child.paused:
            return
    if not ids:
        child.finish, child.error = "error", f"the base's tokenizer cannot write the draft {new!r}"
