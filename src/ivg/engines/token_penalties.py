"""Settings that look back: penalties on tokens that are there already, and texts that are never completed. For one row of logits.

One definition for the transformers engine and for vLLM, whose own would take the response so far for prompt wherever a chunk goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ivg.errors import ConfigError
from ivg.models.vocabulary import Vocabulary
from ivg.types import SamplingParams

Ids = Sequence[int]
FORBIDDEN = float("-inf")


@dataclass(frozen=True)
class TokenPenalties:
    """The settings of a request, with words as tokens.

    Attributes:
        repetition_penalty: divides positive logits of tokens in prompt or response, and multiplies others; 1 is off.
        frequency_penalty: subtracted for each time that the response has the token.
        presence_penalty: subtracted once if the response has the token.
        bad_words: sequences of token ids that the response never completes.
    """

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> TokenPenalties:
        """Those of ``params``."""
        words = vocabulary.word_ids(params.bad_words) if params.bad_words else ()
        return cls(params.repetition_penalty, params.frequency_penalty, params.presence_penalty, words)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> TokenPenalties:
        """From :meth:`to_dict`, as it came out of another process.

        Raises:
            ConfigError: it is something else.
        """
        try:
            words = tuple(tuple(map(int, word)) for word in given["bad_words"])
            repetition, frequency, presence = (float(given[f.name]) for f in fields(cls) if f.name != "bad_words")
            return cls(repetition, frequency, presence, words)
        except (TypeError, ValueError, KeyError) as e:
            raise ConfigError(f"settings that look back cannot be read: {e!r}\n  got {given!r}") from None

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists alone."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"bad_words": [list(word) for word in self.bad_words]}

    def apply(self, z: Tensor, prompt: Ids, response: Ids) -> None:
        """Change one row of logits [vocabulary] in place, in the order of the attributes.

        Args:
            z: float32, behind ``response``.
            prompt: its tokens.
            response: its tokens so far, of all chunks.
        """
        if self.repetition_penalty != 1.0:
            _penalise(z, [*prompt, *response], self.repetition_penalty)
        if response and (self.frequency_penalty or self.presence_penalty):
            counts = Counter(response)
            add_biases(z, (), [((i,), -self.frequency_penalty * count - self.presence_penalty) for i, count in counts.items()])
        if self.bad_words:
            add_biases(z, response, [(word, FORBIDDEN) for word in self.bad_words])

    def apply_to_chunk(self, z: Tensor, prompt: Ids, output: Ids, tokens: int) -> None:
        """:meth:`apply` where an engine has taken the response so far for prompt.

        Args:
            z: float32, behind ``output``.
            prompt: all tokens that the engine was given.
            output: those that it has drawn.
            tokens: so many at the end of ``prompt`` belong to the response.
        """
        start = len(prompt) - tokens
        self.apply(z, prompt[:start], [*prompt[start:], *output])


def columns(z: Tensor, ids: Iterable[int]) -> Tensor:
    """``ids`` that are columns of ``z``, each once."""
    return torch.tensor(sorted({i for i in ids if i < len(z)}), dtype=torch.long, device=z.device)


def add_biases(z: Tensor, text: Ids, biases: Iterable[tuple[Ids, float]]) -> None:
    """Add the bias of every sequence whose tokens but the last end ``text``, or are all of it."""
    total: dict[int, float] = {}
    for sequence, bias in biases:
        before = len(sequence) - 1
        if before <= len(text) and list(text[len(text) - before :]) == list(sequence[:-1]) and sequence[-1] < len(z):
            total[sequence[-1]] = total.get(sequence[-1], 0.0) + bias
    if total:
        ids = sorted(total)
        z[torch.tensor(ids, device=z.device)] += torch.tensor([total[i] for i in ids], device=z.device)


def _penalise(z: Tensor, text: Ids, penalty: float) -> None:
    index = columns(z, text)
    picked = z[index]
    z[index] = torch.where(picked < 0, picked * penalty, picked / penalty)
