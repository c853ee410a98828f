"""Maps hypotheses to rows of a network's cache: what was read of each, and what is still to be read.

Several readers may use one network, each behind its own prompt: one set of weights, one cache, and for each of them rows of its own. Must
not depend on what outputs mean (``values``), nor how beams are chosen. Nothing of a request is kept but its cache rows, which
:meth:`HypothesisRows.release` frees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from torch import nn
from typing_extensions import override

from ivg.errors import ConfigError
from ivg.models.cache import CacheRow, common_length
from ivg.models.image_prompts import ImageInputs
from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.prompt_template import PromptTemplate
from ivg.models.runner import ModelRunner
from ivg.models.support import body_of
from ivg.types import Beam, Hypothesis, Prompt


@dataclass(slots=True)
class RowEntry:
    """What is kept for one hypothesis.

    Attributes:
        row: its cache row.
        prompt_length: leading tokens of the row that are prompt.
        same_tokens: the base's very tokens are read, so the row holds a beginning of them, and a hypothesis that grows only adds.
        counted: leading tokens of the row that the request's token counter has; what the row holds beyond came from the cache.
        scored: response tokens whose log-probability is known.
        logps: their log-probabilities.
    """

    row: CacheRow
    prompt_length: int
    same_tokens: bool
    counted: int = 0
    scored: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    def fork(self, row: CacheRow) -> RowEntry:
        """The same for another hypothesis, whose row is ``row``."""
        return replace(self, row=row, scored=list(self.scored), logps=list(self.logps))


class HypothesisRows(PromptEncoder):
    """A model with its cache, tokenizer and template, and the rows of the hypotheses that it reads.

    Args:
        model: the network and its cache.
        tokenizer: its own.
        template: see :class:`~ivg.models.prompt_template.PromptTemplate`.
        eos_ids: ids that end a response; default: the tokenizer's.
        name: in usage and errors; default: the network's.
        system: an instruction that is read before every prompt (see ``models.chat_template.render``).
        instruction: read the request's own behind it, where it has one: which of ``Prompt.contrast`` and ``Prompt.negative``.
        weights: name of the adapter that it reads with, or of its network, where that shares passes with another; None: the network's own.
        adapter_folder: where its adapter was loaded from.
    """

    weights: str | None = None
    adapter_folder: Path | None = None

    def __init__(
        self,
        model: ModelRunner,
        tokenizer: Any,
        template: str | PromptTemplate | None = None,
        eos_ids: Sequence[int] | None = None,
        *,
        name: str | None = None,
        system: str | None = None,
        instruction: Literal["contrast", "negative"] | None = None,
    ) -> None:
        super().__init__(
            name or model.name,
            tokenizer,
            template,
            eos_ids,
            vocab_size=model.config.vocab_size,
            max_positions=model.max_positions,
            limit_reason=model.support.limit_reason,
            system=system,
            instruction=instruction,
        )
        self.model = model
        self._known: dict[int, RowEntry] = {}
        self._resets = model.resets

    def __reduce__(self) -> NoReturn:
        """Refuse pickle and deepcopy, also of a value that reads with this model: its cache stays in this process.

        Raises:
            ConfigError: always; says what to send instead.
        """
        raise ConfigError(
            f"{self.title} cannot be pickled or copied: it has a cache in this process\n  send its path, and load it in the other process"
        )

    @property
    def _entries(self) -> dict[int, RowEntry]:
        """What is kept, by hypothesis; nothing, where a reader that shares the network has emptied the cache."""
        if self._resets != self.model.resets:
            self._known, self._resets = {}, self.model.resets
        return self._known

    def read_with(self, model: ModelRunner, weights: str | None) -> None:
        """Read in passes of ``model`` from now on, with ``weights`` (see ``models.shared_passes``); what was read is forgotten."""
        self.model, self.weights = model, weights
        self._known, self._resets = {}, model.resets

    def entry_of(self, h: Hypothesis) -> RowEntry | None:
        """What is kept for the hypothesis of that key, which may have been another text then; None: nothing."""
        return self._entries.get(h.key)

    @property
    def network(self) -> nn.Module:
        """The network that it reads with (that of ``model`` may have other weights, where networks share passes, or another head)."""
        return self.model.network_of(self.weights)

    @property
    @override
    def title(self) -> str:
        place = getattr(cast("Any", self.network).config, "name_or_path", "")
        return f"{self.name} ({type(body_of(self.network)).__name__}{f', {place}' if place else ''})"

    @override
    def root(self, prompt: Prompt, new_tokens: int) -> Beam:
        beam = super().root(prompt, new_tokens)
        if (images := self.image_inputs(beam.prompt)) is not None:
            self.model.try_images(images)
        return beam

    def release(self, keys: Sequence[int]) -> None:
        """Free the rows of these hypotheses."""
        for key in keys:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.model.free(entry.row)

    def reset_cache(self) -> None:
        """Forget every hypothesis and everything in the cache (see ``ModelRunner.reset_cache``), that of readers that share it included."""
        self.model.reset_cache()

    def open_row(self, ids: Sequence[int], mark: int = 0, images: ImageInputs | None = None) -> CacheRow:
        """A row of the network's cache that is read as this model reads, with its weights (see ``ModelRunner.open``)."""
        shares_passes = self.model.row_weights is not None  # else its adapter is switched on for all rows of this cache
        return self.model.open(ids, mark, images, self.weights if shares_passes else None)

    def inherit_cache(self, hypotheses: Sequence[Hypothesis]) -> None:
        """Give hypotheses the rows of their ancestors without reading anything: what is not read now can be read later.

        For callers that read only some of them (guidance above an entropy threshold). Hypotheses without an ancestor here get nothing.
        """
        self._get_entries([h for h in hypotheses if h.key not in self._entries and self._known_ancestor(h) is not None])

    def truncate(self, hypotheses: Sequence[Hypothesis]) -> None:
        """The last tokens of these hypotheses were changed: forget what was read beyond their first ``len(token_ids) - 1``.

        Everywhere else a hypothesis only grows, and a child begins with its parent's tokens; readers rely on it.
        """
        for h in hypotheses:
            entry = self._entries.get(h.key)
            if entry is not None:
                keep = max(0, len(h.token_ids) - 1)
                self.model.truncate(entry.row, entry.prompt_length + keep)
                del entry.scored[keep:], entry.logps[keep:]

    def keep_common(self, hypotheses: Sequence[Hypothesis]) -> None:
        """These hypotheses, in this model's vocabulary, may have other tokens than before: forget all behind the first that differs."""
        for h in hypotheses:
            entry = self._entries.get(h.key)
            if entry is not None:
                same = common_length(entry.row.ids[entry.prompt_length :], self.own_ids(h.token_ids))
                self.model.truncate(entry.row, entry.prompt_length + same)
                del entry.scored[same:], entry.logps[same:]

    # What is still to be read

    def _to_read(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int], drop: int = 0) -> tuple[list[RowEntry], list[list[int]]]:
        """Entries, and the tokens to read so that outputs come behind each of the last ``counts[i]``, ``drop`` left out at the end."""
        entries = self._get_entries(hypotheses, drop)
        new = []
        for h, entry, count in zip(hypotheses, entries, counts, strict=True):
            new.append(self._unread(h, entry, drop, count))
            self._count(h, entry, len(new[-1]))
        return entries, new

    def _count(self, h: Hypothesis, entry: RowEntry, new: int) -> None:
        """Count ``new`` tokens that the row is about to read, and those that the cache held before."""
        held = len(entry.row.ids)
        cached = max(0, held - entry.counted)
        h.token_counter.add(self.name, cached + new, cached)
        entry.counted = held + new

    def _unread(self, h: Hypothesis, entry: RowEntry, drop: int, count: int) -> list[int]:
        """Tokens that the row lacks, at least the last ``count`` but for ``drop``; the row is cut to what lies before them."""
        row = entry.row
        held = row.finite_length if row.nonfinite else len(row.ids)
        if entry.same_tokens:  # then the row holds a beginning of this hypothesis: its cost does not grow with the text
            end = max(0, min(held, entry.prompt_length + len(h.token_ids) - drop - count))
            if end < len(row.ids):
                self.model.truncate(row, end)
            if len(row.ids) >= entry.prompt_length:
                return self.own_ids(h.token_ids[len(row.ids) - entry.prompt_length : len(h.token_ids) - drop])
        ids, entry.prompt_length = self.ids(h)
        self.model.truncate(row, max(0, min(held, common_length(row.ids, ids), len(ids) - drop - count)))
        return ids[len(row.ids) : len(ids) - drop]

    def _known_ancestor(self, h: Hypothesis) -> int | None:
        return next((a for a in (h.parent, h.ancestor_key) if a is not None and a in self._entries), None)

    def _get_entries(self, hypotheses: Sequence[Hypothesis], drop: int = 0) -> list[RowEntry]:
        """The entry of every hypothesis: its own, a fork of its ancestor's (the last child takes that over), or a new one."""
        children: dict[int, list[Hypothesis]] = {}
        roots: list[Hypothesis] = []
        known = self._entries
        for h in hypotheses:
            if h.key in known:
                continue
            ancestor = self._known_ancestor(h)
            if ancestor is not None:
                children.setdefault(ancestor, []).append(h)
            else:
                roots.append(h)
        if roots:
            self._open(roots, drop)
        for ancestor, some in children.items():
            entry = known[ancestor]
            for child in some[:-1] if some[-1].inherits else some:
                known[child.key] = entry.fork(self.model.fork(entry.row))
            if some[-1].inherits:
                known[some[-1].key] = known.pop(ancestor)
        return [known[h.key] for h in hypotheses]

    def _open(self, roots: Sequence[Hypothesis], drop: int) -> None:
        """Rows for hypotheses without ancestors here. A prompt that several share is read once.

        Those of one request become one prefix group; those of others copy the prompt, because their texts diverge.
        """
        targets = [self.ids(h) for h in roots]
        prompts = [tuple(ids[: max(0, length - 1)]) for ids, length in targets]
        pictures = [self.image_inputs(h.prompt) for h in roots]
        keys = [(prompt, "" if images is None else images.digest) for prompt, images in zip(prompts, pictures, strict=True)]
        sharing = Counter(keys)
        first_rows: dict[tuple[int, tuple[tuple[int, ...], str]], CacheRow] = {}
        for h, (ids, prompt_length), prompt, images, key in zip(roots, targets, prompts, pictures, keys, strict=True):
            first = first_rows.get((id(h.token_counter), key)) if prompt else None
            if first is None:
                row = self.open_row(ids[: len(ids) - drop], len(prompt), images)
            else:
                row = self.model.fork(first)
                self.model.truncate(row, len(prompt))
            counted = 0 if first is None else len(prompt)  # a request counts what its hypotheses share once
            if first is None and prompt and sharing[key] > 1:
                first_rows[id(h.token_counter), key] = row
                cached = min(len(row.ids), len(prompt))
                h.token_counter.add(self.name, len(prompt), cached)
                counted = len(prompt)
                if unread := list(prompt[cached:]):
                    list(self.model.forward([row], [unread], [0]))
            self._entries[h.key] = RowEntry(row, prompt_length, self.vocabulary.same_as(h.vocabulary), counted)
