"""Reads many texts that begin alike, each part that several share once: the candidates of token guidance.

The texts of one group are a tree of tokens. What all of them begin with is read by the group's row, which keeps it for the next
candidates; what they differ in is read behind it and forgotten. Handles rows and tokens; must not depend on hypotheses
(``models.cached_lm``), nor on how a cache keeps its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ivg.models.cache import CacheRow, common_length
from ivg.models.runner import ModelRunner

_MARGIN = 4
"""A row that cannot be cut stays so many tokens behind what its texts share: the next texts may change its end."""


@dataclass(slots=True)
class CandidateGroup:
    """Texts that are read behind one row.

    Attributes:
        row: holds any beginning of them; afterwards what they have in common, or less.
        texts: their tokens, at least one each.
        counts: how many outputs of each are wanted: those behind its last tokens; 0: none, it is not read.
        most: tokens that the row may hold afterwards; None: any number.
    """

    row: CacheRow
    texts: Sequence[Sequence[int]]
    counts: Sequence[int]
    most: int | None = None


@dataclass(slots=True)
class CandidateOutputs:
    """What was read for a group.

    Attributes:
        outputs: behind each place, [places, vocabulary or 1].
        places: for each text the places of its wanted outputs, in order.
        held: tokens that the row held of the texts.
        kept: tokens of them that it holds now.
        read: tokens that were read.
    """

    outputs: Tensor
    places: list[list[int]]
    held: int
    kept: int
    read: int


@dataclass(slots=True)
class _Tree:
    """The tokens of a group's texts behind the first ``base``, each shared beginning once.

    Attributes:
        base: tokens before the tree, which the row holds.
        tokens: of the nodes; a node comes behind its parent.
        parents: index of the node before it; -1: none.
        paths: for each text its nodes, one after another; none where nothing of it is wanted.
        wanted: nodes whose outputs are wanted.
        stem: how many nodes, the first ones, the group's row reads: all texts share them.
    """

    base: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    wanted: set[int] = field(default_factory=set)
    stem: int = 0

    def leaves(self) -> list[list[int]]:
        """The paths that are no beginning of another, each once."""
        inner = set(self.parents)
        return list({path[-1]: path for path in self.paths if path and path[-1] not in inner}.values())


def _build_tree(group: CandidateGroup, base: int) -> _Tree:
    tree = _Tree(base)
    children: dict[tuple[int, int], int] = {}
    for text, count in zip(group.texts, group.counts, strict=True):
        node, path = -1, []
        for token in text[base:] if count else ():
            if (known := children.get((node, token))) is None:
                known = children[node, token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(node)
            node = known
            path.append(node)
        tree.paths.append(path)
        tree.wanted.update(path[len(path) - count :])
    shown = [path for path in tree.paths if path]
    tree.stem = min((common_length(shown[0], path) for path in shown), default=0)
    if group.most is not None:
        tree.stem = min(tree.stem, max(0, group.most - base))
    return tree


def read_candidates(model: ModelRunner, groups: Sequence[CandidateGroup], head: nn.Module | None = None) -> list[CandidateOutputs]:
    """Read the texts of all groups; what groups read at the same time shares forward passes.

    ``head``: see ``ModelRunner.forward``.

    Raises:
        PromptError: a text is longer than the network reads.
    """
    trees = []
    for group in groups:
        row = group.row
        held = row.finite_length if row.nonfinite else len(row.ids)
        wanted = [len(text) - count for text, count in zip(group.texts, group.counts, strict=True) if count]
        model.truncate(row, max(0, min([held, *wanted, *(common_length(row.ids, text) for text in group.texts)])))
        trees.append(_build_tree(group, len(row.ids)))
    return _read_by_forks(model, groups, trees, head)


class _Collected:
    """Outputs of the wanted nodes of one tree, each once."""

    def __init__(self, tree: _Tree) -> None:
        self.tree = tree
        self.place: dict[int, int] = {}
        self.pieces: list[Tensor] = []

    def add(self, nodes: Iterable[int], outputs: Tensor) -> None:
        """``outputs`` [nodes, vocabulary or 1] of ``nodes``."""
        new = [(i, node) for i, node in enumerate(nodes) if node in self.tree.wanted and node not in self.place]
        if new:
            for _, node in new:
                self.place[node] = len(self.place)
            whole = len(new) == len(outputs)
            self.pieces.append(outputs if whole else outputs[torch.tensor([i for i, _ in new], device=outputs.device)])

    def result(self, group: CandidateGroup, read: int) -> CandidateOutputs:
        """Everything that was added."""
        places = [[self.place[n] for n in path[len(path) - count :]] for path, count in zip(self.tree.paths, group.counts, strict=True)]
        outputs = torch.cat(self.pieces) if self.pieces else torch.empty(0)
        return CandidateOutputs(outputs, places, self.tree.base, len(group.row.ids), read)


def _read_by_forks(
    model: ModelRunner, groups: Sequence[CandidateGroup], trees: Sequence[_Tree], head: nn.Module | None
) -> list[CandidateOutputs]:
    """The stem by the row, the rest of every text by a fork of it."""
    out = [_Collected(tree) for tree in trees]
    margin = 0 if model.cache.rolls_back else _MARGIN
    read = [0] * len(groups)

    def forward(index: Sequence[int], rows: Sequence[CacheRow], paths: Sequence[Sequence[int]]) -> None:
        """Read ``paths``, of the trees ``index``, behind ``rows``."""
        new = [[trees[i].tokens[node] for node in path] for i, path in zip(index, paths, strict=True)]
        keep = [_wanted_length(trees[i], path) for i, path in zip(index, paths, strict=True)]
        done = [len(path) - n for path, n in zip(paths, keep, strict=True)]
        for k, output in model.forward(rows, new, keep, head):
            out[index[k]].add(paths[k][done[k] : done[k] + len(output)], output)
            done[k] += len(output)
        for i, path in zip(index, paths, strict=True):
            read[i] += len(path)

    stems = [_stem_pieces(group.row, tree.stem, margin) for group, tree in zip(groups, trees, strict=True)]
    some = [i for i, (first, _) in enumerate(stems) if first]
    forward(some, [groups[i].row for i in some], [stems[i][0] for i in some])
    sources, forks = [group.row for group in groups], list[CacheRow]()
    try:
        behind = [i for i, (_, rest) in enumerate(stems) if rest]
        for i in behind:
            sources[i] = model.fork(sources[i])
            forks.append(sources[i])
        forward(behind, [sources[i] for i in behind], [stems[i][1] for i in behind])
        begun = [len(first) + len(rest) for first, rest in stems]
        branches = [(i, path[begun[i] :]) for i, tree in enumerate(trees) for path in tree.leaves() if len(path) > begun[i]]
        forks += (rows := [model.fork(sources[i]) for i, _ in branches])
        forward([i for i, _ in branches], rows, [path for _, path in branches])
    finally:
        for row in forks:
            model.free(row)
    return [collected.result(group, n) for collected, group, n in zip(out, groups, read, strict=True)]


def _stem_pieces(row: CacheRow, stem: int, margin: int) -> tuple[range, range]:
    """(nodes of the stem that the row reads and keeps, the others). Pictures are read in one pass with the text before them."""
    if stem < row.unread_images:
        return range(0), range(0)
    first = max(0, stem - margin, row.unread_images)
    return range(first), range(first, stem)


def _wanted_length(tree: _Tree, path: Sequence[int]) -> int:
    """From the first node of ``path`` that is wanted to its end; 0: none is."""
    return next((len(path) - i for i, node in enumerate(path) if node in tree.wanted), 0)
