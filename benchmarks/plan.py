"""Planned memory against measured memory: real runs of two steps, over models, methods, lengths and precisions.

    python benchmarks/plan.py                    all cells, each in a process of its own; adds lines to benchmarks/plan.jsonl
    python benchmarks/plan.py --only gpt2        cells whose name holds this
    python benchmarks/plan.py --heap kept        in the C library's heap, as where weitiao's own cannot be built; "given back": which
                                                 gives freed memory back at once, as is done there where memory is short
    python benchmarks/plan.py --table            benchmarks/plan.jsonl as the table of benchmarks/plan.md

Measured on a CPU: the peak of the resident memory since it was before the model was loaded (VmHWM, so Linux); on a GPU:
torch.cuda.max_memory_allocated. Models other than smollm2-135m have their published shape and random weights, made here;
rows are random words, so that nothing is shared but the template.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "plan.jsonl"
# model, method, tokens of a row, rows a step, further settings
CELLS = [
    ("smollm2-135m", "lora", 128, 8, []),
    ("smollm2-135m", "lora", 512, 2, ["training.precision=bf16"]),
    ("smollm2-135m", "lora", 512, 4, ["training.checkpointing=true"]),
    ("smollm2-135m", "lora", 128, 8, ["model.quantize=nf4"]),
    ("smollm2-135m", "lora", 512, 2, ["training.layout=padded"]),
    ("smollm2-135m", "full", 128, 4, []),
    ("openai-community/gpt2", "full", 128, 4, []),
    ("bigscience/bloom-560m", "lora", 128, 4, ["training.precision=bf16"]),
    ("Qwen/Qwen2.5-0.5B", "lora", 256, 2, ["training.precision=bf16"]),
    ("smollm2-135m", "prefix", 256, 2, []),
    ("smollm2-135m", "lora", 128, 4, ["model.quantize=int8", "training.precision=bf16"]),
    ("openai-community/gpt2", "bitfit", 256, 2, []),
    ("smollm2-135m", "full", 256, 2, ["training.precision=bf16"]),
    ("smollm2-135m", "lora", 256, 8, ["training.nodes_per_pass=512"]),
    ("smollm2-135m", "prompt", 128, 4, ["training.precision=bf16"]),
    ("bigscience/bloom-560m", "bitfit", 128, 4, []),
    ("Qwen/Qwen2.5-0.5B", "full", 128, 2, []),
    ("smollm2-135m", "full", 128, 4, ["training.optimizer=adafactor"]),
    ("smollm2-135m", "adapter", 256, 2, []),
    ("openai-community/gpt2", "lora", 128, 4, ["training.precision=bf16"]),
]

HEAPS = {"own": {}, "kept": {"WEITIAO_COMPILE": "0"}, "given back": {"WEITIAO_COMPILE": "0", "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}}


def folder_of(name: str, cache: Path) -> str:
    """A folder with the published shape, random weights and the embedded model's tokenizer."""
    if name == "smollm2-135m":
        return name
    folder = cache / name.replace("/", "--")
    if not (folder / "config.json").is_file():
        import torch
        from transformers import AutoModelForCausalLM

        from weitiao.model.known import known_config
        from weitiao.model.load import load_tokenizer
        from weitiao.model.source import resolve
        from weitiao.settings.model import ModelSettings

        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(known_config(name), dtype=torch.bfloat16).save_pretrained(folder)
        load_tokenizer(resolve("smollm2-135m"), ModelSettings()).save_pretrained(folder)
    return str(folder)


def rows_of(tokens: int, count: int, file: Path) -> None:
    """Rows of about so many tokens, half of each the answer."""
    draw = random.Random(tokens)
    words = "time river stone green walk paper house light under seven music north bread cold open glass train seed horse blue".split()

    def text() -> str:
        return " ".join(draw.choice(words) for _ in range(max(4, (tokens - 30) // 2)))

    file.write_text("".join(json.dumps({"instruction": text(), "output": text()}) + "\n" for _ in range(count)), "utf-8")


def run(cell: tuple, cache: Path, heap: str) -> dict:
    name, method, tokens, batch, more = cell
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.jsonl"
        rows_of(tokens, 2 * batch, rows)
        words = [f"method={method}", f"training.batch_size={batch}", "training.steps=2", "saving.every=end", *more]
        command = [sys.executable, "-m", "weitiao", "train", "--model", folder_of(name, cache), "--data", str(rows),
                   "--output", f"{place}/run", "--force", *words]
        environment = os.environ | HEAPS[heap]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
        file = Path(place) / "run" / "plan.json"
        if done.returncode or not file.is_file():
            return {"model": name, "method": method, "tokens": tokens, "batch": batch, "settings": more, "heap": heap,
                    "error": (done.stderr or done.stdout)[-400:]}
        found = json.loads(file.read_text("utf-8"))
    predicted, measured = found["predicted"], found["measured"]
    return {
        "model": name, "method": method, "tokens": tokens, "batch": batch, "settings": more, "heap": heap, "nodes": predicted["largest"],
        "planned": predicted["parts"], "measured": measured["parts"], "terms": predicted["terms"],
        "steps_off": measured["parts"]["steps"] / predicted["parts"]["steps"] - 1,
        "peak_off": measured["peak"] / predicted["peak"] - 1,
        "seconds_a_step": measured["seconds_a_step"], "seconds_planned": (predicted["seconds"] or 0) / (predicted["steps"] / predicted["epochs"]),
    }


def table() -> str:
    lines = ["| model | method | tokens x rows | settings | heap | planned, GiB (load, proof, steps) | measured, GiB | steps | peak |",
             "|---|---|---|---|---|---|---|---|---|"]
    newest: dict[tuple, dict] = {}
    for line in RESULTS.read_text("utf-8").splitlines():
        one = json.loads(line)
        newest[one["model"], one["method"], one["tokens"], one["batch"], *one["settings"], one["heap"]] = one

    def gib(parts: dict) -> str:
        return ", ".join(f"{parts.get(name, 0) / 2**30:.2f}" for name in ("load", "proof", "steps"))

    for one in newest.values():
        if "error" not in one:
            lines.append(f"| {one['model']} | {one['method']} | {one['tokens']} x {one['batch']} | {' '.join(one['settings'])} | {one['heap']} | "
                         f"{gib(one['planned'])} | {gib(one['measured'])} | {one['steps_off']:+.1%} | {one['peak_off']:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", type=int, default=0, help="go on after so many cells")
    parser.add_argument("--heap", choices=list(HEAPS), default="own")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "weitiao-plan-models")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        return print(table())
    for cell in CELLS[options.skip :]:
        if options.only in f"{cell[0]} {cell[1]} {' '.join(cell[4])}":
            one = run(cell, options.cache, options.heap)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one) + "\n")
            told = one.get("error") or f"steps {one['steps_off']:+.1%}  peak {one['peak_off']:+.1%}  planned {one['planned']}  measured {one['measured']}"
            print(cell, told, flush=True)


if __name__ == "__main__":
    main()
