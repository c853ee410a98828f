"""The guided model in Inspect AI (UK AI Security Institute), as the provider ``ivg``; the model's name is the method.

Inspect finds it by the entry point of this package::

    inspect eval task.py --model ivg/eft -M recipe=recipe.toml -M beta=0.5
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from ivg.errors import ConfigError, MissingDependencyError
from ivg.factory.recipe import load_models
from ivg.integrations.flat_settings import recipe_from
from ivg.model import GuidedModel
from ivg.models.prompt_encoder import conversation_prompt
from ivg.models.token_text import TokenText
from ivg.search.lengths import DEFAULT_MAX_TOKENS, max_new_tokens
from ivg.search.request import RepeatedPrompts
from ivg.types import Completion, Message, Prompt, TokenLogprobs

try:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessageAssistant,
        GenerateConfig,
        Logprob,
        Logprobs,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        TopLogprob,
        modelapi,
    )
except ImportError as e:
    raise MissingDependencyError(f"ivg.integrations.inspect_ai needs inspect-ai ({e})\n  pip install 'ivg[inspect]'") from e

_SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "max_new_tokens",
    "stop_seqs": "stop",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "logit_bias": "logit_bias",
}
"""Fields of Inspect's ``GenerateConfig`` and the settings that they are."""
_REFUSED = (
    *("best_of", "prompt_logprobs", "response_schema", "reasoning_effort", "reasoning_tokens", "reasoning_mode", "effort", "verbosity"),
    *("modalities", "extra_body"),
)
"""Fields that change an answer and are not taken."""


@modelapi(name="ivg")
class IVGModelAPI(ModelAPI):
    """Answers of a guided model.

    Args:
        model_name: the method, or ``recipe`` for that of the recipe.
        config: Inspect's defaults of generation.
        guided_model: a loaded model in place of the recipe's.
        settings: ``recipe``, and settings of models, search, sampling and run over it (``-M NAME=VALUE``).

    Raises:
        ConfigError: an unknown setting; no method.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        guided_model: GuidedModel | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        method = {} if model_name == "recipe" else {"method": model_name}
        self.recipe = recipe_from({**settings, **method})
        self.model = load_models(self.recipe) if guided_model is None else guided_model
        self.method = self.model.get_method(self.recipe.search.method, **self.recipe.search.settings())
        self._repeated, self._token_text = RepeatedPrompts(1), TokenText(self.model.engine.vocabulary)

    async def generate(self, input: Sequence[Any], tools: Sequence[Any], tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        """One answer, or ``num_choices`` of them, each with its log-probabilities where they are asked for.

        Where neither Inspect nor the recipe nor the checkpoint says a length: 2048 new tokens, or what the contexts have left.

        Raises:
            ConfigError: tools, or a setting that is not taken; content of messages that is neither text nor picture.
            PromptError: messages that the models cannot read: too long, or pictures for a base that reads text alone.
        """
        if tools and tool_choice != "none":
            raise ConfigError("tools are not supported by the provider ivg\n  use ivg serve and Inspect's provider openai-api")
        if given := [name for name in _REFUSED if getattr(config, name, None) not in (None, "none")]:
            raise ConfigError(f"{given[0]} is not supported by the provider ivg\n  leave it out")
        settings = {ours: value for theirs, ours in _SETTINGS.items() if (value := getattr(config, theirs)) is not None}
        if config.logprobs:
            settings["alternatives"] = config.top_logprobs or 0
        prompt, n = self._prompt(input), config.num_choices or 1
        # epochs ask the same again: other samples, unless Inspect gives a seed
        index = 0 if config.seed is not None else n * self._repeated.count_before(prompt)
        settings = {"seed": self.recipe.run.seed, **self.recipe.sampling.settings(), **settings}
        started = time.monotonic()
        if "max_new_tokens" not in settings and "max_new_tokens" not in self.model.generation_config:
            prompt, settings["max_new_tokens"] = await asyncio.to_thread(self._with_length, prompt, settings)
        found = await self.model.agenerate(prompt, self.method, n=n, index=index, **settings)
        if errors := [c.error for c in found if c.error is not None]:
            return ModelOutput(model=self.model_name, error=errors[0])
        choices = [self._choice(c, logprobs=bool(config.logprobs)) for c in found]
        return ModelOutput(model=self.model_name, choices=choices, usage=_usage(found), time=time.monotonic() - started)

    def max_connections(self) -> int:
        """Requests at once: all of them share batches."""
        return 64

    def _prompt(self, turns: Sequence[Any]) -> Prompt:
        """The messages as ``ivg serve`` reads them."""
        messages = [Message.of(_plain_turn(turn, f"messages[{i}]"), f"messages[{i}]") for i, turn in enumerate(turns)]
        return conversation_prompt(messages, self.model.base)

    def _with_length(self, prompt: Prompt, settings: dict[str, Any]) -> tuple[Prompt, int]:
        """The prompt with the content of its pictures, and the number of new tokens where nobody says one."""
        request = self.model.request(prompt, self.method, **settings)
        with self.model.lock:
            left = max_new_tokens(self.model.engine, request)
        return request.prompt, DEFAULT_MAX_TOKENS if left is None else min(left, DEFAULT_MAX_TOKENS)

    def _choice(self, completion: Completion, *, logprobs: bool) -> ChatCompletionChoice:
        reason = "max_tokens" if completion.finish_reason == "length" else "stop"
        message = ChatMessageAssistant(content=completion.answer, model=self.model_name, source="generate")
        shown = Logprobs(content=[self._logprob(d) for d in completion.details]) if logprobs else None
        return ChatCompletionChoice(message=message, stop_reason=reason, logprobs=shown)

    def _logprob(self, detail: TokenLogprobs) -> Logprob:
        shown = self._token_text
        written = shown.own_bytes(detail.token, detail.text)
        top = [TopLogprob(token=detail.text if i == detail.token else shown.decode(i), logprob=p) for i, p in detail.top]
        return Logprob(token=detail.text, logprob=detail.logprob, bytes=list(written), top_logprobs=top or None)


def _plain_turn(turn: Any, where: str) -> dict[str, Any]:
    """One of Inspect's messages in OpenAI's shape."""
    out = {"role": turn.role, "content": _content(turn, where)}
    if turn.role == "assistant" and turn.tool_calls:
        out["tool_calls"] = [
            {"id": call.id, "type": call.type, "function": {"name": call.function, "arguments": call.arguments}} for call in turn.tool_calls
        ]
    if turn.role == "tool":
        out |= {"tool_call_id": turn.tool_call_id, "name": turn.function}
        if turn.error is not None:  # the content is then often empty: Inspect's own providers send the error in its place
            out["content"] = f"Error: {turn.error.message}"
    return out


def _content(turn: Any, where: str) -> str | list[dict[str, Any]]:
    """The content of a message: texts that follow each other are joined by a line break, as Inspect joins them, pictures stay between them.

    The assistant's own reasoning is left out: chat templates leave it out of earlier turns.

    Raises:
        ConfigError: content of another kind; names the place.
    """
    if isinstance(turn.content, str):
        return turn.content
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(turn.content):
        if part.type == "text" and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += "\n" + part.text
        elif part.type == "text":
            parts.append({"type": "text", "text": part.text})
        elif part.type == "image":
            parts.append({"type": "image_url", "image_url": {"url": part.image}})
        elif part.type != "reasoning" or turn.role != "assistant":
            raise ConfigError(
                f"{where}.content[{i}] is of type {part.type!r}, which the provider ivg does not read\n"
                "  expected text or pictures; leave the sample out, or give it as text"
            )
    return parts or ""


def _usage(found: Sequence[Completion]) -> ModelUsage:
    read, written = found[0].usage.prompt_tokens, sum(c.usage.completion_tokens for c in found)
    return ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
