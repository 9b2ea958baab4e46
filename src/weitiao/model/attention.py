"""What a trie needs of attention: a node sees its ancestors and itself.

Indexed by keys. A segment (an unbranching run of nodes) is seen by itself, causally, and by everything below it, wholly;
both are contiguous slices of queries, because depth-first order makes a subtree a slice:

    keys of segment [s, e)   <-  queries [s, e)       causal
                             <-  queries [e, below)   unmasked

So each segment is one causal and one unmasked call of a flash kernel, merged by log-sum-exp; the backward is flash
attention's with the global log-sum-exp (Dao et al. 2022, arXiv:2205.14135, algorithm 4; the merge as in ring attention,
Liu et al. 2023, arXiv:2310.01889). No mask is built, no key is copied, and each is kept once.

Five ways to the same numbers:

    cpu, gpu   a device's own, in `model/cpu.py` and `model/gpu.py`: no dropout
    by_keys    the above. Full attention, no dropout, on a device whose flash kernel hands out its log-sum-exp
    by_paths   every segment attends to the concatenated keys of its own path: windows, dropout, any device
    dense      one T x T boolean mask: the definition, and the judge of the others

`register()` makes it an attention of transformers by the name "weitiao"; without a plan it is sdpa to the letter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from weitiao.data.batch import Plan
from weitiao.model import cpu, gpu
from weitiao.trie import Segment

NAME = "weitiao"
OWN = {"cpu": cpu.attend, "cuda": gpu.attend}


class TrieUnsupported(Exception):
    """This attention asks for something that a trie cannot give; the run falls back to padded rows."""


def register() -> str:
    """Register the attention (and sdpa's mask with it) in transformers; returns the name to load a model with."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, trie_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def trie_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    trie: Plan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in every layer.

    query [1, heads, T, d], key and value [1, kv_heads, V + T, d]; returns [1, T, heads, d]. The V keys that a prefix put
    first are seen by every node.
    """
    if trie is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )
    _refuse_unknown(kwargs)
    # Under autocast rope hands out fp32 beside a bf16 value; sdpa would cast, and so do we.
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # A window wider than the longest row hides nothing.
    prefix = key.shape[2] - query.shape[2]
    window = sliding_window if sliding_window and sliding_window < prefix + trie.longest else None
    return attend(query, key, value, trie, scale, window, dropout, getattr(module, "layer_idx", id(module))).transpose(1, 2), None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float, window: int | None, dropout: float,
    layer: int,
) -> torch.Tensor:
    """query [1, heads, T, d], key and value [1, kv_heads, V + T, d] of a layer -> [1, heads, T, d]; as the plan's memory has
    it, where there is one."""
    if plan.memory is not None:
        return plan.memory.attend(layer, query, key, value, plan, scale, window, dropout)
    return attend_within(query, key, value, plan, scale, window, dropout)


def attend_within(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float, window: int | None, dropout: float = 0.0,
) -> torch.Tensor:
    """The quickest of the ways that can; shapes as above."""
    own = OWN.get(_device(query))
    if own and (out := own(query, key, value, plan, scale, window, dropout)) is not None:
        return out
    if window is None and dropout == 0.0 and _has_flash_kernel(query, value):
        return ByKeys.apply(query, key, value, plan.segments, scale)
    return by_paths(query, key, value, plan, scale, window, dropout)


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Soft cap, sinks and position biases change the scores; an attention that ignored them would be silently wrong."""
    for name in ("softcap", "s_aux", "position_bias", "sinks"):
        if kwargs.get(name) is not None:
            raise TrieUnsupported(f"its attention uses {name}")


_assumed: str | None = None


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Take the ways of a kind of device, for the block, wherever tensors are: a plan is made without one."""
    global _assumed
    before, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = before


def _device(tensor: torch.Tensor) -> str:
    return _assumed or tensor.device.type


def _has_flash_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    return _device(query) == "cpu" and query.shape[-1] == value.shape[-1]


class ByKeys(torch.autograd.Function):
    """Attention over a trie, indexed by the keys of its segments; see the head of this file.

    query [1, heads, T, d], key and value [1, kv_heads, V + T, d] -> [1, heads, T, d]. Partial sums are kept in fp32 (or
    the input's type where that is wider), so that merging many segments costs bf16 nothing.
    """

    @staticmethod
    def forward(ctx, query, key, value, segments, scale):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.empty(query.shape, dtype=wide, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=wide, device=query.device)
        for keys, queries, causal, first, _ in _calls(segments, query.shape[2], key.shape[2]):
            o, l = flash(query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, causal, scale=scale)
            if first:
                out[:, :, queries], lse[:, :, queries] = o, l
            else:
                merge(out[:, :, queries], lse[:, :, queries], o, l)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        *saved, lse = ctx.saved_tensors
        wide = lse.dtype
        types = [x.dtype for x in saved[:3]]
        # The CPU kernel's backward is three times as fast in fp32 as in bf16 on segments this short, and more exact.
        grad, query, key, value, out = (x.to(wide) for x in (grad, *saved))
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        for keys, queries, causal, first, first_of_keys in _calls(ctx.segments, query.shape[2], key.shape[2]):
            dq, dk, dv = backward(
                grad[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys],
                out[:, :, queries], lse[:, :, queries], 0.0, causal, scale=ctx.scale,
            )
            for total, places, part, new in ((d_query, queries, dq, first), (d_key, keys, dk, first_of_keys), (d_value, keys, dv, first_of_keys)):
                if new:
                    total[:, :, places] = part
                else:
                    total[:, :, places] += part
        return *(d.to(t) for d, t in zip((d_query, d_key, d_value), types, strict=True)), None, None


def _calls(segments: list[Segment], nodes: int, keys: int) -> Iterator[tuple[slice, slice, bool, bool, bool]]:
    """(keys, queries, causal, are these queries seen for the first time, are these keys) of each kernel call: a segment with
    itself, then everything below it with the segment. What lies below one segment was seen with it, all of it."""
    prefix = keys - nodes
    seen = 0
    if prefix:
        yield slice(0, prefix), slice(0, nodes), False, True, True
        seen = nodes
    for start, end, below in segments:
        own = slice(prefix + start, prefix + end)
        yield own, slice(start, end), True, start >= seen, True
        seen = max(seen, end)
        if below > end:
            yield own, slice(end, below), False, end >= seen, False
            seen = max(seen, below)


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Add one more set of keys to a softmax, in place. Weights of old and new sum to one: exp(lse) are the two totals.

    out and part [..., d], lse and part_lse [...]. Where nothing was seen yet lse is -inf and out is 0.
    """
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp_()[..., None]).addcmul_(part, (part_lse - total).exp_()[..., None])
    lse.copy_(total)


def part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to some of the keys, to be merged with the rest: out [B, heads, q, d] and lse [B, heads, q], float32 (or
    float64, for inputs of that type).

    query [B, heads, q, d], key and value [B, heads, k, d]; mask: what is added to the scores, [B, 1, 1 or q, k] in the type of
    query. A finite number stands for "not seen", so that a query that sees no key at all gets a weight of 0 in the merge.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    if _has_flash_kernel(query, value):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        return out.to(wide), lse
    scores = (query @ key.transpose(-1, -2)).to(wide) * scale
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp_().to(value.dtype) @ value).to(wide), lse


def by_paths(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float,
    window: int | None = None, dropout: float = 0.0,
) -> torch.Tensor:
    """Every segment attends to the concatenated keys of its own path, with sdpa. Same shapes as `ByKeys`.

    On a path the key's place is its depth (behind the prefix), so causality and the window are a comparison of places.
    """
    prefix = torch.arange(key.shape[2] - query.shape[2], device=query.device)
    outputs: list[torch.Tensor] = []
    path: list[Segment] = []  # the segments above the current one, and itself
    for segment in plan.segments:
        while path and path[-1].below <= segment.start:
            path.pop()
        path.append(segment)
        above = torch.cat([prefix, *(torch.arange(s.start, s.end, device=query.device) + len(prefix) for s in path)])
        first_query = len(above) - (segment.end - segment.start)
        first_key = max(0, first_query - window + 1) if window else 0
        places_q = torch.arange(first_query, len(above), device=query.device)[:, None]
        places_k = torch.arange(first_key, len(above), device=query.device)[None, :]
        mask = places_k <= places_q
        if window:
            mask &= places_q - places_k < window
        keys = above[first_key:]
        outputs.append(
            _sdpa(query[:, :, segment.start : segment.end], key[:, :, keys], value[:, :, keys], mask, scale, dropout)
        )
    return torch.cat(outputs, dim=2)


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float, window: int | None = None,
) -> torch.Tensor:
    """One masked call: sees(q, k) = k <= q < subtree_end[k], and depth[q] - depth[k] < window. The judge."""
    nodes = torch.arange(query.shape[2], device=query.device)
    prefix = torch.arange(key.shape[2] - query.shape[2], device=query.device)
    mask = (nodes[None, :] <= nodes[:, None]) & (nodes[:, None] < plan.subtree_end[None, :])
    mask = torch.cat([mask.new_ones(len(nodes), len(prefix)), mask], dim=1)
    if window:
        places = torch.cat([prefix, plan.depth + len(prefix)])
        mask &= places[len(prefix) :, None] - places[None, :] < window
    return _sdpa(query, key, value, mask, scale)


def _sdpa(query, key, value, mask: torch.Tensor, scale: float, dropout: float = 0.0) -> torch.Tensor:
    """Masked sdpa with fewer key heads than query heads. CUDA's fast kernels take a mask or grouped heads, not both."""
    on_gpu = _device(query) == "cuda"
    if on_gpu:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=not on_gpu,
    )
