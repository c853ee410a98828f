"""Print answers and lines to the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ivg.types.messages import Message, Prompt

if TYPE_CHECKING:
    from ivg.types import Completion


def say(out: Console, text: str) -> None:
    """Print text as it is, in lines of any length."""
    out.print(text, soft_wrap=True, markup=False)


def begun_text(prompt: Any, template: str | None) -> str:
    """What an answer continues: the prompt, where the base reads it as it is, or the begun turn of a chat; empty: the answer is a turn.

    Args:
        prompt: text, or messages.
        template: of the base.
    """
    if not isinstance(prompt, str):
        last = Message.of(prompt[-1])
        return last.content if last.role == "assistant" and not last.tool_calls else ""
    return prompt if template in (None, "raw", "last_turn") or template.endswith("{prompt}") else ""


def prompt_line(prompt: Any) -> str:
    """A prompt as text: itself, or a transcript of its messages."""
    found = Prompt.of(prompt)
    if isinstance(found.content, str):
        return found.content
    return "\n".join(f"{m.role}: {'[picture] ' * len(m.images)}{m.text}" for m in found.content)


def show(prompt: Any, template: str | None, completion: Completion, method: str, *, many: bool, quiet: bool = False) -> None:
    """Print the answer, and its cost on standard error.

    The text that it continues is before it. Of many answers each is one plain line if the output is no terminal; else a prompt that is
    not continued is above its answer.

    Args:
        prompt: text, or messages.
        template: of the base.
        completion: the answer.
        method: name of the method.
        many: it is one of several.
        quiet: print nothing on standard error.
    """
    out = Console(soft_wrap=True, highlight=False)
    begun = begun_text(prompt, template)
    if many and not out.is_terminal:
        out.print(Text(f"{begun}{completion.text}".replace("\n", " ")))
        return
    if many and not begun:
        out.print(Text(prompt_line(prompt), style="dim"))
    thinking = completion.text[: len(completion.text) - len(completion.answer)]
    out.print(Text(begun + thinking, style="dim") + Text(completion.answer, style="bold"))
    if quiet:
        return
    for note in completion.notes:
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"note: {note}"))
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(cost_line(completion, method), style="dim"))


def cost_line(completion: Completion, method: str) -> str:
    """One line: method, score, tokens written and read, seconds."""
    usage = completion.usage
    score = "" if completion.score is None else f" · score {completion.score:.3f}"
    drafted = f", {n} of a draft model" if (n := usage.drafted_tokens) else ""
    tokens = ", ".join(f"{name} {count}" for name, count in usage.forward_tokens.items())
    unit = "token" if usage.completion_tokens == 1 else "tokens"
    written = f"{usage.completion_tokens} {unit}{drafted} ({completion.finish_reason})"
    read = f" · read: {tokens}" if tokens else ""
    return f"{method}{score} · {written}{read} · {usage.seconds:.1f} s"
