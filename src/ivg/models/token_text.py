"""Texts and bytes of single tokens, as servers and harnesses report them beside log-probabilities."""

from __future__ import annotations

from functools import lru_cache

from ivg.models.token_bytes import bytes_in_text
from ivg.models.vocabulary import REPLACEMENT, Vocabulary


class TokenText:
    """Text of single tokens, cached."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._context = vocabulary.tokenizer("a", add_special_tokens=False).input_ids
        self.decode = lru_cache(maxsize=65536)(self._decode)
        self._partial_bytes = lru_cache(maxsize=65536)(vocabulary.partial_bytes)

    def piece(self, token: int) -> str:
        """The token as the tokenizer's vocabulary writes it: no two tokens have the same."""
        return self._vocabulary.pieces.get(token, f"token_id:{token}")

    def own_bytes(self, token: int, text: str | None = None) -> bytes:
        """The bytes of a token, those of a part of a character too; ``text``: what an answer has of it, where it stands in one."""
        own = self._partial_bytes(token)
        if own is not None:
            return own if text is None else bytes_in_text(own, text)
        alone = self.decode(token)
        if text is None:
            return alone.encode()
        lost = len(text) - len(text.lstrip(REPLACEMENT)) if self._vocabulary.has_byte_tokens else 0
        # bytes before it that belong to no character are those of other tokens
        rests = (text[cut:] for cut in range(lost + 1))
        return next((rest for rest in rests if alone.startswith(rest) or alone.lstrip().startswith(rest)), text).encode()

    def _decode(self, token: int) -> str:
        """Decoded after other text, because some tokenizers drop a leading space; a special token by its name."""
        return self._vocabulary.response_text(self._context, [token]) or self._vocabulary.pieces.get(token, "")
