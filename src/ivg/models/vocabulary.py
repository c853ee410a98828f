"""Vocabularies: what token ids stand for, whether two models agree on it, and how ids become text step by step.

Token-level guidance over the whole vocabulary adds two models' logits column by column, so column i must be the same
piece of text in both. Rows that only pad the embedding (32000 against 32016, 151936 against 152064) do no harm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ivg.errors import PromptError, VocabularyError
from ivg.models.token_bytes import bytes_of_piece
from ivg.types import DecodeState

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Stands for bytes that belong to no character."""
_CONTINUATIONS = ("<0x80>", "<0xBF>", "\u0122", "\u00bf")
"""The bytes 0x80 and 0xBF as byte fallback and as byte-level BPE (GPT-2's table) write them."""
_CONTEXT = 8
"""Tokens of the prompt that a response is decoded with: enough to hold some text and a whole character."""
_PREFIXES = ("\n", "a", ".", ":")
"""Texts that a response is tokenised behind, for tokenizers that treat the beginning of a text differently."""


def special_tokens(tokenizer: Any) -> set[str]:
    """The tokens of ``tokenizer`` that are not text, by name."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*getattr(tokenizer, "all_special_tokens", ()), *(str(t) for t in added.values() if getattr(t, "special", False))}


def difference(token_id: int, piece: str | None, other: str | None, owner: str, other_owner: str) -> str:
    """What two vocabularies have for one id; None: nothing."""
    shown = ["absent" if p is None else repr(p) for p in (piece, other)]
    return f"id {token_id}: {shown[0]} in {owner}, {shown[1]} in {other_owner}"


def check_embedded(ids: Sequence[int], tokenizer: Any, rows: int, name: str, what: str = "prompt") -> None:
    """Raise for a token of a text that ``tokenizer`` has and the network lacks: one that was added, without a row of the embedding.

    Args:
        ids: of the text.
        tokenizer: that made them.
        rows: of the embedding.
        name: of the model, in the error.
        what: the text is, in the error.

    Raises:
        PromptError: names the token.
    """
    if ids and (wrong := max(ids)) >= rows:
        raise PromptError(
            f"{what} token {tokenizer.convert_ids_to_tokens(wrong)!r} ({wrong}) has no embedding in {name}, whose ids are 0 to {rows - 1}\n"
            "  leave it out of the text, or give the model a row for it (resize_token_embeddings)"
        )


class Vocabulary:
    """The tokens of one tokenizer, by id.

    Args:
        tokenizer: a transformers tokenizer.
        eos_ids: ids that end a response (a model may have several); default: the tokenizer's.
        owner: name of the model in errors.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int] | None = None, owner: str = "model") -> None:
        self.tokenizer, self.owner = tokenizer, owner
        own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.eos_ids: frozenset[int] = frozenset(own if eos_ids is None else eos_ids)
        self._same: dict[int, tuple[Vocabulary, bool]] = {}
        self._lengths: dict[int, int] = {}
        self._words: dict[str, list[tuple[int, ...]]] = {}
        self._shown: frozenset[int] = frozenset()

    @cached_property
    def pieces(self) -> dict[int, str]:
        """Every id and its piece."""
        return {i: piece for piece, i in self.tokenizer.get_vocab().items()}

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.pieces, default=-1) + 1

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text of this vocabulary: the tokenizer's own, which models are trained with, where it is among ``eos_ids``.

        Else the smallest of them; None: there is none.
        """
        return self.eos_id_below(None)

    def eos_id_below(self, size: int | None) -> int | None:
        """As :attr:`eos_id`, of the ids below ``size``, which a network has rows or columns for; None: of all."""
        found = [i for i in self.eos_ids if size is None or i < size]
        own = self.tokenizer.eos_token_id
        return own if own in found else min(found, default=None)

    @cached_property
    def added(self) -> frozenset[int]:
        """Ids that were added to the trained vocabulary (special and chat tokens)."""
        return frozenset(getattr(self.tokenizer, "added_tokens_decoder", {}))

    def differences(self, other: Vocabulary) -> Iterator[tuple[int, str | None, str | None]]:
        """(id, own piece, other's piece) wherever the two disagree; ids that only pad are left out.

        An id that one lacks counts unless it lies past the other's last id *and* was added to the trained vocabulary.
        """
        last, other_last = self.size - 1, other.size - 1
        for i in range(max(last, other_last) + 1):
            piece, other_piece = self.pieces.get(i), other.pieces.get(i)
            if piece == other_piece:
                continue
            if other_piece is None and i > other_last and i in self.added:
                continue
            if piece is None and i > last and i in other.added:
                continue
            yield i, piece, other_piece

    def same_as(self, other: Vocabulary | None) -> bool:
        """Do all ids stand for the same pieces in both? Cached for each pair."""
        if other is None or other is self:
            return True
        known = self._same.get(id(other))
        if known is None:
            known = self._same[id(other)] = (other, next(self.differences(other), None) is None)
        return known[1]

    def require_same(self, other: Vocabulary, advice: str) -> None:
        """Raise unless :meth:`same_as`.

        Raises:
            VocabularyError: names how many ids differ and the first of them, then ``advice``.
        """
        if self.same_as(other):
            return
        rows = list(self.differences(other))
        shown = "\n".join(f"    {difference(i, a, b, self.owner, other.owner)}" for i, a, b in rows[:5])
        more = f"\n    and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise VocabularyError(
            f"{self.owner} ({len(self.pieces)} tokens) and {other.owner} ({len(other.pieces)} tokens) have different "
            f"vocabularies; {len(rows)} ids differ, the first:\n{shown}{more}\n  {advice}"
        )

    # Text

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that are not text: decoding leaves them out."""
        names = special_tokens(self.tokenizer)
        return frozenset(i for i, piece in self.pieces.items() if piece in names) if names else frozenset()

    def show(self, names: Collection[str]) -> None:
        """Let special tokens be text: those among ``names`` that there are, and no others. Before anything is decoded."""
        special = self.special | self._shown
        self._shown = frozenset(i for name in names if (i := self._ids_of.get(name)) is not None and i in special)
        self.special = special - self._shown

    def special_id(self, name: str) -> int | None:
        """The id of a special token, whether its name is text (:meth:`show`) or not; None: there is none of this name."""
        found = self._ids_of.get(name)
        return found if found in self.special | self._shown else None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out, spaces unchanged.

        As the tokenizer decodes, but for invalid UTF-8: also of byte-fallback tokens (``<0xE6>``) only those that belong to no character
        become U+FFFD, as with byte-level tokenizers. The tokenizers library would replace the whole run of bytes.
        """
        text = self._tokenizer_decode(ids)
        return self._decode_bytewise(ids) if REPLACEMENT in text and self._bytes else text

    def partial_bytes(self, token: int) -> bytes | None:
        """The bytes of a token that may be a part of a character; None: it is none, and what it decodes to says all."""
        if token in self._bytes:
            return bytes([self._bytes[token]])
        if token in self.special or REPLACEMENT not in self._tokenizer_decode([token]):
            return None
        return bytes_of_piece(self.pieces.get(token, ""))

    @property
    def has_byte_tokens(self) -> bool:
        """May a token be a part of a character?"""
        return bool(self._bytes or self._continuations)

    def start_decoding(self, prompt_ids: Sequence[int]) -> DecodeState:
        """The state before the first token of a response to ``prompt_ids``.

        A character whose bytes begin in the prompt belongs to the response (see :meth:`prompt_text`).
        """
        context = tuple(i for i in prompt_ids[-4 * _CONTEXT :] if i not in self.special)[-_CONTEXT:]
        text = self.decode(context)
        cut = self._cut(context, text) if self._continuations else 0
        return DecodeState(0, context, len(text) - cut)

    def prompt_text(self, prompt_ids: Sequence[int]) -> str:
        """Text of a prompt, without an incomplete character at its end."""
        text, state = self.decode(prompt_ids), self.start_decoding(prompt_ids)
        return text[: len(text) - len(self.decode(state.context)) + state.shown]

    def text_for(self, prompt_ids: Sequence[int], tokenizer: Any) -> str:
        """Text of a prompt for a model with another ``tokenizer``; special tokens that it has, too, are kept."""
        known = {self.pieces.get(i) for i in prompt_ids if i in self.special} & special_tokens(tokenizer)
        if not known:
            return self.prompt_text(prompt_ids)
        out, state = [], DecodeState()
        for i in prompt_ids:
            if i in self.special and (piece := self.pieces.get(i)) in known:
                out.append(piece or "")
            text, state = self._append([i], state)
            out.append(text)
        return "".join(out)

    def continue_text(self, ids: Sequence[int], state: DecodeState, *, final: bool = False) -> tuple[str, DecodeState]:
        """The text that the response ``ids`` adds to what was decoded up to ``state``, and the new state.

        From :meth:`start_decoding` on, the pieces together are decode(prompt + response) without decode(prompt), whatever the steps: new
        tokens are decoded behind a few before them. An incomplete character is held back; with ``final`` nothing follows, and it
        becomes U+FFFD, as in :meth:`decode`.
        """
        text = ""
        if new := ids[state.tokens :]:
            text, state = self._append(new, state)
        if final:
            rest = self.decode(state.context)
            text += rest[state.shown :]
            state = replace(state, shown=max(state.shown, len(rest)))
        return text, state

    def response_text(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """Text of the whole response ``ids`` behind ``prompt_ids``: decode(prompt + response) without decode(prompt)."""
        state = self.start_decoding(prompt_ids)
        return self.decode((*state.context, *ids))[state.shown :]

    def response_ids(self, prompt_ids: Sequence[int], text: str) -> list[int]:
        """Tokens of a response that is given as text, such that :meth:`response_text` behind ``prompt_ids`` is ``text``.

        Prompt and response are tokenised apart, as in generation. For tokenizers that write a space before every text (SentencePiece)
        something is put before it. Where nothing round-trips, the tokens of ``text`` alone are returned.
        """
        alone: list[int] = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        if not text or self.response_text(prompt_ids, alone) == text:
            return alone
        for prefix in _PREFIXES:
            before = list(self.tokenizer(prefix, add_special_tokens=False).input_ids)
            both = list(self.tokenizer(prefix + text, add_special_tokens=False).input_ids)
            if before and both[: len(before)] == before and self.response_text(prompt_ids, both[len(before) :]) == text:
                return both[len(before) :]
        return alone

    def word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """How tokens spell ``words``, each at the beginning of a text and behind a space; cached."""
        for word in words:
            if word not in self._words:
                texts = (word.lstrip(), f" {word.lstrip()}")
                self._words[word] = [tuple(self.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        return tuple(dict.fromkeys(ids for word in words for ids in self._words[word] if ids))

    def _append(self, new: Sequence[int], state: DecodeState) -> tuple[str, DecodeState]:
        """The text that is final once the tokens ``new`` are appended, and the new state."""
        end = state.tokens + len(new)
        shown = [token for token in new if token not in self.special]
        if not shown:
            return "", replace(state, tokens=end)
        run = (*state.context, *shown)
        text = self.decode(run)
        cut = self._cut(run, text)
        certain = max(state.shown, len(text) - cut)
        if not cut:  # next time decode no more context than needed
            for width in (1, 2, 3):
                if length := self._length(run[-width:]):
                    return text[state.shown :], DecodeState(end, run[-width:], length)
        return text[state.shown : certain], DecodeState(end, run, certain)

    def _cut(self, ids: tuple[int, ...], text: str) -> int:
        """1 where the last character of ``text``, decoded from ``ids``, lacks bytes (or may: no token is a byte), else 0."""
        if not text.endswith(REPLACEMENT):
            return 0
        if not self._continuations:
            return 1
        return int(any(len(self.decode((*ids, i))) <= len(text) for i in self._continuations))  # a byte more, and no character more

    def _length(self, ids: tuple[int, ...]) -> int:
        """Characters of ``ids`` by themselves; cached for single tokens."""
        if len(ids) > 1:
            return len(self.decode(ids))
        known = self._lengths.get(ids[0])
        if known is None:
            known = self._lengths[ids[0]] = len(self.decode(ids))
        return known

    def _tokenizer_decode(self, ids: Sequence[int]) -> str:
        skip = self._shown.isdisjoint(ids)
        kept = list(ids) if skip else [i for i in ids if i not in self.special]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        return text

    def _decode_bytewise(self, ids: Sequence[int]) -> str:
        """As :meth:`decode`; every byte that belongs to no character becomes U+FFFD by itself."""
        out: list[str] = []
        valid: list[int] = []
        run: list[int] = []

        def text_of_valid() -> str:
            if not any(out):
                return self._tokenizer_decode(valid)
            return self._tokenizer_decode([self._ids_of["<0x41>"], *valid])[1:]  # not at the beginning of a text

        def end_run() -> None:
            while run:
                try:
                    bytes(self._bytes[i] for i in run).decode()
                except UnicodeDecodeError as e:
                    valid.extend(run[: e.start])
                    out.extend((text_of_valid(), REPLACEMENT))
                    valid.clear()
                    del run[: e.end]
                else:
                    valid.extend(run)
                    run.clear()

        for i in ids:
            if i in self.special:
                continue
            if i in self._bytes:
                run.append(i)
            else:
                end_run()
                valid.append(i)
        end_run()
        return "".join((*out, text_of_valid()))

    @cached_property
    def _bytes(self) -> dict[int, int]:
        """Tokens ``<0x00>`` … ``<0xFF>`` and their bytes, where the tokenizer decodes them so."""
        a = self._ids_of.get("<0x41>")
        if a is None or self._tokenizer_decode([a]) != "A":
            return {}
        return {i: byte for byte in range(256) if (i := self._ids_of.get(f"<0x{byte:02X}>")) is not None}

    @cached_property
    def _continuations(self) -> tuple[int, ...]:
        """Tokens that are the byte 0x80 or 0xBF alone: one of them continues any incomplete character, neither begins one."""
        found = (self._ids_of.get(piece) for piece in _CONTINUATIONS)
        return tuple(i for i in found if i is not None and self._tokenizer_decode([i]) == REPLACEMENT)

    @cached_property
    def _ids_of(self) -> dict[str, int]:
        return {piece: i for i, piece in self.pieces.items()}
