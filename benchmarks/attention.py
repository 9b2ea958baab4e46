"""Attention over a trie on this CPU: our kernel beside PyTorch's flash kernel segment by segment, in time and in distance from float64.

    python benchmarks/attention.py [--stem 308] [--rows 12] [--own 256] [--heads 9] [--key-heads 3] [--width 64] [--calls 15] [--threads 2]

A trie of `--rows` rows that share `--stem` nodes and have `--own` of their own each, of one layer. Both sides in turn; least and median of
the calls in milliseconds by the clock, forward and backward, and their sum's distance from float64's (norm of the difference / norm).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from weitiao.data.batch import Plan, trie_batch
from weitiao.model import attention, cpu
from weitiao.trie import Example, build


def trie(stem: int, rows: int, own: int) -> Plan:
    noise = np.random.default_rng(0)
    shared = noise.integers(0, 1000, stem)
    paths = [np.concatenate([shared, [1000 + row], noise.integers(0, 1000, own - 1)]).astype(np.int32) for row in range(rows)]
    return trie_batch(build([Example(path, np.zeros(len(path), np.float32)) for path in paths]))["trie"]


def timed(calls: dict[str, Callable[[], object]], times: int) -> dict[str, tuple[float, float]]:
    """(least, median) milliseconds of each, called in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(times + 1):  # the first warms up
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            found[name].append(1e3 * (time.perf_counter() - began))
    return {name: (min(one[1:]), statistics.median(one[1:])) for name, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in {"stem": 308, "rows": 12, "own": 256, "heads": 9, "key-heads": 3, "width": 64, "calls": 15, "threads": torch.get_num_threads()}.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = trie(options.stem, options.rows, options.own)
    nodes, pairs, scale = len(plan.depth), int((plan.depth + 1).sum()), options.width**-0.5
    print(f"{nodes:,} nodes, {pairs:,} visible pairs, {options.heads} heads over {options.key_heads} of width {options.width}, {options.threads} threads, torch {torch.__version__}")
    for kind in (torch.float32, torch.bfloat16):
        if reason := cpu.trouble(kind):
            print(f"{kind}: {reason}")
            continue
        torch.manual_seed(0)
        query, key, value, grad = (torch.randn(1, nodes, heads, options.width).to(kind).transpose(1, 2)
                                   for heads in (options.heads, options.key_heads, options.key_heads, options.heads))
        exact = [x.double().requires_grad_() for x in (query, key, value)]
        out = attention.dense(*exact, plan, scale)
        judge = [out.detach(), *torch.autograd.grad(out, exact, grad.double())]
        inputs = [x.requires_grad_() for x in (query, key, value)]
        ways = {
            "ours": lambda: cpu.attend(*inputs, plan, scale, None, 0.0),
            "PyTorch's": lambda: attention.ByKeys.apply(*inputs, plan.segments, scale),
        }
        outs = {name: way() for name, way in ways.items()}
        back = {name: (lambda out=out: torch.autograd.grad(out, inputs, grad, retain_graph=True)) for name, out in outs.items()}
        for name, out in outs.items():
            off = [float((a.detach().double() - b).norm() / b.norm()) for a, b in zip((out, *back[name]()), judge, strict=True)]
            print(f"{kind} {name:10} off by {max(off):.1e}")
        for direction, calls, flops in (("forward", ways, 4), ("backward", back, 10)):
            for name, (least, median) in timed(calls, options.calls).items():
                rate = flops * pairs * options.heads * options.width / least / 1e6
                print(f"{kind} {name:10} {direction:8} {least:7.1f} {median:7.1f} ms   {rate:6.0f} GFLOP/s of what is visible")


if __name__ == "__main__":
    main()
