"""Large tensors on a CPU in a heap of their own: native/heap.c, in the place of the C library's for torch alone.

The C library's heap holds whatever the program makes. Small things that outlive a pass (code of products, gradients of LoRA, torch's own
records) come to lie between the activations, so that what is free is in pieces, and a pass of one token more than the last fits none of
them: a quarter of a step's memory and more was holes, more with every new size of pass (benchmarks/heap.py). By themselves tensors come and go
like a stack. WEITIAO_HEAP=0 leaves them where they were.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from weitiao.model import compiled

LEAST = 1 << 16  # bytes of a tensor that goes there
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")

_lock = threading.Lock()
_heap: ctypes.CDLL | None = None  # that tensors go to
_asked = False
_keepers = 0  # blocks that are under way in which it is kept


class Used(NamedTuple):
    """Bytes: of tensors that are there now; at most since this was last asked; and the addresses that those took, holes included."""

    now: int
    most: int
    reached: int


def use() -> bool:
    """Let large tensors of this process go there from now on, where it can be built (Linux with glibc, and a C compiler). Do they?"""
    global _heap, _asked
    with _lock:
        if not _asked:
            _asked = True
            _heap = _put_in_place()
        return _heap is not None


def _put_in_place() -> ctypes.CDLL | None:
    import psutil

    if sys.platform != "linux" or os.environ.get("WEITIAO_HEAP") == "0" or _addresses_are_counted():
        return None
    try:
        library = compiled.loaded("heap")
    except compiled.NotBuilt:
        return None
    library.heap_use.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    library.heap_has.argtypes = [ctypes.c_void_p]
    library.heap_trim.argtypes, library.heap_trim.restype = [], None
    library.heap_keep.argtypes, library.heap_keep.restype = [ctypes.c_int], None
    library.heap_used.argtypes, library.heap_used.restype = [ctypes.POINTER(ctypes.c_size_t)] * 3, None
    huge = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"  # by which torch asks for them where we do not
    return None if library.heap_use(psutil.virtual_memory().total, LEAST, huge) else library


def _addresses_are_counted() -> bool:
    """Would what is reserved, and not used, count as taken?"""
    import resource  # which Windows lacks

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return any(limit != resource.RLIM_INFINITY for limit in limits) or (OVERCOMMIT.is_file() and OVERCOMMIT.read_text().strip() == "2")


def holds(tensor: torch.Tensor) -> bool:
    """Does the tensor lie there?"""
    return _heap is not None and bool(_heap.heap_has(tensor.data_ptr()))


def trim() -> None:
    """Give the memory of what is free back to the system."""
    if _heap is not None:
        _heap.heap_trim()


@contextmanager
def kept() -> Iterator[None]:
    """What is freed in here is kept for what comes next, as the steps of a run want it. Outside the memory of large tensors goes back."""
    _keep(+1)
    try:
        yield
    finally:
        _keep(-1)


def _keep(more: int) -> None:
    global _keepers
    with _lock:
        _keepers += more
        if _heap is not None:
            _heap.heap_keep(_keepers > 0)
    if not _keepers:
        trim()


def used() -> Used:
    """Of a heap that is in use."""
    assert _heap is not None
    now, most, reached = (ctypes.c_size_t() for _ in range(3))
    _heap.heap_used(ctypes.byref(now), ctypes.byref(most), ctypes.byref(reached))
    return Used(now.value, most.value, reached.value)
