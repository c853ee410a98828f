"""Which template a model reads prompts in, and its variables; :mod:`ivg.models.chat_template` renders prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ivg.errors import ConfigError
from ivg.settings.chat import TEMPLATE_KWARGS, TemplateKwargs
from ivg.settings.rules import TEMPLATE_FILES, TEXT_FILES, is_template_file

CHAT = "chat"
"""Template name: use the tokenizer's chat template; a plain text becomes one user message."""
RAW = "raw"
"""Template name: the contents of all messages, joined as they are."""
LAST_TURN = "last_turn"
"""Template name: the content of the last user message alone."""
NO_CHAT_SETTINGS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class PromptTemplate:
    """How one model reads prompts.

    Attributes:
        template: ``"chat"``, ``"raw"``, ``"last_turn"``, a format string with ``{prompt}``, or the path of a file: a chat template in Jinja
            (``.jinja``) or a format string (``.txt``). None: ``"chat"`` for messages, a text as it is.
        chat_template_kwargs: variables of the chat template, such as ``enable_thinking``; those of a prompt go over them.

    Raises:
        ConfigError: an unusable template, no such file, or variables without a chat template.
    """

    template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=TemplateKwargs)

    def __post_init__(self) -> None:
        kwargs = TEMPLATE_KWARGS.checked("chat_template_kwargs", self.chat_template_kwargs)
        object.__setattr__(self, "chat_template_kwargs", kwargs)
        if kwargs and self.resolved[0] not in (None, CHAT):
            raise ConfigError(
                f"chat_template_kwargs {kwargs!r}, but the template {self.template!r} is no chat template\n  leave one of them out"
            )

    @classmethod
    def of(cls, template: str | PromptTemplate | None) -> PromptTemplate:
        """``template`` itself, or that of its text."""
        return template if isinstance(template, PromptTemplate) else cls(template)

    def with_default(self, template: str | None) -> PromptTemplate:
        """This one, with ``template`` where it has none."""
        return self if self.template is not None else replace(self, template=template)

    def __str__(self) -> str:
        kwargs = f" with {self.chat_template_kwargs!r}" if self.chat_template_kwargs else ""
        return f"{self.template!r}{kwargs}"

    @property
    def resolved(self) -> tuple[str | None, dict[str, Any]]:
        """(the template with the text of a file in place of its name, the settings of ``apply_chat_template``)."""
        template, settings = self.template, dict(self.chat_template_kwargs)
        if template is not None and is_template_file(template):
            text = _read_template(template)
            if template.endswith(TEMPLATE_FILES):
                return CHAT, {**settings, "chat_template": text}
            template = text
        if template not in (None, CHAT, RAW, LAST_TURN) and "{prompt}" not in (template or ""):
            files = ", ".join((*TEMPLATE_FILES[:1], *TEXT_FILES))
            raise ConfigError(
                f"unusable template {template!r}\n"
                f'  expected: "chat", "raw", "last_turn", a text with {{prompt}} where the prompt goes, or a file ({files})'
            )
        return template, settings


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"cannot read the template {path}: {why}\n  expected a file with a chat template, or a text with {{prompt}}"
        ) from None
