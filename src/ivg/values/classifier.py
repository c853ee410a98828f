"""What rewards by classifiers share, whether these score texts or steps; and the passes of those that score texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ivg.errors import ConfigError
from ivg.models.placement import input_device
from ivg.models.rotary import length_batches, rope_limits
from ivg.models.shared_prompts import TOLERANCE, TRIAL, group_by_beginning, read_shared, share_prompts, sharing_fault
from ivg.models.support import context_of
from ivg.models.vocabulary import check_embedded

MOST_SHARED = 1024
"""Tokens of texts that are read together behind a common beginning: attention grows with their square."""
WORTHWHILE = 0.8
"""Texts are read together where this share of their tokens, or less, remains to be read."""


def check_label(network: Any, label: int | None, name: str, meaning: str) -> None:
    """Raise where ``label`` is no label of the classifier, or none is given and there are more than two.

    Args:
        network: the classifier.
        label: index of the label that is read.
        name: the reward, for errors.
        meaning: of that label, for errors.

    Raises:
        ConfigError: names the labels that there are.
    """
    labels = network.config.num_labels
    if label is None and labels > 2:
        raise ConfigError(f"{name} has {labels} labels\n  name the one that {meaning}: label=0…{labels - 1}")
    if label is not None and not 0 <= label < labels:
        raise ConfigError(f"{name} has {labels} labels, got label={label}\n  expected 0…{labels - 1}")


def token_limit(network: Any, tokenizer: Any) -> int | None:
    """Tokens that the classifier reads at most; None: no limit."""
    return min((n for n in (context_of(network), tokenizer.model_max_length) if n and 0 < n < 1 << 30), default=None)


def check_ids(ids: Sequence[int], network: Any, tokenizer: Any, name: str) -> None:
    """Raise PromptError for a token of a text that the classifier has no embedding for (see :func:`check_embedded`)."""
    rows = getattr(network.config.get_text_config(), "vocab_size", None)
    if rows is not None:
        check_embedded(ids, tokenizer, rows, name, "text")


class SequenceClassifier:
    """Logits of many texts by one network; a beginning that texts have in common, such as a prompt, is read once for them.

    Args:
        network: a transformers ``*ForSequenceClassification``, in evaluation mode.
        batch_size: texts for each forward pass.
    """

    def __init__(self, network: Any, batch_size: int) -> None:
        self.network, self.batch_size = network, batch_size
        self._config = network.config.get_text_config()
        self._padding: int | None = self._config.pad_token_id
        self._tried, self._shares = 0, False

    @torch.no_grad()
    def logits(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Of each text, given as token ids: [texts, labels], float32 on the CPU."""
        out = torch.empty(len(ids), self.network.config.num_labels)
        for chosen, logits in self._passes(ids):
            out[chosen] = logits.float().cpu()
        return out

    def _passes(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """(indices of some texts, their logits)."""
        if not ids:
            return
        groups = group_by_beginning(ids, MOST_SHARED)
        left = [shared + sum(len(ids[i]) - shared for i in members) for members, shared in groups]
        if sum(left) > WORTHWHILE * sum(map(len, ids)) or not self._can_share(max(map(len, ids))):
            for chosen in length_batches([len(text) for text in ids], self.batch_size, rope_limits(self._config)):
                yield chosen, self.network(**self._batch([ids[i] for i in chosen])).logits
            return
        size = max(1, self.batch_size * len(groups) // len(ids))
        for batch in length_batches(left, size, ()):
            chosen = [i for g in batch for i in groups[g][0]]
            yield chosen, self._together([[(ids[i], groups[g][1]) for i in groups[g][0]] for g in batch])

    def _together(self, groups: Sequence[Sequence[tuple[Sequence[int], int]]]) -> Tensor:
        rows = share_prompts(groups, self._padding or 0)
        ends = torch.tensor([self._end(text) for group in groups for text, _ in group])
        rows = replace(rows, places=rows.places.gather(1, ends[:, None]))
        body = getattr(self.network, self.network.base_model_prefix)
        logits: Tensor = self.network.score(read_shared(body, rows.to(input_device(self.network)))[:, 0])
        return logits

    def _end(self, text: Sequence[int]) -> int:
        """Where the network reads a text: at its last token that is not padding, as transformers does."""
        return next((place for place in reversed(range(len(text))) if text[place] != self._padding), 0)

    def _can_share(self, longest: int) -> bool:
        """Are logits right for texts that are read together? Known of the network, and tried."""
        if longest > self._tried:
            self._tried, self._shares = longest, self._try(longest)
        return self._shares

    def _try(self, longest: int) -> bool:
        body, score = getattr(self.network, self.network.base_model_prefix, None), getattr(self.network, "score", None)
        if body is None or score is None or rope_limits(self._config) or sharing_fault(body, longest) is not None:
            return False
        texts = [[token % self._config.vocab_size for token in text] for text in TRIAL]
        together = self._together([[(text, 3) for text in texts]]).float()
        alone = self.network(**self._batch(texts)).logits.float()
        return bool((together - alone).abs().max() <= TOLERANCE * (1 + alone.abs().max()))

    def _batch(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Rows padded on the right by the network's padding id.

        Networks read the last token that is not padding. For one without a padding id, an id that occurs in none of the rows is set, so
        that each row is read at its own last token.
        """
        padding = self._padding
        if padding is None:
            used = {token for row in rows for token in row}
            padding = self._config.pad_token_id = next(i for i in range(len(used) + 1) if i not in used)
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = input_device(self.network)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
