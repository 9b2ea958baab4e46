"""What each of weitiao's own ways of computing does to a step on this CPU: the same step with it and without it, in turn.

    python benchmarks/step.py --data FOLDER [--jobs resume/lora/fp32 resume/lora/bf16] [--without products attention elementwise together fused] \
        [--calls 6] [--threads 2]

FOLDER holds the rows' files (benchmarks/jobs.py). One real step, its passes made beforehand: loss and backward pass, seconds by the clock,
medians; the difference of the gradients, of all together (norm of the difference / norm). A job is a process of its own.

    products      float32 products by oneDNN, where MKL does not know the processor (model/products.py)
    attention     our kernel over a trie; without: PyTorch's, segment by segment (model/cpu.py)
    elementwise   norms, silu beside up, rotary positions and the loss's gradient in one pass over memory (model/elementwise.py)
    together      queries, keys and values as one function of their input (model/fused.py)
    fused         LoRA's linears and gated MLPs as one function each, `together` included
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from jobs import Job, Watch, as_weitiao_reads, training_of

DEFAULT = ["resume/lora/fp32", "resume/lora/bf16"]
WAYS = ["products", "attention", "elementwise", "together", "fused"]
STEP = 2


def ways() -> dict[str, Callable[[], object]]:
    """By name, what takes it away for a block."""
    from weitiao.model import attention, elementwise, fused, products

    def no(*args: object, **kwargs: object) -> bool:
        return False

    return {
        "products": lambda: mock.patch.object(products, "_takes", no),  # nothing is copied for it then, either
        "attention": lambda: mock.patch.dict(attention.OWN, {"cpu": lambda *args: None}),
        "elementwise": lambda: mock.patch.object(elementwise, "takes", no),
        "together": lambda: mock.patch.object(fused.OneInput, "together", lambda self, x: {}),
        "fused": lambda: mock.patch.object(fused, "parts", lambda module, dropout=False: None),
    }


def measure(job: Job, data: Path, without: Sequence[str], calls: int) -> None:
    import torch

    with tempfile.TemporaryDirectory() as place:
        prepared = as_weitiao_reads(job, data, Path(place), STEP + 1)
    training = training_of(prepared, Watch())
    training.fit(1)  # B of LoRA is 0 before
    work = training._work_of(STEP)
    learned = [p for p in training.plain_model.parameters() if p.requires_grad]

    def once() -> tuple[float, list[torch.Tensor]]:
        began = time.perf_counter()
        training._gradients(STEP, work.passes, work.weight)
        seconds = time.perf_counter() - began
        gradients = [p.grad.double() for p in learned]
        training._forget_gradients()
        return seconds, gradients

    nodes = sum(b["input_ids"].numel() for b in work.passes)
    print(f"\n{job.name}: {nodes:,} nodes, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in without:
        taken_away, seconds = ways()[name], {True: [], False: []}
        for _ in range(calls + 1):
            for there in (True, False):
                if there:
                    took, ours = once()
                else:
                    with taken_away():
                        took, plain = once()
                seconds[there].append(took)
        ours, plain = (torch.cat([g.flatten() for g in gradients]) for gradients in (ours, plain))
        with_it, without_it = (statistics.median(seconds[there][1:]) for there in (True, False))
        each = ", ".join(f"{b / a:.2f}" for a, b in zip(seconds[True][1:], seconds[False][1:]))
        apart = float((ours - plain).norm() / plain.norm())
        print(f"  {name:12} with {with_it:.2f} s, without {without_it:.2f} s: {without_it / with_it:.2f} times as fast ({each}); "
              f"gradients {apart:.1e} apart", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--jobs", nargs="+", default=DEFAULT)
    parser.add_argument("--without", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--calls", type=int, default=6)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)
        return measure(Job.named(options.jobs[0]), options.data, options.without, options.calls)
    for name in options.jobs:
        subprocess.run([sys.executable, __file__, "--child", "--data", options.data, "--jobs", name, "--calls", str(options.calls),
                        "--without", *options.without, *(["--threads", str(options.threads)] if options.threads else [])], check=True)


if __name__ == "__main__":
    main()
