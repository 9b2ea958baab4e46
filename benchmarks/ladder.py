"""The memory ladder of full-parameter tuning: what each rung saves, what it costs, and what it learns.

    python benchmarks/ladder.py --data rows.jsonl --steps 10 --rounds 2      each rung in a process of its own, in turn
    python benchmarks/ladder.py --only thrifty --data rows.jsonl             one of them
    python benchmarks/ladder.py --shapes                                     what the plan says of larger models, and no run

A run's own measurements are read from its folder: the peak of its steps beside what was there before the model came (plan.json), the
plan's figure for it, the seconds of a step, and the losses. Time is the processor's (user + system), so that other work does not count.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BF16 = ["model.dtype=bfloat16"]
INSIDE = ["training.step_in_backward=true", "training.clipping=each"]
RUNGS: dict[str, list[str]] = {
    "float32, AdamW": [],
    "step in backward (measured)": ["training.step_in_backward=true"],
    "step in backward (each)": INSIDE,
    "checkpointing": ["training.checkpointing=true"],
    "checkpointing, step in backward (each)": [*INSIDE, "training.checkpointing=true"],
    "bf16, nearest": [*BF16, "training.rounding=nearest"],
    "bf16, compensated": [*BF16, "training.rounding=compensated"],
    "bf16, stochastic": [*BF16, "training.rounding=stochastic"],
    "memory=balanced": ["training.memory=balanced"],
    "bf16, compensated, 8-bit AdamW": [*BF16, "training.rounding=compensated", "training.optimizer=adamw_bnb_8bit"],
    "memory=thrifty": ["training.memory=thrifty"],
    "memory=thrifty, clipped each": ["training.memory=thrifty", "training.clipping=each"],
    "bf16, Adafactor in backward": [*BF16, *INSIDE, "training.optimizer=adafactor", "training.checkpointing=true"],
}
# A tutorial's 8B and 0.8B (as in tutorial_memory.py) and two smaller ones.
SHAPES = [("meta-llama/Meta-Llama-3-8B", "24GB"), ("Langboat/bloom-800m-zh", "8GB"), ("Qwen/Qwen3-0.6B", "8GB"), ("Qwen/Qwen2.5-0.5B", "8GB")]
FULL, NF4 = {"method": "full"}, {"model.quantize": "nf4", "training.checkpointing": True}
PLANNED: dict[str, dict[str, object]] = {
    "float32, AdamW": FULL,
    "balanced": FULL | {"training.memory": "balanced"},
    "thrifty": FULL | {"training.memory": "thrifty"},
    "thrifty, activations in the host": FULL | {"training.memory": "thrifty", "training.offload_activations": True},
    "LoRA, 4 bits, checkpointing": NF4,
    "LoRA, 4 bits, streamed": NF4 | {"model.stream": True},
    "LoRA, 4 bits, streamed, activations in the host": NF4 | {"model.stream": True, "training.offload_activations": True},
}


def run(words: list[str], data: str, steps: int, batch: int) -> dict[str, object]:
    """One run, from plan.json and metrics.jsonl of its folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "weitiao", "train", "--data", data, "--method", "full", f"training.steps={steps}", f"training.batch_size={batch}",
                   "evaluation.every=end", "saving.every=end", f"output={folder}/run", *words]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        plan = json.loads((Path(folder) / "run" / "plan.json").read_text())
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return {"planned": plan["predicted"]["parts"]["steps"], "measured": plan["measured"]["parts"]["steps"], "seconds": plan["measured"]["seconds_a_step"],
            "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "losses": [line["loss"] for line in lines if "loss" in line]}


def table(results: dict[str, list[dict]]) -> str:
    plain = results[next(iter(results))]

    def middle(runs: list[dict], key: str) -> float:
        return statistics.median(r[key] for r in runs)

    lines = ["| rung | peak, MiB | planned | of float32's | time of a step | processor of a run | loss at last |", "|---|---|---|---|---|---|---|"]
    for name, runs in results.items():
        losses = runs[0]["losses"]
        lines.append(
            f"| {name} | {middle(runs, 'measured') / 2**20:,.0f} | {middle(runs, 'planned') / middle(runs, 'measured'):.2f} | "
            f"{middle(runs, 'measured') / middle(plain, 'measured'):.2f} | {middle(runs, 'seconds') / middle(plain, 'seconds'):.2f} | "
            f"{middle(runs, 'processor') / middle(plain, 'processor'):.2f} | {statistics.mean(losses[-3:]):.3f} |"
        )
    lines += ["", "Losses, step by step:", ""]
    lines += [f"- {name}: {' '.join(f'{loss:.3f}' for loss in runs[0]['losses'])}" for name, runs in results.items()]
    return "\n".join(lines)


def shapes() -> str:
    """What `weitiao plan` says of one row of 2,048 tokens a step on a GPU, computed in bf16."""
    from weitiao.config import read
    from weitiao.screen import Screen
    from weitiao.train.needs import needs
    from weitiao.train.plan import subject_of, target_of

    lines = ["| model | settings | load | proof | steps | in the host's memory |", "|---|---|---|---|---|---|"]
    for name, size in SHAPES:
        for rung, words in PLANNED.items():
            settings = read(**{"data": "none", "model.name": name, "training.batch_size": 1, "training.precision": "bf16"} | words)
            subject, _ = subject_of(settings, Screen(quiet=True), 2048, 8)
            planned = needs(subject, target_of(size, None))
            sizes = [*(planned.parts[part] for part in ("load", "proof", "steps")), planned.host]
            lines.append(f"| {name} | {rung} | " + " | ".join(f"{bytes_ / 2**30:.2f} GiB" for bytes_ in sizes) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="rows to learn from")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="rungs whose name holds this")
    parser.add_argument("--shapes", action="store_true")
    asked = parser.parse_args()
    if asked.shapes:
        print(shapes())
        return
    results: dict[str, list[dict]] = {}
    for _ in range(asked.rounds):
        for name, words in RUNGS.items():
            if asked.only in name:
                results.setdefault(name, []).append(run(words, asked.data, asked.steps, asked.batch))
                print(json.dumps({"rung": name} | results[name][-1]), file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
