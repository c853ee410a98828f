"""The guided model in Inspect AI (UK AI Security Institute), as the provider ``ivg``; the model's name is the method.

Inspect finds it by the entry point of this package::

    inspect eval task.py --model ivg/eft -M recipe=recipe.toml -M beta=0.5
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ivg.errors import ConfigError, MissingDependencyError
from ivg.factory.recipe import load_models
from ivg.integrations.flat_settings import recipe_from
from ivg.model import GuidedModel
from ivg.models.prompt_encoder import has_chat_template
from ivg.models.token_text import TokenText
from ivg.search.request import RepeatedPrompts
from ivg.types import Completion, Prompt, TokenLogprobs

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
_REFUSED = ("best_of", "prompt_logprobs", "response_schema", "reasoning_effort", "reasoning_tokens", "modalities", "extra_body")
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

        Raises:
            ConfigError: tools, or a setting that is not taken.
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
        found = await self.model.agenerate(prompt, self.method, n=n, index=index, **settings)
        if errors := [c.error for c in found if c.error is not None]:
            return ModelOutput(model=self.model_name, error=errors[0])
        choices = [self._choice(c, logprobs=bool(config.logprobs)) for c in found]
        return ModelOutput(model=self.model_name, choices=choices, usage=_usage(found), time=time.monotonic() - started)

    def max_connections(self) -> int:
        """Requests at once: all of them share batches."""
        return 64

    def _prompt(self, turns: Sequence[Any]) -> Prompt:
        """The messages where the base has a chat template, else their texts, one a line, as ``ivg serve`` reads them."""
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        if has_chat_template(self.model.base):
            return Prompt.of(messages)
        return Prompt("\n".join(message["content"] for message in messages))

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


def _usage(found: Sequence[Completion]) -> ModelUsage:
    read, written = found[0].usage.prompt_tokens, sum(c.usage.completion_tokens for c in found)
    return ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
