"""LLaMA-Factory's own run_exp on rows that are encoded already (its `tokenized_path`), in the given order.

options: micro (rows of a forward pass, padded), or blocks (neat_packing: a step's rows in so many blocks, in the layout that its own
packing makes, so that the step stays what it is); checkpointing
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from common import Given, Row, Sheet, run
from datasets import Dataset, DatasetDict
from hf import BLOCKS, CHECKPOINTING, Clock, arguments, dtype

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):  # imported for rows with sound in them, of which there are none; its builds on PyPI want CUDA
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.train.tuner import run_exp  # noqa: E402


def neat_blocks(blocks: list[list[Row]], pad_id: int) -> list[Row]:
    """Rows behind each other, the attention mask telling which, as its packing makes them; padded to the 8 places that its collator wants."""
    width = -(-(max(sum(len(row["input_ids"]) for row in rows) for rows in blocks) + 1) // 8) * 8
    made = []
    for rows in blocks:
        pads = width - sum(len(row["input_ids"]) for row in rows)
        made.append({
            "input_ids": [token for row in rows for token in row["input_ids"]] + [pad_id] * pads,
            "attention_mask": [number for number, row in enumerate(rows, start=1) for _ in row["input_ids"]] + [0] * pads,
            "position_ids": [place for row in rows for place in range(len(row["input_ids"]))] + [0] * pads,
            "labels": [label for row in rows for label in (-100, *row["labels"][1:])] + [-100] * pads,
        })
    return made


def held_as_computed(given: Given, folder: Path) -> str:
    """The model's folder, its config naming the type to hold it in: LLaMA-Factory goes by that alone, and 16 bits are no fp32 job."""
    folder.mkdir()
    for file in Path(given.facts["model"]).iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = folder / "config.json"
    told = json.loads(config.read_text("utf-8"))
    config.unlink()
    config.write_text(json.dumps(told | {"dtype": str(dtype(given))[6:]}), "utf-8")
    return str(folder)


def by_llamafactory(given: Given, options: dict[str, Any], sheet: Sheet) -> None:
    packing = BLOCKS in options
    rows = (neat_blocks(given.packed(options[BLOCKS]), given.facts["pad_id"]) if packing
            else [row | {"attention_mask": [1] * len(row["input_ids"])} for row in given.by_length()])
    facts = given.facts
    with tempfile.TemporaryDirectory() as folder:
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(f"{folder}/rows")
        method = ({"finetuning_type": "lora", "adapter_name_or_path": facts["adapter"], "lora_rank": facts["rank"], "lora_alpha": facts["alpha"],
                   "lora_dropout": 0.0, "lora_target": ",".join(facts["targets"])} if facts["adapter"] else {"finetuning_type": "full"})
        run_exp(arguments(given, options, str(Path(folder) / "run")) | method | {
            "stage": "sft", "do_train": True, "model_name_or_path": held_as_computed(given, Path(folder) / "model"), "template": "default", "dataset": "rows", "dataset_dir": folder,
            "tokenized_path": f"{folder}/rows", "cutoff_len": max(len(row["input_ids"]) for row in rows), "disable_shuffling": True, "flash_attn": "sdpa",
            "packing": packing, "neat_packing": packing, "disable_gradient_checkpointing": not options.get(CHECKPOINTING, False),
            "infer_dtype": "auto", "overwrite_cache": True,
        }, callbacks=[Clock(sheet)])


if __name__ == "__main__":
    run(by_llamafactory)
