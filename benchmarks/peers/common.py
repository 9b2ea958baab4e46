"""What every runner shares: the job it is handed, the layouts of a step's rows, the sheet it hands back. Standard library only.

A runner is called, with the Python of its peer's environment, as

    python by_PEER.py JOB_FOLDER SHEET.json OPTIONS      (OPTIONS: JSON, such as {"micro": 4})

JOB_FOLDER was made by weitiao (by_weitiao.py --prepare):

    job.json       name, method, precision, batch, steps, rate, model (a folder), adapter (a folder in PEFT's format, or null), pad_id, …
    rows.jsonl     {"input_ids": [...], "labels": [...]}, batch x steps rows in the order in which they are learned; -100: not learned
    measured.jsonl rows of the same kind that are not learned, where an evaluation loss was asked for
    adapter/       LoRA as it begins, so that all begin alike
"""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory", "litgpt", "lightning", "unsloth", "liger-kernel")


class NotComparable(Exception):
    """This peer cannot do this job so that it is the same job; says why."""


class Given:
    """The job folder, read."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.facts: dict[str, Any] = json.loads((self.folder / "job.json").read_text("utf-8"))
        self.batch, self.steps = self.facts["batch"], self.facts["steps"]
        self.rows = self._read("rows.jsonl")
        self.measured = self._read("measured.jsonl")

    def _read(self, name: str) -> list[Row]:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []

    def by_length(self) -> list[Row]:
        """Rows of like length side by side within each step: the least padding that keeps a step what it is."""
        return [row for step in self.each_step() for row in sorted(step, key=lambda r: -len(r["input_ids"]))]

    def each_step(self) -> list[list[Row]]:
        return [self.rows[a : a + self.batch] for a in range(0, len(self.rows), self.batch)]

    def packed(self, blocks: int) -> list[list[Row]]:
        """The rows of each step in so many blocks, as even as the longest-first rule makes them."""
        packed = []
        for step in self.each_step():
            filled: list[list[Row]] = [[] for _ in range(blocks)]
            for row in sorted(step, key=lambda r: -len(r["input_ids"])):
                min(filled, key=lambda block: sum(len(r["input_ids"]) for r in block)).append(row)
            packed += filled
        return packed


class Sheet:
    """Seconds and loss of each step, and of each evaluation (step, seconds trained so far, loss)."""

    def __init__(self, given: Given):
        self.given = given
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, float, float]] = []
        self._began = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def step_done(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now

    def evaluated(self, loss: float) -> bool:
        """Note it; its own time is not counted as training. Was the target reached?"""
        self.evaluations.append((len(self.seconds), sum(self.seconds), loss))
        self.begin()
        return loss <= (self.given.facts["until"] or float("-inf"))

    def evaluation_due(self) -> bool:
        every = self.given.facts["evaluate_every"]
        return bool(every) and len(self.seconds) % every == 0

    def write(self, file: str) -> None:
        peak, gpu = peaks()
        Path(file).write_text(json.dumps({
            "seconds": self.seconds, "losses": self.losses, "evaluations": self.evaluations, "peak": peak, "peak_gpu": gpu, "versions": versions(),
        }), "utf-8")


def peaks() -> tuple[int, int]:
    """(bytes of this process at their highest, bytes of tensors on the GPU at their highest)"""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text("ascii", "replace"), re.MULTILINE) if status.is_file() else None
    torch = sys.modules.get("torch")
    return (int(found.group(1)) * 1024 if found else 0,
            torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run(by_peer: Any) -> None:
    """`by_peer(given, options, sheet)` between reading the job and writing the sheet. A peer that cannot says so in the sheet."""
    folder, file, options = sys.argv[1:4]
    given = Given(folder)
    sheet = Sheet(given)
    try:
        by_peer(given, json.loads(options), sheet)
    except NotComparable as reason:
        Path(file).write_text(json.dumps({"skipped": str(reason)}), "utf-8")
        return
    sheet.write(file)
