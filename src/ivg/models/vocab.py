"""Vocabularies: what token ids mean, whether two models mean the same by them, and how ids become text.

Token-level guidance over the whole vocabulary adds two models' logits column by column, so column i must be the same
piece of text in both. Rows that only pad the matrix (32000 against 32016, 151936 against 152064) do no harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from ivg.errors import VocabularyError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


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

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out, spaces as they are."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def continue_text(self, ids: Sequence[int], state: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """The text that ``ids`` add to what was decoded up to ``state``, and the new state.

        ``state`` = (start of the window, end of what is decoded). Only the window is decoded again, because some
        tokenizers drop a leading space. A character whose bytes are not all there yet is held back.
        """
        window, done = state
        if done >= len(ids):
            return "", state
        before, now = self.decode(ids[window:done]), self.decode(ids[window:])
        if now.endswith(_REPLACEMENT) and len(ids) - done < 4:  # no character has more than four bytes
            return "", state
        return now[len(before) :], (done, len(ids))
