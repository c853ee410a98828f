"""Best-of-N of its_hub against an endpoint, with the value network as its reward. Run by ``benchmarks.peers``: URL MODEL VALUE."""

import asyncio
import sys
from typing import Any

from its_hub.api import AbstractOutcomeRewardModel
from its_hub.core.algorithms.bon import BestOfN
from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel

from benchmarks.peers.protocol import SAMPLES, TEMPERATURE, serve, versions
from benchmarks.peers.value import Value

url, model, folder = sys.argv[1:4]
judge = Value(folder)


class Reward(AbstractOutcomeRewardModel):
    """The value of the last message behind the first."""

    def score(self, messages: Any, **kwargs: Any) -> Any:
        """One number, or one for each conversation."""
        return asyncio.run(self.ascore(messages, **kwargs))

    async def ascore(self, messages: Any, **kwargs: Any) -> Any:
        """One number, or one for each conversation."""
        chats = messages if isinstance(messages, list) and messages and isinstance(messages[0], list) else [messages]
        scores = judge.of_ids([judge.ids(text(chat[0]), text(chat[-1])) for chat in chats])
        return scores if chats is messages else scores[0]


def text(message: Any) -> str:
    """What a message says."""
    return message["content"] if isinstance(message, dict) else message.content


async def all_answers(prompts: list[str], tokens: int) -> list[str]:
    """All prompts at once."""
    lm = OpenAICompatibleLanguageModel(endpoint=f"{url}/v1", api_key="none", model_name=model, max_tokens=tokens, temperature=TEMPERATURE)
    search = BestOfN(Reward())
    try:
        return [text(found) for found in await asyncio.gather(*(search.ainfer(lm, prompt, SAMPLES) for prompt in prompts))]
    finally:
        await lm.close_session()


def answer(prompts: list[str], seed: int, tokens: int) -> list[str]:
    """Its client sends no seed."""
    return asyncio.run(all_answers(prompts, tokens))


serve(versions("its-hub", "torch"), answer)
