"""Tree search over chunks: Monte Carlo tree search with the budget of chunk-level beam search (UCT: Kocsis & Szepesvári 2006).

As in W2S-AlignTree (Ding et al. 2025, arXiv 2511.11518), a node is a partial response, its K children are sampled continuations of L
tokens, and a value scores them as soon as they are there: nothing is rolled out. One expansion:

1. From the root go to the child with the largest Q + exploration * sqrt(ln N(parent) / N(child)) until a leaf is reached.
2. Sample K children of the leaf and score them. Of children with the same tokens only the first is kept.
3. Add 1 to N of the leaf and its ancestors, and set their Q to the largest Q of their children. A child begins with N = 1 and its score
   as Q. Finished responses are no children to go to, and count in no Q, as in the authors' code.

At most W * K * max_new_tokens tokens are sampled, as by CBS(W, K, L). A leaf below which the tokens that are left would not suffice for a
whole response is expanded only where there is no other; so there is a finished response at the end, and the best is the answer. The
authors weight the exploration by the base's probability of the chunk and its entropy; this does not.

With exploration 0 it is best-first search: always the best unfinished leaf is expanded. With W = 1 it is blockwise controlled decoding,
because the tokens just suffice for one response.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ivg.search.request import Request, Search
from ivg.search.rule import Chunk, Scored, Selection, SelectionRule
from ivg.search.selection import unique
from ivg.types import Beam


@dataclass(slots=True)
class _Node:
    """A partial response.

    Attributes:
        parent: None: the root.
        best: Q.
        visits: N.
        children: unfinished ones.
    """

    parent: _Node | None
    best: float
    visits: int
    children: list[_Node] = field(default_factory=list)


def most_leaves(search: Search, max_new_tokens: int) -> int:
    """Responses that the tree holds at the end, if none is finished before: each expansion turns one into K."""
    least = 1 if search.chunk_until is not None else search.chunk_length or max_new_tokens  # tokens of a chunk
    return 1 + search.width * math.ceil(max_new_tokens / least) * (search.successors - 1)


class TreeRule(SelectionRule):
    """The tree of one request. Kept are its unfinished leaves and the best finished response."""

    def __init__(self, request: Request) -> None:
        assert request.search.tree is not None
        self.request, self.search = request, request.search
        self.exploration = request.search.tree.exploration
        self.limit = request.sampling.max_new_tokens
        self.tokens = self.search.chunk_length or self.limit
        self.left = self.search.width * self.search.successors * self.limit
        """Tokens that may still be sampled."""
        self.root = _Node(None, 0.0, 0)
        self.leaf = self.root
        """The one that is expanded."""
        self.start = 0
        """Its tokens."""
        self.leaves: dict[int, _Node] = {}
        """Unfinished leaves by the key of their beam."""

    @property
    def rows(self) -> int:
        """All leaves."""
        return most_leaves(self.search, self.limit)

    def begin(self, kept: list[Scored]) -> Chunk:
        """Children of the leaf that the tree leads to."""
        if not self.leaves:
            self.leaves = {kept[0][0].key: self.root}
        growing = {beam.key: beam for beam, _ in kept if not beam.finished}
        leaves = {id(self.leaves[key]): key for key, beam in growing.items() if self._cost(beam) <= self.left}
        in_time = {node for node, key in leaves.items() if self._cost(growing[key], whole=True) <= self.left}
        self.leaf = self._descend([self.leaves[key] for node, key in leaves.items() if node in in_time or not in_time])
        key = leaves[id(self.leaf)]
        self.start = len(growing[key].token_ids)
        del self.leaves[key]
        held = [(beam, score) for beam, score in kept if beam.key != key]
        return Chunk([(growing[key], self.search.successors)], self.tokens, held)

    def _cost(self, leaf: Beam, *, whole: bool = False) -> int:
        """Tokens of K children, at most; ``whole``: and of K children of one of those, and so on to the end of a response."""
        tokens = self.limit - len(leaf.token_ids)
        return self.search.successors * (tokens if whole else min(tokens, self.tokens))

    def _descend(self, leaves: list[_Node]) -> _Node:
        """One of ``leaves``, by the rule of step 1 among the nodes that lead to them."""
        open_nodes: set[int] = set()
        for leaf in leaves:
            node: _Node | None = leaf
            while node is not None and id(node) not in open_nodes:
                open_nodes.add(id(node))
                node = node.parent
        node = self.root
        while node.children:
            log_visits = math.log(node.visits)
            node = max(
                (child for child in node.children if id(child) in open_nodes),
                key=lambda child: child.best + self.exploration * math.sqrt(log_visits / child.visits),
            )
        return node

    def choose(self, held: list[Scored], grown: list[Scored]) -> Selection:
        """Put the children into the tree; keep all unfinished leaves and the best finished response."""
        self.left -= sum(len(beam.token_ids) - self.start for beam, _ in grown)
        for beam, score in (children := unique(grown)):
            if not beam.finished:
                self.leaves[beam.key] = child = _Node(self.leaf, score, 1)
                self.leaf.children.append(child)
        node: _Node | None = self.leaf
        while node is not None:
            node.visits += 1
            node.best = max((child.best for child in node.children), default=-math.inf)
            node = node.parent
        pool = held + children
        finished = [pair for pair in pool if pair[0].finished]
        best = max(finished, key=lambda pair: pair[1], default=None)  # among equals the earlier one
        kept = [pair for pair in pool if not pair[0].finished or pair is best]
        keys = {beam.key for beam, _ in kept}
        dropped = [pair for pair in grown if pair[0].key not in keys]
        done = all(beam.finished or self._cost(beam) > self.left for beam, _ in kept)
        return Selection(kept, dropped, [beam for beam, _ in dropped], best if done else None)
