"""Attention over a trie with FlexAttention: one kernel for all segments, which skips what no query of a block sees.

    Plan.segments ──┬── bounds    each key is seen by one slice of queries, [first, end)      numpy, O(T)
                    └── blocks    of 128 x 128: wholly seen, partly seen, or left out         numpy, O((T / 128)^2)
                    ── BlockMask, kept on the plan: built once a pass, shared by all layers

    sees(q, k) = first[k] <= q < end[k]       and, under a sliding window, place[q] < until[k]

A key that a prefix put first is seen by every node: first = 0, end = T. Nothing that depends on the trie is a constant of the
kernel, so that it is compiled once for passes of every length (FlexAttention: Dong et al. 2024, arXiv:2412.05496).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch

from weitiao.data.batch import Plan

BLOCK = 128  # places a side; FlexAttention's own default
LEAST_WIDTH = 16  # of a head: triton multiplies nothing narrower
COMPILED = 64
TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Bounds(NamedTuple):
    """Which queries see each key: int64 [V + T] each, but `place`, [T].

    first, end: the slice of queries. place: of a query, how many keys stand before it in its row, the prefix's among them.
    until: one past the last place that still sees the key through the window.
    """

    first: np.ndarray
    end: np.ndarray
    place: np.ndarray
    until: np.ndarray


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float, window: int | None) -> torch.Tensor:
    """query [1, heads, T, d], key and value [1, kv_heads, V + T, d] -> [1, heads, T, d]. On a CPU it is torch's own judge of
    the kernel, which holds all scores: for tests."""
    mask = block_mask(plan, key.shape[2] - query.shape[2], window, query.device)
    kernel = compiled() if query.is_cuda else _plain()
    return kernel(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


def takes(query: torch.Tensor, value: torch.Tensor, window: int | None) -> bool:
    return min(query.shape[-1], value.shape[-1]) >= LEAST_WIDTH and query.dtype in TYPES


@functools.cache
def compiled() -> Any:
    """FlexAttention as one kernel for every length. Were it compiled too often, torch would go back to holding all scores without
    a word; `fullgraph` makes that an error, and what there is (with a gradient or without, windows, passes of a single block, each
    twice) stays far under the limit."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED)
    return torch.compile(_plain(), dynamic=True, fullgraph=True)


def _plain() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


# ------------------------------------------------------------------------------------------------------ who sees whom


def block_mask(plan: Plan, prefix: int, window: int | None, device: torch.device) -> Any:
    """The BlockMask of a pass whose keys begin with `prefix` places that every node sees; made once."""
    name = ("flex", prefix, window, device)
    if name not in plan.made:
        plan.made[name] = _block_mask(plan, prefix, window, device)
    return plan.made[name]


def _block_mask(plan: Plan, prefix: int, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    limits = bounds(plan, prefix, window)
    whole, partly = blocks(limits, window)
    made = BlockMask.from_kv_blocks(
        *_listed(partly), *_listed(whole), BLOCK_SIZE=BLOCK, seq_lengths=(len(limits.place), len(limits.first)),
        mask_mod=_mask(*(torch.from_numpy(array.astype(np.int32)).to(device) for array in limits), window is not None),
    )
    return made.to(device)


def bounds(plan: Plan, prefix: int, window: int | None = None) -> Bounds:
    """From the segments alone, which are on the host: to read a tensor back would make the GPU wait."""
    nodes = plan.segments[-1].end
    end, depth = np.empty(nodes, np.int64), np.empty(nodes, np.int64)
    above: list[tuple[int, int]] = []  # of the segments over the current one: (below, depth of what comes next)
    for start, stop, below in plan.segments:
        while above and above[-1][0] <= start:
            above.pop()
        at = above[-1][1] if above else 0
        end[start:stop] = below
        depth[start:stop] = np.arange(at, at + stop - start)
        above.append((below, at + stop - start))
    first = np.concatenate([np.zeros(prefix, np.int64), np.arange(nodes)])
    place = depth + prefix
    return Bounds(
        first, np.concatenate([np.full(prefix, nodes), end]), place,
        np.concatenate([np.arange(prefix), place]) + (window or len(first) + 1),
    )


def blocks(limits: Bounds, window: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(wholly seen, partly seen), bool [blocks of queries, blocks of keys].

    Keys of a block begin to be seen one query after the other, so that two numbers of each tell whether any pair is seen:
    some key is seen from inside the block of queries on, or one of those seen before is seen still. Under a window a block
    may be called partly seen of which nothing is: the mask decides.
    """
    nodes, keys = len(limits.place), len(limits.first)
    q0 = np.arange(0, nodes, BLOCK)[:, None]
    k0 = np.arange(0, keys, BLOCK)
    q1 = np.minimum(q0 + BLOCK, nodes)
    earliest, latest = limits.first[k0], limits.first[np.minimum(k0 + BLOCK, keys) - 1]
    seen = (earliest < q1) & ((latest >= q0) | (np.maximum.reduceat(limits.end, k0) > q0))
    whole = (latest <= q0) & (np.minimum.reduceat(limits.end, k0) >= q1)
    whole &= (q0 + BLOCK <= nodes) & (k0 + BLOCK <= keys)
    if window is not None:
        at = np.arange(0, nodes, BLOCK)
        seen &= np.minimum.reduceat(limits.place, at)[:, None] < np.maximum.reduceat(limits.until, k0)
        whole &= np.maximum.reduceat(limits.place, at)[:, None] < np.minimum.reduceat(limits.until, k0)
    return whole & seen, seen & ~whole


def _listed(dense: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [R, C] -> how many of each row, int32 [1, 1, R], and which come first, int32 [1, 1, R, C]"""
    counts = dense.sum(axis=1, dtype=np.int32)
    order = np.argsort(~dense, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(counts)[None, None], torch.from_numpy(order)[None, None]


def _mask(first: torch.Tensor, end: torch.Tensor, place: torch.Tensor, until: torch.Tensor, near: bool) -> Any:
    """What FlexAttention asks of each pair in a block that is partly seen."""

    def sees(batch, head, q, k):
        return (first[k] <= q) & (q < end[k])

    def sees_near(batch, head, q, k):
        return (first[k] <= q) & (q < end[k]) & (place[q] < until[k])

    return sees_near if near else sees
