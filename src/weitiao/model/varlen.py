"""Attention over a trie with the flash kernel for rows of various lengths: two calls a layer, whatever the trie.

Indexed by keys, as `attention.ByKeys` is: a segment's keys are seen by the segment itself, causally, and by all below it.

    own     every segment with itself                  one causal call; nodes stand in order already
    below   every segment with all that is below it    one call without a mask; queries are gathered, once for each
            (and a prefix with all nodes)              segment above them

Merged by log-sum-exp, one level of the trie after the other: on a level no node occurs twice, so that no two are written to one
place at once. The backward is flash attention's with the log-sum-exp of all keys, which makes the parts' gradients add up (Dao et
al. 2022, arXiv:2205.14135, algorithm 4); the kernel adds up a query's in an order that changes from run to run, FlexAttention does not.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from weitiao.data.batch import Plan

TYPES = (torch.bfloat16, torch.float16)
WIDEST = 256  # of a head


class Kernel(Protocol):
    """Attention of rows that stand one behind the other: query [Q, heads, d], key and value [K, kv_heads, d]; row i is
    cu_q[i]:cu_q[i+1] of the queries and cu_k[i]:cu_k[i+1] of the keys. lse [heads, Q] is the log-sum-exp of the scaled scores."""

    def forward(self, query, key, value, cu_q, cu_k, most_q: int, most_k: int, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [Q, heads, d], lse)"""

    def backward(self, grad, query, key, value, out, lse, cu_q, cu_k, most_q: int, most_k: int, causal: bool, scale: float,
                 ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(d_query, d_key, d_value)"""


class Flash:
    """torch's own (`torch.nn.attention.varlen` wraps the same), with a backward that takes a log-sum-exp not its own."""

    @staticmethod
    def forward(query, key, value, cu_q, cu_k, most_q, most_k, causal, scale):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, cu_q, cu_k, most_q, most_k, 0.0, causal, False, scale=scale,
        )
        return out, lse

    @staticmethod
    def backward(grad, query, key, value, out, lse, cu_q, cu_k, most_q, most_k, causal, scale):
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, lse, cu_q, cu_k, most_q, most_k, 0.0, causal, no_dropout,
            torch.empty(0, device=query.device), scale=scale,
        )


class Rows(NamedTuple):
    """Where the rows of a call begin, int32 [rows + 1], and the longest of them."""

    cu: torch.Tensor
    most: int

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device) -> Rows:
        cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(torch.from_numpy(cu).to(device), int(lengths.max(initial=0)))


class Calls(NamedTuple):
    """The two calls of a layer. queries: int64 [M], the node of each gathered query, level by level; keys: int64, gathered too.

    levels: slices of `queries`; within one of them no node occurs twice.
    """

    own: Rows
    queries: torch.Tensor
    keys: torch.Tensor
    below_q: Rows
    below_k: Rows
    levels: list[slice]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float, window: int | None,
    kernel: Kernel = Flash,
) -> torch.Tensor:
    """query [1, heads, T, d], key and value [1, kv_heads, V + T, d] -> [1, heads, T, d]"""
    assert window is None
    prefix = key.shape[2] - query.shape[2]
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    return _ByKeys.apply(*rows, prefix, calls(plan, prefix, query.device), scale, kernel).transpose(0, 1)[None]


def takes(query: torch.Tensor, value: torch.Tensor, window: int | None) -> bool:
    width = query.shape[-1]
    return window is None and query.dtype in TYPES and width == value.shape[-1] <= WIDEST and width % 8 == 0


def calls(plan: Plan, prefix: int, device: torch.device) -> Calls:
    name = ("varlen", prefix, device)
    if name not in plan.made:
        plan.made[name] = _calls(plan, prefix, device)
    return plan.made[name]


def _calls(plan: Plan, prefix: int, device: torch.device) -> Calls:
    nodes = plan.segments[-1].end
    seen: list[list[tuple[slice, slice]]] = [[(slice(0, prefix), slice(0, nodes))]] if prefix else []  # by level: (keys, queries)
    above: list[int] = []  # where the segments over the current one end
    for start, end, below in plan.segments:
        while above and above[-1] <= start:
            above.pop()
        level = len(above) + bool(prefix)
        if below > end:
            seen.extend([] for _ in range(level + 1 - len(seen)))
            seen[level].append((slice(prefix + start, prefix + end), slice(end, below)))
        above.append(below)
    parts = [part for level in seen for part in level]
    sizes = [sum(_length(queries) for _, queries in level) for level in seen]
    stops = np.cumsum(sizes, dtype=np.int64).tolist()
    return Calls(
        Rows.of(np.array([end - start for start, end, _ in plan.segments]), device),
        _joined([queries for _, queries in parts], device), _joined([keys for keys, _ in parts], device),
        Rows.of(np.array([_length(queries) for _, queries in parts], np.int64), device),
        Rows.of(np.array([_length(keys) for keys, _ in parts], np.int64), device),
        [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)],
    )


def _length(part: slice) -> int:
    return part.stop - part.start


def _joined(parts: list[slice], device: torch.device) -> torch.Tensor:
    indices = np.concatenate([np.arange(0), *(np.arange(part.start, part.stop) for part in parts)])
    return torch.from_numpy(indices.astype(np.int64)).to(device)


class _ByKeys(torch.autograd.Function):
    """query [T, heads, d], key and value [V + T, kv_heads, d] -> [T, heads, d]; parts are summed in float32 or wider."""

    @staticmethod
    def forward(ctx, query, key, value, prefix: int, plan: Calls, scale: float, kernel: Kernel):
        out, lse = kernel.forward(query, key[prefix:], value[prefix:], *_both(plan.own), True, scale)
        if len(plan.queries):
            part, part_lse = kernel.forward(
                query[plan.queries], key[plan.keys], value[plan.keys], *_pair(plan.below_q, plan.below_k), False, scale,
            )
            out, lse = _merged(out, lse, part, part_lse, plan)
            out = out.to(query.dtype)
        out = out.contiguous()
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.prefix, ctx.plan, ctx.scale, ctx.kernel = prefix, plan, scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        plan, prefix = ctx.plan, ctx.prefix
        grad = grad.contiguous()
        d_query, d_key, d_value = ctx.kernel.backward(
            grad, query, key[prefix:], value[prefix:], out, lse, *_both(plan.own), True, ctx.scale,
        )
        if not len(plan.queries):
            return d_query, d_key, d_value, None, None, None, None
        at, keys = plan.queries, plan.keys
        part_query, *parts = ctx.kernel.backward(
            grad[at], query[at], key[keys], value[keys], out[at], lse[:, at].contiguous(), *_pair(plan.below_q, plan.below_k), False, ctx.scale,
        )
        wide = torch.promote_types(query.dtype, torch.float32)
        d_query = d_query.to(wide)
        for level in plan.levels:
            d_query[at[level]] += part_query[level]
        totals = []
        for own, part, like in zip((d_key, d_value), parts, (key, value), strict=True):
            total = torch.zeros(like.shape, dtype=wide, device=like.device)
            total[prefix:] = own
            total[keys] += part  # a key is gathered once
            totals.append(total.to(like.dtype))
        return d_query.to(query.dtype), *totals, None, None, None, None


def _both(rows: Rows) -> tuple[Any, ...]:
    return _pair(rows, rows)


def _pair(queries: Rows, keys: Rows) -> tuple[Any, ...]:
    return queries.cu, keys.cu, queries.most, keys.most


def _merged(out, lse, part, part_lse, plan: Calls) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax over the keys of both, weights exp(lse): out [T, heads, d] and lse [heads, T], and of the gathered queries."""
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    lse = lse.clone()
    for level in plan.levels:
        nodes = plan.queries[level]
        before, more = lse[:, nodes], part_lse[:, level]
        total = torch.logaddexp(before, more)
        out[nodes] = out[nodes] * _weight(before, total) + part[level] * _weight(more, total)
        lse[:, nodes] = total
    return out, lse


def _weight(lse: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """[heads, Q] -> [Q, heads, 1]"""
    return (lse - total).exp().T[..., None]
