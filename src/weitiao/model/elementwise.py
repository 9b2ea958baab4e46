"""Elementwise work of a decoder layer in one pass over memory: native/elementwise.c, for whoever asks `takes` first.

A processor waits for memory here, not for arithmetic: PyTorch's operations each read and write all numbers, these do it once. They
round once at the end, where a row of operations in bfloat16 rounds after each.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from weitiao.model import compiled

LANES = 16
# What a trial may differ by from float64, relative to the largest number.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

_pointer, _long, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
ARGUMENTS = {
    "silu_times_up": [_pointer] * 3 + [_long] * 2,
    "silu_times_up_back": [_pointer] * 5 + [_long] * 2,
    "norm": [_pointer] * 4 + [_float] + [_long] * 3,
    "norm_back": [_pointer] * 5 + [_long] * 3,
    "rotate": [_pointer] * 4 + [_long] * 7,
    "cross_entropy": [_pointer] * 4 + [_long] * 3,
}


_told: Callable[[int], None] | None = None  # the plan under way


@contextmanager
def planned(moved: Callable[[int], None]) -> Iterator[None]:
    """In here tensors that have shapes alone are taken too, for a plan of a CPU's memory: moved is told the bytes that would be read and written."""
    global _told
    before, _told = _told, moved
    try:
        yield
    finally:
        _told = before


def takes(*tensors: torch.Tensor) -> bool:
    """Are all of these dense, of one type that it computes, in whole vectors on a CPU, and is it built here?"""
    kind = tensors[0].dtype
    return kind in TOLERANCES and all(
        x.dtype is kind and x.device.type == "cpu" and x.is_contiguous() and x.shape[-1] % LANES == 0
        and (_told is not None or not isinstance(x, FakeTensor)) for x in tensors
    ) and trouble() is None


def rotates(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """The same of `rotate`, whose x need be dense in its last dimension only."""
    return (takes(cos, sin) and x.dtype is cos.dtype and x.device == cos.device and x.dim() == 4 and x.stride(-1) == 1
            and cos.shape == sin.shape == (1, x.shape[2], x.shape[3]) and len(x) == 1 and x.shape[3] % (2 * LANES) == 0)


@functools.cache
def trouble() -> str | None:
    """Why PyTorch's operations are taken, in a sentence; None if they are not."""
    try:
        library = compiled.loaded()
    except compiled.NotBuilt as reason:
        return str(reason)
    for name, arguments in ARGUMENTS.items():
        getattr(library, name).argtypes = [*arguments, ctypes.c_int]
        getattr(library, name).restype = None
    return compiled.off(_trial, TOLERANCES)


def silu_times_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: [N, intermediate] each."""
    out = torch.empty_like(gate)
    _call("silu_times_up", gate, up, out, gate.numel())
    return out


def silu_times_up_back(d: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(silu(gate) * up, the gradient of gate, that of up) from d, the product's; the last is written over d. [N, intermediate] each."""
    inner, d_gate = torch.empty_like(gate), torch.empty_like(gate)
    _call("silu_times_up_back", d, gate, up, inner, d_gate, gate.numel())
    return inner, d_gate, d


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight * x / rms(x), 1 / rms(x)): x [N, width] -> [N, width] and float32 [N, 1]."""
    out, factors = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
    _call("norm", x, weight, out, factors, eps, *x.shape)
    return out, factors


def norm_back(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The gradient of x."""
    out = torch.empty_like(x)
    _call("norm_back", grad, x, weight, factors, out, *x.shape)
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), halves paired: x [1, heads, T, d], cos and sin [1, T, d] -> [1, heads, T, d],
    heads side by side in memory. back: the gradient of x from that of what comes out."""
    _, heads, rows, width = x.shape
    out = x.new_empty(1, rows, heads, width)
    _call("rotate", x, cos, sin, out, x.stride(1), x.stride(2), heads, rows, width, int(back))
    return out.transpose(1, 2)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """weight * nll of each row, float32 [E]; logits [E, vocabulary] are overwritten by the gradient of their sum. targets int64 [E],
    weights float32 [E]."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    _call("cross_entropy", logits, targets.contiguous(), weights.contiguous(), losses, *logits.shape)
    return losses


def _call(name: str, first: torch.Tensor, *rest: torch.Tensor | int | float) -> None:
    if _told and isinstance(first, FakeTensor):
        return _told(sum(x.numel() * x.element_size() for x in (first, *rest) if isinstance(x, torch.Tensor)))
    given = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in (first, *rest)]
    assert len(given) + 1 == len(ARGUMENTS[name]), name  # the threads are the last of them
    getattr(compiled.loaded(), name)(*given, torch.get_num_threads(), first.dtype is torch.bfloat16)


def _trial(kind: torch.dtype) -> float:
    """Largest difference from float64, relative, of all of these."""
    noise = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return (2 * torch.randn(shape, generator=noise)).to(kind)

    with compiled.apart():
        gate, up, d, weight = drawn(5, 48), drawn(5, 48), drawn(5, 48), drawn(48)
        exact = [x.double().requires_grad_() for x in (gate, up)]
        product = F.silu(exact[0]) * exact[1]
        normed = F.rms_norm(exact[0], (48,), weight.double(), 1e-5)
        judge = [product, product, *torch.autograd.grad(product, exact, d.double()), normed, *torch.autograd.grad(normed, exact[0], d.double())]
        out, factors = norm(gate, weight, 1e-5)
        ours = [silu_times_up(gate, up), *silu_times_up_back(d.clone(), gate, up), out, norm_back(d, gate, weight, factors)]

        x, d, cos, sin = drawn(1, 3, 5, 32), drawn(1, 3, 5, 32), drawn(1, 5, 32), drawn(1, 5, 32)
        exact = x.double().requires_grad_()
        turned = exact * cos.double() + torch.cat([-exact[..., 16:], exact[..., :16]], -1) * sin.double()
        judge += [turned, *torch.autograd.grad(turned, exact, d.double())]
        ours += [rotate(x, cos, sin), rotate(d, cos, sin, back=True)]

        logits, targets, weights = drawn(5, 48), torch.tensor([0, 15, 16, 47, 7]), torch.rand(5, generator=noise)
        exact = logits.double().requires_grad_()
        losses = F.cross_entropy(exact, targets, reduction="none") * weights.double()
        judge += [losses, *torch.autograd.grad(losses.sum(), exact)]
        ours += [cross_entropy(logits, targets, weights), logits]
        pairs = [(a.double(), b.detach()) for a, b in zip(ours, judge, strict=True)]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
