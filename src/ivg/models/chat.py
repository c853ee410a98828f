"""How one model reads a prompt: its tokenizer's chat template, a format string, or the plain text.

Base, guides and values may each have a template of their own; only the response is shared (METHOD, section 2).
"""

from __future__ import annotations

from typing import Any

from ivg.errors import ConfigError, PromptError
from ivg.types import Prompt

CHAT = "chat"
"""Template name: use the tokenizer's chat template, a plain text being one user message."""


def check_template(template: str | None) -> None:
    """Raise unless ``template`` is None, ``"chat"`` or a format string with the one field ``{prompt}``.

    Raises:
        ConfigError: otherwise.
    """
    if template in (None, CHAT):
        return
    assert template is not None
    if "{prompt}" not in template:
        raise ConfigError(f'unusable template {template!r}\n  expected: "chat", or a text with {{prompt}} where the prompt goes')


def prompt_text(prompt: Prompt) -> str:
    """The prompt as plain text: the text itself, a lone user message, or a transcript ``role: content``."""
    if isinstance(prompt.content, str):
        return prompt.content
    if len(prompt.content) == 1:
        return prompt.content[0].content
    return "\n".join(f"{m.role}: {m.content}" for m in prompt.content)


def render(prompt: Prompt, tokenizer: Any, template: str | None) -> str:
    """The text that the model is to continue. A ``None`` template is ``"chat"`` for messages, else the text as it is.

    Raises:
        PromptError: empty prompt, or messages for a tokenizer without chat template.
    """
    text = prompt_text(prompt)
    if not text.strip():
        raise PromptError("empty prompt\n  expected: some text, or messages with some content")
    if template not in (None, CHAT):
        assert template is not None
        return template.replace("{prompt}", text)
    if template is None and isinstance(prompt.content, str):
        return text
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template, but the prompt is chat messages\n"
            '  give a text, or a template for this model such as "{prompt}"'
        )
    messages = (
        [{"role": "user", "content": text}]
        if isinstance(prompt.content, str)
        else [{"role": m.role, "content": m.content} for m in prompt.content]
    )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(prompt: Prompt, tokenizer: Any, template: str | None, response: str | None = None) -> list[int]:
    """Token ids of the rendered prompt, and of ``response`` behind it when given.

    A chat template writes its own special tokens; otherwise the tokenizer adds those it puts before a text.
    """
    text = render(prompt, tokenizer, template)
    chat = template == CHAT or (template is None and not isinstance(prompt.content, str))
    ids = tokenizer(text + (response or ""), add_special_tokens=not chat).input_ids
    if not chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0"):
        ids = ids[:-1]  # some tokenizers close every text; a prompt goes on
    if not ids:
        raise PromptError(f"the prompt {text!r} has no tokens\n  expected: some text")
    return list(ids)
