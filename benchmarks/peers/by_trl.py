"""TRL's SFTTrainer on rows that are encoded already: its own collator, its own loss from the last hidden states.

options: micro (rows of a forward pass, padded), or blocks (packing=True: a step's rows in so many blocks, in the layout that TRL's own
packing makes, so that the step stays what it is); checkpointing; liger (Liger's kernels, on a GPU)
"""

from __future__ import annotations

import tempfile
from typing import Any

from common import Given, Row, Sheet, run
from datasets import Dataset
from hf import BLOCKS, Clock, arguments, model_of, tokenizer_of
from trl import SFTConfig, SFTTrainer


def block(rows: list[Row]) -> Row:
    """Rows behind each other, with their lengths beside them, from which TRL's collator makes positions that begin anew."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "seq_lengths": [len(row["input_ids"]) for row in rows],
    }


def by_trl(given: Given, options: dict[str, Any], sheet: Sheet) -> None:
    train(model_of(given), given, options, sheet)


def train(model: Any, given: Given, options: dict[str, Any], sheet: Sheet) -> None:
    packing = BLOCKS in options
    rows = [block(rows) for rows in given.packed(options[BLOCKS])] if packing else given.by_length()
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            **arguments(given, options, folder), train_sampling_strategy="sequential", packing=packing, max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True}, use_liger_kernel=options.get("liger", False),
        )
        SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer_of(given), callbacks=[Clock(sheet)]).train()


if __name__ == "__main__":
    run(by_trl)
