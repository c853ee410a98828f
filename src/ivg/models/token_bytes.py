"""The bytes that a token writes, also where they are a part of a character. No torch."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from functools import cache

from transformers.convert_slow_tokenizer import bytes_to_unicode


def bytes_of_piece(piece: str) -> bytes | None:
    """The bytes of a piece of byte-level BPE, whose letters are those of GPT-2's table; None: it is not such a piece."""
    table = _bytes_of_letters()
    return bytes(table[letter] for letter in piece) if all(letter in table for letter in piece) else None


def bytes_in_text(own: bytes, text: str) -> bytes:
    """Those of the bytes of a token that stand in an answer.

    Args:
        own: what the token writes. It may begin and end within a character.
        text: what the answer has of it, with the whole character that it completes and without one that it begins. A stop string may
            have cut its end off.
    """
    continued = next((i for i, byte in enumerate(own) if byte & 0xC0 != 0x80), len(own))
    if text.endswith(codecs.getincrementaldecoder("utf-8")("replace").decode(own[continued:])):
        return own
    return own[:continued] + text[continued > 0 :].encode()


@cache
def _bytes_of_letters() -> Mapping[str, int]:
    return {letter: byte for byte, letter in bytes_to_unicode().items()}
