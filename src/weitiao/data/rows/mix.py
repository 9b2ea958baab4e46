"""The rows of several sources -> one list of rows, each source with its share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weitiao.data.rows.row import Row


def mix(sources: Sequence[Sequence[Row]], shares: Sequence[float | None], seed: int) -> list[Row]:
    """The rows of several sources, as many as all hold together, source `i` with its share of them.

    Without shares, all rows one after the other. With shares, a source's rows come in a seeded order, and none comes a
    second time before all have come once.
    """
    assert len(sources) == len(shares)
    if all(share is None for share in shares):
        return [row for source in sources for row in source]
    assert all(share is not None and share >= 0 for share in shares) and sum(shares) > 0
    counts = _apportion(shares, sum(map(len, sources)))
    return [
        row
        for i, (source, count) in enumerate(zip(sources, counts, strict=True))
        for row in _draw(source, count, np.random.default_rng([seed, i]))
    ]


def _apportion(shares: Sequence[float], total: int) -> list[int]:
    """Largest remainder, so that the counts sum to the total: shares 1, 1, 1 of 10 -> 4, 3, 3."""
    quotas = [share / sum(shares) * total for share in shares]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _draw(source: Sequence[Row], count: int, rng: np.random.Generator) -> list[Row]:
    assert source or not count
    order: list[int] = []
    while len(order) < count:
        order.extend(rng.permutation(len(source)).tolist())
    return [source[i] for i in order[:count]]
