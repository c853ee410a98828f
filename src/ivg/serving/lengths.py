"""Prompts that the models cannot read, and how clients are told. Independent of HTTP."""

from __future__ import annotations

from ivg.errors import ConfigError, ContextLengthError, PromptError, ServeError
from ivg.model import GuidedModel
from ivg.models.chat_template import encode, prompt_text
from ivg.models.prompt_encoder import PromptEncoder, has_chat_template
from ivg.settings.recipe import ROLES
from ivg.types import Message, Prompt


def check_prompt_length(base: PromptEncoder, prompt: Prompt, new_tokens: int = 1) -> None:
    """Refuse a prompt that is far too long before it is tokenized by every model: token ids of prompts are cached.

    Args:
        base: reads it.
        prompt: to be answered.
        new_tokens: of the answer, at least.

    Raises:
        ContextLengthError: more tokens than the base has positions.
    """
    limit = base.max_positions
    if limit is None:
        return
    if prompt.token_ids is not None:
        tokens = len(prompt.token_ids)
    else:
        text = prompt_text(prompt)
        if len(text) <= 4 * limit:
            return
        longest = max(map(len, base.vocabulary.pieces.values()), default=1)
        tokens = (
            len(text) // longest
            if len(text) > longest * limit
            else len(encode(prompt, base.tokenizer, base.template, settings=base.chat_settings))
        )
    if tokens + new_tokens > limit:
        message = f"prompt of at least {tokens} tokens > context of {base.name} ({limit})\n  shorten the prompt"
        raise ContextLengthError(message, model=base.name, length=tokens, new_tokens=new_tokens, limit=limit)


def check_chat_templates(model: GuidedModel) -> None:
    """Check at start that every value can read messages, if the base can.

    Raises:
        ConfigError: names the models that cannot.
    """
    if not has_chat_template(model.base):
        return
    refusals: list[str] = []
    for value in model.values.values():
        try:
            value.check(Prompt((Message("user", "x"),)), 1)
        except PromptError as e:
            refusals.append(str(e).partition("\n")[0])
    if refusals:
        role = refusals[0].partition(" ")[0].replace("explicit", "value")
        hint = f"--template '{role}={{prompt}}'" if role in ROLES else 'template = "{prompt}" in the recipe'
        raise ConfigError(
            f"the base has a chat template, but no chat could be answered: {'; '.join(refusals)}\n"
            f"  give every model a template, for example {hint}"
        )


def context_length_error(error: ContextLengthError, param: str, max_tokens: int | None) -> ServeError:
    """OpenAI's error, in the words and with the code that clients look for.

    Args:
        error: what does not fit.
        param: the field of the prompt: ``messages`` or ``prompt``.
        max_tokens: completion tokens that the client asked for.
    """
    if max_tokens is None:
        got = f"your {param} resulted in {error.length} tokens. Please reduce the length of the {param}."
    else:
        got = (
            f"you requested {error.length + max_tokens} tokens ({error.length} in the {param}, {max_tokens} in the completion)."
            f" Please reduce the length of the {param} or completion."
        )
    model = "" if error.model == "base" else f" The context is that of {error.model}."
    message = f"This model's maximum context length is {error.limit} tokens. However, {got}{model}"
    return ServeError(message, 400, "context_length_exceeded", param)
