"""A run, proven at length: trie against plain rows on many batches, and its recorded steps against the same steps again."""

from __future__ import annotations


from weitiao.data.dataset import TrainingRow
from weitiao.errors import RunError
from weitiao.screen import Screen, quiet_libraries
from weitiao.train.folder import Checkpoint, RunFolder, open_run
from weitiao.train.loop import Training
from weitiao.train.proof import ROWS, prove as prove_trie
from weitiao.train.train import Job, prepare, refuse_other_rows


def prove(path: str, batches: int, steps: int) -> None:
    """Print each measure; the worst of them stand in RUN/proof-long.json.

    Raises:
        RunError: something was not proven.
    """
    quiet_libraries()
    screen = Screen()
    run, _ = open_run(path)
    job = prepare(run.settings(), screen)
    refuse_other_rows(run, job)
    report: dict[str, object] = {}
    failed = []
    if job.settings.training.layout == "trie":
        proofs = [prove_trie(job.model, examples, job.compute, str(job.accelerator.device))
                  for examples in screen.progress(batches_of(job, batches), "Trie against rows")]
        worst = {name: max(getattr(p, name) for p in proofs) for name in ("leak_max", "nll_max", "grad_rel_max")}
        report["trie"] = {**worst, "dtype": proofs[0].dtype, "rows": sum(p.rows for p in proofs), "passed": all(p.passed for p in proofs)}
        screen.tell(f"Trie against plain rows, {report['trie']['rows']} rows: " + ", ".join(f"{k} {v:.2g}" for k, v in worst.items()))
        failed += [p.reason for p in proofs if not p.passed]
    else:
        screen.tell("This run pads its rows; there is no trie to prove.")
    if steps:
        worst_step, made = repeat(run, job, steps, screen)
        report["repeated"] = {"steps": made, "loss_difference_max": worst_step}
        screen.tell(f"Made again from the record: {len(made)} steps, losses differ by at most {worst_step:.2g}.")
        tolerance = 0.0 if job.accelerator.device.type == "cpu" else 1e-2
        if worst_step > tolerance:
            failed.append(f"step {made} has another loss than its record")
    run.write_json("proof-long.json", report)
    if failed:
        raise RunError("Not proven: " + "; ".join(failed) + ".", f"See {run.path / 'proof-long.json'}.")
    screen.tell("Proven.")


def batches_of(job: Job, count: int) -> list[list]:
    """Examples of some rows of each of the first steps."""
    def examples(rows: list[TrainingRow]) -> list:
        return [e for row in rows for e in row.examples]

    rows = job.data.rows
    return [examples(rows[a : a + ROWS]) for a in range(0, min(count * ROWS, len(rows)), ROWS)]


def repeat(run: RunFolder, job: Job, steps: int, screen: Screen) -> tuple[float, list[int]]:
    """(largest difference of a loss, which steps): the steps after the oldest checkpoint that has any, else the first ones."""
    recorded = {m["step"]: m["loss"] for m in run.read_metrics() if "loss" in m}
    start: Checkpoint | None = next((c for c in run.checkpoints() if c.step + 1 in recorded), None)
    settings = job.settings.model_copy(update={"evaluation": job.settings.evaluation.model_copy(update={"every": "end"})})
    lines: list[dict] = []
    training = Training(
        settings, None, job.model, job.method, job.base_name, job.template, job.data.rows, [], job.accelerator,
        settings.training.layout, settings.training.nodes_per_pass, _Recorder(lines),
    )
    if start:
        training.restore(start)
    first = training.step + 1
    training.fit(last=min(first + steps - 1, max(recorded)))
    if not lines:
        raise RunError(f"{run.path} has no recorded steps to repeat.")
    return max(abs(line["loss"] - recorded[line["step"]]) for line in lines), [line["step"] for line in lines]


class _Recorder:
    def __init__(self, lines: list[dict]):
        self.lines = lines

    def on_step(self, line: dict) -> None:
        self.lines.append(line)

    def on_evaluation(self, line: dict) -> None: ...
    def on_message(self, text: str) -> None: ...
