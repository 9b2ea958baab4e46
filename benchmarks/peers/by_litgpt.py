"""litgpt's finetune/lora.py on rows that are encoded already, by a data module of our own.

Its loss is the mean of its forward passes' means, so the rows of a step weigh as elsewhere only where they go through at once. It keeps a
schedule of its own, which is put aside for a constant rate; it clips nothing; what it does behind the last step (merging, saving) is
not measured. It does not tie the head to the embedding, so with all weights it trains another model.

options: micro (rows of a forward pass)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Given, NotComparable, Row, Sheet, run

NAMES = {"smollm2-135m": "SmolLM2-135M-Instruct", "qwen-shape": "Qwen2.5-0.5B"}
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-true"}
PARTS = {  # of a layer: litgpt's name, and the linears of the others whose A stand in it, one below the other
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn.proj": ("self_attn.o_proj",),
    "mlp.fc_1": ("mlp.gate_proj",), "mlp.fc_2": ("mlp.up_proj",), "mlp.proj": ("mlp.down_proj",),
}


class Done(Exception):
    """The last step is taken."""


def converted(given: Given, folder: Path) -> Path:
    """The model in litgpt's form, the first A of each adapter with it (B begins at 0)."""
    from safetensors.torch import load_file

    name = NAMES[given.facts["shape"]]
    checkpoint = folder / name
    checkpoint.mkdir()
    for file in Path(given.facts["model"]).iterdir():
        shutil.copy(file, checkpoint / file.name)
    subprocess.run([sys.executable, "-m", "litgpt", "convert_to_litgpt", str(checkpoint), "--model_name", name], check=True)
    adapter = load_file(Path(given.facts["adapter"]) / "adapter_model.safetensors")
    weights = torch.load(checkpoint / "lit_model.pth")
    layers = sum(key.endswith("q_proj.lora_A.weight") for key in adapter)
    for layer in range(layers):
        for ours, theirs in PARTS.items():
            first = torch.cat([adapter[f"base_model.model.model.layers.{layer}.{one}.lora_A.weight"] for one in theirs])
            weights[f"transformer.h.{layer}.{ours}.lora_A"] = first
    torch.save(weights, checkpoint / "lit_model.pth")
    return checkpoint


def samples(rows: list[Row]) -> list[dict[str, Any]]:
    return [{"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["labels"]),
             "token_counts": {"raw": len(row["input_ids"]), "raw_plus_prompt_template": len(row["input_ids"])}} for row in rows]


def by_litgpt(given: Given, options: dict[str, Any], sheet: Sheet) -> None:
    if given.facts["method"] != "lora":
        raise NotComparable("litgpt does not tie the head to the embedding, so all weights are others than those of the other side")
    import litgpt.finetune.lora as theirs
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.prompts import Default
    from torch.utils.data import DataLoader

    class Encoded(DataModule):
        prompt_style = Default()

        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **kwargs: Any) -> None:
            self.micro = batch_size

        def train_dataloader(self) -> DataLoader:
            return self.loader(given.by_length(), self.micro)

        def val_dataloader(self) -> DataLoader:
            return self.loader(given.rows[:1], 1)

        def loader(self, rows: list[Row], at_once: int) -> DataLoader:
            return DataLoader(samples(rows), batch_size=at_once, collate_fn=get_sft_collate_fn(pad_id=given.facts["pad_id"]))

    losses: list[torch.Tensor] = []
    cross_entropy, cycle = theirs.chunked_cross_entropy, theirs.CycleIterator

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = cross_entropy(*args, **kwargs)
        if loss.requires_grad:
            losses.append(loss.detach().float())
        return loss

    def begun(loader: Any) -> Any:
        sheet.begin()
        return cycle(loader)

    class Constant(torch.optim.lr_scheduler.LambdaLR):
        """Also what is called when a step is done."""

        started = False

        def step(self, *args: Any) -> None:
            super().step(*args)
            if not self.started:  # once when it is made
                self.started = True
                return
            sheet.step_done()
            sheet.losses.append(float(torch.stack(losses).mean()))
            losses.clear()
            if len(sheet.losses) == given.steps:
                raise Done

    theirs.chunked_cross_entropy, theirs.CycleIterator = noted, begun
    theirs.get_lr_scheduler = lambda optimizer, warmup_steps, max_steps: Constant(optimizer, lambda step: 1.0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            theirs.setup(
                converted(given, folder), folder / "out", precision=PRECISIONS[given.facts["precision"]], lora_r=given.facts["rank"],
                lora_alpha=given.facts["alpha"], lora_dropout=0.0, lora_query=True, lora_key=True, lora_value=True, lora_projection=True, lora_mlp=True,
                data=Encoded(), train=TrainArgs(
                    global_batch_size=given.batch, micro_batch_size=options["micro"], lr_warmup_steps=0, epochs=2, max_steps=given.steps,
                    save_interval=1 << 30, log_interval=1,
                ),
                eval=EvalArgs(interval=1 << 30, max_new_tokens=1, max_iters=1, initial_validation=False, final_validation=False),
                optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": given.facts["rate"], "weight_decay": 0.0}},
            )
        except Done:
            pass


if __name__ == "__main__":
    run(by_litgpt)
