"""Values beside vLLM: those that guide inside the composite, and the explicit value that a pooling engine reads.

:class:`PooledValue` gives the numbers of ``values.explicit.ExplicitValue`` from vLLM's hidden states: prefixes stay in its cache, so
scoring a chunk reads the chunk and the last unfinished block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ivg.engines.vllm.client import EngineClient
from ivg.errors import PromptError
from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.vocabulary import Vocabulary
from ivg.types import Hypothesis, Prompt, TokenCounter, Value


class InnerValue:
    """A value whose models run inside the composite, where they guide tokens.

    Args:
        name: of its group there.
        vocabulary: the base's, which its models share.
        load: makes the same value outside, to select by it; asked for when it first scores.
    """

    def __init__(self, name: str, vocabulary: Vocabulary, load: Callable[[], Value]) -> None:
        self.name, self.vocabulary, self._load = name, vocabulary, load
        self.loaded: Value | None = None

    @property
    def outer(self) -> Value:
        """The value outside."""
        if self.loaded is None:
            self.loaded = self._load()
        return self.loaded

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """Of the value outside."""
        return self.outer.score(hypotheses)

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """The engine has checked the length: all parts of a composite read the same tokens."""

    def release(self, keys: Sequence[int]) -> None:
        """What is kept outside."""
        if self.loaded is not None:
            self.loaded.release(keys)


class PooledValue:
    """An explicit value whose backbone runs in vLLM's pooling engine.

    Args:
        core: of ``vllm.value_model``.
        texts: how the network reads prompts, in its own tokens.
        weight: of its head, [vocabulary or 1, hidden].
        bias: of its head, or None.
        name: in usage and traces.
    """

    def __init__(self, core: EngineClient, texts: PromptEncoder, weight: Tensor, bias: Tensor | None, name: str = "explicit") -> None:
        self.core, self.texts, self.name = core, texts, name
        self.weight, self.bias = weight.float(), None if bias is None else bias.float()
        self.head = "scalar" if len(weight) == 1 else "vocabulary"
        self.submitted = self.cached = 0

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """V(x, y_<=t) for each hypothesis, in units of the reward that the network was trained on.

        Raises:
            PromptError: a text that does not fit, or that vLLM refuses.
        """
        if not hypotheses:
            return []
        rows, wanted = [self._read(h) for h in hypotheses], dict[tuple[int, ...], Hypothesis]()
        for (tokens, _), h in zip(rows, hypotheses, strict=True):
            wanted.setdefault(tokens, h)
        hidden = self._hidden(wanted)
        column = torch.tensor([column for _, column in rows])
        states = torch.stack([hidden[tokens] for tokens, _ in rows])
        values = (states * self.weight[column]).sum(1)
        return (values if self.bias is None else values + self.bias[column]).tolist()

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Raise PromptError where prompt and answer outgrow the context."""
        self.texts.check_length(prompt, new_tokens)

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept for a hypothesis; vLLM's cache is by tokens."""

    def restart(self) -> bool:
        """Begin anew where the engine died. Had it?"""
        return self.core.restart()

    def close(self) -> None:
        """Stop vLLM."""
        self.core.close()

    def _read(self, h: Hypothesis) -> tuple[tuple[int, ...], int]:
        """(tokens to read, row of the head): a vocabulary head has the value of a prefix at the place before its last token."""
        tokens, _ = self.texts.ids(h)
        column, limit = 0, self.texts.max_positions
        if self.head != "scalar":
            if len(tokens) < 2:
                raise PromptError(f"{self.name}: a vocabulary head gives no value for a text of one token")
            tokens, column = tokens[:-1], tokens[-1]
        if limit is not None and len(tokens) > limit:
            raise PromptError(f"{self.name} reads at most {limit} tokens, got {len(tokens)}\n  shorten the prompt or the answer")
        return tuple(tokens), column

    def _hidden(self, wanted: dict[tuple[int, ...], Hypothesis]) -> dict[tuple[int, ...], Tensor]:
        """Hidden states [hidden] behind the last token of each."""
        from vllm import PoolingParams

        under_way: dict[str, tuple[int, ...]] = {}
        read: dict[TokenCounter, list[tuple[int, int]]] = {}
        out: dict[tuple[int, ...], Tensor] = {}
        try:
            for tokens in wanted:
                try:
                    number = self.core.add(tokens, PoolingParams(task="embed", use_activation=False))
                except ValueError as e:
                    raise PromptError(f"{self.name}: vLLM refuses this: {str(e).strip().splitlines()[0]}") from e
                under_way[number] = tokens
            while under_way:
                for news in self.core.step():
                    output = news.output
                    if output.request_id not in under_way:  # of a call that was broken off
                        continue
                    tokens = under_way.pop(output.request_id)
                    out[tokens] = _tensor(output.outputs)
                    read.setdefault(wanted[tokens].token_counter, []).append((len(tokens), news.cached[0]))
        finally:
            self.core.abort(list(under_way))
            self._count(read)
        return out

    def _count(self, read: Mapping[TokenCounter, Sequence[tuple[int, int]]]) -> None:
        """Tell the meters of (tokens, those that the cache held) of their texts.

        What all of a request's first texts found there came from other requests: it is asked for, and cached.
        """
        for token_counter, texts in read.items():
            tokens, cached = sum(t for t, _ in texts), sum(c for _, c in texts)
            spared = 0 if token_counter.forward_tokens[self.name] else min(c for _, c in texts)
            token_counter.add(self.name, tokens - cached + spared, spared)
            self.submitted += tokens
            self.cached += cached


def _tensor(outputs: Any) -> Tensor:
    """A pooling output's vector, float32."""
    data = getattr(outputs, "data", None)
    return data.float() if isinstance(data, Tensor) else torch.tensor(outputs.embedding, dtype=torch.float32)
