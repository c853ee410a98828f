"""Print answers, lines and tables to the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ivg.types import Completion


def say(out: Console, text: str) -> None:
    """Print text as it is, in lines of any length."""
    out.print(text, soft_wrap=True, markup=False)


def plain_table(*columns: str, **options: Any) -> Table:
    """A table without lines."""
    return Table(*columns, box=None, pad_edge=False, **options)


def show(prompt: str, completion: Completion, method: str, *, many: bool) -> None:
    """Print prompt and answer, and its cost on standard error; one plain line for each of many answers if the output is no terminal."""
    out = Console(soft_wrap=True, highlight=False)
    if many and not out.is_terminal:
        out.print(Text(f"{prompt}{completion.text}".replace("\n", " ")))
        return
    out.print(Text(prompt, style="dim") + Text(completion.text, style="bold"))
    for note in completion.notes:
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"note: {note}"))
    score = "" if completion.score is None else f" · score {completion.score:.3f}"
    tokens = ", ".join(f"{name} {count}" for name, count in completion.usage.forward_tokens.items())
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[dim]{method}{score} · {len(completion.token_ids)} tokens ({completion.finish_reason}) · read: {tokens} · "
        f"{completion.usage.seconds:.1f} s[/dim]"
    )
