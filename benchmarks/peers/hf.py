"""What the peers that stand on transformers.Trainer share: the model, Trainer's arguments, the clock."""

from __future__ import annotations

from typing import Any

import torch
from common import Given, Row, Sheet
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

# options of all of them: rows of a forward pass, or blocks of a step where rows are packed; recompute activations?
MICRO, BLOCKS, CHECKPOINTING = "micro", "blocks", "checkpointing"


def dtype(given: Given) -> torch.dtype:
    """A frozen base is held as it is computed, trained weights in float32: the quickest that loses nothing."""
    return torch.bfloat16 if given.facts["precision"] == "bf16" and given.facts["method"] == "lora" else torch.float32


def model_of(given: Given) -> Any:
    """The model with the job's adapter, which begins as everybody's."""
    model = AutoModelForCausalLM.from_pretrained(given.facts["model"], dtype=dtype(given), attn_implementation="sdpa")
    model.config.use_cache = False
    if given.facts["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, given.facts["adapter"], is_trainable=True)
    return model


def tokenizer_of(given: Given) -> Any:
    return AutoTokenizer.from_pretrained(given.facts["model"])


def arguments(given: Given, options: dict[str, Any], folder: str) -> dict[str, Any]:
    """Of TrainingArguments and its children. Blocks go through one by one."""
    micro = 1 if BLOCKS in options else options[MICRO]
    gpu = torch.cuda.is_available()
    return {
        "output_dir": folder, "per_device_train_batch_size": micro, "gradient_accumulation_steps": options.get(BLOCKS) or given.batch // micro,
        "max_steps": given.steps, "learning_rate": given.facts["rate"], "lr_scheduler_type": "constant", "optim": "adamw_torch", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": given.facts["precision"] == "bf16",
        "use_cpu": not gpu, "dataloader_pin_memory": gpu, "gradient_checkpointing": options.get(CHECKPOINTING, False),
    }


class Clock(TrainerCallback):
    """Seconds and loss of each step; measures the rows set aside where that was asked for."""

    def __init__(self, sheet: Sheet):
        self.sheet = sheet

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.sheet.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.sheet.step_done()
        if self.sheet.evaluation_due() and self.sheet.evaluated(mean_loss(model, self.sheet.given)):
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.sheet.losses.append(float(logs["loss"]))


def padded(rows: list[Row], pad_id: int) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def side_by_side(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([v + [fill] * (width - len(v)) for v in values])

    ids = [row["input_ids"] for row in rows]
    return {"input_ids": side_by_side(ids, pad_id), "attention_mask": side_by_side([[1] * len(v) for v in ids], 0),
            "labels": side_by_side([row["labels"] for row in rows], -100)}


def mean_loss(model: Any, given: Given, rows_at_once: int = 4) -> float:
    """sum(nll) / learned tokens over the rows set aside."""
    rows = sorted(given.measured, key=lambda row: len(row["input_ids"]))
    device, total, learned = next(model.parameters()).device, 0.0, 0
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=given.facts["precision"] == "bf16"):
        for a in range(0, len(rows), rows_at_once):
            batch = {k: v.to(device) for k, v in padded(rows[a : a + rows_at_once], given.facts["pad_id"]).items()}
            count = int((batch["labels"][:, 1:] >= 0).sum())
            total += float(model(**batch, use_cache=False).loss) * count
            learned += count
    model.train()
    return total / learned
