"""The rows of an optimizer step -> passes that each fit a budget of nodes.

A pass is what goes through the model at once: a `Trie`, or a few rows that are padded side by side. Weights add up over
passes, so how a step is split changes nothing that is learned; it changes only how often a shared prefix is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from weitiao.trie import Example, Trie, build, common_prefix, sort_key


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
    new = [n - common_prefix(a.ids, b.ids) for n, a, b in zip(lengths[1:], rows, rows[1:])]

    def cuts(limit: int) -> list[int]:
        """Where passes start when each takes rows until `limit` nodes."""
        starts, nodes = [0], lengths[0]
        for i, more in enumerate(new, 1):
            nodes += more
            if nodes > limit:
                starts.append(i)
                nodes = lengths[i]
        return starts

    longest = max(lengths)
    limit = _smallest(lambda n: len(cuts(n)), low=longest, high=max(longest, budget))
    starts = cuts(limit)
    return [rows[a:b] for a, b in zip(starts, starts[1:] + [len(rows)])]


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
