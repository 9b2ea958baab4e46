"""The tutorials' own figures, term by term: all weights of 0.8B in 18 GB, 8B in 180 GB, 80B in 1,800 GB.

    python benchmarks/tutorial_memory.py         prints the table of benchmarks/plan.md

Tutorial 0's recipe (float32, AdamW, rows padded to 256 tokens, 4 of them a pass) is traced on the published shapes, without weights;
beside it weitiao's defaults on the same rows, and its thriftiest way. For 80B, which nobody published, Llama's shape is stretched.
GB are 10^9 bytes here, as in the tutorials.
"""

from __future__ import annotations

from typing import Any

from weitiao.config import parse
from weitiao.model.known import known_config
from weitiao.screen import quiet_libraries
from weitiao.train.needs import Subject, Target, needs
from weitiao.train.plan import made_up

ANY = Target("any GPU", "cuda", 1 << 50)
TOKENS, ROWS = 256, 4  # of a pass of tutorial 0
RECIPE = {"method": "full", "training": {"precision": "fp32", "layout": "padded", "batch_size": 32, "nodes_per_pass": TOKENS * ROWS, "checkpointing": False,
                                         "optimizer_options": "foreach=true"}}  # a step on all weights at once, torch's own default
WAYS: dict[str, dict[str, Any]] = {
    "the tutorial's recipe": RECIPE,
    "all weights, weitiao's defaults": {"method": "full", "training": {"batch_size": 32, "nodes_per_pass": TOKENS * ROWS}},
    "all weights, thriftiest": {"method": "full", "training": {"batch_size": 32, "nodes_per_pass": TOKENS, "checkpointing": True,
                                                              "optimizer": "adafactor"}},
    "LoRA, weitiao's defaults": {"training": {"batch_size": 32, "nodes_per_pass": TOKENS * ROWS}},
    "LoRA on 4 bits, thriftiest": {"model": {"quantize": "nf4"}, "training": {"batch_size": 32, "nodes_per_pass": TOKENS, "checkpointing": True}},
}


def shapes() -> dict[str, tuple[float, Any]]:
    """name -> (GB that the tutorial tells, config)"""
    large = known_config("meta-llama/Llama-3.1-70B")
    large.num_hidden_layers = 91  # 80.1 B
    return {
        "0.8B (bloom-800m-zh)": (18, known_config("Langboat/bloom-800m-zh")),
        "8B (Llama-3.1-8B)": (180, known_config("meta-llama/Llama-3.1-8B")),
        "80B (Llama-3.1's shape, 91 layers)": (1800, large),
    }


def main() -> None:
    quiet_libraries()
    names = ("weights", "quantisation", "adapter", "gradients", "optimizer", "activations", "logits", "work space")
    print("| model, tutorial's figure | way | " + " | ".join(names) + " | in all, GB |\n" + "|---" * (len(names) + 3) + "|")
    for shape, (told, config) in shapes().items():
        for way, values in WAYS.items():
            settings = parse({"data": "none", **values})
            planned = needs(Subject(settings, config, made_up(TOKENS, 64)), ANY)
            terms = [f"{planned.terms.get(name, 0) / 1e9:.1f}" for name in names]
            print(f"| {shape}, {told} GB | {way} | " + " | ".join(terms) + f" | **{planned.parts['steps'] / 1e9:,.1f}** |", flush=True)


if __name__ == "__main__":
    main()
