"""Vocabularies: what token ids mean, whether two models mean the same by them, and how ids become text.

Token-level guidance over the whole vocabulary adds two models' logits column by column, so column i must be the same
piece of text in both. Rows that only pad the matrix (32000 against 32016, 151936 against 152064) do no harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ivg.errors import VocabularyError
from ivg.types import DecodeState

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTINUATIONS = ("<0x80>", "<0xBF>", "\u0122", "\u00bf")
"""The bytes 0x80 and 0xBF as byte fallback and as byte-level BPE (GPT-2's table) write them."""
_CONTEXT = 8
"""Tokens of the prompt that the beginning of a response is decoded behind: enough to hold some text and a whole character."""
_LEADS = ("\n", "a", ".", ":")
"""Texts that a response is tokenised behind, for tokenizers that treat the beginning of a text differently."""


def special_tokens(tokenizer: Any) -> set[str]:
    """The tokens of ``tokenizer`` that are no text, by name."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*getattr(tokenizer, "all_special_tokens", ()), *(str(t) for t in added.values() if getattr(t, "special", False))}


class Vocabulary:
    """The tokens of one tokenizer, by id.

    Args:
        tokenizer: a transformers tokenizer.
        eos_ids: ids that end a response (a model may have several); default: the tokenizer's.
        owner: how error messages call the model.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int] | None = None, owner: str = "model") -> None:
        self.tokenizer, self.owner = tokenizer, owner
        own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.eos_ids: frozenset[int] = frozenset(own if eos_ids is None else eos_ids)
        self._same: dict[int, tuple[Vocabulary, bool]] = {}
        self._lengths: dict[int, int] = {}

    @cached_property
    def pieces(self) -> dict[int, str]:
        """Every id and its piece."""
        return {i: piece for piece, i in self.tokenizer.get_vocab().items()}

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.pieces, default=-1) + 1

    @cached_property
    def added(self) -> frozenset[int]:
        """Ids that were added to the trained vocabulary (special and chat tokens)."""
        return frozenset(getattr(self.tokenizer, "added_tokens_decoder", {}))

    def differences(self, other: Vocabulary) -> Iterator[tuple[int, str | None, str | None]]:
        """(id, own piece, other's piece) wherever the two disagree; ids that only pad are left out.

        An id that one lacks counts unless it lies past the other's last id *and* was added to the trained vocabulary.
        """
        last_mine, last_theirs = self.size - 1, other.size - 1
        for i in range(max(last_mine, last_theirs) + 1):
            mine, theirs = self.pieces.get(i), other.pieces.get(i)
            if mine == theirs:
                continue
            if theirs is None and i > last_theirs and i in self.added:
                continue
            if mine is None and i > last_mine and i in other.added:
                continue
            yield i, mine, theirs

    def same_as(self, other: Vocabulary | None) -> bool:
        """Do equal ids mean equal pieces in both? Remembered for each pair."""
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
        shown = "\n".join(f"    id {i}: {a!r} in {self.owner}, {b!r} in {other.owner}" for i, a, b in rows[:5])
        more = f"\n    and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise VocabularyError(
            f"{self.owner} ({len(self.pieces)} tokens) and {other.owner} ({len(other.pieces)} tokens) do not mean the same "
            f"by their token ids; {len(rows)} differ, the first:\n{shown}{more}\n  {advice}"
        )

    # Text

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that are no text: decoding leaves them out."""
        names = special_tokens(self.tokenizer)
        return frozenset(i for i, piece in self.pieces.items() if piece in names) if names else frozenset()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out, spaces as they are.

        As the tokenizer decodes, but for bytes that are no UTF-8: of ``<0xE6>`` tokens, too, only those that belong to no character
        become U+FFFD, as with byte-level tokenizers. The tokenizers library would take the whole run of bytes with them.
        """
        text = self._plain(ids)
        return self._mended(ids) if _REPLACEMENT in text and self._bytes else text

    def begin(self, prompt_ids: Sequence[int]) -> DecodeState:
        """The state before the first token of a response to ``prompt_ids``.

        A character whose bytes begin in the prompt counts to the response (:meth:`whole`).
        """
        context = tuple(i for i in prompt_ids[-4 * _CONTEXT :] if i not in self.special)[-_CONTEXT:]
        text = self.decode(context)
        cut = self._cut(context, text) if self._continuations else 0
        return DecodeState(0, context, len(text) - cut)

    def whole(self, prompt_ids: Sequence[int]) -> str:
        """Text of a prompt, but for a character at its end whose bytes are not all there."""
        text, state = self.decode(prompt_ids), self.begin(prompt_ids)
        return text[: len(text) - len(self.decode(state.context)) + state.shown]

    def text_for(self, prompt_ids: Sequence[int], tokenizer: Any) -> str:
        """Text of a prompt for a model with another ``tokenizer``: of special tokens those are kept that it knows, too."""
        known = {self.pieces.get(i) for i in prompt_ids if i in self.special} & special_tokens(tokenizer)
        if not known:
            return self.whole(prompt_ids)
        out, state = [], DecodeState()
        for i in prompt_ids:
            if i in self.special and (piece := self.pieces.get(i)) in known:
                out.append(piece or "")
            text, state = self._append(i, state)
            out.append(text)
        return "".join(out)

    def continue_text(self, ids: Sequence[int], state: DecodeState, *, final: bool = False) -> tuple[str, DecodeState]:
        """The text that the response ``ids`` adds to what was decoded up to ``state``, and the new state.

        Together, from :meth:`begin` on, decode(prompt + response) without decode(prompt), whatever the steps: token by token, a few
        tokens are decoded behind the ones before them. A character whose bytes are not all there yet is held back; with ``final``
        nothing follows, and U+FFFD stands for it, as it does in decode().
        """
        out = []
        for token in ids[state.tokens :]:
            text, state = self._append(token, state)
            out.append(text)
        if final:
            rest = self.decode(state.context)
            out.append(rest[state.shown :])
            state = replace(state, shown=max(state.shown, len(rest)))
        return "".join(out), state

    def response_text(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """Text of the whole response ``ids`` behind ``prompt_ids``: decode(prompt + response) without decode(prompt)."""
        state = self.begin(prompt_ids)
        return self.decode((*state.context, *ids))[state.shown :]

    def response_ids(self, prompt_ids: Sequence[int], text: str) -> list[int]:
        """Tokens of a response that is given as text, such that :meth:`response_text` behind ``prompt_ids`` is ``text``.

        Prompt and response are tokenised apart, as generation sees them. Tokenizers that write a space before every text
        (SentencePiece) are given something before it. Where no way gives the text back, that of ``text`` alone is taken.
        """
        alone: list[int] = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        if not text or self.response_text(prompt_ids, alone) == text:
            return alone
        for lead in _LEADS:
            before = list(self.tokenizer(lead, add_special_tokens=False).input_ids)
            both = list(self.tokenizer(lead + text, add_special_tokens=False).input_ids)
            if before and both[: len(before)] == before and self.response_text(prompt_ids, both[len(before) :]) == text:
                return both[len(before) :]
        return alone

    def _append(self, token: int, state: DecodeState) -> tuple[str, DecodeState]:
        """The text that is certain once ``token`` is there, and the new state."""
        if token in self.special:
            return "", replace(state, tokens=state.tokens + 1)
        run = (*state.context, token)
        text = self.decode(run)
        cut = self._cut(run, text)
        certain = max(state.shown, len(text) - cut)
        if not cut:  # decode no more next time than is needed to stand behind something
            for width in (1, 2, 3):
                if shown := self._length(run[-width:]):
                    return text[state.shown :], DecodeState(state.tokens + 1, run[-width:], shown)
        return text[state.shown : certain], DecodeState(state.tokens + 1, run, certain)

    def _cut(self, ids: tuple[int, ...], text: str) -> int:
        """1 where the last character of ``text``, which ``ids`` spell, lacks bytes (or may: no token is a byte), else 0."""
        if not text.endswith(_REPLACEMENT):
            return 0
        if not self._continuations:
            return 1
        return int(any(len(self.decode((*ids, i))) <= len(text) for i in self._continuations))  # a byte more, and no character more

    def _length(self, ids: tuple[int, ...]) -> int:
        """Characters of ``ids`` by themselves; remembered for single tokens."""
        if len(ids) > 1:
            return len(self.decode(ids))
        known = self._lengths.get(ids[0])
        if known is None:
            known = self._lengths[ids[0]] = len(self.decode(ids))
        return known

    def _plain(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _mended(self, ids: Sequence[int]) -> str:
        """As :meth:`decode`, bytes that belong to no character each by itself."""
        out: list[str] = []
        sound: list[int] = []
        run: list[int] = []

        def text_of_sound() -> str:
            if not any(out):
                return self._plain(sound)
            return self._plain([self._byte_a, *sound])[1:]  # not at the beginning of a text

        def end_run() -> None:
            while run:
                try:
                    bytes(self._bytes[i] for i in run).decode()
                except UnicodeDecodeError as e:
                    sound.extend(run[: e.start])
                    out.extend((text_of_sound(), _REPLACEMENT))
                    sound.clear()
                    del run[: e.end]
                else:
                    sound.extend(run)
                    run.clear()

        for i in ids:
            if i in self.special:
                continue
            if i in self._bytes:
                run.append(i)
            else:
                end_run()
                sound.append(i)
        end_run()
        return "".join((*out, text_of_sound()))

    @cached_property
    def _bytes(self) -> dict[int, int]:
        """Tokens ``<0x00>`` … ``<0xFF>`` and their bytes, where the tokenizer decodes them so."""
        a = self._ids_of.get("<0x41>")
        if a is None or self._plain([a]) != "A":
            return {}
        return {i: byte for byte in range(256) if (i := self._ids_of.get(f"<0x{byte:02X}>")) is not None}

    @cached_property
    def _byte_a(self) -> int:
        return self._ids_of["<0x41>"]

    @cached_property
    def _continuations(self) -> tuple[int, ...]:
        """Tokens that are the byte 0x80 or 0xBF alone: one of them goes on with any character that lacks bytes, neither begins one."""
        found = (self._ids_of.get(piece) for piece in _CONTINUATIONS)
        return tuple(i for i in found if i is not None and self._plain([i]) == _REPLACEMENT)

    @cached_property
    def _ids_of(self) -> dict[str, int]:
        return {piece: i for i, piece in self.pieces.items()}
