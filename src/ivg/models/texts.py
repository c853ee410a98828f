"""How one model sees prompts and hypotheses: in its own tokens, behind its own prompt.

Knows: templates, vocabularies, lengths. Must not know networks: they may run here (``models.reader``) or inside another engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ivg.errors import PromptError
from ivg.models.chat import check_template, encode
from ivg.models.rows import common_length
from ivg.models.vocab import Vocabulary
from ivg.types import Hypothesis, Prompt


class Texts:
    """The tokenizer and template of one model.

    Args:
        name: of the model, in usage and errors.
        tokenizer: its own.
        template: ``"chat"``, a format string with ``{prompt}``, or None (see ``models.chat``).
        eos_ids: ids that end a response; default: the tokenizer's.
        vocab_size: rows of the model's embedding.
        max_positions: tokens that it can read at most; None: any number.
        limit_reason: what ends there, where it is not simply the model's context.
    """

    reads_given_ids = False
    """Takes the tokens of a prompt that has them (``Prompt.token_ids``): true of the base alone."""

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        template: str | None = None,
        eos_ids: Sequence[int] | None = None,
        *,
        vocab_size: int,
        max_positions: int | None = None,
        limit_reason: str = "",
    ) -> None:
        check_template(template)
        self.name, self.tokenizer, self.template = name, tokenizer, template
        self.vocab_size, self.max_positions, self.limit_reason = vocab_size, max_positions, limit_reason
        self.vocabulary = Vocabulary(tokenizer, eos_ids, owner=name)
        self.prompt_ids = lru_cache(maxsize=512)(self._prompt_ids)

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if self.reads_given_ids and prompt.token_ids is not None:
            return prompt.token_ids
        return tuple(encode(prompt, self.tokenizer, self.template))

    def check_length(self, prompt: Prompt, new_tokens: int) -> int:
        """Length of the prompt in this model's tokens.

        Raises:
            PromptError: prompt and answer together outgrow the model's context.
        """
        length, limit = len(self.prompt_ids(prompt)), self.max_positions
        if limit is not None and length + new_tokens > limit:
            why = f": {self.limit_reason}" if self.limit_reason else ""
            raise PromptError(
                f"prompt of {length} tokens + {new_tokens} new tokens > context of {self.name} ({limit}{why})\n"
                f"  shorten the prompt, or ask for at most {max(0, limit - length)} new tokens"
            )
        return length

    def ids(self, h: Hypothesis) -> tuple[list[int], int]:
        """(all tokens of prompt and response, how many of them are prompt).

        With the base's vocabulary: its very tokens. With another: the text is tokenised anew, and a token that spans the
        border counts as response. An end-of-sequence token of the base is read as this model's own.
        """
        prompt = self.prompt_ids(h.prompt)
        if self.vocabulary.same_as(h.vocabulary):
            return [*prompt, *self.own_ids(h.token_ids)], len(prompt)
        ids = encode(h.prompt, self.tokenizer, self.template, h.text) if h.text else list(prompt)
        border = common_length(prompt, ids)
        if h.token_ids and h.token_ids[-1] in h.vocabulary.eos_ids and self.vocabulary.eos_ids:
            ids.append(min(self.vocabulary.eos_ids))
        return ids, border

    def own_ids(self, tokens: Sequence[int]) -> list[int]:
        """The base's tokens in this model's, which shares its vocabulary but for tokens that the base may have added."""
        known = self.vocab_size
        return [t if t < known else next(iter(self.vocabulary.eos_ids), 0) for t in tokens]

    def last_id(self, h: Hypothesis) -> int:
        """The last token of prompt and response."""
        if h.token_ids and self.vocabulary.same_as(h.vocabulary) and len(self.prompt_ids(h.prompt)) + len(h.token_ids) > 1:
            return self.own_ids(h.token_ids[-1:])[0]
        ids, _ = self.ids(h)
        if len(ids) < 2:
            raise PromptError(f"{self.name}: a vocabulary head gives no value for a text of one token")
        return ids[-1]
