"""The rows of an optimizer step -> passes that each fit a budget of nodes.

A pass is what goes through the model at once: a `Trie`, or a few rows that are padded side by side. Weights add up over
passes, so how a step is split changes nothing that is learned; it changes only how often a shared prefix is computed.

    rows       A B C d      A B C e f      A B g h      A B i       (each too long for a pass with another)

    tries      A B C d   |  A B C e f   |  A B g h   |  A B i       `trie_rows`: what is shared is computed in each
    parts      A B   ──  C  ──  d  |  e f          |  g h  |  i     `parts`: first, by itself, and the others go on behind it
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from weitiao.trie import Example, Trie, build, common_prefix, sort_key

WORTH = 256  # nodes that a stem has to spare the passes behind it; a call of the model for fewer costs more
NEVER = math.inf
LEAST = 64  # tokens of a row that virtual ones leave room for in a pass


def room(budget: int, virtual_tokens: int) -> int:
    """Of a pass of so many nodes, for its rows."""
    return max(budget - virtual_tokens, min(budget, LEAST))


def trie_passes(examples: Sequence[Example], budget: int) -> list[Trie]:
    """Tries of at most `budget` nodes each, or of the longest row where that is more."""
    return [build(rows) for rows in trie_rows(examples, budget)]


def trie_rows(examples: Sequence[Example], budget: int) -> list[list[Example]]:
    """The rows of each of these tries.

    Rows are sorted, so each cut falls at a branch, and the shared prefix is repeated in both parts. With the number of
    passes known, the cuts are moved so that the largest pass is as small as can be: that bounds the memory. All nodes count, those
    too that need not be computed.
    """
    rows = sorted(examples, key=sort_key)
    lengths = [len(row) for row in rows]
    starts = _starts(lengths, _shared(rows), max(lengths), budget)
    return [rows[a:b] for a, b in zip(starts, [*starts[1:], len(rows)])]


def _shared(rows: Sequence[Example]) -> list[int]:
    """How many first ids each row but the first shares with the one before it."""
    return [common_prefix(a.ids, b.ids) for a, b in zip(rows, rows[1:])]


def _starts(lengths: Sequence[int], shared: Sequence[int], low: int, high: int) -> list[int]:
    """Where passes start: as few as passes of `high` nodes are, and those no larger than they have to be, nor smaller than `low`."""
    def cuts(limit: int) -> list[int]:
        """When each takes rows until `limit` nodes."""
        starts, nodes = [0], lengths[0]
        for i, common in enumerate(shared, 1):
            nodes += lengths[i] - common
            if nodes > limit:
                starts.append(i)
                nodes = lengths[i]
        return starts

    return cuts(_smallest(lambda n: len(cuts(n)), low, max(low, high)))


@dataclass(frozen=True, eq=False)
class Part:
    """What one pass computes of some rows: the places of their trie from `behind` on, of a stem those before `end`.

    behind: how many first tokens of all of these rows earlier parts, stems, have computed. end: of a stem, one past its last
    place: the rows have all tokens before it in common, and parts that follow go on behind it; None: no stem.
    again: is a stem computed once more when it goes back, so that its activations need not wait for the parts behind it?
    """

    rows: Sequence[Example]
    behind: int = 0
    end: int | None = None
    again: bool = False

    @functools.cached_property
    def trie(self) -> Trie:
        """Of the rows, of a stem's as far as it predicts."""
        if self.end is None:
            return build(self.rows)
        return build([Example(row.ids[: self.end + 1], row.weights[: self.end + 1], row.row) for row in self.rows])

    def computed(self) -> np.ndarray:
        """bool [T]: which nodes of `trie` the pass computes."""
        if self.end is None:
            nodes = self.trie.needed()
            nodes[: self.behind] = False  # in common, so the first ones
            return nodes
        at = np.arange(len(self.trie))
        return (at >= self.behind) & (at < self.end)

    @functools.cached_property
    def nodes(self) -> int:
        """How many those are."""
        return int(self.computed().sum()) if self.end is None else self.end - self.behind

    @property
    def is_run(self) -> bool:
        """Does nothing branch in it?"""
        return self.end is not None or bool((self.trie.subtree_end == len(self.trie)).all())


def parts(examples: Sequence[Example], budget: int, worth: float = WORTH) -> list[Part]:
    """Passes of which those that share a prefix worth it go on behind a stem of that: in depth-first order, so that a part goes on
    behind the last stem before it that ends at its `behind`. Of a part there may be nothing left to compute; such are left out.

    budget: nodes whose activations are there at once: of a part and of the stems above it that are not computed again. A longer row goes
    through in pieces. worth: nodes that a stem spares at least; NEVER: no stems, and no pieces: passes as of `trie_rows`.
    """
    if worth == NEVER:
        return [part for part in map(Part, trie_rows(examples, budget)) if part.nodes]
    rows = sorted(filter(None, map(_learned, examples)), key=sort_key)
    if not rows:
        return []
    shared = _shared(rows)
    # A long prefix of all rows is computed again rather than taking the room of what goes on behind it.
    first = min(shared, default=0)
    if 2 * first < budget or first < worth or sum(map(len, rows)) - sum(shared) <= budget:
        first = 0
    starts = _starts([len(row) - first for row in rows], [n - first for n in shared], 1, budget)
    found = _behind_stems(rows, shared, [*starts, len(rows)], first, worth)
    return _within(budget, [piece for part in found for piece in _pieces(part, budget)])


def _learned(row: Example) -> Example | None:
    """Up to the last token that is learned; None: nothing is."""
    stop = int(np.flatnonzero(row.weights)[-1]) + 1 if row.weights.any() else 0
    return None if not stop else row if stop == len(row) else Example(row.ids[:stop], row.weights[:stop], row.row)


def _behind_stems(rows: Sequence[Example], shared: Sequence[int], starts: list[int], first: int, worth: float) -> Iterator[Part]:
    """starts: where passes start, and where the last ends. first: of how many tokens there is to be a stem above all, if of any."""
    if first:
        yield Part(rows, 0, first)
    todo = [(starts, first)]
    while todo:
        starts, behind = todo.pop()
        some = rows[starts[0] : starts[-1]]
        if len(starts) == 2:
            yield Part(some, behind)
            continue
        weakest = min(shared[starts[0] : starts[-1] - 1])
        if (len(starts) - 2) * (weakest - behind) >= worth:
            yield Part(some, behind, weakest)
            behind = weakest
        todo += [(group, behind) for group in reversed(_parted(starts, shared, weakest, behind + worth))]


def _pieces(part: Part, budget: int) -> Iterator[Part]:
    """The part, or where it is one run of more nodes than the budget, stems of like length that each go on behind the one before it."""
    if not part.nodes:
        return
    count = -(-part.nodes // budget)
    if count == 1 or not part.is_run:
        yield part
        return
    cuts = np.linspace(part.behind, part.behind + part.nodes, count + 1).astype(int).tolist()
    for behind, end in zip(cuts, cuts[1:-1]):
        yield Part(part.rows, behind, end)
    yield replace(part, behind=cuts[-2])


def _within(budget: int, found: Sequence[Part]) -> list[Part]:
    """The same with so many stems computed again, the longest first, that no more than the budget is there at once."""
    again: set[Part] = set()
    for part, above in with_stems(found):
        while (kept := [stem for stem in above if stem not in again]) and part.nodes + sum(stem.nodes for stem in kept) > budget:
            again.add(max(kept, key=lambda stem: stem.nodes))
    return [replace(part, again=True) if part in again else part for part in found]


def with_stems(found: Iterable[Part]) -> Iterator[tuple[Part, list[Part]]]:
    """Each of these parts, in their order, and the stems that it goes on behind, the first places first."""
    above: list[Part] = []
    for part in found:
        while above and above[-1].end > part.behind:
            above.pop()
        yield part, [*above]
        if part.end is not None:
            above.append(part)


def _parted(starts: Sequence[int], shared: Sequence[int], weakest: int, worth: float) -> list[list[int]]:
    """Groups of passes, parted where neighbouring rows share least.

    A pass that has such neighbours in itself is a group of its own; but what it has before the first or behind the last of them
    becomes one more pass of the group next to it, if it shares so much as `worth` with that.
    """
    bounds, breaks = set(starts), {starts[0], starts[-1]}
    for start, stop in zip(starts, starts[1:]):
        weak = [i for i in range(start + 1, stop) if shared[i - 1] == weakest]
        if weak:
            joins_last = start > starts[0] and min(shared[start - 1 : weak[0] - 1]) >= worth
            joins_next = stop < starts[-1] and min(shared[weak[-1] : stop]) >= worth
            parted = weak[0] if joins_last else start, weak[-1] if joins_next else stop
            bounds.update(parted)
            breaks.update(parted)
        elif start > starts[0] and shared[start - 1] == weakest:
            breaks.add(start)
    every = sorted(bounds)
    at = [bisect_left(every, edge) for edge in sorted(breaks)]
    return [every[a : b + 1] for a, b in zip(at, at[1:])]


def padded_passes(examples: Sequence[Example], budget: int, virtual_tokens: int = 0) -> list[list[Example]]:
    """Rows of like length side by side, at most `budget` places each, pads and each row's virtual tokens included.

    The second, independent path.
    """
    passes: list[list[Example]] = []
    for row in sorted(examples, key=lambda e: (len(e), sort_key(e))):
        if passes and (len(passes[-1]) + 1) * (virtual_tokens + len(row)) <= budget:
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes


def _smallest(passes_at: Callable[[int], int], low: int, high: int) -> int:
    """The smallest limit from `low` on that needs no more passes than `high` does."""
    wanted = passes_at(high)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes_at(middle) <= wanted else (middle + 1, high)
    return high
