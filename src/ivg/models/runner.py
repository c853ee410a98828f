"""Runs a causal network over cached rows: what is to be read is cut into forward passes of bounded size.

The network reads only tokens that the cache does not hold yet. Rows under different rotary factors (LongRoPE, ``models.rotary``) never
share a pass. Must not depend on how a cache keeps its rows (``models.cache``), nor prompts, beams, tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ivg.errors import PromptError
from ivg.models.cache import CacheRow, PassLimits, RowCache, common_length
from ivg.models.choose_cache import choose_cache, images_fault
from ivg.models.hidden_states import HiddenStates, PassOutputs, last_columns
from ivg.models.image_cache import TextAndImageCache
from ivg.models.image_prompts import ImageInputs
from ivg.models.placement import input_device
from ivg.models.processor import reads_images
from ivg.models.rotary import rotary_factors_beyond, rotary_modules
from ivg.models.row_weights import RowWeights
from ivg.models.state_cache import StateCache
from ivg.models.support import body_of, check_support
from ivg.models.value_head import ValueModel


class ModelRunner:
    """A causal network (language model or :class:`~ivg.models.value_head.ValueModel`) with a cache.

    Args:
        network: a decoder of transformers, or a value network on one.
        name: in usage and errors.
        limits: of one forward pass.
        trial: try the cache out where the network's code is not transformers' (``models.choose_cache``); False: trust it.

    Attributes:
        config: of the text model.
        support: how the network is read, and up to which length.
        unshared_peak_bytes: what all rows in use would have held without sharing, at the busiest moment since :meth:`reset_cache`.
        peak_bytes: what they held.
        row_weights: reads rows with weights of their own (``models.row_weights``); None: all read with those of ``network``.
        states: keeps hidden states of each pass (see :meth:`keep_states`); None: nothing needs them.
        before_pass: called before every forward pass, where the network is shared by models that change it (``models.adapters``).
        resets: calls of :meth:`reset_cache`: rows that were opened before the last one are gone.

    Raises:
        ModelError: the network cannot be read row by row.
    """

    def __init__(self, network: nn.Module, name: str, limits: PassLimits | None = None, *, trial: bool = True) -> None:
        self.network, self.name, self.device = network.eval(), name, input_device(network)
        self.limits = limits or PassLimits.on(self.device)
        self.config = cast("Any", network).config.get_text_config()
        self.support = check_support(network, name)
        self.max_positions = self.support.max_positions
        self._rope_limits = self.support.rope_limits
        self._rotary = rotary_modules(network) if self._rope_limits else []
        scalar = isinstance(network, ValueModel) and network.kind == "scalar"
        self._output_size = 1 if scalar else int(self.config.vocab_size)
        self.cache: RowCache = choose_cache(network, self.support, self.limits, name, trial=trial)
        if reads_images(network) and not isinstance(self.cache, StateCache) and StateCache.takes(network):
            self.cache = TextAndImageCache(self.cache, StateCache(network, self.limits))
        self._images_tried = False
        self.unshared_peak_bytes = self.peak_bytes = self.resets = 0
        self.before_pass: Callable[[], None] | None = None
        self.row_weights: RowWeights | None = None
        self.states: HiddenStates | None = None

    def network_of(self, weights: str | None) -> nn.Module:
        """The network whose weights rows of ``weights`` are read with."""
        return self.network if self.row_weights is None else self.row_weights.network_of(weights)

    def keep_states(self, body: nn.Module) -> None:
        """Let passes also give what ``body``, a part of the network, gives in them: for heads of their own."""
        if self.states is None:
            self.states = HiddenStates(body)

    def shares_pass(self, tokens: int) -> bool:
        """Are so many tokens of rows with different weights read faster in one pass than in one for each?"""
        return self.row_weights is None or self.row_weights.max_tokens is None or tokens <= self.row_weights.max_tokens

    # Rows

    def reset_cache(self) -> None:
        """Forget all rows: what comes next is computed as by a fresh model, to the last bit."""
        self.cache.clear()
        self.resets += 1
        self.unshared_peak_bytes = self.peak_bytes = 0

    def release_memory(self) -> None:
        """Return memory that no row holds to the operating system: else a process keeps every page that any row ever used.

        Changes no output. CPUs only.
        """
        self.cache.release_memory()

    @property
    def live_rows(self) -> int:
        """Rows in use."""
        return self.cache.num_rows

    def open(self, ids: Sequence[int], mark: int = 0, images: ImageInputs | None = None, weights: str | None = None) -> CacheRow:
        """A row for ``ids``, holding already as many of them as the cache knows (all but the last at most).

        ``mark``: length to which rows that descend from it are likely to be cut: that of their prompt. ``images``: what is read beside it.
        ``weights``: it is read with, where ``cache.mixes_weights``.
        """
        if images is not None:
            return self.cache.open_with_images(ids, self._rope_range(len(ids)), images)
        return self.cache.open(ids, self._rope_range(len(ids)), mark, weights)

    def try_images(self, images: ImageInputs) -> None:
        """Once, with the first prompt that has pictures: are rows that begin with them exact?

        Raises:
            PromptError: they are not; says why.
        """
        if not self._images_tried and self.before_pass is not None:
            self.before_pass()
        if not self._images_tried and (fault := images_fault(self.network, images, self.limits)) is not None:
            kind = type(body_of(self.network)).__name__
            raise PromptError(f"{self.name}: {kind} cannot be used with pictures: it {fault}\n  give text, or another base")
        self._images_tried = True

    def fork(self, row: CacheRow) -> CacheRow:
        """A second row with the same tokens."""
        return self.cache.fork(row)

    def truncate(self, row: CacheRow, length: int) -> None:
        """Keep the first ``length`` tokens of ``row`` at most; ``row.ids`` says how many the cache kept."""
        self.cache.truncate(row, length)

    def free(self, row: CacheRow) -> None:
        """The row is not used any more."""
        self.cache.free(row)

    # Reading

    def forward(
        self, rows: Sequence[CacheRow], new: Sequence[Sequence[int]], keep: Sequence[int], head: nn.Module | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Read ``new[i]`` (at least one token) behind what ``rows[i]`` holds.

        ``head``: gives the outputs, from the hidden states, in place of the network's own (see :meth:`keep_states`).

        Yields (i, outputs [positions, vocabulary or 1]): together those of the last ``keep[i]`` tokens, in order, in
        one or more pieces; where several positions of a row are wanted, never more than ``limits.outputs`` numbers at a time.

        Raises:
            PromptError: a row would outgrow the model's positions.
        """
        for found, given in self._passes(rows, new, keep):
            outputs = given.of(head)
            for i, place, count in found:
                yield i, outputs[place, -count:]

    def forward_passes(
        self, rows: Sequence[CacheRow], new: Sequence[Sequence[int]], keep: Sequence[int]
    ) -> Iterator[tuple[list[tuple[int, int, int]], Tensor]]:
        """As :meth:`forward`, all rows of a pass together.

        Yields ([(i, place, count)], outputs [places, positions, vocabulary or 1]): the last ``count`` positions of ``place`` are of row i.
        """
        for found, given in self._passes(rows, new, keep):
            yield found, given.outputs

    def _passes(
        self, rows: Sequence[CacheRow], new: Sequence[Sequence[int]], keep: Sequence[int]
    ) -> Iterator[tuple[list[tuple[int, int, int]], PassOutputs]]:
        """As :meth:`forward_passes`, with hidden states."""
        left, wanted = {i: list(tokens) for i, tokens in enumerate(new)}, list(keep)
        while left:
            index, pieces, counts = list(left), [], []
            for i in index:
                held, total = len(rows[i].ids), len(rows[i].ids) + len(left[i])
                end = self._range_end(total - max(0, wanted[i] - 1), total)
                pieces.append(left[i][: end - held])
                counts.append(max(0, wanted[i] - (total - end)))
                left[i], wanted[i] = left[i][end - held :], wanted[i] - counts[-1]
            some = [rows[i] for i in index]
            for found, given in self._forward_in_range(some, self._reopen_in_range(some, pieces), counts):
                yield [(index[k], place, count) for k, place, count in found], given
            left = {i: tokens for i, tokens in left.items() if tokens}

    def last_outputs(self, rows: Sequence[CacheRow], new: Sequence[Sequence[int]]) -> Tensor:
        """Read ``new`` and return the output behind each row's last token, [rows, vocabulary or 1], in the network's dtype."""
        return self.last_outputs_and_states(rows, new)[0]

    def last_outputs_and_states(self, rows: Sequence[CacheRow], new: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """As :meth:`last_outputs`, and the hidden states [rows, hidden] there; None: they are not kept."""
        new = self._reopen_in_range(rows, new)
        longest, shortest = max(map(len, new)), min(map(len, new))
        if longest == shortest <= self.limits.row_tokens:
            self._prepare(rows, new)
            if len(next(self.cache.batches(rows, dict.fromkeys(range(len(rows)), longest), {}, self._output_size))) == len(rows):
                given, order = self._pass(rows, new, 1)
                outputs, states = given.outputs[:, -1], None if given.states is None else given.states[:, -1]
                if order != list(range(len(rows))):
                    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=outputs.device)
                    outputs, states = outputs.index_select(0, back), None if states is None else states.index_select(0, back)
                return outputs, states
        found_outputs: list[Tensor] = [torch.empty(0)] * len(rows)
        found_states = list(found_outputs)
        for found, given in self._passes(rows, new, [1] * len(rows)):
            for i, place, _ in found:
                found_outputs[i] = given.outputs[place, -1]
                if given.states is not None:
                    found_states[i] = given.states[place, -1]
        return torch.stack(found_outputs), None if self.states is None else torch.stack(found_states)

    def _forward_in_range(
        self, rows: Sequence[CacheRow], new: Sequence[Sequence[int]], keep: Sequence[int]
    ) -> Iterator[tuple[list[tuple[int, int, int]], PassOutputs]]:
        """As :meth:`_passes`, each row under the rotary factors that it has."""
        done = [0] * len(rows)
        pending = list(range(len(rows)))
        self._prepare(rows, new)
        while pending:
            sizes = {i: max(rows[i].unread_images, self._piece_length(len(new[i]) - done[i], keep[i])) for i in pending}
            wanted = {i: max(0, min(sizes[i], done[i] + sizes[i] - (len(new[i]) - keep[i]))) for i in pending}
            for batch in self.cache.batches(rows, sizes, wanted, self._output_size):
                pieces = [list(new[i][done[i] : done[i] + sizes[i]]) for i in batch]
                given, order = self._pass([rows[i] for i in batch], pieces, max(1, *(wanted[i] for i in batch)))
                for place, piece in zip(batch, pieces, strict=True):
                    done[place] += len(piece)
                yield [(batch[at], k, wanted[batch[at]]) for k, at in enumerate(order) if wanted[batch[at]]], given
            pending = [i for i in pending if done[i] < len(new[i])]

    def _piece_length(self, left: int, keep: int) -> int:
        """Tokens of a row for one pass, of ``left`` that are to be read and the last ``keep`` whose outputs are wanted."""
        limits = self.limits
        most = max(1, limits.outputs // self._output_size)
        before = max(0, left - keep)
        return min(left, limits.row_tokens, before + most if before < limits.row_tokens else limits.row_tokens)

    def _prepare(self, rows: Sequence[CacheRow], new: Sequence[Sequence[int]]) -> None:
        longest = max((len(r.ids) + len(n) for r, n in zip(rows, new, strict=True)), default=0)
        if self.max_positions is not None and longest > self.max_positions:
            why = f" ({self.support.limit_reason})" if self.support.limit_reason else ""
            raise PromptError(
                f"{self.name} reads at most {self.max_positions} tokens{why}, got {longest}\n  shorten the prompt or the answer"
            )
        self.cache.prepare(rows)

    @torch.no_grad()
    def _pass(self, rows: Sequence[CacheRow], pieces: Sequence[Sequence[int]], keep: int) -> tuple[PassOutputs, list[int]]:
        """One forward pass of rows of one rope range (see ``RowCache.forward``); notes rows whose outputs are not finite."""
        if self.before_pass is not None:
            self.before_pass()
        rope_range = rows[0].rope_range
        reading = nullcontext() if self.row_weights is None else self.row_weights.using([row.weights for row in rows])
        keeping = nullcontext() if self.states is None else self.states.kept()
        with rotary_factors_beyond(self._rope_limits[rope_range - 1] if rope_range else None, self._rotary), reading, keeping as states:
            outputs, order = self.cache.forward(rows, pieces, keep)
        finite = outputs[:, -1].amax(-1) < torch.inf  # NaN wins every comparison
        if not bool(finite.all()):
            for k in (~finite).nonzero()[:, 0].tolist():
                row = rows[order[k]]
                row.nonfinite, row.finite_length = True, len(row.ids) - len(pieces[order[k]])
        self.unshared_peak_bytes = max(self.unshared_peak_bytes, self.cache.unshared_bytes)
        self.peak_bytes = max(self.peak_bytes, self.cache.used_bytes)
        return PassOutputs(outputs, last_columns(states, keep) if states else None), order

    # Rotary factors that depend on the length

    def _rope_range(self, length: int) -> int:
        """Which rotary factors a text of this length has: how many limits it is beyond."""
        return sum(length > limit for limit in self._rope_limits)

    def _range_end(self, first: int, total: int) -> int:
        """The longest text of at most ``total`` tokens that has the rotary factors of one of ``first``."""
        return min([total, *(limit for limit in self._rope_limits if limit >= first)])

    def _reopen_in_range(self, rows: Sequence[CacheRow], new: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """What is to be read if rows that would outgrow their rotary factors, or were cut below them, begin anew.

        Rows of one group stay one: what they have in common is read once.
        """
        if not self._rope_limits:
            return new
        moved: dict[tuple[Any, int], list[int]] = {}
        for i, row in enumerate(rows):
            if row.rope_range != (rope_range := self._rope_range(len(row.ids) + len(new[i]))):
                moved.setdefault((row.group, rope_range), []).append(i)
        texts = {i: [*rows[i].ids, *new[i]] for some in moved.values() for i in some}
        for (_, rope_range), some in moved.items():
            text, first = texts[some[0]], rows[some[0]]
            shared = min(common_length(text, texts[i][:-1]) for i in some)
            self.cache.reopen(first, text if len(some) == 1 else text[: shared + 1], rope_range)
            if len(some) > 1 and len(first.ids) < shared:
                list(self._forward_in_range([first], [text[len(first.ids) : shared]], [0]))
            for i in some[1:]:
                self.cache.reopen_as_fork(rows[i], first)
        return [texts[i][len(row.ids) :] if i in texts else new[i] for i, row in enumerate(rows)]
