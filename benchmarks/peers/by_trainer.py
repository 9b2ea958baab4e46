"""transformers.Trainer as its tutorials use it: DataCollatorForSeq2Seq, padding to the longest row of a forward pass.

options: micro (rows of a forward pass), checkpointing
"""

from __future__ import annotations

import tempfile
from typing import Any

from common import Given, Sheet, run
from hf import Clock, arguments, model_of, tokenizer_of
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments


def by_trainer(given: Given, options: dict[str, Any], sheet: Sheet) -> None:
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in given.by_length()]
    collator = DataCollatorForSeq2Seq(tokenizer_of(given), padding=True, label_pad_token_id=-100)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(**arguments(given, options, folder), train_sampling_strategy="sequential")
        Trainer(model_of(given), settings, train_dataset=rows, data_collator=collator, callbacks=[Clock(sheet)]).train()


if __name__ == "__main__":
    run(by_trainer)
