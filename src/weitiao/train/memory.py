"""Bytes: what is free, what is used, what a node costs."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

MOST_NODES = {"cpu": 4_096, "cuda": 16_384}  # larger passes mostly cost memory, and hide progress
LEAST_NODES = 512
UNBOUNDED = 1 << 30
SHARE_OF_FREE = 0.5  # the rest is for gradients, the optimizer, the head's chunk and what else runs here


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
    """What the parts of a run (load, proof, steps, …) need at their worst, beside what was there before the model came."""

    def __init__(self, device: Any):
        self.device, self.before = device, used(device)
        self.peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        reset_peak(self.device)
        try:
            yield
        finally:
            self.peaks[name] = max(0, peak(self.device) - self.before)

    @property
    def worst(self) -> int:
        return max(self.peaks.values(), default=0)


def free(device: Any) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def device_name(device: Any) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    return platform.processor() or platform.machine() or "CPU"


def bytes_per_node(model: torch.nn.Module, compute: torch.dtype, checkpointing: bool | None, layout: str) -> int:
    """What one more node of a pass keeps for the backward pass, roughly.

    A layer of a Llama-like model with LoRA on its linears keeps about 16 hidden vectors (norms in fp32, residuals, q, k,
    v, attention's output) and 5 of the MLP's inner width. With checkpointing a layer keeps its input, and one layer's
    worth is there while it is recomputed. Padded rows hold their logits besides.
    """
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    size = compute.itemsize
    layer = (16 * hidden + 5 * inner) * size
    kept = layers * hidden * size + layer if checkpointing else layers * layer
    return kept + (4 * 4 * config.vocab_size if layout == "padded" else 0)


def nodes_that_fit(per_node: int, accelerator: Any, most: int | None = None) -> int:
    """A budget of nodes for one pass, from the memory that is free now, shared by the processes on this machine."""
    share = SHARE_OF_FREE * free(accelerator.device)
    if accelerator.device.type != "cuda":
        share /= accelerator.num_processes
    most = most or MOST_NODES.get(accelerator.device.type, MOST_NODES["cuda"])
    return max(LEAST_NODES, min(most, int(share / per_node) // 256 * 256))
