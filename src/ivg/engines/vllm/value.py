"""Values that run in vLLM: guides of the composite model, and the explicit value in a pooling engine.

:class:`PooledValue` computes the scores of :class:`~ivg.values.explicit.ExplicitValue` from vLLM's hidden states. Prefixes stay in
vLLM's cache, so scoring a chunk reads the chunk and the last unfinished block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ivg.engines.vllm.client import EngineClient
from ivg.errors import PromptError
from ivg.models.prompt_encoder import PromptEncoder
from ivg.types import Hypothesis, Prompt, TokenCounter, Value


class VLLMGuide(Value):
    """A value that guides tokens inside the composite. To score hypotheses, the same value is loaded in this process as well.

    Args:
        name: of its group in the composite.
        load: loads the value in this process; called when it first scores.

    Attributes:
        parts: the value in this process, once it is loaded.
    """

    def __init__(self, name: str, load: Callable[[], Value]) -> None:
        self.name, self._load = name, load
        self.parts = ()

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """The scores of the value in this process."""
        if not self.parts:
            self.parts = ((1.0, self._load()),)
        return self.parts[0][1].score(hypotheses)

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """The engine has checked the length: all submodels of a composite read the same tokens."""


class PooledValue(Value):
    """An explicit value whose backbone runs in vLLM's pooling engine.

    Args:
        client: of an engine with :mod:`ivg.engines.vllm.value_model`.
        encoder: how the network reads prompts, in its own tokens.
        weight: of its head, [vocabulary or 1, hidden].
        bias: of its head, or None.
        name: in usage and traces.
    """

    def __init__(self, client: EngineClient, encoder: PromptEncoder, weight: Tensor, bias: Tensor | None, name: str = "explicit") -> None:
        self.client, self.encoder, self.name = client, encoder, name
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
        """Raise PromptError where prompt and answer exceed the context."""
        self.encoder.check_length(prompt, new_tokens)

    def restart(self) -> bool:
        """Start the engine again if it died. True if it had."""
        return self.client.restart()

    def close(self) -> None:
        """Stop vLLM."""
        self.client.close()

    def _read(self, h: Hypothesis) -> tuple[tuple[int, ...], int]:
        """(tokens to read, row of the head): a vocabulary head has the value of a prefix at the place before its last token."""
        tokens, _ = self.encoder.ids(h)
        column, limit = 0, self.encoder.max_positions
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
                    number = self.client.add(tokens, PoolingParams(task="embed", use_activation=False))
                except ValueError as e:
                    raise PromptError(f"{self.name}: vLLM refuses this: {str(e).strip().splitlines()[0]}") from e
                under_way[number] = tokens
            while under_way:
                for result in self.client.step():
                    output = result.output
                    if output.request_id not in under_way:  # of a call that was interrupted
                        continue
                    tokens = under_way.pop(output.request_id)
                    out[tokens] = _tensor(output.outputs)
                    read.setdefault(wanted[tokens].token_counter, []).append((len(tokens), result.cached[0]))
        finally:
            self.client.abort(list(under_way))
            self._count(read)
        return out

    def _count(self, read: Mapping[TokenCounter, Sequence[tuple[int, int]]]) -> None:
        """Add (tokens, those that the cache held) of the texts to their requests' counters.

        What all of a request's first texts found in the cache came from other requests: it counts as forward and as cached tokens.
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
