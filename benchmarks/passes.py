"""How large should a pass be, and what does it spare to compute a prefix once for all passes of a step?

    python benchmarks/passes.py --data FOLDER [--jobs resume/lora/fp32 alpaca/lora/fp32] [--nodes 512 1024 4096] [--stems yes no] \
        [--rounds 2] [--threads 2]

FOLDER holds the rows' files (benchmarks/jobs.py). The same steps (12 rows each, loss and backward pass) in passes of at most so many nodes,
with stems (weitiao.model.stems) and without, each in a process of its own and in turn. Printed: nodes computed (what is computed again not counted), seconds a step, over
three steps, the median of the rounds, and microseconds a node, the peak memory of the process, and how far the gradients of the last step are
from those of the first way named (norm of the difference / norm).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobs import Job, Watch, as_weitiao_reads, training_of

DEFAULT = ["resume/lora/fp32", "resume/lora/bf16", "alpaca/lora/fp32", "alpaca/lora/bf16"]
STEPS = 3  # behind one that warms up


def measure(job: Job, data: Path, nodes: int, stems: bool, kept: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from weitiao.train import memory

    with tempfile.TemporaryDirectory() as place:
        training = training_of(as_weitiao_reads(job, data, Path(place), STEPS + 1), Watch())
    training.budget, training.stems = nodes, stems
    training.fit(1)  # B of LoRA is 0 before
    learned = {name: p for name, p in training.plain_model.named_parameters() if p.requires_grad}
    seconds, computed = [], 0
    for step in range(2, STEPS + 2):
        work = training._work_of(step)
        computed += sum(batch["input_ids"].numel() for batch in work.passes)
        began = time.perf_counter()
        training._gradients(step, work.passes, work.weight)
        seconds.append(time.perf_counter() - began)
        if step == STEPS + 1:
            save_file({name: p.grad.contiguous() for name, p in learned.items()}, kept)
        training._forget_gradients()
    print(json.dumps({"nodes": computed, "seconds": seconds, "peak": memory.peak("cpu"), "version": torch.__version__}))


def compare(name: str, options: argparse.Namespace) -> None:
    from safetensors.torch import load_file

    ways = [(nodes, stems == "yes") for nodes in options.nodes for stems in options.stems]
    found: dict[tuple[int, bool], list[dict]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        def at(way: tuple[int, bool]) -> Path:
            return Path(folder) / f"{way[0]}-{way[1]}.safetensors"

        for _ in range(options.rounds):
            for way in ways:
                nodes, stems = way
                command = [sys.executable, __file__, "--child", "--data", str(options.data), "--jobs", name, "--nodes", str(nodes), "--kept", str(at(way)),
                           "--stems", "yes" if stems else "no", *(["--threads", str(options.threads)] if options.threads else [])]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[way].append(json.loads(out.splitlines()[-1]))
        judge = load_file(at(ways[0]))
        print(f"\n{name}: {STEPS} steps, torch {found[ways[0]][0]['version']}, {options.rounds} rounds")
        for way, runs in found.items():
            seconds = statistics.median(sum(run["seconds"]) for run in runs)
            theirs = load_file(at(way))
            apart = sum(float((theirs[n].double() - g.double()).norm() ** 2) for n, g in judge.items()) ** 0.5
            apart /= sum(float(g.double().norm() ** 2) for g in judge.values()) ** 0.5
            print(f"  {way[0]:6,} nodes a pass, {'stems   ' if way[1] else 'no stems'}  {runs[0]['nodes']:7,} computed  {seconds / STEPS:6.2f} s a step  "
                  f"{1e6 * seconds / runs[0]['nodes']:6,.0f} us a node  {max(run['peak'] for run in runs) / 2**30:5.2f} GiB  {apart:.1e} apart", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--jobs", nargs="+", default=DEFAULT)
    parser.add_argument("--nodes", nargs="+", type=int, default=[512, 1024, 4096])
    parser.add_argument("--stems", nargs="+", choices=["yes", "no"], default=["yes", "no"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kept", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child:
        for name in options.jobs:
            compare(name, options)
        return
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    measure(Job.named(options.jobs[0]), options.data, options.nodes[0], options.stems[0] == "yes", options.kept)


if __name__ == "__main__":
    main()
