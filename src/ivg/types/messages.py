"""What is to be answered: one parser of prompts for library, command line, server and training. Standard library only.

A prompt is a text or the messages of one conversation, calls of tools and their results among them. Contents may be lists of parts
(OpenAI's shape), whose texts are joined; pictures among them stay where they are, for a base that reads them.
What cannot be read is refused with its place (``messages[1].content[0]``); how a model renders a prompt is ``models.chat_template``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ivg.errors import PromptError, show_value
from ivg.settings.chat import ChatSettings
from ivg.types.images import IMAGE_PARTS, Image
from ivg.types.tool_calls import ToolCall

_SHAPES = 'text, or messages [{"role": "user", "content": "…"}, …]'
_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that hold text: of chat completions, and of OpenAI's Responses API."""
_UNREADABLE = ("function_call", "audio")
"""Fields of messages that are part of the conversation, and that nothing here reads; other unknown fields are ignored."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: who speaks.
        content: the text, without pictures.
        parts: texts and pictures in order, where there are pictures; else nothing.
        tool_calls: functions that the assistant calls in this turn.
        tool_call_id: of a turn of a tool: the call whose result it is.
        name: of a turn of a tool: the function, where it is said.
    """

    role: str
    content: str
    parts: tuple[str | Image, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def images(self) -> tuple[Image, ...]:
        """The pictures."""
        return tuple(part for part in self.parts if isinstance(part, Image))

    @property
    def plain(self) -> dict[str, Any]:
        """The turn as JSON has it."""
        parts = [part.plain if isinstance(part, Image) else {"type": "text", "text": part} for part in self.parts]
        return {"role": self.role, "content": parts or self.content, **self.tool_fields}

    @property
    def tool_fields(self) -> dict[str, Any]:
        """What a turn has besides role and content, in OpenAI's shape."""
        calls = [call.plain for call in self.tool_calls] or None
        found = {"tool_calls": calls, "tool_call_id": self.tool_call_id, "name": self.name}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def text(self) -> str:
        """The turn for a model without a chat template: its text, then each call as a line of JSON."""
        return "\n".join([*([self.content] if self.content or not self.tool_calls else []), *(call.text for call in self.tool_calls)])

    @classmethod
    def of(cls, value: Message | Mapping[str, Any], where: str = "message") -> Message:
        """Read one turn: ``role`` is any text but the empty one, ``content`` a text or a list of text parts.

        Args:
            value: OpenAI's shape. Fields that are not known are ignored.
            where: its place, for errors.

        Raises:
            PromptError: anything else; names the place.
        """
        if isinstance(value, Message):
            check_text(value.role, f"{where}.role")
            check_text(value.content, f"{where}.content")
            return value
        if not isinstance(value, Mapping):
            raise PromptError(f'{where} is {show_value(value)}\n  expected {{"role": …, "content": …}}')
        calls = value.get("tool_calls") or ()
        for name in ("role",) if calls else ("role", "content"):
            if name not in value:
                got = ", ".join(map(str, value)) or "nothing"
                raise PromptError(f'{where} has no {name}, got {got}\n  expected {{"role": …, "content": …}}')
        role = value["role"]
        if not isinstance(role, str) or not role.strip():
            raise PromptError(f"{where}.role is {show_value(role)}\n  expected text such as system, user or assistant")
        check_text(role, f"{where}.role")
        for name in _UNREADABLE:
            if value.get(name):
                advice = "give tool_calls instead" if name == "function_call" else "leave it out"
                raise PromptError(f"{where}.{name} is not supported\n  {advice}")
        content = value.get("content")
        text, parts = ("", ()) if calls and content in (None, "", []) else read_content(content, f"{where}.content")
        return cls(role, text, parts, _read_calls(calls, role, where), **_tool_result(value, role, where))


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to answer: plain text, or the turns of a chat. Each model renders it in its own way (``models.chat_template``)."""

    content: str | tuple[Message, ...]
    token_ids: tuple[int, ...] | None = None
    """The prompt in the base's tokens, where the caller has them. They are as the base shall read them: no template is applied.

    A guide or value without a template of its own reads the same: these very tokens where it shares the vocabulary, else their
    text. One with a template reads ``content`` in it, and refuses tokens that were rendered for a chat (see ``models.texts``).
    """
    vocabulary: Any = field(default=None, repr=False)
    """What ``token_ids`` mean (``models.vocabulary.Vocabulary``); engines fill it in."""
    contrast: str | None = None
    """An instruction that only the value ``contrast`` reads (:class:`ivg.values.contrast.PromptContrast`): to be followed more closely."""
    negative: str | None = None
    """As ``contrast``: to be moved away from."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """How messages are rendered; no effect on a text."""

    @property
    def plain(self) -> str | list[dict[str, Any]]:
        """The content as JSON has it; :meth:`of` reads it back."""
        return self.content if isinstance(self.content, str) else [m.plain for m in self.content]

    @property
    def images(self) -> tuple[Image, ...]:
        """The pictures of all messages, in order."""
        return () if isinstance(self.content, str) else tuple(image for m in self.content if m.parts for image in m.images)

    @property
    def without_data(self) -> Prompt:
        """An equal prompt without the content of its pictures: to remember it by."""
        if isinstance(self.content, str):
            return self
        turns = [replace(m, parts=tuple(replace(p, data=None) if isinstance(p, Image) else p for p in m.parts)) for m in self.content]
        return replace(self, content=tuple(turns))

    @property
    def continued(self) -> str | None:
        """The content of the last turn, where the response continues it (prefill); None: the response is a turn of its own."""
        if isinstance(self.content, str) or not self.content:
            return None
        last = self.content[-1]
        return last.content if self.chat.continues(last.role) and not last.tool_calls else None

    @classmethod
    def of(cls, value: PromptLike) -> Prompt:
        """Read a prompt: a text, the messages of one conversation, one message (a conversation of one turn), or a Prompt.

        Raises:
            PromptError: anything else, or a part of a message that is no text; names the place.
        """
        if isinstance(value, Prompt):
            return value
        if isinstance(value, str):
            check_text(value, "the prompt")
            return cls(value)
        if isinstance(value, Message):
            return cls((Message.of(value),))
        if isinstance(value, Mapping):
            return cls((_lone_message(value),))
        if isinstance(value, bytes | bytearray | memoryview) or not isinstance(value, Iterable):
            advice = "\n  decode it first: prompt.decode()" if isinstance(value, bytes | bytearray) else ""
            raise PromptError(f"unusable prompt {show_value(value)}\n  expected {_SHAPES}{advice}")
        turns = list(value)
        if not turns:
            raise PromptError(f"empty prompt: no messages\n  expected {_SHAPES}")
        if not any(isinstance(turn, Message | Mapping) for turn in turns):
            raise PromptError(f"unusable prompt {show_value(turns)}\n  expected {_SHAPES}")
        return cls(tuple(Message.of(turn, f"messages[{i}]") for i, turn in enumerate(turns)))


Conversation = Prompt | str | Sequence[Mapping[str, Any] | Message]
"""A Prompt, a text, or the messages of one conversation."""
PromptLike = Conversation | Message | Mapping[str, Any]
"""A :data:`Conversation`, or one message, which is a conversation of one turn."""


def read_prompts(value: PromptLike | Sequence[Conversation]) -> tuple[list[Prompt], bool]:
    """(prompts, is it one alone): a text, a message or a list of messages is one prompt, any other list is one prompt for each item.

    Raises:
        PromptError: a prompt that cannot be read, or messages and other prompts in one list.
    """
    if isinstance(value, Prompt | str | Message | Mapping | bytes | bytearray | memoryview) or not isinstance(value, Iterable):
        return [Prompt.of(value)], True  # type: ignore[arg-type]
    items: list[Any] = list(value)
    turns = sum(isinstance(item, Message | Mapping) for item in items)
    if turns and turns < len(items):
        raise PromptError(
            "messages and other prompts in one list\n  expected the messages of one conversation, or a list of prompts: "
            "put the messages of each conversation into a list of its own"
        )
    return ([Prompt.of(items)], True) if turns else ([Prompt.of(item) for item in items], False)


def _read_calls(calls: Any, role: str, where: str) -> tuple[ToolCall, ...]:
    if not calls:
        return ()
    if role != "assistant":
        raise PromptError(f"{where}.tool_calls, but the role is {role!r}\n  expected them in turns of the assistant")
    if isinstance(calls, str | bytes | Mapping) or not isinstance(calls, Iterable):
        raise PromptError(f"{where}.tool_calls is {show_value(calls)}\n  expected a list of calls")
    return tuple(ToolCall.of(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls))


def _tool_result(value: Mapping[str, Any], role: str, where: str) -> dict[str, str]:
    """``tool_call_id`` and ``name`` of a turn of a tool; ignored elsewhere."""
    out: dict[str, str] = {}
    for name in ("tool_call_id", "name") if role == "tool" else ():
        if (found := value.get(name)) is not None:
            check_text(found, f"{where}.{name}")
            out[name] = found
    return out


def content_text(content: Any, where: str = "content") -> str:
    """The text of a message's content: see :func:`read_content`."""
    return read_content(content, where)[0]


def read_content(content: Any, where: str = "content") -> tuple[str, tuple[str | Image, ...]]:
    """(the text of a message's content, its parts if there are pictures): the texts of all parts are joined without anything between.

    Raises:
        PromptError: null, or a part that is neither text nor picture; names the place.
    """
    if isinstance(content, str):
        check_text(content, where)
        return content, ()
    if content is None:
        raise PromptError(f"{where} is null\n  expected text")
    if isinstance(content, bytes | bytearray | memoryview | Mapping) or not isinstance(content, Iterable):
        raise PromptError(f'{where} is {show_value(content)}\n  expected text, or parts [{{"type": "text", "text": "…"}}, …]')
    given = list(content)
    if not given:
        raise PromptError(f"{where} is an empty list\n  expected text, or at least one part")
    parts = tuple(_part(part, f"{where}[{i}]") for i, part in enumerate(given))
    text = "".join(part for part in parts if isinstance(part, str))
    return text, parts if any(isinstance(part, Image) for part in parts) else ()


def _part(part: Any, where: str) -> str | Image:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise PromptError(f'{where} is {show_value(part)}\n  expected a part {{"type": "text", "text": "…"}}')
    if kind in IMAGE_PARTS:
        return Image.of(part, where)
    if kind not in _TEXT_PARTS:
        raise PromptError(f"{where}: parts of type {kind!r} are not supported\n  only text and pictures are read; leave the part out")
    text = part.get("text")
    if not isinstance(text, str):
        raise PromptError(f"{where}.text is {show_value(text)}\n  expected text")
    check_text(text, f"{where}.text")
    return text


def check_text(text: Any, where: str) -> None:
    """Raise unless ``text`` is text that can be written as UTF-8 (tokenizers read bytes).

    Raises:
        PromptError: no text, or half of a surrogate pair in it, which JSON and some file readers let through.
    """
    if not isinstance(text, str):
        raise PromptError(f"{where} is {show_value(text)}\n  expected text")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise PromptError(
            f"{where} is no Unicode text: character {e.start} is half of a surrogate pair (U+{ord(text[e.start]):04X})\n"
            "  replace it, or write the pair as one character"
        ) from None


def _lone_message(value: Mapping[str, Any]) -> Message:
    inner = [name for name in ("prompt", "messages", "text") if name in value]
    if inner and "role" not in value:
        raise PromptError(f"got a row {{{', '.join(repr(k) for k in value)}}} as a prompt\n  give what is in it: row[{inner[0]!r}]")
    return Message.of(value)
