"""Matrix products in float32 on processors that MKL does not know: oneDNN's, which PyTorch brings along as well.

PyTorch hands float32 products to MKL, and MKL computes with half the width of a processor with AVX-512 that is not Intel's: on a
Zen 5, 110 GFLOP/s of a thread where oneDNN reaches 240 (benchmarks/products.py). `use()` puts oneDNN's in the place where PyTorch looks for the kernels
of `aten::mm` and `aten::addmm` on a CPU, so that whatever multiplies, a model's own linears, their gradients or a head, gets them. What is too
small to gain, of another type, anything but a plain sum, or written in place goes where it went.
"""

from __future__ import annotations

import functools
import platform
import warnings
from pathlib import Path

import torch

LEAST = 3 << 18  # multiply-adds: below, calling oneDNN takes longer than MKL's product
WIDE = 128
NARROW = 32  # summed over fewer, a product is no work beside what it writes

_kept: list[torch.library.Library] = []  # a library's kernels go with it


def use() -> None:
    """Let this process compute float32 products by oneDNN from now on, if that is quicker on its processor."""
    if _kept or not is_quicker():
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")  # which is what is asked for
        library.impl("mm", mm, "CPU")
        library.impl("addmm", addmm, "CPU")
    _kept.append(library)


@functools.cache
def is_quicker() -> bool:
    """Is this a processor with AVX-512 that MKL takes for one without?"""
    return (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()
            and _vendor() != "GenuineIntel")


def _vendor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor().rpartition(", ")[2]  # "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD"
    return next((line.partition(":")[2].strip() for line in info.read_text("utf-8", "replace").splitlines() if line.startswith("vendor_id")), "")


def _takes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """[m, k] row by row, or wide enough to be worth a copy that is, as in a weight's gradient; [k, n] in either order: of others oneDNN makes
    copies, or takes its reference code, hundreds of times as slow."""
    if not (a.dtype is b.dtype is torch.float32 and a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0]):
        return False
    (m, k), n = a.shape, b.shape[1]
    return (k >= NARROW and m * k * n >= LEAST and (b.is_contiguous() or b.t().is_contiguous())
            and (a.is_contiguous() or (min(m, k, n) >= WIDE and a.t().is_contiguous())))


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b: [m, k], [k, n] -> [m, n]; below autograd, as any kernel."""
    if _takes(a, b):
        a = a.contiguous()
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def addmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """beta c + alpha a b: c [m, n] or what becomes that, [m, k], [k, n] -> [m, n]"""
    if _takes(a, b) and beta == alpha == 1 and c.dtype is torch.float32 and c.is_contiguous():
        a = a.contiguous()
        if c.shape == (b.shape[1],):
            return torch.ops.mkldnn._linear_pointwise(a, b.t(), c, "none", [], "")
        if c.shape == (a.shape[0], b.shape[1]):
            return torch.ops.mkldnn._linear_pointwise.binary(a, c, b.t(), None, "add")
    return torch.addmm(c, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))
