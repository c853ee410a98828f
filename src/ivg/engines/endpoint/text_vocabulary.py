"""A vocabulary of text pieces, for engines that return text only: each piece of text gets an id when it is first seen.

Models with a tokenizer of their own have another vocabulary (:meth:`Vocabulary.same_as`), and read the text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from ivg.errors import PromptError
from ivg.models.chat_template import encode_rendered, is_chat, render, without_bos
from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.prompt_template import PromptTemplate
from ivg.models.vocabulary import Vocabulary
from ivg.types import DecodeState, Prompt

END = 0
"""The id of the end of a response."""
FILLER = 1
"""The id of a token without text: a piece of n tokens is followed by n - 1 of these, so that counts are right."""
_NAMES = {END: "\0ivg: the end", FILLER: "\0ivg: a token within a piece"}
"""Names that no tokenizer has, so that no vocabulary equals this one."""
KEPT = 1 << 20
"""Pieces kept at most, for long-lived servers: the oldest are dropped, and their ids never used again."""


class PieceTokenizer:
    """The part of a tokenizer that ivg uses, over whole texts: each is one token.

    Args:
        name: of the model, in errors.
        chat_template: of the tokenizer that renders prompts, where there is one.
        kept: pieces kept at most.
    """

    eos_token_id = END

    def __init__(self, name: str, chat_template: str | None = None, kept: int = KEPT) -> None:
        self.name_or_path, self.chat_template, self.kept = name, chat_template, kept
        self._numbers: dict[str, int] = {}
        self._texts: dict[int, str] = {}
        self._next = max(_NAMES) + 1

    def intern(self, text: str) -> int:
        """The id of ``text``: the same as long as it is kept, and unique."""
        known = self._numbers.get(text)
        if known is not None:
            return known
        number, self._next = self._next, self._next + 1
        self._numbers[text], self._texts[number] = number, text
        if len(self._texts) > self.kept:
            del self._numbers[self._texts.pop(next(iter(self._texts)))]
        return number

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        """``input_ids`` of a text: one id, or none if it is empty."""
        return SimpleNamespace(input_ids=[self.intern(text)] if text else [])

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Text of ``ids``; the end, fillers and dropped pieces have none."""
        return "".join(self._texts.get(i, "") for i in ids)

    def get_vocab(self) -> dict[str, int]:
        """Every piece and its id."""
        return {**{name: i for i, name in _NAMES.items()}, **self._numbers}


class TextVocabulary(Vocabulary):
    """The pieces of one endpoint. It grows; equal ids mean equal texts within this object only.

    Args:
        owner: how error messages call the model.
        chat_template: of the tokenizer that renders prompts, where there is one.
        kept: pieces kept at most.
    """

    def __init__(self, owner: str = "endpoint", chat_template: str | None = None, kept: int = KEPT) -> None:
        super().__init__(PieceTokenizer(owner, chat_template, kept), owner=owner)

    @property
    def pieces(self) -> dict[int, str]:  # type: ignore[override]
        """Every id and its piece, at this moment."""
        return {i: piece for piece, i in self.tokenizer.get_vocab().items()}

    @property
    def size(self) -> int:  # type: ignore[override]
        """One more than the largest id, at this moment."""
        return max(self.pieces) + 1

    def same_as(self, other: Vocabulary | None) -> bool:
        """Only with itself: the ids of another vocabulary stand for other texts."""
        return other is None or other is self

    def begin(self, prompt_ids: Sequence[int]) -> DecodeState:
        """Pieces are text already; tokens of prompts do not belong to this vocabulary."""
        return DecodeState()

    def intern(self, text: str) -> int:
        """The id of ``text`` (see :meth:`PieceTokenizer.intern`)."""
        number: int = self.tokenizer.intern(text)
        return number


class EndpointPromptEncoder(PromptEncoder):
    """Renders prompts for the base behind an endpoint, which gets text.

    Args:
        vocabulary: of the endpoint's answers.
        tokenizer: the base's own, for its chat template and to count the tokens of prompts; None: messages
            are refused unless ``template`` is a format string, and the length of a prompt is its number of words.
        template: see :mod:`ivg.models.chat_template`.
    """

    def __init__(self, vocabulary: TextVocabulary, tokenizer: Any = None, template: str | PromptTemplate | None = None) -> None:
        # the embedding's size is not known
        super().__init__("base", vocabulary.tokenizer, template, vocab_size=sys.maxsize)
        self.vocabulary, self.renderer = vocabulary, tokenizer
        self.text = lru_cache(maxsize=512)(self._text)

    def _text(self, prompt: Prompt) -> str:
        """The text that the endpoint continues.

        Raises:
            PromptError: an empty prompt, or messages that cannot be rendered here.
        """
        self.read_images(prompt)
        chat = is_chat(prompt, self.template)
        if self.renderer is None and chat:
            raise PromptError(
                f"{self.vocabulary.owner} gets text, and only its tokenizer can render chat messages\n"
                '  give the tokenizer (a directory or hub id), or a template for this model such as "{prompt}"'
            )
        text = render(prompt, self.renderer, self.template, self.name, self.chat_settings)
        return text if self.renderer is None else without_bos(text, self.renderer)

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        text = self.text(prompt)
        if self.renderer is not None:
            return tuple(encode_rendered(text, self.renderer, chat=False))
        return (FILLER,) * len(text.split())
