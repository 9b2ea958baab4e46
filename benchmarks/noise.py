"""How far half precision alone moves a proof: trie against plain rows on the first batches of several seeds, beside what is let pass.

    python benchmarks/noise.py ROWS.jsonl [ROWS.jsonl ...] [--seeds 5] [--precision bf16]

The limits of weitiao.train.proof have to lie well above these, and below what a wrong layout gives (tests/train/test_proof.py).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from weitiao.cli import TORCH_READS

os.environ.update(TORCH_READS)

from weitiao import config  # noqa: E402
from weitiao.screen import Screen  # noqa: E402
from weitiao.train import train  # noqa: E402
from weitiao.train.proof import prove  # noqa: E402


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("rows", nargs="+")
    asked.add_argument("--seeds", type=int, default=5)
    asked.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp16"])
    given = asked.parse_args()
    print("| rows | seed | passed | nll, limit | worst tensor, limit | all tensors, limit |\n|---|---|---|---|---|---|")
    for rows in given.rows:
        for seed in range(given.seeds):
            settings = config.read(None, [f"data.train={rows}", f"training.precision={given.precision}", f"training.seed={seed}"])
            job = train.prepare(settings, Screen(quiet=True))
            made = prove(job.model, train.first_rows(job), job.compute, str(job.accelerator.device), train.size_of_proof(job))
            if not made.limits:
                return print(f"{rows}: {made.reason}")
            _, nll, worst, together = made.limits
            print(f"| {Path(rows).stem} | {seed} | {made.passed} | {made.nll_max:.2f}, {nll:.2f} | {made.grad_rel_max:.3f}, {worst:.3f} "
                  f"| {made.grad_rel:.3f}, {together:.3f} |", flush=True)


if __name__ == "__main__":
    main()
