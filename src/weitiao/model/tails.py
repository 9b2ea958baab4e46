"""Keys and values that the rows of a batch of answers have for themselves, on a CPU: native/tails.c, for whoever asks `takes` first.

PyTorch's flash kernel wants all rows as long as the longest, float32 for speed, and is made for many queries; here each row is read to
its own end, once for all heads that share its keys, in the type of the model.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from weitiao.model import compiled

LANES = 16
# What a trial may differ by from float64, relative to the largest number.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-5}  # of the same numbers: out is float32

_pointer, _long, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


def takes(first: torch.Tensor, *others: torch.Tensor) -> bool:
    """Are queries, keys and values of one type and width, those that it computes, on a CPU?"""
    alike = all(x.dtype is first.dtype and x.shape[-1] == first.shape[-1] for x in others)
    return alike and first.device.type == "cpu" and computes(first.dtype, first.shape[-1])


def computes(kind: torch.dtype, width: int) -> bool:
    return kind in TOLERANCES and width % LANES == 0 and trouble() is None


@functools.cache
def trouble() -> str | None:
    """Why PyTorch's kernels are taken, in a sentence; None if they are not."""
    try:
        library = compiled.loaded()
    except compiled.NotBuilt as reason:
        return str(reason)
    library.attend_to_tails.argtypes = [_pointer, _long, _long, *[_pointer] * 6, _float, *[_long] * 6, ctypes.c_int]
    library.put_into_tails.argtypes = [*[_pointer] * 5, *[_long] * 8]
    return compiled.off(_trial, TOLERANCES)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, last: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's token to the places first..last of its own: (out [rows, kv_heads, group, d], lse [rows, kv_heads, group]), float32.

    query [1, kv_heads * group, rows, d]; keys, values [slots, kv_heads, room, d], dense, of query's type; first, last int64 [rows].
    """
    query = query[0] if query.stride(-1) == 1 else query[0].contiguous()
    heads, rows, width = query.shape
    _, key_heads, room, _ = keys.shape
    assert keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape and keys.dtype is values.dtype is query.dtype
    assert len(keys) >= rows == len(first) == len(last) and keys.shape[3] == width
    out = torch.empty(rows, key_heads, heads // key_heads, width)
    lse = torch.empty(rows, key_heads, heads // key_heads)
    failed = compiled.loaded().attend_to_tails(
        query.data_ptr(), query.stride(1), query.stride(0), keys.data_ptr(), values.data_ptr(), first.data_ptr(), last.data_ptr(),
        out.data_ptr(), lse.data_ptr(), scale, rows, key_heads, heads // key_heads, width, room, torch.get_num_threads(), query.dtype is torch.bfloat16)
    if failed:
        raise MemoryError("No memory for the queries of answers.")
    return out, lse


def put(tail: torch.Tensor, new: torch.Tensor, nodes: torch.Tensor | None, rows: torch.Tensor, at: torch.Tensor) -> None:
    """Nodes of [kv_heads, T, d] (None: all) -> places `at` of the tails of `rows`: tail [slots, kv_heads, room, d], dense; the others integers [N].

    Raises:
        IndexError: there is no such node, row or place; what came before is put.
    """
    new = new if new.stride(-1) == 1 else new.contiguous()
    assert tail.is_contiguous() and tail.dtype is new.dtype and len(rows) == len(at) == (len(at) if nodes is None else len(nodes))
    nodes, rows, at = (None if one is None else one.long().contiguous() for one in (nodes, rows, at))
    size = new.element_size()
    beyond = compiled.loaded().put_into_tails(
        tail.data_ptr(), new.data_ptr(), None if nodes is None else nodes.data_ptr(), rows.data_ptr(), at.data_ptr(), len(rows), new.shape[1],
        *tail.shape[:3], tail.shape[3] * size, new.stride(0) * size, new.stride(1) * size)
    if beyond:
        raise IndexError(f"A node, row or place of {len(rows)} is beyond {new.shape[1]} nodes, {len(tail)} rows or {tail.shape[2]} places.")


def _trial(kind: torch.dtype) -> float:
    """Largest difference from float64, relative: three rows of 1 to 100 keys, 5 heads over each of 2."""
    with compiled.apart():
        noise = torch.Generator().manual_seed(0)
        query, new = (torch.randn(shape, generator=noise).to(kind) for shape in ((1, 10, 3, 48), (2, 2, 150, 48)))
        first, last = torch.tensor([0, 99, 20]), torch.tensor([99, 99, 60])
        tails = torch.full((2, 4, 2, 100, 48), float("nan"), dtype=kind)  # what nobody put there counts for nothing
        places = [(row, at) for row in range(3) for at in range(int(first[row]), int(last[row]) + 1)]
        rows, at = (torch.tensor(one) for one in zip(*places, strict=True))
        for tail, one in zip(tails, new, strict=True):
            put(tail, one, torch.arange(len(rows)) + 3, rows, at)
        out, lse = attend(query, tails[0], tails[1], first, last, 0.2)
        worst = 0.0
        for row in range(3):
            nodes = torch.arange(len(rows))[rows == row] + 3
            keys, values = (one[:, nodes].double() for one in new)
            scores = 0.2 * query[0, :, row].double().unflatten(0, (2, 5)) @ keys.transpose(1, 2)
            judge = [scores.softmax(-1) @ values, scores.logsumexp(-1)]
            worst = max(worst, *(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip((out[row], lse[row]), judge, strict=True)))
        return worst
