"""A language model or value network that reads hypotheses: in its own tokens, behind its own prompt, and only what is new of each.

Several may read with one network, each behind its own prompt (:meth:`CachedLM.sharing`). Must not depend on what its outputs mean
(``values``), nor how beams are chosen. Which rows hypotheses have: ``models.hypothesis_rows``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from ivg.errors import ConfigError
from ivg.models.cache import common_length
from ivg.models.candidates import CandidateGroup, CandidateOutputs, read_candidates
from ivg.models.hypothesis_rows import HypothesisRows, RowEntry
from ivg.models.kept_outputs import KeptOutputs, KeptStates
from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.prompt_template import PromptTemplate
from ivg.models.runner import ModelRunner
from ivg.models.token_logps import pass_logps, target_logps
from ivg.types import Hypothesis


@dataclass(slots=True)
class _Candidates:
    """The candidates behind one hypothesis.

    Attributes:
        parent: that hypothesis.
        entry: its.
        index: which of all candidates they are.
        ids: tokens of each, prompt and response.
        prompt_lengths: how many of them are prompt.
    """

    parent: Hypothesis
    entry: RowEntry
    index: list[int]
    ids: list[list[int]]
    prompt_lengths: list[int]

    @property
    def own_length(self) -> int | None:
        """Tokens that the parent itself has; None: it is text, whose tokens may change."""
        return self.entry.prompt_length + len(self.parent.token_ids) if self.entry.same_tokens else None

    def keep_scores(self, logps: Sequence[Sequence[float]]) -> None:
        """Let the parent keep the log-probabilities of the response tokens that all candidates have."""
        first, length = self.ids[0], self.prompt_lengths[0]
        if any(n != length for n in self.prompt_lengths):
            return
        same = min(common_length(first, ids) for ids in self.ids)
        same = max(0, (same if self.own_length is None else min(same, self.own_length)) - length)
        self.entry.prompt_length, self.entry.scored, self.entry.logps = length, first[length : length + same], list(logps[0][:same])


class CachedLM(HypothesisRows):
    """A model that reads hypotheses: its outputs behind their tokens, the log-probabilities of these.

    Args: those of :class:`~ivg.models.hypothesis_rows.HypothesisRows`.

    Attributes:
        head: gives the outputs, from the network's hidden states; None: the network's own.
        states: hidden states behind what was read, for readers with heads that follow this one; None: there are none.
    """

    head: nn.Module | None = None
    states: KeptStates | None = None
    _source: CachedLM | None = None
    _keeps_outputs = False
    _kept: KeptOutputs | None = None
    """Of the last :meth:`outputs`."""
    _with_base: KeptOutputs | None = None
    """Of :func:`read_with_guides`, until they are asked for."""

    def follow(self, other: CachedLM) -> None:
        """Where ``other``, which shares the network, has just read a hypothesis behind the same prompt, its outputs are taken.

        For a guide that is the base itself: it then costs no pass.
        """
        if other is not self and other.model is self.model and other.weights == self.weights:
            self._source, other._keeps_outputs = other, True

    def sharing(
        self,
        name: str,
        template: str | PromptTemplate | None = None,
        *,
        system: str | None = None,
        instruction: Literal["contrast", "negative"] | None = None,
    ) -> CachedLM:
        """Another reader with the same network, cache and tokenizer, behind other prompts."""
        out = CachedLM(self.model, self.tokenizer, template, name=name, system=system, instruction=instruction)
        out.vocabulary, out.generation_config = self.vocabulary, self.generation_config
        out.weights, out.adapter_folder = self.weights, self.adapter_folder
        return out

    @override
    def release(self, keys: Sequence[int]) -> None:
        super().release(keys)
        if self._kept is not None:
            self._kept = self._kept.without(keys)
        if self._with_base is not None and not self._with_base.places.keys().isdisjoint(keys):
            self._with_base = None
        if self.states is not None:
            self.states.release(keys)

    @override
    def truncate(self, hypotheses: Sequence[Hypothesis]) -> None:
        super().truncate(hypotheses)
        self._with_base = None

    @override
    def reset_cache(self) -> None:
        self._kept = self._with_base = None
        if self.states is not None:
            self.states.clear()
        super().reset_cache()

    # Reading

    def prefill(self, hypotheses: Sequence[Hypothesis]) -> None:
        """Read those of which nothing was read, all but the last token, so that their children share it."""
        unread = [h for h in hypotheses if h.key not in self._entries and self._known_ancestor(h) is None]
        entries, new = self._to_read(unread, [0] * len(unread), drop=1)
        some = [i for i, tokens in enumerate(new) if tokens]
        list(self.model.forward([entries[i].row for i in some], [new[i] for i in some], [0] * len(some)))

    def outputs(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """The network's output behind the last token, float32 [hypotheses, vocabulary or 1]."""
        out = self.logits(hypotheses)
        if self._keeps_outputs:
            part = out.untyped_storage().nbytes() > out.numel() * out.element_size()  # of a pass with other rows
            kept = out.clone() if part or out.dtype == torch.float32 else out  # the caller may write over float32
            self._kept = KeptOutputs.of(hypotheses, kept)
        return out.float()

    def logits(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """As :meth:`outputs`, in the network's own dtype."""
        return read_together([self], hypotheses)[0]

    def last_token_outputs(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """The output one token earlier, at the entry of the last token: Q(s_t, y_t) = V(x, y_<=t); float32 [hypotheses]."""
        lasts = [self.last_id(h) for h in hypotheses]
        entries, new = self._to_read(hypotheses, [1] * len(hypotheses), drop=1)
        out = self.model.last_outputs([e.row for e in entries], new)
        return out.gather(1, torch.tensor(lasts, device=out.device)[:, None])[:, 0].float()

    def recent_outputs(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int], drop: int = 0) -> list[Tensor]:
        """The network's outputs behind each of the last ``counts[i]`` tokens, in order; float32 [counts[i], vocabulary or 1].

        One pass where nothing of them has been read before. Prompt tokens count: behind the last of them stands the first token
        of the response. The last ``drop`` tokens are left out: with 1, the outputs are what the last ``counts[i]`` tokens were drawn from.
        """
        entries, new = self._to_read(hypotheses, counts, drop)
        out: list[list[Tensor]] = [[] for _ in hypotheses]
        for i, output in self.model.forward([e.row for e in entries], new, counts, self.head):
            out[i].append(output.float())
        return [torch.cat(pieces) for pieces in out]

    def token_logps(self, hypotheses: Sequence[Hypothesis]) -> list[list[float]]:
        """Log-probability of every response token, in nats; only those not yet known are computed."""
        entries = self._get_entries(hypotheses, drop=1)
        unscored = [self._unscored(h, entry) for h, entry in zip(hypotheses, entries, strict=True)]
        some = [i for i, tokens in enumerate(unscored) if tokens]
        new = []
        for i in some:
            new.append(self._unread(hypotheses[i], entries[i], 1, len(unscored[i])))
            self._count(hypotheses[i], entries[i], len(new[-1]))
        for found, outputs in self.model.forward_passes([entries[i].row for i in some], new, [len(unscored[i]) for i in some]):
            tokens = [unscored[some[k]][:count] for k, _, count in found]
            for (k, _, count), logps, scored in zip(
                found, pass_logps(outputs, [place for _, place, _ in found], tokens), tokens, strict=True
            ):
                del unscored[some[k]][:count]
                entries[some[k]].logps += logps
                entries[some[k]].scored += scored
        return [list(e.logps) for e in entries]

    def _outputs_read_with_base(self, hypotheses: Sequence[Hypothesis]) -> Tensor | None:
        """What :func:`read_with_guides` has just read, if that is every hypothesis; it is given once, since callers write over it."""
        known = self._with_base
        if known is None or (index := known.find(hypotheses)) is None:
            return None
        self._with_base = known.without([h.key for h in hypotheses])
        return known.rows if index == list(range(len(known.rows))) else known.select(index)

    def _follows(self, other: CachedLM, hypotheses: Sequence[Hypothesis]) -> bool:
        """Are the outputs of ``other`` this one's?"""
        return self._source is other and all(other.prompt_ids(h.prompt) == self.prompt_ids(h.prompt) for h in hypotheses)

    def _outputs_of_source(self, hypotheses: Sequence[Hypothesis]) -> Tensor | None:
        """A copy of what the reader that this one follows has just read, where it holds for every hypothesis here, too."""
        source = self._source
        if source is None or source._kept is None or (index := source._kept.find(hypotheses)) is None:
            return None
        if any(source.prompt_ids(h.prompt) != self.prompt_ids(h.prompt) for h in hypotheses):
            return None
        return source._kept.select(index)

    def _unscored(self, h: Hypothesis, entry: RowEntry) -> list[int]:
        """Response tokens whose log-probability is not known."""
        if entry.same_tokens:
            return self.own_ids(h.token_ids[len(entry.logps) :])
        ids, prompt_length = self.ids(h)
        logps = _known_logps(entry, ids, prompt_length)
        end = prompt_length + len(logps)
        entry.prompt_length, entry.scored, entry.logps = prompt_length, ids[prompt_length:end], logps
        return ids[end:]

    # Candidates of the next token

    def candidate_outputs(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> Tensor:
        """As :meth:`outputs` of ``candidates``, each one token more than its ``parent``, which is one of ``hypotheses``.

        Nothing is kept of the candidates. What all candidates of a hypothesis begin with is read once, and that hypothesis keeps it.
        """
        found = self._group(hypotheses, candidates)
        read = self._read_groups(found, [[1] * len(some.ids) for some in found])
        return _scatter(found, [out.outputs[[place for (place,) in out.places]] for out in read]).float()

    def candidate_last_token_outputs(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> Tensor:
        """As :meth:`last_token_outputs` of ``candidates`` (see :meth:`candidate_outputs`); float32 [candidates]."""
        found = self._group(hypotheses, candidates)
        for some in found:
            for ids in some.ids:
                self.check_two_tokens(ids)
        read = self._read_groups(found, [[1] * len(some.ids) for some in found], drop=1)
        lasts = ([ids[-1] for ids in some.ids] for some in found)
        return _scatter(found, [out.outputs[[p for (p,) in out.places], last] for out, last in zip(read, lasts, strict=True)]).float()

    def candidate_logps(
        self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis], ids: Sequence[tuple[list[int], int]] | None = None
    ) -> list[list[float]]:
        """As :meth:`token_logps` of ``candidates`` (see :meth:`candidate_outputs`); ``ids``: :meth:`ids_of` them, where that is known."""
        found = self._group(hypotheses, candidates, ids)
        known = [[_known_logps(some.entry, ids, n) for ids, n in zip(some.ids, some.prompt_lengths, strict=True)] for some in found]
        targets = [
            [ids[n + len(logps) :] for ids, n, logps in zip(some.ids, some.prompt_lengths, before, strict=True)]
            for some, before in zip(found, known, strict=True)
        ]
        read = self._read_groups(found, [[len(tokens) for tokens in wanted] for wanted in targets], drop=1)
        out: list[list[float]] = [[] for _ in candidates]
        for some, before, wanted, outputs in zip(found, known, targets, read, strict=True):
            logps = [old + new for old, new in zip(before, target_logps(outputs, wanted), strict=True)]
            for i, all_of_one in zip(some.index, logps, strict=True):
                out[i] = all_of_one
            some.keep_scores(logps)
        return out

    def _group(
        self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis], ids: Sequence[tuple[list[int], int]] | None = None
    ) -> list[_Candidates]:
        """The candidates by their parents."""
        known = {h.key: h for h in hypotheses}
        index: dict[int, list[int]] = {}
        for i, candidate in enumerate(candidates):
            index.setdefault(known[candidate.parent or 0].key, []).append(i)
        parents = [known[key] for key in index]
        ids = self.ids_of(candidates) if ids is None else ids
        return [
            _Candidates(h, entry, index[h.key], [ids[i][0] for i in index[h.key]], [ids[i][1] for i in index[h.key]])
            for h, entry in zip(parents, self._get_entries(parents), strict=True)
        ]

    def _read_groups(self, found: Sequence[_Candidates], counts: Sequence[Sequence[int]], drop: int = 0) -> list[CandidateOutputs]:
        """Outputs behind the last ``counts`` tokens of every candidate, whose last ``drop`` tokens are left out; counts what is read."""
        groups = [
            CandidateGroup(some.entry.row, [ids[: len(ids) - drop] for ids in some.ids], own, some.own_length)
            for some, own in zip(found, counts, strict=True)
        ]
        out = read_candidates(self.model, groups, self.head)
        for some, read in zip(found, out, strict=True):
            cached = max(0, read.held - some.entry.counted)
            some.parent.token_counter.add(self.name, cached + read.read, cached)
            some.entry.counted = read.kept
        return out


def _known_logps(entry: RowEntry, ids: list[int], prompt_length: int) -> list[float]:
    """Those of the response tokens of ``ids`` that ``entry`` has. That of the first token of all is 0: nothing before it says more."""
    same = common_length(entry.scored, ids[prompt_length:]) if prompt_length == entry.prompt_length else 0
    return entry.logps[:same] if same or prompt_length else [0.0]


def _scatter(found: Sequence[_Candidates], rows: Sequence[Tensor]) -> Tensor:
    """``rows`` of all groups in the order of the candidates."""
    order = torch.tensor([i for some in found for i in some.index])
    together = torch.cat(list(rows))
    return together[order.argsort().to(together.device)]


def read_together(readers: Sequence[CachedLM], hypotheses: Sequence[Hypothesis]) -> list[Tensor]:
    """:meth:`CachedLM.logits` of each reader, [hypotheses, vocabulary or 1]; those that share a network read in one pass.

    A reader that follows another (:meth:`CachedLM.follow`) reads nothing where that one has just read the same.
    """
    out: dict[CachedLM, Tensor] = {}
    for reader in readers:
        if (read := reader._outputs_read_with_base(hypotheses)) is not None:
            out[reader] = read
        elif (known := reader._outputs_of_source(hypotheses)) is not None:
            reader.inherit_cache(hypotheses)
            out[reader] = known
    for model in dict.fromkeys(reader.model for reader in readers if reader not in out):
        some = [reader for reader in dict.fromkeys(readers) if reader.model is model and reader not in out]
        out |= _read_in_one_pass(model, dict.fromkeys(some, hypotheses))
    return [out[reader] for reader in readers]


def read_with_guides(base: CachedLM, hypotheses: Sequence[Hypothesis], guides: Mapping[CachedLM, Sequence[Hypothesis]]) -> Tensor:
    """:meth:`CachedLM.outputs` of ``base``. Guides on its network read in the same pass, and have their outputs when they are asked next.

    Args:
        base: of the engine.
        hypotheses: that it reads.
        guides: those of its guides that will be asked for exactly these hypotheses; others are left alone.
    """
    some = {lm: wanted for lm, wanted in guides.items() if lm is not base and lm.model is base.model and not lm._follows(base, wanted)}
    if not some:
        return base.outputs(hypotheses)
    read = _read_in_one_pass(base.model, {base: hypotheses, **some})
    for lm, wanted in some.items():
        lm._with_base = KeptOutputs.of(wanted, read[lm])
    base._with_base = KeptOutputs.of(hypotheses, read[base])
    return base.outputs(hypotheses)


def _read_in_one_pass(model: ModelRunner, wanted: Mapping[CachedLM, Sequence[Hypothesis]]) -> dict[CachedLM, Tensor]:
    """The outputs of each reader of ``model`` behind its hypotheses; in one pass for each network where that is faster."""
    read: dict[str | None, list[tuple[CachedLM, list[RowEntry], list[list[int]]]]] = {}
    for reader, hypotheses in wanted.items():
        read.setdefault(reader.weights, []).append((reader, *reader._to_read(hypotheses, [1] * len(hypotheses))))
    everything = [found for some in read.values() for found in some]
    tokens = sum(len(piece) for _, _, new in everything for piece in new)
    passes = [everything] if model.shares_pass(tokens) else read.values()
    out: dict[CachedLM, Tensor] = {}
    for some in passes:
        rows, pieces = [entry.row for _, entries, _ in some for entry in entries], [piece for _, _, new in some for piece in new]
        outputs, states = model.last_outputs_and_states(rows, pieces)
        first = 0
        for reader, entries, _ in some:
            part, first = slice(first, first + len(entries)), first + len(entries)
            if states is not None and reader.states is not None:
                reader.states.add(wanted[reader], states[part])
            out[reader] = outputs[part] if reader.head is None or states is None else reader.head(states[part])
    return out


def runners_of(readers: Sequence[CachedLM]) -> dict[str, ModelRunner]:
    """The networks of ``readers`` with their caches, each once, by the name of its first reader."""
    first: dict[ModelRunner, str] = {}
    for reader in readers:
        first.setdefault(reader.model, reader.name)
    return {name: model for model, name in first.items()}


def local_reader(model: PromptEncoder) -> CachedLM:
    """``model``, which runs in this process.

    Raises:
        ConfigError: another engine runs it.
    """
    if isinstance(model, CachedLM):
        return model
    raise ConfigError(f"{model.name} runs in another engine, and this needs its outputs here\n  leave engine out of the recipe's [run]")
