"""A particle filter, and greedy proxy tuning, by genlm-control. Run by ``benchmarks.peers``: BASE VALUE, or BASE TUNED UNTUNED.

With a value, one particle is drawn from base·exp(value) by 16 that the value weighs every five tokens, as ivg's method ``smc`` does.
With a pair, the answer is the likeliest token of base·tuned/untuned, again and again.
"""

import asyncio
import random
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from genlm.control import Potential, PromptedLLM, direct_token_sampler
from genlm.control.potential.built_in.llm import load_model_by_name

from benchmarks.peers.protocol import SAMPLES, TEMPERATURE, serve, versions
from benchmarks.peers.value import Value

EVERY = 5
"""Tokens between two weighings."""


def language_model(folder: str, temperature: float = 1.0) -> PromptedLLM:
    """A model in float32."""
    return PromptedLLM(load_model_by_name(folder, "hf", hf_opts={"torch_dtype": torch.float32}), temperature=temperature)


class Critic(Potential):
    """The value of a response, looked at every few tokens and at its end.

    Args:
        base: its vocabulary, which is the value's too.
        value: the network.
        prompt: what the responses follow.
    """

    def __init__(self, base: PromptedLLM, value: Value, prompt: list[int]) -> None:
        super().__init__(base.vocab, tables=base.tables)
        self.value, self.prompt = value, prompt
        self.known: dict[tuple[int, ...], float] = {}

    async def prefix(self, context: list[Any]) -> Any:
        """The value of the response up to the last weighing."""
        return (await self.batch_prefix([context]))[0]

    async def complete(self, context: list[Any]) -> Any:
        """The value of the whole response."""
        return (await self.batch_complete([context]))[0]

    async def batch_prefix(self, contexts: Sequence[list[Any]]) -> Any:
        """One for each."""
        return self._of([context[: len(context) // EVERY * EVERY] for context in contexts])

    async def batch_complete(self, contexts: Sequence[list[Any]]) -> Any:
        """One for each."""
        return self._of(contexts)

    def _of(self, contexts: Sequence[list[Any]]) -> Any:
        rows = [tuple(token.token_id for token in context) for context in contexts]
        new = [row for row in dict.fromkeys(rows) if row and row not in self.known]
        if new:
            self.known |= dict(zip(new, self.value.of_ids([[*self.prompt, *row] for row in new]), strict=True))
        return np.array([self.known[row] if row else 0.0 for row in rows])


async def draw(base: PromptedLLM, value: Value, prompt: str, tokens: int) -> str:
    """One response."""
    base.set_prompt_from_str(prompt)
    base.model.cache_kv(base.prompt_ids)
    critic = Critic(base, value, base.prompt_ids)
    found = await direct_token_sampler(base).smc(n_particles=SAMPLES, ess_threshold=0.5, max_tokens=tokens + 1, critic=critic)
    weights = np.exp(found.log_normalized_weights)
    chosen = found.contexts[np.random.choice(len(weights), p=weights / weights.sum())]
    return b"".join(token.byte_string for token in chosen[:-1]).decode(errors="replace")


async def greedy(mixed: Potential, models: list[PromptedLLM], prompt: str, tokens: int) -> str:
    """The likeliest response, token by token."""
    for model in models:
        model.set_prompt_from_str(prompt)
    context: list[Any] = []
    while len(context) < tokens:
        weights = await mixed.logw_next(context)
        token = mixed.vocab_eos[int(np.argmax(np.asarray(weights.weights)))]
        if token is mixed.eos:
            break
        context.append(token)
    return b"".join(token.byte_string for token in context).decode(errors="replace")


def main() -> None:
    """Choose by the number of models."""
    base = language_model(sys.argv[1], TEMPERATURE if len(sys.argv) == 3 else 1.0)
    if len(sys.argv) == 3:
        value = Value(sys.argv[2])

        async def all_answers(prompts: list[str], tokens: int) -> list[str]:
            return await asyncio.gather(*(asyncio.create_task(draw(base, value, prompt, tokens)) for prompt in prompts))

    else:
        tuned, untuned = map(language_model, sys.argv[2:4])
        mixed = base * tuned * untuned**-1

        async def all_answers(prompts: list[str], tokens: int) -> list[str]:
            return [await greedy(mixed, [base, tuned, untuned], prompt, tokens) for prompt in prompts]

    def answer(prompts: list[str], seed: int, tokens: int) -> list[str]:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        base.model.clear_cache()
        return asyncio.run(all_answers(prompts, tokens))

    serve(versions("genlm-control", "torch", "transformers"), answer)


main()
