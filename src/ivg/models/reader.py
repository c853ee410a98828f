"""A model that follows hypotheses: it reads, in its own tokens and behind its own prompt, only what is new of each.

Knows: templates, vocabularies, which row holds which hypothesis. Must not know what its outputs mean (``values``), nor
how beams are chosen. Nothing of a request is kept but its cache rows, which :meth:`Reader.release` frees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ivg.errors import PromptError
from ivg.models.cached import CachedModel, Row, common_length
from ivg.models.chat import check_template, encode
from ivg.models.vocab import Vocabulary
from ivg.types import Hypothesis, Prompt


@dataclass(slots=True)
class _Entry:
    """What is kept for one hypothesis: its row, its prompt's length, its response tokens so far scored and their scores."""

    row: Row
    border: int
    scored: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class Reader:
    """A cached model with its tokenizer and template.

    Args:
        model: the network and its cache.
        tokenizer: its own.
        template: ``"chat"``, a format string with ``{prompt}``, or None (see ``models.chat``).
        eos_ids: ids that end a response; default: the tokenizer's.
    """

    def __init__(self, model: CachedModel, tokenizer: Any, template: str | None = None, eos_ids: Sequence[int] | None = None) -> None:
        check_template(template)
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.name = model.name
        self.reads_given_ids = False
        self.vocabulary = Vocabulary(tokenizer, eos_ids, owner=model.name)
        self._entries: dict[int, _Entry] = {}
        self.prompt_ids = lru_cache(maxsize=4096)(self._prompt_ids)
        config = model.config
        self._rows_of_embedding = config.vocab_size

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if self.reads_given_ids and prompt.token_ids is not None:
            return prompt.token_ids
        return tuple(encode(prompt, self.tokenizer, self.template))

    def check_length(self, prompt: Prompt, new_tokens: int) -> int:
        """Length of the prompt in this model's tokens.

        Raises:
            PromptError: prompt and answer together outgrow the model's context.
        """
        length, limit = len(self.prompt_ids(prompt)), self.model.max_positions
        if limit is not None and length + new_tokens > limit:
            raise PromptError(
                f"prompt of {length} tokens + {new_tokens} new tokens > context of {self.name} ({limit})\n"
                f"  shorten the prompt, or ask for at most {max(0, limit - length)} new tokens"
            )
        return length

    def release(self, keys: Sequence[int]) -> None:
        """Free the rows of these hypotheses."""
        for key in keys:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.model.free(entry.row)

    def clear(self) -> None:
        """Forget every hypothesis, and whatever the cache holds (see ``CachedModel.clear``)."""
        self._entries.clear()
        self.model.clear()

    def follow(self, hypotheses: Sequence[Hypothesis]) -> None:
        """Give hypotheses the rows of their ancestors without reading anything: what is not read now can be read later.

        For whoever reads only some of them (gated guidance). Hypotheses without an ancestor here get nothing.
        """
        new = [h for h in hypotheses if h.key not in self._entries and (h.parent in self._entries or h.origin in self._entries)]
        self._claim(new, [([], 0)] * len(new))

    # What a hypothesis is, in this model's tokens

    def ids(self, h: Hypothesis) -> tuple[list[int], int]:
        """(all tokens of prompt and response, how many of them are prompt).

        With the base's vocabulary: its very tokens. With another: the text is tokenised anew, and a token that spans the
        border counts as response. An end-of-sequence token of the base is read as this model's own.
        """
        prompt = self.prompt_ids(h.prompt)
        if self.vocabulary.same_as(h.vocabulary):
            known = self._rows_of_embedding
            fallback = next(iter(self.vocabulary.eos_ids), 0)  # the base may have added tokens that this model lacks
            return [*prompt, *(t if t < known else fallback for t in h.token_ids)], len(prompt)
        ids = encode(h.prompt, self.tokenizer, self.template, h.text) if h.text else list(prompt)
        border = common_length(prompt, ids)
        if h.token_ids and h.token_ids[-1] in h.vocabulary.eos_ids and self.vocabulary.eos_ids:
            ids.append(min(self.vocabulary.eos_ids))
        return ids, border

    # Reading

    def outputs(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """What the network puts out behind the last token, float32 [hypotheses, vocabulary or 1]."""
        return self._outputs(hypotheses, [self.ids(h) for h in hypotheses])

    def last_token_outputs(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """The output one token earlier, at the entry of the last token: Q(s_t, y_t) = V(x, y_<=t); float32 [hypotheses]."""
        targets = [self.ids(h) for h in hypotheses]
        if any(len(ids) < 2 for ids, _ in targets):
            raise PromptError(f"{self.name}: a vocabulary head gives no value for a text of one token")
        out = self._outputs(hypotheses, [(ids[:-1], border) for ids, border in targets])
        last = torch.tensor([ids[-1] for ids, _ in targets], device=out.device)
        return out.gather(1, last[:, None])[:, 0]

    def token_logps(self, hypotheses: Sequence[Hypothesis]) -> list[list[float]]:
        """Log-probability of every response token, in nats; only those not yet known are computed."""
        targets = [self.ids(h) for h in hypotheses]
        entries = self._claim(hypotheses, [(ids[:-1], border) for ids, border in targets])
        rows, new, keep, order = [], [], [], []
        for i, (entry, (ids, border)) in enumerate(zip(entries, targets, strict=True)):
            self._cut(entry, ids, border)
            missing = len(ids) - border - len(entry.logps)
            if missing <= 0:
                continue
            del entry.row.ids[len(ids) - 1 - missing :]
            rows.append(entry.row)
            new.append(ids[len(entry.row.ids) : -1])
            keep.append(missing)
            order.append(i)
            hypotheses[i].meter.add(self.name, len(new[-1]))
        for k, output in self.model.feed(rows, new, keep):
            entry, (ids, border) = entries[order[k]], targets[order[k]]
            first = border + len(entry.logps)
            tokens = ids[first : first + len(output)]
            wanted = torch.tensor(tokens, device=output.device)
            output = output.float()
            logps = output.gather(1, wanted[:, None])[:, 0] - output.logsumexp(1)
            entry.logps += logps.tolist()
            entry.scored += tokens
        return [list(e.logps) for e in entries]

    def recent_outputs(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int]) -> list[Tensor]:
        """What the network puts out behind each of the last ``counts[i]`` tokens, in order; float32 [counts[i], vocabulary or 1].

        One pass where nothing of them has been read before. Prompt tokens count: behind the last of them stands the first token
        of the response.
        """
        targets = [self.ids(h) for h in hypotheses]
        entries = self._claim(hypotheses, targets)
        new = []
        for h, entry, (ids, border), count in zip(hypotheses, entries, targets, counts, strict=True):
            self._cut(entry, ids, border)
            del entry.row.ids[len(ids) - count :]
            new.append(ids[len(entry.row.ids) :])
            h.meter.add(self.name, len(new[-1]))
        out: list[list[Tensor]] = [[] for _ in hypotheses]
        for i, output in self.model.feed([e.row for e in entries], new, counts):
            out[i].append(output.float())
        return [torch.cat(pieces) for pieces in out]

    def rewind(self, hypotheses: Sequence[Hypothesis]) -> None:
        """The last tokens of these hypotheses were changed: forget what was read beyond their first ``len(token_ids) - 1``.

        Everywhere else a hypothesis only grows, and a child begins with its parent's tokens; readers rely on it.
        """
        for h in hypotheses:
            entry = self._entries.get(h.key)
            if entry is not None:
                keep = max(0, len(h.token_ids) - 1)
                del entry.row.ids[entry.border + keep :]
                del entry.scored[keep:], entry.logps[keep:]

    def _outputs(self, hypotheses: Sequence[Hypothesis], targets: list[tuple[list[int], int]]) -> Tensor:
        entries = self._claim(hypotheses, targets)
        new = []
        for h, entry, (ids, border) in zip(hypotheses, entries, targets, strict=True):
            self._cut(entry, ids, border)
            del entry.row.ids[len(ids) - 1 :]  # at least one token must be read to have an output
            new.append(ids[len(entry.row.ids) :])
            h.meter.add(self.name, len(new[-1]))
        return self.model.last([e.row for e in entries], new).float()

    def _cut(self, entry: _Entry, ids: list[int], border: int) -> None:
        """Forget what the row holds, and what was scored, beyond its common beginning with ``ids``."""
        del entry.row.ids[common_length(entry.row.ids, ids) :]
        same = common_length(entry.scored, ids[border:]) if border == entry.border else 0
        del entry.scored[same:], entry.logps[same:]
        entry.border = border

    def _claim(self, hypotheses: Sequence[Hypothesis], targets: list[tuple[list[int], int]]) -> list[_Entry]:
        """The entry of every hypothesis: its own, a fork of its parent's (the last heir takes that over), or a new one."""
        heirs: dict[int, list[Hypothesis]] = {}
        fresh: list[tuple[Hypothesis, list[int], int]] = []
        for h, (ids, border) in zip(hypotheses, targets, strict=True):
            if h.key in self._entries:
                continue
            known = next((a for a in (h.parent, h.origin) if a is not None and a in self._entries), None)
            if known is not None:
                heirs.setdefault(known, []).append(h)
            else:
                fresh.append((h, ids, border))
        self._open(fresh)
        for parent, children in heirs.items():
            for i, child in enumerate(children):
                entry = self._entries[parent]
                if i == len(children) - 1 and child.inherits:
                    self._entries[child.key] = self._entries.pop(parent)
                else:
                    self._entries[child.key] = _Entry(self.model.fork(entry.row), entry.border, list(entry.scored), list(entry.logps))
        return [self._entries[h.key] for h in hypotheses]

    def _open(self, fresh: list[tuple[Hypothesis, list[int], int]]) -> None:
        """Rows for hypotheses without ancestors here. A prompt that several share is read once, and copied."""
        sharing = Counter(tuple(ids[: border - 1]) for _, ids, border in fresh)
        for h, ids, border in fresh:
            row = self.model.open(ids)
            self._entries[h.key] = _Entry(row, border)
            if sharing[tuple(ids[: border - 1])] > 1 and len(row.ids) < border - 1:
                unread = ids[len(row.ids) : border - 1]
                list(self.model.feed([row], [unread], [0]))
                h.meter.add(self.name, len(unread))
