"""How one model reads a prompt: its tokenizer's chat template, one of a file, a format string, or the plain text.

Base, guides and values may each have a template of their own; only the response is shared. Why: docs/explanation/concepts.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ivg.errors import ConfigError, PromptError
from ivg.models.prompt_template import CHAT, LAST_TURN, NO_CHAT_SETTINGS, RAW
from ivg.models.tool_prompts import Messages, Render, check_tools_shown, with_readable_arguments
from ivg.settings.chat import CHAT_SETTINGS, ChatSettings
from ivg.types.messages import Message, Prompt, PromptLike, check_text

SYSTEM_ROLES = ("system", "developer")
"""Roles of instructions; the second is OpenAI's newer name."""


def prompt_text(prompt: Prompt) -> str:
    """The prompt as plain text: the text itself, a lone user message, or a transcript ``role: content``."""
    if isinstance(prompt.content, str):
        return prompt.content
    if len(prompt.content) == 1:
        return prompt.content[0].text
    return "\n".join(f"{m.role}: {m.text}" for m in prompt.content)


def render(
    prompt: Prompt,
    tokenizer: Any,
    template: str | None,
    name: str = "the model",
    settings: Mapping[str, Any] = NO_CHAT_SETTINGS,
    system: str | None = None,
) -> str:
    """The text that the model is to continue. A ``None`` template is ``"chat"`` for messages, else the text as it is.

    Where the last turn is to be continued (:meth:`Prompt.continued`), its content ends the text, without what a template writes after it.

    Args:
        prompt: what to answer.
        tokenizer: of the model that reads it.
        template: see above.
        name: of the model, for errors.
        settings: of ``apply_chat_template``; those of the prompt go over them.
        system: instruction that this model reads before everything else: in a chat as its system turn (before the text of a system turn
            that is there), else before the prompt, with a blank line between unless it ends with white space itself.

    Raises:
        PromptError: empty prompt, messages for a tokenizer without chat template or whose template refuses them, no Unicode text.
    """
    text = prompt_text(prompt)
    if prompt.token_ids is not None and prompt.vocabulary is not None:
        if template is not None or system is not None:
            _check_not_rendered(prompt, "an instruction" if template is None else f"a template of its own ({template!r})", name)
        if template is None and isinstance(prompt.content, str):
            text = prompt.vocabulary.text_for(prompt.token_ids, tokenizer)
    if not text:
        if prompt.images:
            raise PromptError(f"the prompt has pictures and no text, and {name} reads text alone\n  put some text beside the pictures")
        raise PromptError("empty prompt\n  expected: some text, or messages with some content")
    if is_chat(prompt, template):
        return _checked(_chat_text(prompt, tokenizer, name, settings, system))
    if template is not None:
        text = _framed(prompt, text, template, name)
    return _checked(text if system is None else join_instruction(system, text))


def join_instruction(system: str, text: str) -> str:
    """An instruction and what follows it, a blank line between them unless the instruction ends with white space itself."""
    return system + ("" if not system or system[-1].isspace() else "\n\n") + text


def _checked(text: str) -> str:
    check_text(text, "the prompt")
    return text


def _chat_text(prompt: Prompt, tokenizer: Any, name: str, settings: Mapping[str, Any], system: str | None) -> str:
    """The messages in a chat template, behind the instruction ``system``."""
    messages = turns(prompt)
    if system is not None:
        own = messages[0]["role"] in SYSTEM_ROLES
        content = join_instruction(system, messages[0]["content"]) if own else system
        messages = [{"role": messages[0]["role"] if own else "system", "content": content}, *messages[1 if own else 0 :]]
    text = apply_chat_template(messages, tokenizer, name, **chat_arguments(prompt, settings))
    if system is not None and system.strip() not in text:
        raise PromptError(
            f"the chat template of {name} leaves the instruction {_shortened(system)} out: it has no system turn\n"
            '  give this model a template such as "{prompt}", before which the instruction is put'
        )
    return text


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}…")


def _framed(prompt: Prompt, text: str, template: str, name: str) -> str:
    """The prompt, whose plain text is ``text``, in a template that is no chat template."""
    content, last = prompt.content, prompt.continued
    if isinstance(content, str):
        return text if template in (RAW, LAST_TURN) else template.replace("{prompt}", text)
    if template == RAW:
        return "".join(m.text for m in content)
    before = content if last is None else content[:-1]
    if template == LAST_TURN:
        users = [m.content for m in before if m.role == "user"]
        if not users:
            roles = ", ".join(m.role for m in content)
            raise PromptError(
                f"{name} reads the last user turn, and there is none (roles: {roles})\n  give messages with a turn of the user"
            )
        return users[-1] + (last or "")
    return template.replace("{prompt}", prompt_text(Prompt(before))) + (last or "")


def is_chat(prompt: Prompt, template: str | None) -> bool:
    """Is ``prompt`` read in the tokenizer's chat template?"""
    return template == CHAT or (template is None and not isinstance(prompt.content, str))


def with_chat_settings(prompt: PromptLike, settings: Mapping[str, Any], template: str | None) -> Prompt:
    """The prompt with those of ``settings`` over its own that :class:`~ivg.settings.chat.ChatSettings` has and that are not None.

    Raises:
        ConfigError: they have no effect on this prompt for a base that reads in ``template``.
        PromptError: its own variables of a chat template have none.
    """
    wanted, given = Prompt.of(prompt), {k: v for k, v in settings.items() if k in CHAT_SETTINGS and v is not None}
    if (own := _template_settings(wanted.chat)) and not is_chat(wanted, template):
        raise PromptError(_UNREAD.format(name=own))
    if not given:
        return wanted
    chat = replace(wanted.chat, **given)
    if (own := _template_settings(chat)) and not is_chat(wanted, template):
        raise ConfigError(_UNREAD.format(name=own))
    if chat.continue_final_message and isinstance(wanted.content, str):
        raise ConfigError("continue_final_message, but the prompt is a text\n  give messages, or leave it out: a text is continued")
    return replace(wanted, chat=chat)


_UNREAD = "{name}, but the base reads this prompt in no chat template\n  give messages, or leave it out"


def _template_settings(chat: ChatSettings) -> str:
    """The first setting among ``chat`` that only a chat template reads; empty: none."""
    return "chat_template_kwargs" if chat.chat_template_kwargs else "tools" if chat.tools else ""


def turns(prompt: Prompt) -> list[dict[str, Any]]:
    """The messages of a prompt as chat templates read them, without pictures; a text is one user message."""
    content = prompt.content
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    return [turn_fields(m) for m in content]


def turn_fields(message: Message) -> dict[str, Any]:
    """One message as chat templates read it, without pictures: arguments of calls are objects."""
    calls = {"tool_calls": [call.parsed for call in message.tool_calls]} if message.tool_calls else {}
    return {"role": message.role, "content": message.content, **message.tool_fields, **calls}


def chat_arguments(prompt: Prompt, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``apply_chat_template`` besides the messages: those of the prompt over a model's own ``settings``."""
    continued, begins = prompt.continued is not None, prompt.chat.add_generation_prompt
    more = {"add_generation_prompt": not continued if begins is None else begins, "continue_final_message": continued}
    return {**settings, **template_arguments(prompt), **more}


def template_arguments(prompt: Prompt) -> dict[str, Any]:
    """Tools and variables of a chat template that a prompt brings."""
    return {**prompt.chat.chat_template_kwargs, **({"tools": list(prompt.chat.tools)} if prompt.chat.tools else {})}


def apply_chat_template(messages: Sequence[Mapping[str, Any]], tokenizer: Any, name: str, /, **settings: Any) -> str:
    """The text that the tokenizer's chat template renders ``messages`` to.

    Templates of multimodal models often read lists of content parts alone, and leave a plain text out silently, or fail. Where the rendered
    text has no content and does not depend on any, the messages are rendered with their contents as one text part each.
    ``settings`` may hold variables of a template of any name (hence ``/``).

    Raises:
        PromptError: there is no template, or it fails: it refuses these messages (a system turn, two user turns in a row), or needs what
            is not there. Names the model and the roles, and quotes the template's own message. Or it leaves tools out.
    """
    if not settings.get("chat_template") and not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"{name} has no chat template, in which it is to read this prompt\n"
            '  give this model a template such as "{prompt}" or raw; a text needs none'
        )
    messages = with_known_roles(messages, tokenizer, settings)

    def as_text(found: Messages, more: Mapping[str, Any]) -> str | None:
        return _rendered(found, tokenizer, {**settings, **more})[0]

    def as_parts(found: Messages, more: Mapping[str, Any]) -> str | None:
        return as_text([{**m, "content": [{"type": "text", "text": m["content"]}]} for m in found], more)

    for form in (as_text, as_parts):
        readable = with_readable_arguments(messages, form)
        text = form(readable, {})
        if text is None or (form is as_parts and _shows_parts(text)):
            continue
        if _has_content(text, messages) or (form is as_text and _depends_on_content(text, readable, as_text)):
            check_tools_shown(text, readable, settings.get("tools") or (), name, form)
            return text
    plain, problem = _rendered(messages, tokenizer, settings)
    if plain is not None:
        check_tools_shown(plain, messages, settings.get("tools") or (), name, as_text)
        return plain  # the template changes the contents itself
    message = " ".join(str(problem).split()) or type(problem).__name__
    roles = ", ".join(m["role"] for m in messages)
    raise PromptError(
        f"the chat template of {name} refuses these messages (roles: {roles}): {message}\n"
        f'  give other messages, or a template for this model such as "{{prompt}}"'
    )


def with_known_roles(messages: Messages, reader: Any, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``messages`` with turns of the role ``developer`` as system turns, unless the template knows that role.

    Args:
        messages: as chat templates read them.
        reader: a tokenizer or processor, with its chat template.
        settings: of ``apply_chat_template``.
    """
    source = settings.get("chat_template") or getattr(reader, "chat_template", None)
    known = "developer" in str(source)
    return [{**m, "role": "system"} if m["role"] == "developer" and not known else dict(m) for m in messages]


def _rendered(messages: Messages, tokenizer: Any, settings: Mapping[str, Any]) -> tuple[str | None, Exception | None]:
    """(the text, why there is none)."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)), None
    except Exception as e:  # a template is code of the checkpoint and may raise anything
        return None, e


def _has_content(text: str, messages: Messages) -> bool:
    """Does ``text`` hold the content of any message?"""
    contents = [m["content"].strip() for m in messages]
    return any(content and content in text for content in contents)


def _depends_on_content(text: str, messages: Messages, form: Render) -> bool:
    """Would ``messages`` with other letters, as many, be another ``text``? A template may go through a text as if it were parts."""
    other = [{**m, "content": "".join(c if c.isspace() else "y" if c == "x" else "x" for c in m["content"])} for m in messages]
    return form(other, {}) not in (None, text)


def _shows_parts(text: str) -> bool:
    """Did a template that expects plain text print the list of parts?"""
    return "'type': 'text'" in text or '"type": "text"' in text


def text_ids(text: str, tokenizer: Any, *, special: bool = True, **settings: Any) -> list[int]:
    """Token ids of a rendered text. A beginning-of-sequence token that a template wrote is not doubled.

    Args:
        text: with the special tokens that a template wrote.
        tokenizer: its own.
        special: the tokenizer adds its own special tokens.
        settings: other arguments of the tokenizer.
    """
    ids: list[int] = list(tokenizer(text, add_special_tokens=special, **settings).input_ids)
    return ids[1:] if special and _has_two_bos(ids, tokenizer) else ids


def without_bos(text: str, tokenizer: Any) -> str:
    """``text`` without the beginning-of-sequence token of its template, where the tokenizer (or a server) adds another."""
    word = getattr(tokenizer, "bos_token", None)
    if word and text.startswith(word) and _has_two_bos(tokenizer(text).input_ids, tokenizer):
        return text.removeprefix(word)
    return text


def _has_two_bos(ids: Sequence[int], tokenizer: Any) -> bool:
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(ids[:2]) == [bos, bos]


def encode(
    prompt: Prompt,
    tokenizer: Any,
    template: str | None,
    response: str | None = None,
    name: str = "the model",
    settings: Mapping[str, Any] = NO_CHAT_SETTINGS,
) -> list[int]:
    """Token ids of the rendered prompt, and of ``response`` behind it when given. Errors as :func:`render`."""
    text = render(prompt, tokenizer, template, name, settings)
    return encode_rendered(text, tokenizer, response or "", chat=is_chat(prompt, template))


def encode_rendered(text: str, tokenizer: Any, response: str = "", *, chat: bool) -> list[int]:
    """As :func:`encode`, of a prompt that is rendered already.

    A chat template writes its own special tokens; otherwise the tokenizer adds those it puts before a text.
    """
    return _continued(list(tokenizer(text + response, add_special_tokens=not chat).input_ids), text, tokenizer, chat)


def encode_each(texts: Sequence[tuple[str, str]], tokenizer: Any, *, chat: bool) -> list[list[int]]:
    """:func:`encode_rendered` of many (rendered prompt, response), in one call of the tokenizer."""
    if len(texts) <= 1:
        return [encode_rendered(text, tokenizer, response, chat=chat) for text, response in texts]
    encoded = tokenizer([text + response for text, response in texts], add_special_tokens=not chat).input_ids
    return [_continued(list(ids), text, tokenizer, chat) for (text, _), ids in zip(texts, encoded, strict=True)]


def _continued(ids: list[int], text: str, tokenizer: Any, chat: bool) -> list[int]:
    """``ids`` of a rendered prompt ``text`` and what follows it, without special tokens of the tokenizer's that a prompt does not have."""
    if not chat:
        if _has_two_bos(ids, tokenizer):
            ids = ids[1:]
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0"):
            ids = ids[:-1]  # some tokenizers end every text; a prompt continues
    if not ids:
        raise PromptError(f"the prompt {text!r} has no tokens\n  expected: some text")
    return ids


def _check_not_rendered(prompt: Prompt, reads: str, name: str) -> None:
    """Raise where tokens that a chat template made would be rendered again; ``reads``: what the model has of its own.

    Raises:
        PromptError: names a special token.
    """
    for token in (prompt.token_ids or ())[1:]:
        if token in prompt.vocabulary.special:
            raise PromptError(
                f"the prompt is tokens that were rendered already (they hold {prompt.vocabulary.pieces.get(token)!r}), "
                f"and {name} has {reads}\n  give messages or text instead of tokens, or {name} none: then it reads the same tokens"
            )
