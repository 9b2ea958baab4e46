"""AdamW's step over the weights of SmolLM2-135M, all in float32, on a CPU: torch's plain step and its fused one, in turn.

    python benchmarks/adam.py [--threads 2] [--rounds 9]

Prints of each the median time, the bytes that it takes for the moment, and how far the weights are apart after all steps.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

from weitiao.cli import TORCH_READS

os.environ.update(TORCH_READS)

import torch  # noqa: E402

from weitiao.model import heap  # noqa: E402

HIDDEN, INNER, KEYS, LAYERS, VOCABULARY = 576, 1536, 192, 30, 49_152
LAYER = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN), (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER), (HIDDEN,), (HIDDEN,)]


def made(fused: bool) -> torch.optim.Optimizer:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in [(VOCABULARY, HIDDEN), *LAYER * LAYERS, (HIDDEN,)]]
    for weight in weights:
        weight.grad = 1e-3 * torch.randn(weight.shape, generator=draw)
    return torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01, fused=fused)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--rounds", type=int, default=9)
    given = asked.parse_args()
    torch.set_num_threads(given.threads)
    ways = {"plain": made(False), "fused": made(True)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    own = heap.use()
    over = dict.fromkeys(ways, 0)
    with heap.kept():
        for turn in range(1 + given.rounds):
            for name, optimizer in ways.items():
                before = heap.used().now if own else 0
                began = time.perf_counter()
                optimizer.step()
                took = time.perf_counter() - began
                if turn:  # the first makes the state
                    times[name].append(took)
                    over[name] = max(over[name], heap.used().most - before if own else 0)
    for name, took in times.items():
        print(f"{name}: {median(took):.3f} s a step, {over[name] / 2**20:.0f} MiB for the moment")
    weights = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in ways.values())
    print(f"apart by at most {max(float((a - b).detach().abs().max()) for a, b in zip(*weights, strict=True)):.1g}")


if __name__ == "__main__":
    main()
