"""What a step does depends on the settings and its number, and on nothing else."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import example

from weitiao import config
from weitiao.data.conversation import Conversation, Message
from weitiao.data.stored import TrainingRow
from weitiao.errors import TrainingStopped
from weitiao.train import loop
from weitiao.train.loop import Schedule, StreamedSchedule, Training, deal, what_is_there_stays
from weitiao.train.optimizer import warmup_steps


class Recorder:
    def __init__(self):
        self.lines, self.evaluations, self.messages = [], [], []

    def on_step(self, line, seconds):
        self.lines.append(line)

    def on_evaluation(self, line):
        self.evaluations.append(line)

    def on_message(self, text):
        self.messages.append(text)


def make_rows(count=20, seed=0) -> list[TrainingRow]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(4, 60, 6)
    talk = Conversation((Message("user", "a"), Message("assistant", "b", 1.0)))
    rows = []
    for i in range(count):
        ids = [*(shared if i % 3 else shared[:2]), *rng.integers(4, 60, int(rng.integers(3, 12)))]
        rows.append(TrainingRow(f"rows.jsonl:{i + 1}", talk, (example(ids, len(ids) - 3, i),)))
    return rows


def training(tokenizer, rows, layout="trie", method="lora", run=None, eval_rows=(), budget=4096, stop=lambda: False,
             model=None, precision="fp32", of_model="smollm2-135m", **settings) -> Training:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from conftest import tiny_model

    from weitiao.data.templates import load_template
    from weitiao.model.methods import METHODS
    from weitiao.train.loss import learn_on_tries

    values = {"batch_size": 6, "epochs": 2, "learning_rate": 1e-2, "precision": precision} | settings
    made = config.parse({"data": "rows.jsonl", "model": of_model, "method": method, "training": values})
    model = model or tiny_model(seed=1)
    learn_on_tries(model)
    model = METHODS[made.method.name].attach(model, made.method, 0, tokenizer)
    AcceleratorState._reset_state()  # a process has one precision at a time
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16" else "no")
    return Training(made, run, model, METHODS[made.method.name], "base", load_template("auto", tokenizer), rows, eval_rows,
                    accelerator, layout, budget, Recorder(), stop)


def losses(trained: Training) -> list[float]:
    return [line["loss"] for line in trained.listener.lines]


def uninterrupted(start, folder: Path, at: int = 5) -> Training:
    """The run that `start` makes, fitted, after a look that one which is saved after step `at` and goes on is it, bit for bit."""
    from weitiao.train.folder import RunFolder

    whole, first, second = start(None), start(RunFolder(folder)), start(None)
    whole.fit()
    first.fit(last=at)
    first.save()
    second.restore(RunFolder(folder).checkpoints()[-1])
    second.fit()
    assert losses(second) and second.listener.lines == whole.listener.lines[at:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, second.parameters, strict=True))
    return whole


def test_every_row_once_an_epoch_in_an_order_of_its_own():
    schedule = Schedule(rows=10, batch_size=4, seed=7, epochs=2)
    assert (schedule.steps_per_epoch, schedule.steps) == (3, 6)
    epochs = [np.concatenate([schedule.rows_of(s) for s in steps]) for steps in ((1, 2, 3), (4, 5, 6))]
    assert [sorted(e.tolist()) for e in epochs] == [list(range(10))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    assert [len(schedule.rows_of(s)) for s in range(1, 7)] == [4, 4, 2, 4, 4, 2]


def test_the_tutorials_step_counts():
    assert Schedule(rows=200, batch_size=12, seed=0, epochs=3).steps == 51
    assert Schedule(rows=400, batch_size=32, seed=0, epochs=1).steps == 13
    assert Schedule(rows=8530, batch_size=8, seed=0, epochs=1).steps == 1067


def test_what_is_due():
    schedule = Schedule(rows=10, batch_size=4, seed=7, epochs=2)
    assert [s for s in range(1, 7) if schedule.due("epoch", s)] == [3, 6]
    assert [s for s in range(1, 7) if schedule.due(4, s)] == [4, 6]
    assert [s for s in range(1, 7) if schedule.due("end", s)] == [6]


class Coming:
    """Rows of a stream: so many are there, and more come when they are asked for."""

    def __init__(self, rows, there=0):
        self.rows, self.there = rows, there

    def wait(self, count):
        self.there = max(self.there, min(count, self.rows))
        return min(count, self.there)


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(loop, "FIRST_WINDOW", 8)


@pytest.mark.parametrize("rows", [3, 8, 9, 47, 100])
def test_a_stream_gives_every_row_once_window_by_window(short_windows, rows):
    schedule = StreamedSchedule(Coming(rows), batch_size=5, seed=7, steps=1000)
    ahead = StreamedSchedule(Coming(rows, there=rows), batch_size=5, seed=7, steps=1000)
    an_epoch = math.ceil(rows / 5)
    first = np.concatenate([schedule.rows_of(step) for step in range(1, an_epoch + 1)])
    assert sorted(first.tolist()) == list(range(rows))
    for start, end in ((0, 8), (8, 40), (40, 168)):
        assert sorted(first[start:end]) == list(range(start, min(end, rows))) or start >= rows
    if rows > 40:
        assert first[8:40].tolist() != sorted(first[8:40])
    later = Schedule(rows, 5, 7, epochs=3)
    for step in range(1, 3 * an_epoch + 1):
        assert schedule.rows_of(step).tolist() == ahead.rows_of(step).tolist()
        if step > an_epoch:
            assert schedule.rows_of(step).tolist() == later.rows_of(step).tolist()


def test_a_streams_epoch_ends_where_its_rows_do(short_windows):
    schedule = StreamedSchedule(Coming(10), batch_size=4, seed=7, steps=7)
    assert [s for s in range(1, 8) if schedule.due("epoch", s)] == [3, 6, 7]
    assert [s for s in range(1, 8) if schedule.due(4, s)] == [4, 7]
    assert [s for s in range(1, 8) if schedule.due("end", s)] == [7]
    assert [schedule.epoch(s) for s in (1, 2, 3, 6)] == [None, None, 1.0, 2.0]
    assert [schedule.looked_at(most) for most in (1, 10)] == [1, 2]


def test_a_step_of_a_stream_waits_for_its_window_and_the_next_row(short_windows):
    rows = Coming(1000)
    schedule = StreamedSchedule(rows, batch_size=4, seed=7, steps=50)
    there = []
    for step in (1, 2, 3):
        schedule.rows_of(step)
        there.append(rows.there)
    assert there == [8, 9, 40]


def test_warmup_is_a_share_below_one_and_steps_from_one_on():
    assert [warmup_steps(w, 100) for w in (0, 0.03, 1, 12, 500)] == [0, 3, 1, 12, 100]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_padded_path_takes_the_same_steps_loss_for_loss(tokenizer, method):
    rows = make_rows()
    by_trie, padded = (training(tokenizer, rows, layout, method) for layout in ("trie", "padded"))
    assert by_trie.fit() and padded.fit()
    assert len(losses(by_trie)) == 8
    assert losses(by_trie) == pytest.approx(losses(padded), rel=1e-4)
    assert losses(by_trie)[-1] < losses(by_trie)[0]


def test_splitting_a_step_into_passes_changes_no_loss(tokenizer):
    rows = make_rows()
    whole, split = training(tokenizer, rows, budget=4096), training(tokenizer, rows, budget=24)
    assert whole.fit() and split.fit()
    assert losses(whole) == pytest.approx(losses(split), rel=1e-4)


def test_the_plain_trainer_of_transformers_gives_our_losses(tokenizer, tmp_path):
    """The judge: transformers.Trainer on the same rows in the same order, padded."""
    from conftest import tiny_model
    from transformers import Trainer, TrainingArguments

    rows = make_rows(18)
    ours = training(tokenizer, rows, "trie", "full", scheduler="linear", warmup=0, epochs=1, learning_rate=1e-3)
    assert ours.fit()

    class InOurOrder(Trainer):
        def _get_train_sampler(self, *args):
            return [int(i) for step in (1, 2, 3) for i in ours.schedule.rows_of(step)]

    def collate(batch):
        width = max(len(e) for e in batch)
        ids, mask, labels = (torch.full((len(batch), width), fill) for fill in (3, 0, -100))
        for b, e in enumerate(batch):
            ids[b, : len(e)], mask[b, : len(e)] = torch.from_numpy(e.ids.astype("int64")), 1
            learned = torch.from_numpy(e.weights) > 0
            labels[b, : len(e)][learned] = ids[b, : len(e)][learned]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=6, num_train_epochs=1, learning_rate=1e-3,
                                  logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
                                  optim="adamw_torch", remove_unused_columns=False)
    trainer = InOurOrder(tiny_model(seed=1), arguments, train_dataset=[row.examples[0] for row in rows], data_collator=collate)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses(ours) == pytest.approx(theirs, rel=2e-4)


def test_the_same_seed_gives_the_same_run_bit_for_bit_dropout_included(tokenizer):
    from conftest import tiny_model

    def run(seed):
        model = tiny_model("gpt2", attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1)
        made = training(tokenizer, make_rows(), model=model, seed=seed)
        made.fit()
        return losses(made)

    first = run(5)
    torch.manual_seed(999)  # what the process did before is of no account
    assert run(5) == first
    assert run(6) != first


def test_an_evaluation_in_mid_run_leaves_the_next_losses_unchanged(tokenizer):
    rows = make_rows()
    quiet, measuring = training(tokenizer, rows), training(tokenizer, rows, eval_rows=make_rows(5, seed=9))
    quiet.fit()
    measuring.fit()
    assert losses(measuring) == losses(quiet)
    assert [line["step"] for line in measuring.listener.evaluations] == [4, 8]
    assert measuring.best["step"] in (4, 8)


def test_evaluation_is_weighted_by_edges_over_the_whole_set_whatever_the_batching(tokenizer):
    eval_rows = make_rows(7, seed=9)
    values = {
        training(tokenizer, make_rows(), layout, eval_rows=eval_rows, budget=budget).evaluate()["eval_loss"]
        for layout in ("trie", "padded") for budget in (20, 4096)
    }
    assert max(values) - min(values) < 1e-5


def test_checkpointing_and_bf16_train(tokenizer):
    from conftest import tiny_model

    model = tiny_model(seed=1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = make_rows()
    plain, checkpointed = training(tokenizer, rows), training(tokenizer, rows, model=model)
    plain.fit(), checkpointed.fit()
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)
    half = training(tokenizer, rows, precision="bf16", method="full")
    half.fit()
    assert losses(half)[-1] < losses(half)[0]
    assert {p.dtype for p in half.parameters} == {torch.float32}
    assert losses(half) == pytest.approx(losses(training_and_fit(tokenizer, rows, method="full")), rel=0.05)


def training_and_fit(tokenizer, rows, **more) -> Training:
    made = training(tokenizer, rows, **more)
    made.fit()
    return made



def test_a_loss_that_is_not_finite_stops_at_once_and_names_step_and_row(tokenizer):
    rows = make_rows()
    bad = example([4, 5, 299, 7], 2, 99)  # the only row with token 299
    rows[13] = TrainingRow("rows.jsonl:14", rows[13].conversation, (bad,))
    from conftest import tiny_model

    model = tiny_model(seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[299] = float("nan")
    made = training(tokenizer, rows, model=model)
    expected = next(s for s in range(1, 9) if 13 in made.schedule.rows_of(s))
    with pytest.raises(TrainingStopped, match=rf"Step {expected}: the loss is nan; it comes from rows.jsonl:14"):
        made.fit()
    assert len(losses(made)) == expected - 1
    assert all(math.isfinite(x) for x in losses(made))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(tokenizer):
    made = training(tokenizer, make_rows())
    made.parameters[0].register_hook(lambda grad: grad * float("inf"))
    before = [p.detach().clone() for p in made.parameters]
    with pytest.raises(TrainingStopped, match="Step 1: the gradient is"):
        made.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters, strict=True))


def test_a_stop_in_mid_step_leaves_the_weights_of_the_step_before(tokenizer):
    calls = iter(range(100))
    rows = make_rows()
    whole = training(tokenizer, rows, budget=20)
    whole.fit(last=2)
    stopped = training(tokenizer, rows, budget=20, stop=lambda: next(calls) > 6)
    assert not stopped.fit()
    assert 0 < stopped.step < 8
    reference = training(tokenizer, rows, budget=20)
    reference.fit(last=stopped.step)
    assert all(torch.equal(a, b) for a, b in zip(stopped.parameters, reference.parameters, strict=True))


def test_only_what_is_trained_moves(tokenizer):
    made = training(tokenizer, make_rows())
    before = {n: p.detach().clone() for n, p in made.plain_model.named_parameters()}
    made.fit()
    for name, parameter in made.plain_model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name


def test_passes_are_dealt_so_that_every_process_runs_equally_many():
    passes = [{"n": i} for i in range(5)]
    dealt = [deal(passes, rank, 3) for rank in range(3)]
    assert [[p["n"] for p in mine] for mine, _ in dealt] == [[0, 3], [1, 4], [2, 0]]
    assert [idle for _, idle in dealt] == [False, False, True]


@pytest.mark.parametrize("name", ["adafactor", "sgd", "rmsprop", "adagrad", "adamw_torch_fused"])
def test_optimizers_of_transformers(tokenizer, name):
    made = training(tokenizer, make_rows(), optimizer=name, learning_rate=1e-3, epochs=1, scheduler="cosine", warmup=2)
    made.fit()
    assert all(math.isfinite(x) for x in losses(made))
    assert [line["learning_rate"] for line in made.listener.lines][:3] == pytest.approx([0, 5e-4, 1e-3])


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy", "constant_with_warmup", "polynomial", "cosine_with_restarts"])
def test_schedulers_of_transformers(tokenizer, name):
    options = {"patience": 0} if name == "reduce_lr_on_plateau" else {}
    made = training(tokenizer, make_rows(), scheduler=name, scheduler_options=options, warmup=2)
    made.fit()
    assert all(math.isfinite(line["loss"]) and line["learning_rate"] >= 0 for line in made.listener.lines)


def test_a_run_of_one_step_learns_in_it(tokenizer):
    made = training(tokenizer, make_rows(6), epochs=1)
    before = [p.detach().clone() for p in made.parameters]
    made.fit()
    assert made.step == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, made.parameters, strict=True))


def test_a_routers_loss_is_kept_on_padded_rows():
    import transformers as T

    from weitiao.data.batch import padded_batch
    from weitiao.model.load import trie_obstacle
    from weitiao.train.loss import summed_loss

    torch.manual_seed(0)
    config = T.MixtralConfig(vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=1.0)
    model = T.AutoModelForCausalLM.from_config(config)
    assert "router loss" in trie_obstacle(model)
    row = make_rows(1)[0].examples[0]
    ids = torch.from_numpy(row.ids.astype("int64"))[None]
    labels = torch.where(torch.from_numpy(row.weights)[None] > 0, ids, -100)
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    ours = summed_loss(model, padded_batch([row], 0)) / row.weights.sum()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)


WORKER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from conftest import tokenizer
from test_loop import make_rows, training, losses
made = training(tokenizer.__wrapped__(), make_rows(), budget=int(sys.argv[3]), eval_rows=make_rows(5, seed=9), method=sys.argv[2])
made.fit()
if made.is_main:
    print(json.dumps({"world": made.world, "losses": losses(made), "eval": [e["eval_loss"] for e in made.listener.evaluations]}))
made.accelerator.wait_for_everyone()
sys.stdout.flush()
os._exit(0)  # see cli.leave
"""


# 4096: one pass, and one process without any
@pytest.mark.parametrize(("method", "budget"), [("lora", 30), ("full", 4096), ("prefix", 30), ("ptuning", 4096)])
def test_two_processes_give_the_losses_of_one(tokenizer, tmp_path, method, budget):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    here = str(Path(__file__).parent)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d",
               "--rdzv-endpoint=127.0.0.1:0", str(script), here, method, str(budget)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([here, str(Path(here).parent)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    one = training(tokenizer, make_rows(), budget=budget, eval_rows=make_rows(5, seed=9), method=method)
    one.fit()
    assert two["world"] == 2
    assert two["losses"] == pytest.approx(losses(one), rel=1e-5)
    assert two["eval"] == pytest.approx([e["eval_loss"] for e in one.listener.evaluations], rel=1e-5)


def test_what_is_there_before_the_steps_is_not_looked_through_for_garbage():
    with what_is_there_stays():
        assert gc.get_freeze_count()
        with what_is_there_stays():
            pass
        assert gc.get_freeze_count()  # who froze it lets it go
    assert not gc.get_freeze_count()
