"""Matrix products in float32 on this CPU: MKL's, which PyTorch takes, beside oneDNN's, which weitiao takes where model/products.py says so.

    python benchmarks/products.py [--threads 1] [--calls 15]

Shapes of SmolLM2-135M's linears and its head, from one row (a token of an answer) to a whole pass; rates in GFLOP/s by the least time of
the calls, and the largest difference from float64 (relative to the largest number). Both sides in turn. What it does to a step: step.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from weitiao.model import products

ROWS = (1, 4, 16, 64, 512, 3384)
LAYERS = {"gate, up": (576, 1536), "down": (1536, 576), "q, o": (576, 576), "k, v": (576, 192), "LoRA's A": (576, 8), "head": (576, 49152)}


def by_mkl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def by_onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def least(ways: dict[str, Callable], pairs: list, calls: int) -> dict[str, float]:
    """Seconds of one product, by way; each call goes through all pairs, so that no weight stays in a cache."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(calls + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            for a, b in pairs:
                way(a, b)
            found[name].append((time.perf_counter() - began) / len(pairs))
    return {name: min(one[1:]) for name, one in found.items()}


def shapes(calls: int) -> None:
    print(f"{'':10}{'rows':>6}{'':4}x W^T: MKL, oneDNN, times    g W: MKL, oneDNN, times    g^T x: MKL, oneDNN, times    off from float64: MKL, oneDNN   taken")
    ways = {"mkl": by_mkl, "onednn": by_onednn}
    for name, (k, n) in LAYERS.items():
        for rows in ROWS:
            if rows > 512 and n > 10_000:
                continue
            weights = [torch.randn(n, k) for _ in range(1 if n > 10_000 else 10)]
            x, g = torch.randn(rows, k), torch.randn(rows, n)
            there = least(ways, [(x, w.t()) for w in weights], calls)
            back = least(ways, [(g, w) for w in weights], calls)
            learned = least(ways | {"onednn": lambda a, b: by_onednn(a.contiguous(), b)}, [(g.t(), x)], calls)
            exact = x.double() @ weights[0].double().t()
            off = [float((way(x, weights[0].t()) - exact).abs().max() / exact.abs().max()) for way in ways.values()]
            rates = [[2e-9 * rows * k * n / one[way] for way in ways] for one in (there, back, learned)]
            print(f"{name:10}{rows:6}{'':8}" + "        ".join(f"{mkl:6.0f} {onednn:6.0f} {onednn / mkl:5.2f}" for mkl, onednn in rates)
                  + f"        {off[0]:.1e} {off[1]:.1e}   {products._takes(x, weights[0].t())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} threads; oneDNN's are {'' if products.is_quicker() else 'not '}taken on this processor")
    shapes(options.calls)


if __name__ == "__main__":
    main()
