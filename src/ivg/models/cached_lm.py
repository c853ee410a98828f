"""A model that follows hypotheses: it reads, in its own tokens and behind its own prompt, only what is new of each.

Knows: which row holds which hypothesis. Must not know what its outputs mean (``values``), nor
how beams are chosen. Nothing of a request is kept but its cache rows, which :meth:`CachedLM.release` frees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ivg.models.cache_manager import Row, common_length
from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.runner import ModelRunner
from ivg.types import Hypothesis


@dataclass(slots=True)
class _Entry:
    """What is kept for one hypothesis: its row, its prompt's length, its response tokens so far scored and their scores.

    ``follows``: the base's very tokens are read, so the row holds a beginning of them, and a hypothesis that grows only adds.
    ``counted``: leading tokens of the row that the request's meter has; what the row holds beyond came from the cache.
    """

    row: Row
    border: int
    follows: bool
    counted: int = 0
    scored: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class CachedLM(PromptEncoder):
    """A cached model with its tokenizer and template.

    Args:
        model: the network and its cache.
        tokenizer: its own.
        template: ``"chat"``, a format string with ``{prompt}``, or None (see ``models.chat``).
        eos_ids: ids that end a response; default: the tokenizer's.
    """

    def __init__(self, model: ModelRunner, tokenizer: Any, template: str | None = None, eos_ids: Sequence[int] | None = None) -> None:
        super().__init__(
            model.name,
            tokenizer,
            template,
            eos_ids,
            vocab_size=model.config.vocab_size,
            max_positions=model.max_positions,
            limit_reason=model.reading.limit_reason,
        )
        self.model = model
        self._entries: dict[int, _Entry] = {}

    def release(self, keys: Sequence[int]) -> None:
        """Free the rows of these hypotheses."""
        for key in keys:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.model.free(entry.row)

    def clear(self) -> None:
        """Forget every hypothesis, and whatever the cache holds (see ``ModelRunner.clear``)."""
        self._entries.clear()
        self.model.clear()

    def inherit_cache(self, hypotheses: Sequence[Hypothesis]) -> None:
        """Give hypotheses the rows of their ancestors without reading anything: what is not read now can be read later.

        For whoever reads only some of them (gated guidance). Hypotheses without an ancestor here get nothing.
        """
        new = [h for h in hypotheses if h.key not in self._entries and (h.parent in self._entries or h.ancestor_key in self._entries)]
        self._claim(new)

    # Reading

    def outputs(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """What the network puts out behind the last token, float32 [hypotheses, vocabulary or 1]."""
        return self.logits(hypotheses).float()

    def logits(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """As :meth:`outputs`, in the network's own type."""
        entries, new = self._to_read(hypotheses, [1] * len(hypotheses))
        return self.model.last([e.row for e in entries], new)

    def last_token_outputs(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """The output one token earlier, at the entry of the last token: Q(s_t, y_t) = V(x, y_<=t); float32 [hypotheses]."""
        lasts = [self.last_id(h) for h in hypotheses]
        entries, new = self._to_read(hypotheses, [1] * len(hypotheses), drop=1)
        out = self.model.last([e.row for e in entries], new)
        return out.gather(1, torch.tensor(lasts, device=out.device)[:, None])[:, 0].float()

    def recent_outputs(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int]) -> list[Tensor]:
        """What the network puts out behind each of the last ``counts[i]`` tokens, in order; float32 [counts[i], vocabulary or 1].

        One pass where nothing of them has been read before. Prompt tokens count: behind the last of them stands the first token
        of the response.
        """
        entries, new = self._to_read(hypotheses, counts)
        out: list[list[Tensor]] = [[] for _ in hypotheses]
        for i, output in self.model.feed([e.row for e in entries], new, counts):
            out[i].append(output.float())
        return [torch.cat(pieces) for pieces in out]

    def token_logps(self, hypotheses: Sequence[Hypothesis]) -> list[list[float]]:
        """Log-probability of every response token, in nats; only those not yet known are computed."""
        entries = self._claim(hypotheses, drop=1)
        rows, new, keep, order, wanted = [], [], [], [], []
        for i, (h, entry) in enumerate(zip(hypotheses, entries, strict=True)):
            tokens = self._unscored(h, entry)
            if not tokens:
                continue
            rows.append(entry.row)
            new.append(self._unread(h, entry, 1, len(tokens)))
            keep.append(len(tokens))
            order.append(i)
            wanted.append(tokens)
            self._count(h, entry, len(new[-1]))
        for k, output in self.model.feed(rows, new, keep):
            entry, tokens = entries[order[k]], wanted[k][: len(output)]
            del wanted[k][: len(output)]
            output = output.float()
            logps = output.gather(1, torch.tensor(tokens, device=output.device)[:, None])[:, 0] - output.logsumexp(1)
            entry.logps += logps.tolist()
            entry.scored += tokens
        return [list(e.logps) for e in entries]

    def truncate(self, hypotheses: Sequence[Hypothesis]) -> None:
        """The last tokens of these hypotheses were changed: forget what was read beyond their first ``len(token_ids) - 1``.

        Everywhere else a hypothesis only grows, and a child begins with its parent's tokens; readers rely on it.
        """
        for h in hypotheses:
            entry = self._entries.get(h.key)
            if entry is not None:
                keep = max(0, len(h.token_ids) - 1)
                del entry.row.ids[entry.border + keep :]
                del entry.scored[keep:], entry.logps[keep:]

    # What is still to be read

    def _to_read(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int], drop: int = 0) -> tuple[list[_Entry], list[list[int]]]:
        """Entries, and the tokens to read so that outputs come behind each of the last ``counts[i]``, ``drop`` left out at the end."""
        entries = self._claim(hypotheses, drop)
        new = []
        for h, entry, count in zip(hypotheses, entries, counts, strict=True):
            new.append(self._unread(h, entry, drop, count))
            self._count(h, entry, len(new[-1]))
        return entries, new

    def _count(self, h: Hypothesis, entry: _Entry, new: int) -> None:
        """Tell the request's meter of ``new`` tokens that its row is about to read, and of those that the cache spared it before."""
        held = len(entry.row.ids)
        cached = max(0, held - entry.counted)
        h.token_counter.add(self.name, cached + new, cached)
        entry.counted = held + new

    def _unread(self, h: Hypothesis, entry: _Entry, drop: int, count: int) -> list[int]:
        """Tokens that the row lacks, at least the last ``count`` but for ``drop``; the row is cut to what lies before them."""
        held = entry.row.sound if entry.row.broken else len(entry.row.ids)
        if entry.follows:  # then the row holds a beginning of this hypothesis: its cost does not grow with the text
            keep = min(held, entry.border + len(h.token_ids) - drop - count)
            if keep >= entry.border:
                del entry.row.ids[keep:]
                return self.own_ids(h.token_ids[keep - entry.border : len(h.token_ids) - drop])
        ids, border = self.ids(h)
        del entry.row.ids[max(0, min(held, common_length(entry.row.ids, ids), len(ids) - drop - count)) :]
        entry.border = border
        return ids[len(entry.row.ids) : len(ids) - drop]

    def _unscored(self, h: Hypothesis, entry: _Entry) -> list[int]:
        """Response tokens whose log-probability is not known."""
        if entry.follows:
            return self.own_ids(h.token_ids[len(entry.logps) :])
        ids, border = self.ids(h)
        same = common_length(entry.scored, ids[border:]) if border == entry.border else 0
        del entry.scored[same:], entry.logps[same:]
        entry.border = border
        return ids[border + same :]

    def _claim(self, hypotheses: Sequence[Hypothesis], drop: int = 0) -> list[_Entry]:
        """The entry of every hypothesis: its own, a fork of its parent's (the last heir takes that over), or a new one."""
        heirs: dict[int, list[Hypothesis]] = {}
        fresh: list[Hypothesis] = []
        for h in hypotheses:
            if h.key in self._entries:
                continue
            known = next((a for a in (h.parent, h.ancestor_key) if a is not None and a in self._entries), None)
            if known is not None:
                heirs.setdefault(known, []).append(h)
            else:
                fresh.append(h)
        if fresh:
            self._open(fresh, drop)
        for parent, children in heirs.items():
            for i, child in enumerate(children):
                entry = self._entries[parent]
                if i == len(children) - 1 and child.inherits:
                    self._entries[child.key] = self._entries.pop(parent)
                else:
                    copy = _Entry(
                        self.model.fork(entry.row), entry.border, entry.follows, entry.counted, list(entry.scored), list(entry.logps)
                    )
                    self._entries[child.key] = copy
        return [self._entries[h.key] for h in hypotheses]

    def _open(self, fresh: Sequence[Hypothesis], drop: int) -> None:
        """Rows for hypotheses without ancestors here. A prompt that several share is read once.

        Those of one request become one family; those of others copy the prompt, because their texts go their own ways.
        """
        targets = [self.ids(h) for h in fresh]
        prompts = [tuple(ids[: border - 1]) for ids, border in targets]
        sharing = Counter(prompts)
        sisters: dict[tuple[int, tuple[int, ...]], Row] = {}
        for h, (ids, border), prompt in zip(fresh, targets, prompts, strict=True):
            first = sisters.get((id(h.token_counter), prompt)) if prompt else None
            if first is None:
                row = self.model.open(ids[: len(ids) - drop])
            else:
                row = self.model.fork(first)
                del row.ids[len(prompt) :]
            counted = 0 if first is None else len(prompt)  # a request counts what its hypotheses share once
            if first is None and prompt and sharing[prompt] > 1:
                sisters[id(h.token_counter), prompt] = row
                cached = min(len(row.ids), len(prompt))
                h.token_counter.add(self.name, len(prompt), cached)
                counted = len(prompt)
                if unread := list(prompt[cached:]):
                    list(self.model.feed([row], [unread], [0]))
            self._entries[h.key] = _Entry(row, border, self.vocabulary.same_as(h.vocabulary), counted)
