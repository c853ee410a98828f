"""Structured output inside vLLM: its scheduler masks tokens, and the masks are those of :mod:`ivg.engines.grammar`.

vLLM's own backends know a request, and a chunk of a search is a request: its grammar would begin anew in every chunk. Here a request
says which tokens of its prompt belong to the response, and its grammar reads those first. So the grammar of every beam is behind that
beam's own tokens. The rest is vLLM's: grammars are compiled beside the forward pass, masks reach the workers with the batch, and the
composite's logits are guided before they are masked.

Give the scheduler to an engine by name, ``scheduler_cls="ivg.engines.vllm.scheduler.make_scheduler"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputGrammar, StructuredOutputOptions

from ivg.engines.grammar import Grammars
from ivg.engines.vllm.response_grammar import ResponseGrammar
from ivg.errors import ConfigError

_WORD = 32
"""Tokens in a word of a mask."""


class MatcherState(StructuredOutputGrammar):
    """Where the response of a request is in its grammar.

    Args:
        grammars: compiles them.
        of: the grammar, and how the response begins.
        width: of the vocabulary.

    Raises:
        ConfigError: the grammar cannot be used, or excludes what the response begins with.
    """

    def __init__(self, grammars: Grammars, of: ResponseGrammar, width: int) -> None:
        self.grammars, self.of, self.width = grammars, of, width
        self.ends = frozenset(of.ends)
        self.reset()

    def reset(self) -> None:
        """Back to how the response begins."""
        self.matcher, self.tokens, self.ended = self.grammars.matcher(self.of.structure), 0, False
        if self.of.response and not self.matcher.consume_tokens(list(self.of.response)):
            raise ConfigError(f"{self.of.structure[0]}: the response so far is excluded by it")

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Read tokens that were drawn; False: one was forbidden, since nothing was allowed."""
        for token in tokens:
            if self.ended:
                return True
            allowed = self._may_end() if token in self.ends else self.matcher.consume_token(token)
            if not allowed:
                return False
            self.ended = token in self.ends
            self.tokens += 1
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """The first of ``tokens`` that are allowed; reads none."""
        if self.ended:
            return []
        text = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[: self.matcher.validate_tokens(tokens[:text])]

    def rollback(self, num_tokens: int) -> None:
        """Take back tokens."""
        if num_tokens > 0:
            self.matcher.rollback(num_tokens - self.ended)
            self.tokens, self.ended = self.tokens - num_tokens, False

    def fill_bitmask(self, bitmask: Tensor, batch_index: int) -> None:
        """Write a bit for every token that is allowed."""
        allowed = self.grammars.allowed(self.matcher, self.width, self.ends, self.of.least - self.tokens)
        if self.of.ignore_eos and not self.matcher.is_stopped():
            allowed[[i for i in self.of.eos_ids if i < self.width]] = False
        padded = np.zeros(bitmask.shape[1] * _WORD, dtype=bool)
        padded[: self.width] = allowed
        bitmask[batch_index] = torch.from_numpy(np.packbits(padded, bitorder="little").view(np.int32))

    def is_terminated(self) -> bool:
        """Has the response ended?"""
        return self.ended

    def _may_end(self) -> bool:
        return bool(self.matcher.is_accepting() and (self.matcher.is_stopped() or self.tokens >= self.of.least))


@dataclass
class GrammarBackend(StructuredOutputBackend):
    """Compiles the grammars of an engine."""

    grammars: Grammars | None = None

    def compile_grammar(
        self, request_type: StructuredOutputOptions, grammar_spec: str, stop_token_ids: set[int] | None = None
    ) -> StructuredOutputGrammar:
        """The state of a request before its first token.

        Raises:
            ConfigError: the grammar cannot be used; the request ends with an error.
        """
        if request_type != StructuredOutputOptions.JSON:
            grammar_spec = "{}"
        found = ResponseGrammar.read(grammar_spec)
        if self.grammars is None:
            self.grammars = Grammars(self.tokenizer, found.eos_ids)
        return MatcherState(self.grammars, found, self.vocab_size)

    def allocate_token_bitmask(self, max_num_seqs: int) -> Tensor:
        """Memory for masks of so many rows."""
        return torch.full((max_num_seqs, -(-self.vocab_size // _WORD)), -1, dtype=torch.int32)

    def destroy(self) -> None:
        """Forget the grammars."""
        self.grammars = None


def make_scheduler(*, vllm_config: Any, structured_output_manager: Any, **rest: Any) -> Any:
    """The scheduler that vLLM would use, whose grammars are made here."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    model = vllm_config.model_config
    structured_output_manager.backend = GrammarBackend(vllm_config, structured_output_manager.tokenizer, model.get_vocab_size())
    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return kind(vllm_config=vllm_config, structured_output_manager=structured_output_manager, **rest)
