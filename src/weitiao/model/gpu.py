"""A GPU's ways to attend over a trie, in the order in which they are taken: the first that can, and that runs on this GPU.

    flex      FlexAttention: one kernel that skips what nobody sees; windows too. Wants triton
    varlen    the flash kernel that PyTorch brings, two calls; no windows; 16 bits only

Neither knows dropout. Where none can, `attention.by_paths` does.
"""

from __future__ import annotations

import functools
import warnings

import numpy as np
import torch

from weitiao.data.batch import Plan, trie_batch
from weitiao.errors import OutOfMemory
from weitiao.model import flex, varlen
from weitiao.trie import Example, build

WAYS = {"flex": flex, "varlen": varlen}


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float, window: int | None, dropout: float,
) -> torch.Tensor | None:
    """query [1, heads, T, d], key and value [1, kv_heads, V + T, d] -> [1, heads, T, d]; None if no way can.

    Tensors that are not on a GPU stand for some that will be: they are given the bytes that the way keeps.
    """
    if dropout:
        return None
    for name, way in WAYS.items():
        if way.takes(query, value, window):
            if not query.is_cuda:
                return Kept.apply(query, key, value)
            if works(name, query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]):
                return way.attend(query, key, value, plan, scale, window)
    return None


@functools.cache
def works(name: str, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int, value_width: int) -> bool:
    """Does it run on this GPU, forward and backward, with such heads? Tried once; a no is told."""
    plan = _trial(device)

    def draw(count: int, size: int) -> torch.Tensor:
        return torch.randn(1, len(plan.depth), count, size, dtype=dtype, device=device).transpose(1, 2).requires_grad_()

    try:
        # Apart from what surrounds it: a checkpoint counts the tensors that are saved inside it, and noise is the step's own.
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), \
                torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            inputs = draw(heads, width), draw(kv_heads, width), draw(kv_heads, value_width)
            WAYS[name].attend(*inputs, plan, 1.0, None).sum().backward()
        return all(bool(tensor.grad.isfinite().all()) for tensor in inputs)
    except Exception as error:  # the compiler's, triton's or the driver's: whatever it is, there is another way
        if OutOfMemory.of(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        warnings.warn(f"Attention by {name} does not run on this GPU: {reason}. Another way is taken, which may be slower.", stacklevel=2)
        return False


def _trial(device: torch.device) -> Plan:
    """A trie of three segments, longer than a block of FlexAttention's."""
    rows = [np.repeat([0, branch], 150).astype(np.int32) for branch in (1, 2)]
    return trie_batch(build([Example(ids, np.zeros(len(ids), np.float32)) for ids in rows]), device)["trie"]


class Kept(torch.autograd.Function):
    """What these ways leave in memory, and nothing of what they compute: for a plan that is made of shapes alone.

    Forward keeps query, key, value, output and a float32 a query and head; backward makes their gradients, and one such more.
    """

    @staticmethod
    def forward(ctx, query, key, value):
        rows, heads, nodes, _ = query.shape
        out = query.new_empty(rows, nodes, heads, value.shape[-1]).transpose(1, 2)  # as the projection behind it reads it
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, lse = ctx.saved_tensors
        delta = torch.empty_like(lse)  # sum of out * grad
        gradients = tuple(torch.empty_like(x) for x in (query, key, value))
        del delta
        return gradients
