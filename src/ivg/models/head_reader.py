"""A value that is a head on the hidden states of a language model's network: it reads with that network, its cache and its passes.

Where the language model that it follows has just read a text behind the same prompt, the states are there, and nothing is read. So a
vocabulary head scores what was generated for one product of two vectors each: V(x, y_<=t) = head[y_t] . h_{t-1}, and y_t was drawn from
h_{t-1}. A scalar head needs the state behind y_t, which it reads behind a fork of the other's row. Anything else is read in rows of its
own, as by any reader. Must not depend on what outputs mean (``values``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from ivg.models.cache import CacheRow
from ivg.models.cached_lm import CachedLM
from ivg.models.kept_outputs import KeptState, KeptStates, stack_states
from ivg.models.prompt_template import PromptTemplate
from ivg.models.runner import ModelRunner
from ivg.models.value_head import ValueModel
from ivg.types import Hypothesis, Prompt
from ivg.types.beam import HEAD_SUFFIX


class HeadReader(CachedLM):
    """Reads with the head of ``value``, whose backbone is the body of the network of ``model``.

    Args:
        model: runs the network; its passes keep hidden states.
        value: the backbone and the head.
        tokenizer: its own.
        template: see :class:`~ivg.models.prompt_template.PromptTemplate`.
        eos_ids: ids that end a response.
        name: in usage and errors.
    """

    head: nn.Linear

    def __init__(
        self, model: ModelRunner, value: ValueModel, tokenizer: Any, template: PromptTemplate, eos_ids: Sequence[int] | None, *, name: str
    ) -> None:
        self.value = value
        super().__init__(model, tokenizer, template, eos_ids, name=name)
        self.head = value.head

    @property
    @override
    def network(self) -> ValueModel:
        return self.value

    @property
    def head_name(self) -> str:
        """In usage: positions where the whole head was computed on states that another reader had read."""
        return f"{self.name}{HEAD_SUFFIX}"

    @override
    def follow(self, other: CachedLM) -> None:
        """Where ``other``, which shares the network and reads without adapter, has just read a text, its states are taken."""
        if other is not self and other.model is self.model and other.weights is None and other.head is None:
            self._source = other if self.vocabulary.same_as(other.vocabulary) else None
            if self._source is not None and other.states is None:
                other.states = KeptStates()

    @override
    def logits(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        if self.value.kind == "vocabulary" or self._source is None or self._outputs_of_source(hypotheses) is not None:
            return super().logits(hypotheses)
        found = [self._row_of_source(h) for h in hypotheses]
        known, unread = [i for i, pair in enumerate(found) if pair], [i for i, pair in enumerate(found) if not pair]
        if not known:
            return super().logits(hypotheses)
        out = [self._read_behind([pair for pair in found if pair], [hypotheses[i] for i in known])]
        if unread:
            out.append(super().logits([hypotheses[i] for i in unread]))
        return torch.cat(out)[torch.tensor([*known, *unread], device=out[0].device).argsort()]

    def _row_of_source(self, h: Hypothesis) -> tuple[CacheRow, list[int]] | None:
        """(the row that the reader that this one follows has of ``h``, the tokens behind what it holds); None: it has none of use."""
        assert self._source is not None
        entry = self._source.entry_of(h)
        if entry is None or not entry.row.ids or entry.row.nonfinite or entry.row.images is not None:
            return None
        ids, held = self.ids(h)[0], len(entry.row.ids)
        return (entry.row, ids[held:]) if held < len(ids) and ids[:held] == entry.row.ids else None

    def _read_behind(self, found: Sequence[tuple[CacheRow, list[int]]], hypotheses: Sequence[Hypothesis]) -> Tensor:
        """The head's outputs behind each of ``hypotheses``, whose last tokens are read behind a copy of a row that holds the others."""
        forks = [self.model.fork(row) for row, _ in found]
        try:
            states = self.model.last_outputs_and_states(forks, [new for _, new in found])[1]
        finally:
            for row in forks:
                self.model.free(row)
        for h, (_, new) in zip(hypotheses, found, strict=True):
            h.token_counter.add(self.name, len(new))
        assert states is not None
        return self.head(states)

    @override
    def last_token_outputs(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        lasts = [self.last_id(h) for h in hypotheses]
        found = self._states_of_source(hypotheses, 1)
        known, unread = [i for i, s in enumerate(found) if s is not None], [i for i, s in enumerate(found) if s is None]
        states = []
        if known:
            states.append(stack_states([state for state in found if state is not None]))
            self.inherit_cache([hypotheses[i] for i in known])
        if unread:
            entries, new = self._to_read([hypotheses[i] for i in unread], [1] * len(unread), drop=1)
            read = self.model.last_outputs_and_states([e.row for e in entries], new)[1]
            assert read is not None
            states.append(read)
        order = [*known, *unread]
        out = self._outputs_at(torch.cat(states), [lasts[i] for i in order])
        return out[torch.tensor(order, device=out.device).argsort()]

    @override
    def candidate_last_token_outputs(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> Tensor:
        known = [state for state in self._states_of_source(candidates, 1) if state is not None]
        if len(known) < len(candidates):
            return super().candidate_last_token_outputs(hypotheses, candidates)
        return self._outputs_at(stack_states(known), [self.last_id(h) for h in candidates])

    def _outputs_at(self, states: Tensor, tokens: Sequence[int]) -> Tensor:
        """The outputs of the head for one token behind each of ``states`` [states, hidden], float32 [states]."""
        where = torch.tensor(tokens, device=states.device)
        out = (states.float() * self.head.weight[where].float()).sum(-1)
        return out if self.head.bias is None else out + self.head.bias[where].float()

    @override
    def _outputs_of_source(self, hypotheses: Sequence[Hypothesis]) -> Tensor | None:
        found = self._states_of_source(hypotheses, 0)
        known = [state for state in found if state is not None]
        if not known or len(known) < len(found):
            return None
        for h in hypotheses if self.value.kind == "vocabulary" else ():
            h.token_counter.add(self.head_name, 1)
        return cast("Tensor", self.head(stack_states(known)))

    def _states_of_source(self, hypotheses: Sequence[Hypothesis], drop: int) -> list[KeptState | None]:
        """What the reader that this one follows has read last of each hypothesis without its last ``drop`` tokens, where this one would
        read the same.
        """
        source = self._source
        if source is None or source.states is None:
            return [None] * len(hypotheses)
        found = [source.states.find(h, drop) if self.vocabulary.same_as(h.vocabulary) else None for h in hypotheses]
        same: dict[tuple[int, int], bool] = {}
        for h, state in zip(hypotheses, found, strict=True):
            if state is not None and (pair := (id(h.prompt), id(state.prompt))) not in same:
                same[pair] = self.reads_as_source(h.prompt, state.prompt)
        return [s if s is not None and same[id(h.prompt), id(s.prompt)] else None for h, s in zip(hypotheses, found, strict=True)]

    def reads_as_source(self, prompt: Prompt, other: Prompt) -> bool:
        """Does it read before the answer to ``prompt`` what the reader that it follows reads before that to ``other``?"""
        source = self._source
        return source is not None and source.image_inputs(other) is None and source.prompt_ids(other) == self.prompt_ids(prompt)
