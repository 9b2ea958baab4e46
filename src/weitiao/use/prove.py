"""A run, proven at length: trie against plain rows on many batches, and its recorded steps against the same steps again."""

from __future__ import annotations

import os

import torch

from weitiao.data.stored import TrainingRow
from weitiao.errors import RunError
from weitiao.screen import Screen, quiet_libraries
from weitiao.train.folder import Checkpoint, RunFolder, open_run
from weitiao.train.loop import Training, takes_stems
from weitiao.train.proof import NAMES, ROWS, Size, prove as prove_trie
from weitiao.train.train import Job, encoding_beside, prepare, refuse_other_rows, size_of_proof


def prove(path: str, batches: int, steps: int) -> None:
    """Print each measure; the worst of them stand in RUN/proof-long.json.

    Raises:
        RunError: something was not proven.
    """
    quiet_libraries()
    screen = Screen()
    run, weights = open_run(path)
    job = prepare(run.settings(), screen)
    refuse_other_rows(run, job)
    report: dict[str, object] = {}
    failed = []
    made_by = run.read_json("environment.json")["processes"]
    if steps and made_by != job.accelerator.num_processes:
        screen.tell(f"The run was made by {made_by} processes; its steps are repeated by as many: torchrun -m weitiao prove.")
    elif steps:
        # With another number of threads sums are made in another order. First, since it begins with the weights that
        # training began with.
        torch.set_num_threads(min(run.read_json("environment.json")["threads"], os.cpu_count() or 1))
        with encoding_beside(job, screen):
            worst_step, made, alike = repeat(run, job, steps)
        report["repeated"] = {"steps": made, "loss_difference_max": worst_step, "same_nodes": alike}
        screen.tell(f"Made again from the record: steps {made[0]} to {made[-1]}, losses differ by at most {worst_step:.2g}.")
        if not alike:
            screen.tell("They were made of other nodes then, by another version: losses are the same within rounding at best.")
        if worst_step > (0.0 if job.accelerator.device.type == "cpu" and alike else 1e-2):
            failed.append(f"steps {made[0]} to {made[-1]} have other losses than their record")
    if job.settings.training.layout == "trie":
        job.method.load(job.model, weights / job.method.FOLDER)
        frugal = job.settings.proves_frugally
        proofs = [prove_trie(job.model, examples, job.compute, str(job.accelerator.device), size_of_proof(job) if frugal else Size(), frugal,
                            stems=takes_stems(job.settings.training.checkpointing, job.accelerator.num_processes))
                  for examples in screen.progress(batches_of(job, batches), "Trie against rows")]
        worst = {name: max(getattr(p, name) for p in proofs) for name in NAMES}
        rows = sum(p.rows for p in proofs)
        report["trie"] = {**worst, "dtype": proofs[0].dtype, "rows": rows, "passed": all(p.passed for p in proofs)}
        screen.tell(f"Trie against plain rows, {rows} rows: " + ", ".join(f"{k} {v:.2g}" for k, v in worst.items()))
        failed += [p.reason for p in proofs if not p.passed]
    else:
        screen.tell("This run pads its rows; there is no trie to prove.")
    run.write_json("proof-long.json", report)
    if failed:
        raise RunError("Not proven: " + "; ".join(failed) + ".", f"See {run.path / 'proof-long.json'}.")
    screen.tell("Proven.")


def batches_of(job: Job, count: int) -> list[list]:
    """Examples of the first rows, eight to a batch."""
    def examples(rows: list[TrainingRow]) -> list:
        return [e for row in rows for e in row.examples]

    rows = job.data.rows
    return [examples(rows[a : a + ROWS]) for a in range(0, min(count * ROWS, len(rows)), ROWS)]


def repeat(run: RunFolder, job: Job, steps: int) -> tuple[float, list[int], bool]:
    """(largest difference of a loss, which steps, are they of as many nodes?): the steps after the oldest checkpoint that has any, else the
    first ones."""
    recorded = {m["step"]: m for m in run.read_metrics() if "loss" in m}
    start: Checkpoint | None = next((c for c in run.checkpoints() if c.step + 1 in recorded), None)
    settings = job.settings.model_copy(update={"evaluation": job.settings.evaluation.model_copy(update={"every": "end"})})
    lines: list[dict] = []
    training = Training(
        settings, None, job.model, job.method, job.base_name, job.template, job.rows, [], job.accelerator,
        settings.training.layout, settings.training.nodes_per_pass, _Recorder(lines),
    )
    if start:
        training.restore(start)
    first = training.step + 1
    training.fit(last=min(first + steps - 1, max(recorded)))
    if not lines:
        raise RunError(f"{run.path} has no recorded steps to repeat.")
    pairs = [(line, recorded[line["step"]]) for line in lines]
    worst = max(abs(line["loss"] - known["loss"]) for line, known in pairs)
    return worst, [line["step"] for line in lines], all(line["nodes"] == known["nodes"] for line, known in pairs)


class _Recorder:
    def __init__(self, lines: list[dict]):
        self.lines = lines

    def on_step(self, line: dict, seconds: float) -> None:
        self.lines.append(line)

    def on_evaluation(self, line: dict) -> None: ...
    def on_message(self, text: str) -> None: ...
