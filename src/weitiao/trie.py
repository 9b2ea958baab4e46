"""Examples -> a token trie laid flat. Pure numpy: knows no file, no model, no tensor.

Rows that share a prefix share its nodes. Nodes stand in depth-first order, so that a subtree is a slice:

    rows            A B C d          A B C e f            (learned tokens in lower case)

    index           0  1  2  3  4  5
    token           A  B  C  d  e  f
    parent         -1  0  1  2  2  4      the node before it in every row that passes through it; -1 at a root
    depth           0  1  2  3  3  4      its position in those rows
    subtree_end     6  6  6  4  6  6      one past the last node below it
    weight          0  0  0  1  1  1      how much is learned of the edge parent -> token, over all rows

A node sees its ancestors and itself:  sees(q, k) = k <= q < subtree_end[k].  Plain causal attention (subtree_end = T
everywhere), packed documents and shared prefixes are this one rule.

A target belongs to an edge: parent[i] predicts token[i] with weight[i].  loss = sum(weight * nll) / sum(weight).
So a node below which nothing is learned need not be computed, a row's last token (d, f) first of all: it is a target alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, eq=False)
class Example:
    """One path of tokens and what is learned of it.

    ids: int32 [T], token ids from the first to the last.
    weights: float32 [T], weights[t] > 0 where token t is learned from what stands before it. weights[0] is 0:
        nothing stands before the first token.
    row: which row of the data set it comes from (a conversation gives one Example a turn, all of the same row).
    """

    ids: np.ndarray
    weights: np.ndarray
    row: int = -1

    def __post_init__(self):
        assert self.ids.ndim == 1 and self.ids.shape == self.weights.shape and len(self.ids) > 0
        assert self.weights[0] == 0, "the first token has nothing before it to be learned from"

    def __len__(self) -> int:
        return len(self.ids)


class Segment(NamedTuple):
    """An unbranching run of the trie: nodes start..end-1, each the only child of the one before it.

    `below` is one past the last node of the subtree under it: the queries of nodes end..below-1 all see the segment.
    """

    start: int
    end: int
    below: int


@dataclass(frozen=True, eq=False)
class Trie:
    """A token trie laid flat; see the drawing above. Arrays are [T], integers int64, weights float32."""

    token: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    subtree_end: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.token)

    def sees(self) -> np.ndarray:
        """bool [T, T]: may query q attend to key k? The definition itself; the judge of faster ways."""
        q, k = np.arange(len(self))[:, None], np.arange(len(self))[None, :]
        return (k <= q) & (q < self.subtree_end[None, :])

    def segments(self) -> list[Segment]:
        """The unbranching runs, in order. A run starts at a root, below a node with several children, and nowhere else."""
        if len(self) == 0:
            return []
        children = np.bincount(self.parent[self.parent >= 0], minlength=len(self))
        starts_here = (self.parent < 0) | (children[self.parent] > 1)
        starts = np.flatnonzero(starts_here)
        ends = np.append(starts[1:], len(self))
        return [Segment(int(s), int(e), int(self.subtree_end[s])) for s, e in zip(starts, ends, strict=True)]

    def needed(self) -> np.ndarray:
        """bool [T]: is something learned below this node? If so, then below its ancestors too."""
        learned = np.append(0, np.cumsum(self.weight > 0))
        return learned[self.subtree_end] > learned[1:]

    @property
    def computed(self) -> int:
        """How many nodes that is."""
        return int(self.needed().sum())

    def of(self, nodes: np.ndarray) -> Trie:
        """Some of the nodes, bool [T]: a root is what has its parent not among them. What stands between two of them is, too."""
        before = np.append(0, np.cumsum(nodes))  # how many of them stand before each place
        parent = self.parent[nodes]
        inside = (parent >= 0) & nodes[parent]
        return Trie(self.token[nodes], np.where(inside, before[parent], -1), self.depth[nodes], before[self.subtree_end[nodes]], self.weight[nodes])

    def edges(self) -> np.ndarray:
        """int64 [E]: the nodes whose token is learned, in order. The predicting node of edge e is parent[e]."""
        return np.flatnonzero(self.weight)


def sort_key(example: Example) -> bytes:
    """Bytes that order examples as their ids do: big-endian, so that byte order is number order."""
    return example.ids.astype(">u4").tobytes()


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many first ids two rows share."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


def build(examples: Sequence[Example]) -> Trie:
    """Merge rows into one trie. A row that occurs twice is computed once, with twice the weight."""
    return build_with_paths(examples)[0]


def build_with_paths(examples: Sequence[Example]) -> tuple[Trie, list[np.ndarray]]:
    """(the trie, for each example the nodes of its tokens, int64 [T], in the order of the examples)"""
    order = sorted(range(len(examples)), key=lambda i: sort_key(examples[i]))
    paths: list[np.ndarray] = [np.zeros(0, np.int64)] * len(examples)
    size = sum(len(row) for row in examples)
    token, parent, depth, subtree_end = (np.zeros(size, np.int64) for _ in range(4))
    weight = np.zeros(size, np.float64)
    nodes = 0
    path = np.zeros(0, np.int64)  # the flat index of each token of the row before
    previous = np.zeros(0, np.int32)
    for i in order:
        row = examples[i]
        shared = common_prefix(previous, row.ids)
        subtree_end[path[shared:]] = nodes  # nothing more comes below what this row leaves
        new = slice(nodes, nodes + len(row) - shared)
        indices = np.arange(new.start, new.stop)
        token[new] = row.ids[shared:]
        depth[new] = np.arange(shared, len(row))
        parent[new] = indices - 1
        if len(indices):
            parent[new.start] = path[shared - 1] if shared else -1
        path = paths[i] = np.concatenate([path[:shared], indices])
        weight[path] += row.weights
        previous, nodes = row.ids, new.stop
    subtree_end[path] = nodes
    return Trie(token[:nodes], parent[:nodes], depth[:nodes], subtree_end[:nodes], weight[:nodes].astype(np.float32)), paths
