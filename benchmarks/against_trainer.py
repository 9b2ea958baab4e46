"""The same fine-tune by weitiao and by transformers.Trainer, in turn, each in a process of its own.

    python benchmarks/against_trainer.py --data rows.json [--steps 3] [--rounds 2] [--precision fp32 bf16]

Same model, rows, order of rows, LoRA (r=8, alpha 32, the seven linears of a Llama layer), learning rate, rows per optimizer
step (12), encoded ids. Trainer is used as its tutorials do: DataCollatorForSeq2Seq, padded batches of 4, 3 accumulated (12 in
one piece is killed for memory on a 24 GB machine). Printed: loss of each step on both sides, rows/s over the steps after the
first, peak resident memory of the whole process, and the medians' ratio. A job whose losses differ by more than the
precision allows is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

MODEL, BATCH, MICRO, RATE = "smollm2-135m", 12, 4, 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOSSES_WITHIN = {"fp32": 1e-3, "bf16": 5e-2}


def prepared(data: str, precision: str, steps: int):
    """The job as weitiao reads it; both sides learn from its ids."""
    from weitiao import config
    from weitiao.screen import Screen, quiet_libraries
    from weitiao.train.train import prepare

    quiet_libraries()
    settings = config.read(None, [
        "method.rank=8", "method.alpha=32", f"method.targets=[{','.join(TARGETS)}]", f"training.batch_size={BATCH}",
        f"training.learning_rate={RATE}", "training.scheduler=constant", "training.warmup=0", f"training.precision={precision}",
        f"training.steps={steps}", "training.layout=trie", "evaluation.every=end", "training.max_grad_norm=1.0",
    ], **{"model.name": MODEL, "data.train": data})
    return prepare(settings, Screen(quiet=True))


def by_weitiao(data: str, precision: str, steps: int) -> dict:
    from weitiao.train.loop import Training

    job = prepared(data, precision, steps)
    times, losses = [time.perf_counter()], []

    class Watch:
        def on_step(self, line, seconds):
            times.append(time.perf_counter())
            losses.append(line["loss"])

        def on_evaluation(self, line): ...
        def on_message(self, text): ...

    Training(job.settings, None, job.model, job.method, "base", job.template, job.data.rows, [], job.accelerator, "trie", 4096,
             Watch()).fit()
    return {"seconds": [b - a for a, b in zip(times, times[1:])], "losses": losses}


def by_trainer(data: str, precision: str, steps: int) -> dict:
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from weitiao.train.train import schedule_of

    job = prepared(data, precision, steps)
    schedule = schedule_of(job)
    order = [int(i) for step in range(1, steps + 1) for i in schedule.rows_of(step)]
    rows = []
    for row in job.data.rows:
        example = row.examples[0]
        ids = example.ids.tolist()
        labels = [token if weight > 0 else -100 for token, weight in zip(ids, example.weights.tolist())]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    times, losses = [], []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return order

    model = job.model
    inner = model.get_base_model()
    inner.set_attn_implementation("sdpa")
    del inner.forward  # the class's own, without the keyword that weitiao teaches the instance
    tokenizer = job.template.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=MICRO, gradient_accumulation_steps=BATCH // MICRO, max_steps=steps,
            learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            bf16=precision == "bf16", optim="adamw_torch", disable_tqdm=True, gradient_checkpointing=False,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
        InOrder(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[Watch()]).train()
    assert torch.is_grad_enabled()
    return {"seconds": [b - a for a, b in zip(times, times[1:])], "losses": losses}


SIDES = {"weitiao": by_weitiao, "trainer": by_trainer}


def child(side: str, data: str, precision: str, steps: int) -> dict:
    """One side in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--child", side, "--data", data, "--precision", precision, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} {precision}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--child", choices=SIDES)
    options = parser.parse_args()
    if options.child:
        result = SIDES[options.child](options.data, options.precision[0], options.steps)
        result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(result))
        return
    for precision in options.precision:
        seen: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                seen[side].append(child(side, options.data, precision, options.steps))
                last = seen[side][-1]
                print(f"{precision} {side:8} losses {[round(x, 4) for x in last['losses']]} seconds {[round(s, 1) for s in last['seconds']]} "
                      f"peak {last['peak_gib']:.1f} GiB", flush=True)
        speed = {side: statistics.median(BATCH / s for run in runs for s in run["seconds"][1:]) for side, runs in seen.items()}
        peak = {side: statistics.median(run["peak_gib"] for run in runs) for side, runs in seen.items()}
        worst = max(abs(a - b) / b for a, b in zip(seen["weitiao"][0]["losses"], seen["trainer"][0]["losses"]))
        counts = "counted" if worst <= LOSSES_WITHIN[precision] else "NOT COUNTED"
        print(f"{precision}: {speed['weitiao']:.2f} against {speed['trainer']:.2f} rows/s (x {speed['weitiao'] / speed['trainer']:.2f}), "
              f"{peak['weitiao']:.1f} against {peak['trainer']:.1f} GiB; losses differ by {worst:.1e}: {counts}", flush=True)


if __name__ == "__main__":
    main()
