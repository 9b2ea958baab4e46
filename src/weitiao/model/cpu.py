"""A CPU's own way to attend over a trie: native/attention.c, which the machine's C compiler builds (`compiled`).

    query, key, value ── blocks of 64 keys x 64 queries: skipped, whole, or in parts ── out, log-sum-exp; their gradients

Scores stay in the processor's cache, and what no query sees is skipped; float32 goes by vectors, bfloat16 by the matrix tiles
of AMX or by AVX-512's products of pairs, and as float32 where a processor has neither. Where there is no compiler, or where
what was built does not compute what it should, PyTorch's kernels do it, segment by segment (`attention.ByKeys`): the same
numbers, later.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from weitiao.data.batch import Plan
from weitiao.model import compiled

BLOCK, LANES, TILE = 64, 16, 32
WIDEST = 1024  # of a head: the zeros of attention.c
# What a trial may differ by from float64, relative to the largest number.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class _Tensor(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("head", ctypes.c_long), ("row", ctypes.c_long)]


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("heads", "key_heads", "queries", "keys", "width", "threads")),
        ("scale", ctypes.c_float), ("first", ctypes.c_void_p), ("last", ctypes.c_void_p),
        *((name, _Tensor) for name in ("query", "key", "value", "out", "grad", "d_query", "d_key", "d_value")),
        ("lse", ctypes.c_void_p),
    ]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float, window: int | None, dropout: float,
) -> torch.Tensor | None:
    """query [1, heads, T, d], key and value [1, kv_heads, V + T, d] -> [1, heads, T, d]; None where this way cannot."""
    if window is not None or dropout or not takes(query, key, value):
        return None
    return ByBlocks.apply(query, key, value, *_seen_by(plan, key.shape[2] - query.shape[2]), scale)


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Are these of a type and width that it computes, and is it here?"""
    multiple = {torch.float32: LANES, torch.bfloat16: TILE}.get(query.dtype)
    same = query.dtype is key.dtype is value.dtype and query.shape[-1] == key.shape[-1] == value.shape[-1]
    return multiple is not None and same and query.shape[-1] % multiple == 0 and query.shape[-1] <= WIDEST and query.shape[0] == 1 and trouble(query.dtype) is None


@functools.cache
def trouble(dtype: torch.dtype) -> str | None:
    """Why PyTorch's kernels are taken for tensors of this type, in a sentence; None if they are not."""
    if dtype not in TOLERANCES:
        return f"It computes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}."
    try:
        _library()
    except compiled.NotBuilt as reason:
        return str(reason)
    worst = _trial(dtype)
    if not worst <= TOLERANCES[dtype]:  # a NaN is trouble too
        return f"What {compiled.compiler()} made of it is off by {worst:.1g}."
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    library = compiled.loaded()
    library.forward.argtypes = [ctypes.POINTER(_Job), ctypes.c_int]
    library.backward.argtypes = [ctypes.POINTER(_Job), ctypes.c_int, ctypes.c_void_p, ctypes.c_long]
    library.prepare_halves()
    return library


@functools.cache
def computes_halves() -> bool:
    """Does it multiply bfloat16, by tiles or by pairs? Otherwise they are made float32 first."""
    return bool(_library().prepare_halves())


def _trial(dtype: torch.dtype) -> float:
    """Largest difference from float64, relative, of output and gradients: 150 queries, the second half in two branches."""
    with compiled.apart():
        last = torch.full((150,), 150, dtype=torch.int32)
        last[75:110] = 110
        first = torch.arange(150, dtype=torch.int32)
        sees = (first[None] <= first[:, None]) & (first[:, None] < last[None])
        noise = torch.Generator().manual_seed(0)
        *inputs, cotangent = (torch.randn(1, 150, heads, 96, generator=noise).to(dtype).transpose(1, 2) for heads in (4, 2, 2, 4))
        ours, exact = ([x.to(kind, copy=True).requires_grad_() for x in inputs] for kind in (dtype, torch.float64))
        out = ByBlocks.apply(*ours, first, last, 0.2)
        judge = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=sees, scale=0.2, enable_gqa=True)
        gradients = torch.autograd.grad(out, ours, cotangent), torch.autograd.grad(judge, exact, cotangent.double())
        pairs = [(out.detach(), judge.detach()), *zip(*gradients, strict=True)]
        return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def _seen_by(plan: Plan, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    """first, last int32 [V + T]: key k is seen by the queries first[k] <= q < last[k]."""
    made = plan.made.get(("cpu", prefix))
    if made is None:
        nodes = len(plan.depth)
        first = torch.cat([torch.zeros(prefix, dtype=torch.int32), torch.arange(nodes, dtype=torch.int32)])
        last = torch.cat([torch.full((prefix,), nodes, dtype=torch.int32), plan.subtree_end.to(torch.int32)])
        plan.made["cpu", prefix] = made = first, last
    return made


class ByBlocks(torch.autograd.Function):
    """Attention in which key k is seen by the queries first[k] <= q < last[k], which are at least one for each query.

    query [1, heads, T, d], key and value [1, kv_heads, K, d], all float32 or all bfloat16; first, last int32 [K] -> [1, heads, T, d].
    Tensors without numbers, of which a plan is made, are given the same bytes.
    """

    @staticmethod
    def forward(ctx, query, key, value, first, last, scale):
        kind = query.dtype
        query, key, value = kept = [_dense_rows(x) for x in (query, key, value)]
        query, key, value = (_as_computed(x) for x in kept)
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)  # as the projection behind it reads it
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        if not isinstance(query, FakeTensor):
            job = _job(scale, first, last, lse, query=query, key=key, value=value, out=out)
            if _library().forward(job, query.dtype is torch.bfloat16):
                raise MemoryError("No memory for the blocks of attention.")
        out = out.to(kind)
        ctx.save_for_backward(*kept, out, lse, first, last)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, lse, first, last = ctx.saved_tensors
        kind = query.dtype
        query, key, value, out, grad = (_as_computed(x) for x in (query, key, value, out, _dense_rows(grad)))
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        sums = query.new_zeros(*_room_for_sums(query, key, torch.get_num_threads()), dtype=torch.float32)
        if not isinstance(query, FakeTensor):
            job = _job(ctx.scale, first, last, lse, query=query, key=key, value=value, out=out, grad=grad,
                       d_query=d_query, d_key=d_key, d_value=d_value)
            if _library().backward(job, query.dtype is torch.bfloat16, sums.data_ptr(), sums.shape[2]):
                raise MemoryError("No memory for the blocks of attention.")
        return d_query.to(kind), d_key.to(kind), d_value.to(kind), None, None, None


def _room_for_sums(query: torch.Tensor, key: torch.Tensor, threads: int) -> tuple[int, int, int, int, int]:
    """[threads, 2, key heads that one thread meets at most, keys up to whole blocks, width]: gradients of keys and values, added up by each
    thread for itself. Threads get runs of like work, team by team of heads, to half a block of queries more at either end: the key heads in
    between are whole, and less than a thread's share."""
    heads, key_heads = query.shape[1], key.shape[1]
    share = -(-heads // threads)
    return threads, 2, min(key_heads, -(-share // (heads // key_heads)) + 1), -(-key.shape[2] // BLOCK) * BLOCK, key.shape[3]


def _as_computed(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float32 or computes_halves() else x.float()


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _job(scale: float, first: torch.Tensor, last: torch.Tensor, lse: torch.Tensor, **tensors: torch.Tensor) -> _Job:
    query, key = tensors["query"], tensors["key"]
    job = _Job(query.shape[1], key.shape[1], query.shape[2], key.shape[2], query.shape[3], torch.get_num_threads(), scale,
               first.data_ptr(), last.data_ptr())
    for name, x in tensors.items():
        setattr(job, name, _Tensor(x.data_ptr(), x.stride(1), x.stride(2)))
    job.lse = lse.data_ptr()
    return job
