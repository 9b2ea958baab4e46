"""Unsloth: its own loading and kernels, TRL's trainer as it patches it. On a GPU only.

options: those of by_trl.py
"""

from __future__ import annotations

from typing import Any

from unsloth import FastLanguageModel  # isort: skip  (it patches the others, so it comes first)

import torch
from by_trl import train
from common import Given, Sheet, run
from hf import CHECKPOINTING


def by_unsloth(given: Given, options: dict[str, Any], sheet: Sheet) -> None:
    facts = given.facts
    model, _ = FastLanguageModel.from_pretrained(
        facts["model"], max_seq_length=max(len(row["input_ids"]) for row in given.rows), load_in_4bit=False, full_finetuning=facts["method"] == "full",
        dtype=torch.bfloat16 if facts["precision"] == "bf16" else torch.float32,
    )
    if facts["adapter"]:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        model = FastLanguageModel.get_peft_model(
            model, r=facts["rank"], lora_alpha=facts["alpha"], lora_dropout=0.0, bias="none", target_modules=facts["targets"],
            use_gradient_checkpointing=options.get(CHECKPOINTING, False),
        )
        set_peft_model_state_dict(model, load_file(f"{facts['adapter']}/adapter_model.safetensors"))
    train(model, given, options, sheet)


if __name__ == "__main__":
    run(by_unsloth)
