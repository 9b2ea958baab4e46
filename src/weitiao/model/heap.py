"""Large tensors on a CPU in a heap of their own: native/heap.c, in the place of the C library's for torch alone.

The C library's heap holds whatever the program makes. Small things that outlive a pass (code of products, gradients of LoRA, torch's own
records) come to lie between the activations, so that what is free is in pieces, and a pass of one token more than the last fits none of
them: a quarter of a step's memory and more was holes, more with every new size of pass (benchmarks/heap.py). By themselves tensors come and go
like a stack.
"""

from __future__ import annotations

import ctypes
import os
from typing import NamedTuple

import torch

from weitiao.model import compiled

LEAST = 1 << 16  # bytes of a tensor that goes there; as in heap.c


class Used(NamedTuple):
    """Bytes: of tensors that are there now; at most since this was last asked; and the addresses that those took, holes included."""

    now: int
    most: int
    reached: int


_in_use: bool | None = None  # None: nobody asked for it yet


def use() -> bool:
    """Let large tensors of this process go there from now on, where it can be built (Linux, and what `compiled` needs). Do they?"""
    global _in_use
    if _in_use is None:
        _in_use = _put_in_place()
    return _in_use


def _put_in_place() -> bool:
    import psutil

    try:
        library = compiled.loaded()
    except compiled.NotBuilt:
        return False
    library.heap_use.argtypes = [ctypes.c_size_t, ctypes.c_int]
    library.heap_has.argtypes = [ctypes.c_void_p]
    library.heap_trim.argtypes, library.heap_trim.restype = [], None
    library.heap_used.argtypes, library.heap_used.restype = [ctypes.POINTER(ctypes.c_size_t)] * 3, None
    huge = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"  # by which torch asks for them where we do not
    return library.heap_use(2 * psutil.virtual_memory().total, huge) == 0 and holds(torch.empty(2 * LEAST, dtype=torch.uint8))


def holds(tensor: torch.Tensor) -> bool:
    """Does the tensor lie there?"""
    return bool(compiled.loaded().heap_has(tensor.data_ptr()))


def trim() -> None:
    """Give the memory of what is free back to the system."""
    if _in_use:
        compiled.loaded().heap_trim()


def used() -> Used:
    """Of a heap that is in use."""
    now, most, reached = (ctypes.c_size_t() for _ in range(3))
    compiled.loaded().heap_used(ctypes.byref(now), ctypes.byref(most), ctypes.byref(reached))
    return Used(now.value, most.value, reached.value)
