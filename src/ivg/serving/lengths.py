"""How long prompts and answers may be: the contexts of base and values, as far as each has one. Knows no HTTP."""

from __future__ import annotations

from dataclasses import replace

from ivg.errors import ConfigError, ContextLengthError, PromptError, ServeError
from ivg.model import GuidedModel
from ivg.models.chat_template import encode, prompt_text
from ivg.models.prompt_encoder import PromptEncoder
from ivg.search.request import Request
from ivg.settings.recipe import ROLES
from ivg.types import Message, Prompt

ANY = 1 << 40
"""More tokens than any context has."""


def room(model: GuidedModel, request: Request) -> int | None:
    """New tokens that every model of ``request`` can read behind its prompt, at most; None where none has a limit.

    Raises:
        ContextLengthError: not even one.
        PromptError: a prompt that cannot be read.
    """
    tokens = ANY
    while True:
        try:
            check(model, request, tokens)
        except ContextLengthError as e:
            if e.length >= e.limit or tokens <= 1:
                raise
            tokens = min(tokens - 1, e.limit - e.length)
        else:
            return None if tokens == ANY else tokens


def check(model: GuidedModel, request: Request, tokens: int) -> None:
    """Raise PromptError unless every model of ``request`` can read its prompt and so many new tokens."""
    search = request.search
    prompt = model.engine.open(request.prompt, replace(request.sampling, max_new_tokens=tokens)).prompt
    for value in (search.guidance.value if search.guidance else None, search.value):
        if value is not None:
            value.check(prompt, tokens)


def check_size(base: PromptEncoder, prompt: Prompt) -> None:
    """Refuse what is far too long before anything reads or remembers it: readers keep the tokens of the prompts that they saw.

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
        tokens = len(text) // longest if len(text) > longest * limit else len(encode(prompt, base.tokenizer, base.template))
    if tokens >= limit:
        message = f"prompt of at least {tokens} tokens > context of {base.name} ({limit})\n  shorten the prompt"
        raise ContextLengthError(message, model=base.name, length=tokens, new_tokens=1, limit=limit)


def reads_chats(base: PromptEncoder) -> bool:
    """Has the base a form for messages?"""
    return base.template is not None or bool(getattr(base.tokenizer, "chat_template", None))


def check_chats(model: GuidedModel) -> None:
    """Raise unless all values can read messages, if the base can: known at start, and not at every request.

    Raises:
        ConfigError: names the models that cannot.
    """
    if not reads_chats(model.base):
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
            f"the base reads chats, and no conversation could be answered: {'; '.join(refusals)}\n"
            f"  give every model a form of its own, for example {hint}"
        )


def too_long(error: ContextLengthError, param: str) -> ServeError:
    """In OpenAI's words, which clients look for, and under its code."""
    asked = f"{error.length} in the {param}" + (f", {error.new_tokens} in the completion" if error.new_tokens < ANY else "")
    total = error.length + (error.new_tokens if error.new_tokens < ANY else 1)
    whose = "" if error.model == "base" else f" The context is that of {error.model}."
    message = (
        f"This model's maximum context length is {error.limit} tokens. However, you requested {total} tokens ({asked})."
        f" Please reduce the length of the {param} or completion.{whose}"
    )
    return ServeError(message, 400, "context_length_exceeded", param)
