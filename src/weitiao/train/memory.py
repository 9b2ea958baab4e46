"""Bytes: what is free, what is used, what the parts of a run need."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from weitiao.model import heap

MMAP_THRESHOLD = -3  # of mallopt (malloc.h)
_gives_back = False
STATUS, CLEAR, GROUPS, CONTROLS = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

# Nodes of a pass, by training.memory. Larger ones than those of "fast" mostly cost memory, and hide progress. On a CPU (a Zen 5 was measured,
# benchmarks/results.md) 896 take half the memory of 4,096 in the same time, 448 four fifths of that for some 15 % more. In half precision, where
# each product lays its weight out anew, small passes cost up to a quarter more time than 4,096, so that there are IN_HALVES times as many.
NODES: dict[str, dict[str | None, int]] = {
    "cpu": {"fast": 4_096, None: 896, "balanced": 448, "thrifty": 4_096}, "cuda": {"fast": 16_384, None: 16_384, "balanced": 4_096, "thrifty": 16_384},
}
IN_HALVES = 2
LEAST_NODES = 256
MORE = 1.1  # times the nodes: computing more of them is not worth a smaller pass


def used(device: Any) -> int:
    """Bytes in use: of the GPU by tensors, of the machine by this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def peak(device: Any) -> int:
    """The most bytes in use since `reset_peak`; for a CPU of the whole process, its interpreter included.

    Where the system cannot forget its peak (anything but Linux), since the process began.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.is_file():
        kilobytes = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text("ascii", "replace"), re.MULTILINE)
        if kilobytes:
            return int(kilobytes.group(1)) * 1024
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset


def reset_peak(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # the high-water mark begins anew (man 5 proc_pid_clear_refs)


class Meter:
    """What the parts of a run (load, proof, steps) need at their worst, beside what was there before the model came."""

    def __init__(self, device: Any):
        give_back()
        self.device, self.before = device, used(device)
        self.peaks: dict[str, int] = {}
        self.part_now: str | None = None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        give_back()
        reset_peak(self.device)
        self.part_now = name
        try:
            yield
        finally:
            self.note()
            self.part_now = None

    def note(self) -> None:
        """Read the peak of the part that is under way."""
        if self.part_now:
            self.peaks[self.part_now] = max(0, peak(self.device) - self.before)

    @property
    def worst(self) -> int:
        return max(self.peaks.values(), default=0)


def give_back() -> None:
    """Hand what the heaps hold of freed memory back to the system, where they can."""
    heap.trim()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's


def give_back_at_once() -> None:
    """From now on every freed tensor goes back to the system, where tensors are in glibc's heap and not in our own.

    Otherwise it keeps holes between what lives long and what does not: a step of LoRA held up to 2.2 times what passed through it. It
    costs page faults, a fifth of the time and more (benchmarks/results.md), so it is done where memory is short.
    """
    global _gives_back
    with contextlib.suppress(AttributeError, OSError):
        _gives_back = bool(ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 17))


def gives_back() -> bool:
    """Is that so, by `give_back_at_once` or by the environment?"""
    asked = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    return _gives_back or (asked.isdigit() and int(asked) <= 1 << 20)


def free(device: Any) -> int:
    """Bytes: of a GPU; else of the machine, or fewer where this process or its container may not have them all."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return max(0, min(psutil.virtual_memory().available, *_left_by_limits()))


def _left_by_limits() -> Iterator[int]:
    """Of the address space (ulimit -v), and of each control group that the process is in (containers, systemd, Slurm), of both kinds."""
    import psutil

    yield sys.maxsize
    with contextlib.suppress(ImportError):  # Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0] if sys.platform == "linux" else resource.RLIM_INFINITY
        if limit != resource.RLIM_INFINITY:
            yield limit - psutil.Process().memory_info().vms
    for group in _control_groups():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limit, now, cache = ("memory.max", "memory.current", "") if (group / "memory.current").is_file() else \
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            most = int((group / limit).read_text())
            files = re.findall(rf"^{cache}(?:in)?active_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            yield most - int((group / now).read_text()) + sum(map(int, files))  # pages of files give way


def _control_groups() -> Iterator[Path]:
    """Folders of this process's, and of those around them: each may have a limit. In a container the path may be the host's, which is not seen there."""
    with contextlib.suppress(OSError):
        for line in GROUPS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            root = CONTROLS / "memory" if kinds else CONTROLS
            within = root / path.lstrip("/")
            yield from dict.fromkeys((within, *(folder for folder in within.parents if folder.is_relative_to(root)), root))


def device_name(device: Any) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    return platform.processor() or platform.machine() or "CPU"


def guess(model: torch.nn.Module, compute: torch.dtype, checkpointing: bool, padded: bool, device: Any, processes: int, asked: str | None = None) -> int:
    """Nodes of a pass (asked: training.memory), for a model that cannot be planned: half of what is free, over what a layer like Llama's with LoRA keeps of a node.

    That is some 16 hidden vectors and 5 of the MLP's inner width; with checkpointing its input, and one layer's worth besides.
    """
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    layer = (16 * hidden + 5 * inner) * compute.itemsize
    node = (layers * hidden * compute.itemsize + layer if checkpointing else layers * layer) + (16 * config.vocab_size if padded else 0)
    kind = torch.device(device).type
    room = free(device) / 2 / (processes if kind == "cpu" else 1)
    return max(LEAST_NODES, min(NODES.get(kind, NODES["cuda"])[asked], int(room / node) // 256 * 256))
