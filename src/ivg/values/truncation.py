"""Prompts that are too long for a classifier lose their beginning; the response stays whole.

The text is rendered again from the shorter prompt, so templates and special tokens are complete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ivg.types import Message, Prompt


def truncate_prompt(prompt: Prompt, fits: Callable[[Prompt], bool]) -> Prompt | None:
    """``prompt`` without as few characters at its beginning as possible; None: not even its last character fits.

    Args:
        prompt: the whole prompt.
        fits: is the text of a shorter prompt short enough?
    """
    if fits(prompt):
        return prompt
    text = prompt.content if isinstance(prompt.content, str) else "".join(m.content for m in prompt.content)
    low, high = 0, len(text.rstrip()) - 1  # a cut of ``low`` characters does not fit, one of ``high`` does
    if high < 1 or not fits(drop_beginning(prompt, high)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if fits(drop_beginning(prompt, middle)):
            high = middle
        else:
            low = middle
    return drop_beginning(prompt, high)


def drop_beginning(prompt: Prompt, count: int) -> Prompt:
    """``prompt`` without its first ``count`` characters; turns without text are left out.

    If a turn of the assistant or of a tool would come first, an empty user turn is put before it, as most chat templates require.
    """
    if isinstance(prompt.content, str):
        return Prompt(prompt.content[count:])
    turns: list[Message] = []
    for message in prompt.content:
        if turns or count < len(message.content):
            turns.append(replace(message, content=message.content[count:], parts=()))
            count = 0
        else:
            count -= len(message.content)
    if turns and turns[0].role in ("assistant", "tool"):
        turns.insert(0, Message("user", ""))
    return replace(prompt, content=tuple(turns))
