"""Texts that are too long for a classifier: the response stays whole, the prompt loses its beginning.

Everything is rendered anew from the shorter prompt, so templates and special tokens are those of a short text. Knows prompts; must not
know tokenizers or models.
"""

from __future__ import annotations

from collections.abc import Callable

from ivg.types import Message, Prompt


def fit(prompt: Prompt, fits: Callable[[Prompt], bool]) -> Prompt | None:
    """``prompt`` without as many characters of its beginning as must go; None: not even its last one leaves room enough.

    Args:
        prompt: to be cut.
        fits: is what is made of a prompt short enough?
    """
    if fits(prompt):
        return prompt
    text = prompt.content if isinstance(prompt.content, str) else "".join(m.content for m in prompt.content)
    low, high = 0, len(text.rstrip()) - 1  # a cut of ``low`` characters does not fit, one of ``high`` does
    if high < 1 or not fits(without_beginning(prompt, high)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if fits(without_beginning(prompt, middle)):
            high = middle
        else:
            low = middle
    return without_beginning(prompt, high)


def without_beginning(prompt: Prompt, count: int) -> Prompt:
    """``prompt`` without its first ``count`` characters. Turns that lose all of theirs are left out.

    Where an assistant's turn would then be the first, an empty one of the user stands before it: most chat templates demand that.
    """
    if isinstance(prompt.content, str):
        return Prompt(prompt.content[count:])
    turns: list[Message] = []
    for message in prompt.content:
        if turns or count < len(message.content):
            turns.append(Message(message.role, message.content[count:]))
            count = 0
        else:
            count -= len(message.content)
    if turns and turns[0].role == "assistant":
        turns.insert(0, Message("user", ""))
    return Prompt(tuple(turns))
