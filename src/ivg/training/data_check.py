"""What is in a file of rows: form, lengths, ties, duplicates and rows that are too long. Loads no model; a tokenizer, if one is given."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ivg.jobs.formats import SourceRow
from ivg.models.chat_template import prompt_text, render
from ivg.training.data import RatedResponse, ReadOptions, SFTExample, read_any
from ivg.types import Preference, Prompt

Item = Preference | RatedResponse | SFTExample | Prompt


@dataclass(frozen=True)
class Lengths:
    """Lengths of some texts.

    Attributes:
        least, median, most: of all.
        p95: 95 of 100 are at most so long.
        empty: how many are empty.
    """

    least: int
    median: float
    p95: int
    most: int
    empty: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """From at least one length."""
        ordered = sorted(lengths)
        p95 = ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]
        return cls(ordered[0], statistics.median(ordered), p95, ordered[-1], sum(n == 0 for n in ordered))


@dataclass(frozen=True)
class DataReport:
    """What a file holds.

    Attributes:
        form: preferences, rated responses, SFT examples or prompts.
        items: pairs, responses, examples or prompts that can be used.
        unusable: (place, reason) of every row that cannot.
        chats: items whose prompt is a conversation.
        prompts: different prompts.
        lengths: of prompts and responses, in ``unit``.
        unit: characters, or tokens of the tokenizer.
        counts: what may be wrong, in words: how many items.
        shares: facts about the items, in words: a share in [0, 1].
    """

    form: str
    items: int
    unusable: tuple[tuple[str, str], ...]
    chats: int
    prompts: int
    lengths: dict[str, Lengths]
    unit: str
    counts: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def fine(self) -> bool:
        """Can every row be used, and is none too long?"""
        return not self.unusable and not any(self.counts.get(name) for name in (TOO_LONG, EMPTY))


TOO_LONG, EMPTY = "too long", "without a response"


def check_data(source: str | Path, options: ReadOptions | None = None, tokenizer: Any = None, max_length: int | None = None) -> DataReport:
    """Read a source and describe it.

    Args:
        source: file, folder, ``-``, or id on the hub.
        options: how it is read.
        tokenizer: lengths are in its tokens, prompts in its chat template; None: in characters.
        max_length: of prompt and response together; what is longer is counted.

    Raises:
        ConfigError: unreadable as a whole, or columns of no known form.
    """
    bad: list[SourceRow] = []
    form, items = read_any(source, replace(options or ReadOptions(), on_bad=bad.append))
    prompts = [prompt for item in items if (prompt := _prompt(item)) is not None]
    measure = _measure(tokenizer)
    lengths: dict[str, list[int]] = defaultdict(list)
    whole: list[int] = []
    for item in items:
        prompt = _prompt(item)
        before = 0 if prompt is None else measure(prompt)
        if prompt is not None:
            lengths["prompt"].append(before)
        texts = _responses(item)
        for name, text in texts.items():
            lengths[name].append(measure(text))
        whole.append(before + max((lengths[name][-1] for name in texts), default=0))
    counts = {"the same as an earlier one": _repeated(map(_key, items)), **_by_form(form, items)}
    if form != "prompts":
        counts[EMPTY] = sum(any(not text.strip() for text in _responses(item).values()) for item in items)
    if max_length is not None:
        counts[TOO_LONG] = sum(length > max_length for length in whole)
    return DataReport(
        form,
        len(items),
        tuple((row.place, row.error or "") for row in bad),
        sum(not isinstance(p.content, str) for p in prompts),
        len(set(prompts)),
        {name: Lengths.of(found) for name, found in lengths.items() if found},
        "characters" if tokenizer is None else "tokens",
        counts,
        _shares(items),
    )


def _prompt(item: Item) -> Prompt | None:
    return item if isinstance(item, Prompt) else item.prompt


def _responses(item: Item) -> dict[str, str]:
    """The responses of an item, by what they are."""
    if isinstance(item, Preference):
        return {"chosen": item.chosen, "rejected": item.rejected}
    return {} if isinstance(item, Prompt) else {"response": item.response}


def _key(item: Item) -> Any:
    score = item.score if isinstance(item, RatedResponse) else None
    return _prompt(item), *_responses(item).values(), score


def _repeated(keys: Iterable[Any]) -> int:
    """How many are equal to an earlier one."""
    return sum(count - 1 for count in Counter(keys).values())


def _by_form(form: str, items: Sequence[Item]) -> dict[str, int]:
    """What may be wrong with pairs and scores."""
    pairs = [item for item in items if isinstance(item, Preference)]
    rated = [item for item in items if isinstance(item, RatedResponse)]
    if pairs:
        seen = {(p.prompt, p.chosen, p.rejected) for p in pairs}
        return {"contradicted by a pair the other way round": sum((p.prompt, p.rejected, p.chosen) in seen for p in pairs)}
    if not rated:
        return {}
    by_prompt: dict[Prompt, list[RatedResponse]] = defaultdict(list)
    for row in rated:
        by_prompt[row.prompt].append(row)
    groups = list(by_prompt.values())
    return {
        "alone with its prompt, so without a pair": sum(len(g) == 1 for g in groups),
        "of a prompt whose responses all have one score": sum(len(g) for g in groups if len(g) > 1 and len({r.score for r in g}) == 1),
        "the same response to one prompt with another score": sum(
            len({r.score for r in g if r.response == text}) - 1 for g in groups for text in {r.response for r in g}
        ),
    }


def _shares(items: Sequence[Item]) -> dict[str, float]:
    """Ties and lengths of pairs."""
    pairs = [item for item in items if isinstance(item, Preference)]
    if pairs:
        return {"pairs whose chosen response is longer": sum(len(p.chosen) > len(p.rejected) for p in pairs) / len(pairs)}
    by_prompt: dict[Prompt, list[float]] = defaultdict(list)
    for row in items:
        if isinstance(row, RatedResponse):
            by_prompt[row.prompt].append(row.score)
    tied, total = 0, 0
    for scores in by_prompt.values():
        n = len(scores)
        total += n * (n - 1) // 2
        tied += sum(count * (count - 1) // 2 for count in Counter(scores).values())
    return {"ties among pairs of responses to one prompt": tied / total} if total else {}


def _measure(tokenizer: Any) -> Callable[[Prompt | str], int]:
    """The length of a prompt or a response."""
    if tokenizer is None:
        return lambda text: len(text if isinstance(text, str) else prompt_text(text))
    chats = bool(getattr(tokenizer, "chat_template", None))

    def tokens(text: Prompt | str) -> int:
        if isinstance(text, str):
            return len(tokenizer(text, add_special_tokens=False).input_ids)
        rendered = render(text, tokenizer, None) if chats else prompt_text(text)
        return len(tokenizer(rendered, add_special_tokens=not chats or isinstance(text.content, str)).input_ids)

    return tokens
