"""weitiao itself, and what it hands to the peers. Run with weitiao's own Python.

    python by_weitiao.py --prepare JOB_FOLDER OPTIONS        makes the folder; options: name, data, steps, place, measured, evaluate_every, until
    python by_weitiao.py JOB_FOLDER SHEET.json OPTIONS       as every runner; no options
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import Given, NotComparable, Row, Sheet, run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs import ALPHA, BATCH, RANK, TARGETS, Job, Watch, as_weitiao_reads, training_of  # noqa: E402


def as_one_row(row: Any) -> Row:
    """The ids of a row and what is learned of them. A conversation learns every answer of its longest path.

    Raises:
        NotComparable: its turns are no single row of tokens, or tokens weigh differently.
    """
    longest = max(row.examples, key=len)
    weights = longest.weights * 0
    for example in row.examples:
        if (longest.ids[: len(example)] != example.ids).any():
            raise NotComparable(f"{row.where}: its turns, each as inference would send it, are no single row of tokens")
        weights[: len(example)] += example.weights
    if not set(weights.tolist()) <= {0.0, 1.0}:
        raise NotComparable(f"{row.where}: its tokens weigh {sorted(set(weights.tolist()))}, and the peers know 0 and 1")
    ids = longest.ids.tolist()
    return {"input_ids": ids, "labels": [token if weight else -100 for token, weight in zip(ids, weights.tolist())]}


def write(file: Path, rows: list[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def prepare(folder: Path, options: dict[str, Any]) -> None:
    """The job as weitiao reads it, for everybody: ids, labels, order, first adapter."""
    job, place = Job.named(options["name"]), Path(options["place"])
    prepared = as_weitiao_reads(job, Path(options["data"]), place, options["steps"])
    training = training_of(prepared, Watch())
    order = [int(i) for step in range(1, options["steps"] + 1) for i in training.schedule.rows_of(step)]
    rows, unlearned = prepared.data.rows, sorted(set(range(len(prepared.data.rows))) - set(order))
    write(folder / "rows.jsonl", [as_one_row(rows[i]) for i in order])
    if options["measured"]:
        write(folder / "measured.jsonl", [as_one_row(rows[i]) for i in unlearned[: options["measured"]]])
    if job.method == "lora":
        prepared.method.save(prepared.model, folder / "adapter", str(prepared.base))
    facts = {
        "name": job.name, "rows": job.rows, "method": job.method, "precision": job.precision, "shape": job.model, "batch": BATCH, "steps": options["steps"],
        "rate": prepared.settings.learning_rate, "rank": RANK, "alpha": ALPHA, "targets": TARGETS, "model": str(prepared.base),
        "adapter": str(folder / "adapter") if job.method == "lora" else None, "pad_id": prepared.template.pad_id,
        "trainable": sum(p.numel() for p in prepared.model.parameters() if p.requires_grad), "data": options["data"], "place": options["place"],
        "measured": unlearned[: options["measured"]], "evaluate_every": options["evaluate_every"], "until": options["until"],
    }
    (folder / "job.json").write_text(json.dumps(facts), "utf-8")


class Told(Watch):
    def __init__(self, sheet: Sheet):
        super().__init__()
        self.sheet = sheet

    def on_step(self, line: dict[str, Any], seconds: float) -> None:
        self.sheet.step_done()
        self.sheet.losses.append(line["loss"])


def by_weitiao(given: Given, options: dict[str, Any], sheet: Sheet) -> None:
    from weitiao.train.evaluation import mean_loss

    facts = given.facts
    prepared = as_weitiao_reads(Job.named(facts["name"]), Path(facts["data"]), Path(facts["place"]), facts["steps"])
    training = training_of(prepared, Told(sheet))
    sheet.begin()
    for step in range(1, facts["steps"] + 1):
        training.fit(step)
        if sheet.evaluation_due() and sheet.evaluated(mean_loss(
            training.plain_model, [prepared.data.rows[i] for i in facts["measured"]], "trie", training.budget, facts["pad_id"],
            training.accelerator.device, training.accelerator.autocast,
        )):
            break


if __name__ == "__main__":
    if sys.argv[1] == "--prepare":
        try:
            prepare(Path(sys.argv[2]), json.loads(sys.argv[3]))
        except NotComparable as reason:
            sys.exit(f"{reason}")
    else:
        run(by_weitiao)
