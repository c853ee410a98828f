"""How the messages of a prompt are rendered in a chat template. Standard library only.

Names and meanings are those of transformers' ``apply_chat_template`` and of vLLM's chat completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from ivg.errors import ConfigError
from ivg.settings.json_value import JSONValue
from ivg.settings.rules import FLAG, Rule
from ivg.settings.schema import Setting, validate
from ivg.settings.tools import NO_TOOLS, TOOLS, Tools

RESERVED = frozenset({
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "processor_kwargs", "load_audio_from_video", "self", "conversations",
})  # fmt: skip
"""Arguments of ``apply_chat_template`` that are no variables of a template, or that are set otherwise."""


class TemplateKwargs(JSONValue, Mapping[str, Any]):
    """Variables of a chat template: JSON values by name, whose order does not count."""

    __slots__ = ()

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(dict(values or {}), sort_keys=True)


def _kwargs(value: Any) -> TemplateKwargs:
    """``value`` as variables of a template.

    Raises:
        TypeError, ValueError: no mapping of names to JSON values.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
        raise TypeError
    return value if isinstance(value, TemplateKwargs) else TemplateKwargs(value)


TEMPLATE_KWARGS = Rule(
    "a JSON object",
    _kwargs,
    "variables of the chat template (enable_thinking …), no arguments of apply_chat_template (tokenize …)",
    lambda kwargs: not RESERVED & set(kwargs),
)
_OPTIONAL_FLAG = replace(FLAG, optional=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """How one prompt of messages is rendered.

    Raises:
        ConfigError: a field of the wrong type, a reserved name, or a turn that is to be continued and followed by another.
    """

    chat_template_kwargs: Annotated[
        Mapping[str, Any],
        Setting(
            "Variables of the chat templates of all models, such as enable_thinking; they go over those of each model.",
            TEMPLATE_KWARGS,
            accepts=dict[str, Any],
        ),
    ] = TemplateKwargs()
    tools: Annotated[
        Tools,
        Setting("Functions that the model may call; chat templates write them into the prompt.", TOOLS, accepts=list[dict[str, Any]]),
    ] = NO_TOOLS
    add_generation_prompt: Annotated[
        bool | None,
        Setting("Begin a new turn of the assistant after the last one.", _OPTIONAL_FLAG, unset="unless the last turn is continued"),
    ] = None
    continue_final_message: Annotated[
        bool | None,
        Setting("The response continues the last turn.", _OPTIONAL_FLAG, unset="where it is the assistant's"),
    ] = None

    def __post_init__(self) -> None:
        validate(self)
        if self.add_generation_prompt and self.continue_final_message:
            raise ConfigError("add_generation_prompt and continue_final_message are both true\n  give one of them")

    def continues(self, last_role: str) -> bool:
        """Does the response continue the last turn, whose role is ``last_role``?"""
        if self.continue_final_message is not None:
            return self.continue_final_message
        return last_role == "assistant" and not self.add_generation_prompt


CHAT_SETTINGS = frozenset(f.name for f in fields(ChatSettings))
"""Their names."""
