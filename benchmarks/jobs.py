"""The jobs that are measured: which rows, which model, what is trained; and how weitiao reads and takes them.

    resume    prompt and JSON answer, a long prompt that all rows share       resume/seed_200.json
    reviews   sentences about films behind a fixed instruction                rotten_tomatoes/train.jsonl
    alpaca    Chinese instructions, hardly anything shared                    alpaca_zh/alpaca_zh_demo.json
    chats     conversations of several turns (ShareGPT)                       multi_turn/sharegpt_zh_1k.jsonl

The files stand in a folder that the user names (`--data`); nothing of them is kept. All trains 12 rows a step by AdamW at a
constant rate, gradients clipped to a length of 1, no dropout: r=8 and alpha 32 on the seven linears of a Llama layer, or all weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH, LORA_RATE, FULL_RATE = 12, 1e-4, 1e-5
RANK, ALPHA = 8, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHORT = 1024  # tokens: longer conversations are cut

INSTRUCTION = (
    "Below is one sentence from a review of a film. Decide whether its author liked the film. Answer with exactly one word: positive "
    "if the sentence speaks well of the film, negative if it does not. Do not explain the answer."
)


def as_instructions(file: Path, place: Path) -> Path:
    """Every fourth review of the file (it is sorted by class) as an instruction row, written to `place`."""
    lines = file.read_text("utf-8").strip().split("\n")[::4]  # not splitlines: some reviews hold other line breaks
    rows = ({"instruction": INSTRUCTION, "input": row["text"], "output": "positive" if row["label"] else "negative"} for row in map(json.loads, lines))
    made = place / "reviews.jsonl"
    made.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return made


@dataclass(frozen=True)
class Rows:
    """file: below the data folder. made: what writes the rows to train on from it, if it is not taken as it is."""

    file: str
    made: Callable[[Path, Path], Path] | None = None
    more: tuple[str, ...] = ()


ROWS = {
    "resume": Rows("resume/seed_200.json"),
    "reviews": Rows("rotten_tomatoes/train.jsonl", made=as_instructions),
    "alpaca": Rows("alpaca_zh/alpaca_zh_demo.json"),
    "chats": Rows("multi_turn/sharegpt_zh_1k.jsonl", more=(f"data.max_tokens={SHORT}", "data.bad_share=1")),
}
METHODS = {
    "lora": ("method=lora", f"method.rank={RANK}", f"method.alpha={ALPHA}", f"method.targets=[{','.join(TARGETS)}]", f"training.learning_rate={LORA_RATE}"),
    "full": ("method=full", f"training.learning_rate={FULL_RATE}"),
}
PRECISIONS = ("fp32", "bf16")


def embedded(place: Path) -> str:
    return "smollm2-135m"


def qwen_shape(place: Path) -> str:
    """Qwen2.5-0.5B's shape with random weights in bf16 and SmolLM2's tokenizer: a vocabulary of 151,936."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from weitiao.model.source import resolve

    folder = place / "qwen2.5-0.5b-shape"
    if not (folder / "tokenizer.json").is_file():
        torch.manual_seed(0)
        config = Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, vocab_size=151_936,
            max_position_embeddings=32_768, rope_theta=1e6, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        for file in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
            shutil.copy(resolve("smollm2-135m") / file, folder / file)
    return str(folder)


MODELS = {"smollm2-135m": embedded, "qwen-shape": qwen_shape}


@dataclass(frozen=True)
class Job:
    """One thing to train; its name is such as resume/lora/bf16/smollm2-135m."""

    rows: str
    method: str
    precision: str
    model: str = "smollm2-135m"

    @property
    def name(self) -> str:
        return f"{self.rows}/{self.method}/{self.precision}/{self.model}"

    @classmethod
    def named(cls, name: str) -> Job:
        """`resume/lora/bf16`, or with a model behind it.

        Raises:
            ValueError: a part is unknown.
        """
        parts = name.split("/")
        tables = (ROWS, METHODS, PRECISIONS, MODELS)
        if not 3 <= len(parts) <= 4 or any(part not in table for part, table in zip(parts, tables)):
            raise ValueError(f"{name!r} is no job. Expected rows/method/precision[/model], of {', '.join(' '.join(table) for table in tables)}.")
        return cls(*parts)


def as_weitiao_reads(job: Job, data: Path, place: Path, steps: int) -> Any:
    """weitiao's own `Job`, up to where its first step would begin: rows encoded, model loaded, method attached.

    Args:
        data: the folder of the rows' files.
        place: a folder for what has to be made of them.
    """
    from weitiao.cli import TORCH_READS

    for name, value in TORCH_READS.items():
        os.environ.setdefault(name, value)
    from weitiao import config
    from weitiao.screen import Screen, quiet_libraries
    from weitiao.train.train import prepare

    quiet_libraries()
    rows = ROWS[job.rows]
    file = rows.made(data / rows.file, place) if rows.made else data / rows.file
    settings = config.read(None, [
        *METHODS[job.method], *rows.more, f"training.batch_size={BATCH}", "training.scheduler=constant", "training.warmup=0",
        f"training.precision={job.precision}", f"training.steps={steps}", "training.layout=trie", "evaluation.every=end", "training.max_grad_norm=1.0",
    ], **{"model.name": MODELS[job.model](place), "data.train": str(file)})
    return prepare(settings, Screen(quiet=True))


def training_of(prepared: Any, listener: Any, nodes: int | None = None) -> Any:
    """The run that the command would make of it, without a run folder and without the proof. nodes: of a pass, in place of the usual."""
    from weitiao.model import heap
    from weitiao.train.loop import Training
    from weitiao.train.train import guessed

    heap.kept().__enter__()  # as within one call of `fit`: here it is called for some steps at a time

    budget = nodes or (prepared.planned.budget if prepared.planned else guessed(prepared, False, "trie"))
    return Training(prepared.settings, None, prepared.model, prepared.method, "base", prepared.template, prepared.data.rows, [],
                    prepared.accelerator, "trie", budget, listener)


class Watch:
    """What a listener is told, kept: a line and the seconds of each step."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.seconds: list[float] = []

    def on_step(self, line: dict[str, Any], seconds: float) -> None:
        self.lines.append(line)
        self.seconds.append(seconds)

    def on_evaluation(self, line: dict[str, Any]) -> None: ...
    def on_message(self, text: str) -> None: ...
