"""What is in a file of rows: form, lengths, ties, duplicates and rows that are too long. Loads no model; a tokenizer, if one is given."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ivg.jobs.formats import SourceRow
from ivg.models.chat_template import encode, prompt_text
from ivg.models.vocabulary import Vocabulary
from ivg.training.data import RatedResponse, ReadOptions, SFTExample, read_any
from ivg.types import Preference, Prompt

Item = Preference | RatedResponse | SFTExample | Prompt


@dataclass(frozen=True)
class Lengths:
    """Lengths of some texts.

    Attributes:
        min, median, max: of all.
        p95: 95 of 100 are at most so long.
        empty: how many are empty.
    """

    min: int
    median: float
    p95: int
    max: int
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
        max_length: of prompt and response together, with the end-of-sequence token that training appends; what is longer is counted.

    Raises:
        ConfigError: unreadable as a whole, or columns of no known form.
    """
    bad: list[SourceRow] = []
    form, items = read_any(source, replace(options or ReadOptions(), on_bad=bad.append))
    prompts = [prompt for item in items if (prompt := _prompt(item)) is not None]
    vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
    lengths: dict[str, list[int]] = defaultdict(list)
    whole: list[int] = []
    for item in items:
        before, responses, total = _measure(item, vocabulary)
        for name, length in (({} if _prompt(item) is None else {"prompt": before}) | responses).items():
            lengths[name].append(length)
        whole.append(total)
    counts = {"the same as an earlier one": _repeated(map(_key, items)), **_by_form(items)}
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


def _by_form(items: Sequence[Item]) -> dict[str, int]:
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


def _measure(item: Item, vocabulary: Vocabulary | None) -> tuple[int, dict[str, int], int]:
    """Lengths of the prompt, of each response, and of the longest row that training makes of the item."""
    prompt, responses = _prompt(item), _responses(item)
    if vocabulary is None:
        before = 0 if prompt is None else len(prompt_text(prompt))
        lengths = {name: len(text) for name, text in responses.items()}
        return before, lengths, before + max(lengths.values(), default=0)
    ids = _prompt_ids(prompt, vocabulary.tokenizer)
    lengths = {name: len(vocabulary.response_ids(ids, text)) for name, text in responses.items()}
    ended = _ended(item) if vocabulary.tokenizer.eos_token_id is not None else frozenset()
    return len(ids), lengths, len(ids) + max((length + (name in ended) for name, length in lengths.items()), default=0)


def _prompt_ids(prompt: Prompt | None, tokenizer: Any) -> list[int]:
    """The prompt in the tokenizer's chat template; a conversation as plain text where it has none."""
    if prompt is None:
        return list(tokenizer("").input_ids)
    if not getattr(tokenizer, "chat_template", None):
        prompt = Prompt(prompt_text(prompt))
    return encode(prompt, tokenizer, None)


def _ended(item: Item) -> frozenset[str]:
    """The responses that an end-of-sequence token follows in training."""
    if isinstance(item, Preference):
        return frozenset(name for name, ends in (("chosen", item.chosen_ends), ("rejected", item.rejected_ends)) if ends)
    return frozenset({"response"} if isinstance(item, SFTExample | RatedResponse) and item.ends else ())
