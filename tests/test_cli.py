"""The command line as a user meets it: what runs, what is refused, with which message and which exit code."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weitiao.cli import main


@pytest.fixture
def weitiao(monkeypatch, capsys, tmp_path):
    """Run a command in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["weitiao", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


FAST = ["training.epochs=2", "training.batch_size=6", "training.learning_rate=1e-2", "method.rank=4"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, model_folder, rows_file) -> Path:
    """A finished run on the tiny model, shared by the tests that read one."""
    from weitiao import config
    from weitiao.train.train import train

    path = tmp_path_factory.mktemp("runs") / "done"
    settings = config.read(None, [*FAST, "data.eval_share=0.25", "saving.every=2"], **{
        "model.name": str(model_folder), "data.train": str(rows_file), "output": str(path)})
    return train(settings).path


def one_message(err: str) -> None:
    assert "Traceback" not in err
    assert err.strip()


def test_one_line_is_enough(weitiao, model_folder, rows_file, tmp_path):
    code, out, err = weitiao("train", "--model", model_folder, "--data", rows_file, *FAST)
    assert code == 0, err
    run = tmp_path / "runs" / f"{rows_file.parent.name}-lora-{model_folder.name}"
    assert run.is_dir()
    names = {p.name for p in run.iterdir()}
    assert names >= {"config.yaml", "environment.json", "data.json", "template.jinja", "template.json", "metrics.jsonl",
                     "proof.json", "checkpoints", "adapter", "summary.json", "loss.png"}
    proof = json.loads((run / "proof.json").read_text())
    assert proof["passed"] and proof["leak_max"] == 0 and {"nll_max", "grad_rel_max", "grad_rel", "limits", "dtype"} <= set(proof)
    assert "trainable params: " in out and " || all params: " in out and "token trie" in out
    assert "step 8/8" in out and "rows/s" in out and "tokens/s" in out and "computed" in out and "GiB" in out
    assert "\x1b[" not in out  # no terminal: plain lines
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(range(1, 9))
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_in_yaml_with_overrides(weitiao, model_folder, rows_file, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"model: {model_folder}\ndata: {rows_file}\nmethod: lora\ntraining: {{epochs: 1, batch_size: 12}}\noutput: mine\n")
    code, _, err = weitiao("train", "run.yaml", "method.rank=2", "training.steps=1")
    assert code == 0, err
    assert json.loads((tmp_path / "mine" / "adapter" / "adapter_config.json").read_text())["r"] == 2
    code, _, err = weitiao("train", "run.yaml")
    assert code == 2 and "mine exists already" in err and "--resume" in err


def test_full_tuning_leaves_a_plain_model_in_float32(weitiao, model_folder, rows_file, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "full", "method=full",
                           "training.steps=2", "training.batch_size=8")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


REFUSED = {
    "missing file": (["--data", "nowhere.jsonl"], "nowhere.jsonl", ""),
    "empty file": (["--data", "empty.jsonl"], "holds no rows", ""),
    "broken line": (["--data", "broken.jsonl"], "broken.jsonl:2", ""),
    "unknown columns": (["--data", "columns.jsonl"], "columns.jsonl:1 has the columns 问, 答", "data.columns"),
    "unknown setting": (["--data", "good.jsonl", "method.rnk=3"], "There is no setting 'method.rnk'", "Did you mean 'method.rank'?"),
    "peer's name": (["--data", "good.jsonl", "lora_alpha=3"], "There is no setting 'lora_alpha'", "method.alpha"),
    "nothing learned": (["--data", "unanswered.jsonl", "data.bad_share=1"], "Nothing can be learned from any of the 3 rows", "no answer"),
    "too many bad": (["--data", "half.jsonl"], "1 of 2 rows cannot teach (50.0%)", "half.jsonl:2"),
    "bad row refused": (["--data", "mostly.jsonl", "data.bad_rows=refuse"], "1 of 40 rows cannot teach", "mostly.jsonl:7"),
    "cut before the answer": (["--data", "good.jsonl", "data.max_tokens=8"], "its answer is cut away", "Raise data.max_tokens"),
    "mistyped model": (["--data", "good.jsonl", "--model", "./tiny-lama"], "tiny-lama", ""),
    "mistyped alias": (["--data", "good.jsonl", "--model", "smolm2-135m"], "smolm2-135m", "smollm2-135m"),
    "unknown template": (["--data", "good.jsonl", "data.template=chatm"], "There is no template 'chatm'", "Did you mean 'chatml'?"),
    "unknown optimizer": (["--data", "good.jsonl", "training.optimizer=adamw_trch"], "adamw_trch", "Did you mean 'adamw_torch'?"),
    "unknown scheduler": (["--data", "good.jsonl", "training.scheduler=cosin"], "cosin", "Did you mean 'cosine'?"),
    "unknown targets": (["--data", "good.jsonl", "method.targets=[q_prj]"], "matches no layer", "q_proj"),
    "missing yaml": (["run.yml"], "There is no file run.yml", ""),
    "no rows named": ([], "no rows to learn from", "--data FILE"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_message_with_exit_code_2_and_nothing_written(weitiao, what, model_folder, tmp_path):
    good = '{"prompt": "What is it?", "completion": "It is it."}\n'
    files = {
        "empty.jsonl": "", "broken.jsonl": good + '{"prompt": "x", "completion": \n' + good,
        "columns.jsonl": '{"问": "a", "答": "b"}\n', "good.jsonl": good * 3,
        "unanswered.jsonl": '{"prompt": "x", "completion": null}\n' * 3,
        "half.jsonl": good + '{"prompt": "x", "completion": ""}\n',
        "mostly.jsonl": good * 6 + '{"prompt": "x", "completion": ""}\n' + good * 33,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")
    words, found, cure = REFUSED[what]
    model = [] if "--model" in words else ["--model", str(model_folder)]
    before = sorted(p.name for p in tmp_path.iterdir())
    code, _, err = weitiao("train", *model, *words)
    assert code == 2
    one_message(err)
    assert found in err and cure in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_token_outside_the_embedding_is_named_with_its_row(weitiao, model_folder, rows_file, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "<new>"}\n')
    code, _, err = weitiao("train", "--model", folder, "--data", "rows.jsonl")
    assert code == 2 and "rows.jsonl:2: token id 300 is outside the model's embedding of 300 rows" in err


def test_weights_that_are_not_finite_are_named(weitiao, model_folder, rows_file, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = weitiao("train", "--model", folder, "--data", rows_file, "--output", "x")
    assert code == 2 and "model.norm.weight" in err and "not finite" in err
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_that_lacks_weights_is_refused(weitiao, model_folder, rows_file, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = weitiao("train", "--model", folder, "--data", rows_file)
    assert code == 2 and "lacks 1 weights, model.layers.1.mlp.up_proj.weight" in err


def test_a_run_that_diverges_stops_with_a_message_and_leaves_nothing_of_itself(weitiao, model_folder, rows_file, tmp_path):
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "x", "method=full",
                           "training.learning_rate=1e30", "training.max_grad_norm=0", "training.warmup=0", "training.epochs=5")
    assert code == 2
    assert "Step 2" in err or "Step 3" in err
    assert "nan" in err.lower() or "inf" in err.lower() or "finite" in err


def test_a_model_outside_the_interface_is_trained_on_padded_rows_and_told(weitiao, tokenizer, rows_file, tmp_path):
    from conftest import tiny_model

    tiny_model("gptj").save_pretrained(tmp_path / "gptj")
    tokenizer.save_pretrained(tmp_path / "gptj")
    code, out, err = weitiao("train", "--model", "./gptj", "--data", rows_file, "--output", "b", *FAST)
    assert code == 0, err
    assert "warning: rows are padded side by side" in out
    losses = [json.loads(line)["loss"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    code, _, err = weitiao("train", "--model", "./gptj", "--data", rows_file, "--output", "c", "training.layout=trie")
    assert code == 2 and "training.layout=trie cannot be kept" in err


def test_resume_of_a_finished_run_says_so(weitiao, finished):
    code, out, _ = weitiao("train", finished, "--resume")
    assert code == 0 and "is finished" in out


def test_other_rows_than_it_began_with_are_refused(weitiao, model_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    assert weitiao("train", "--model", model_folder, "--data", rows, "--output", "r", "training.batch_size=2")[0] == 0
    rows.write_text('{"prompt": "a", "completion": "c"}\n' * 8)
    code, out, _ = weitiao("train", "r", "--resume")
    assert code == 0 and "r is finished: " in out  # whatever became of its rows
    shutil.rmtree(tmp_path / "r" / "adapter")
    code, _, err = weitiao("train", "r", "--resume")
    assert code == 2 and "not those that r began with" in err
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    assert weitiao("train", "r", "--resume")[0] == 0 and (tmp_path / "r" / "adapter").is_dir()  # learned weights that went missing come back


# ------------------------------------------------------------------------------------------------ kills and signals


def start(words, cwd) -> subprocess.Popen:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    # A shell lets what it runs in the background ignore Ctrl-C, these tests too.
    return subprocess.Popen([sys.executable, "-m", "weitiao", *map(str, words)], cwd=cwd, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_for_steps(process: subprocess.Popen, run: Path, steps: int) -> None:
    metrics = run / "metrics.jsonl"
    for _ in range(6000):
        if metrics.is_file() and metrics.read_text().count("\n") >= steps:
            return
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        time.sleep(0.02)
    raise AssertionError("no steps in two minutes")


LONG = ["training.epochs=40", "training.batch_size=6", "training.learning_rate=3e-3", "saving.every=7", "data.eval_share=0.2",
        "evaluation.every=10", "method.dropout=0.1"]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, model_folder, rows_file) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = start(["train", "--model", model_folder, "--data", rows_file, "--output", "whole", *LONG], folder)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    return folder / "whole"


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_interrupted_and_resumed_is_the_uninterrupted_run_bit_for_bit(how, uninterrupted, model_folder, rows_file, tmp_path, weitiao):
    process = start(["train", "--model", model_folder, "--data", rows_file, "--output", "run", *LONG], tmp_path)
    run = tmp_path / "run"
    wait_for_steps(process, run, 31)
    process.send_signal(getattr(signal, how))
    _, err = process.communicate(timeout=120)
    assert process.returncode == {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 143}[how]
    if how != "SIGKILL":
        assert "Go on: weitiao train run --resume" in err
    interrupted_at = len((run / "metrics.jsonl").read_text().splitlines())
    assert interrupted_at < len((uninterrupted / "metrics.jsonl").read_text().splitlines())
    if how == "SIGKILL":  # and the newest checkpoint is torn besides
        newest = max((run / "checkpoints").iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1)
        with (newest / "trainer.pt").open("r+b") as file:
            file.truncate(100)
    code, out, err = weitiao("train", run, "--resume")
    assert code == 0, err
    assert ("is torn" in out) == (how == "SIGKILL")
    assert (run / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (run, uninterrupted)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("how", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_stopped_before_the_first_step_it_says_that_nothing_is_kept_and_keeps_nothing(how, code, model_folder, rows_file, tmp_path):
    process = start(["train", "--model", model_folder, "--data", rows_file, "--output", "run", *LONG], tmp_path)
    assert any("rows" in line for line in process.stdout)  # it reads, and is past what Python does before it listens
    process.send_signal(getattr(signal, how))
    _, err = process.communicate(timeout=120)
    assert (process.returncode, list(tmp_path.iterdir())) == (code, [])
    assert err.strip().endswith("Stopped before the first step was done; nothing is kept.")


LOST = """
import os, signal, sys, threading, time
from weitiao import cli
from weitiao.errors import Terminated

def terminate(number, frame):
    raise Terminated

class Slow:
    def __del__(self):
        for _ in range(20_000): pass

signal.signal(signal.SIGTERM, terminate)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.unraisablehook = cli.ask_again
threading.Timer(0.3, os.kill, [os.getpid(), getattr(signal, sys.argv[1])]).start()
end = time.monotonic() + 60
try:
    while time.monotonic() < end:
        Slow()
        for _ in range(2_000): pass
except KeyboardInterrupt as stop:
    print(type(stop).__name__)
"""


@pytest.mark.parametrize(("how", "what"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "Terminated")])
def test_a_signal_that_comes_while_objects_are_deleted_is_not_lost(how, what):
    done = subprocess.run([sys.executable, "-c", LOST, how], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == (what, "")


def test_two_processes_train_save_and_go_on_as_one(model_folder, rows_file, tmp_path, weitiao):
    words = ["train", "--model", model_folder, "--data", rows_file, *FAST, "data.eval_share=0.2", "saving.every=3",
             "training.nodes_per_pass=60", "evaluation.metric=exact_match"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
                "--rdzv-endpoint=127.0.0.1:0", "-m", "weitiao"]
    for more in ([*words, "--output", "two"], ["train", "two", "--resume"]):
        done = subprocess.run([*torchrun, *map(str, more)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        if more[-1] != "--resume":
            shutil.rmtree(tmp_path / "two" / "checkpoints" / "8")
            shutil.rmtree(tmp_path / "two" / "adapter")
    assert weitiao(*words, "--output", "one")[0] == 0
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert len(one) == len(two)
    for ours, theirs in zip(one, two, strict=True):
        for key, value in ours.items():
            assert theirs[key] == pytest.approx(value, rel=1e-4), (key, ours["step"])


def test_a_run_at_work_refuses_a_second_one(model_folder, rows_file, tmp_path, weitiao):
    process = start(["train", "--model", model_folder, "--data", rows_file, "--output", "run", "training.steps=100000"], tmp_path)
    try:
        wait_for_steps(process, tmp_path / "run", 1)
        code, _, err = weitiao("train", "run", "--resume")
        assert code == 2 and "Another training is at work in run" in err
    finally:
        process.kill()
        process.communicate()


def test_a_full_disk_is_told_and_training_goes_on_to_the_next_save(weitiao, model_folder, rows_file, tmp_path, monkeypatch):
    import errno

    from weitiao.model.methods.lora import Lora

    save, calls = Lora.save, []

    def full_once(self, model, folder, base):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, model, folder, base)

    monkeypatch.setattr(Lora, "save", full_once)
    code, out, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "run", *FAST, "saving.every=2")
    assert code == 0, err
    assert "Step 4 could not be saved: [Errno 28] No space left on device. Training goes on to the next save." in out
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [6, 8]


def test_a_disk_that_stays_full_ends_cleanly_with_the_last_good_checkpoint_standing(weitiao, model_folder, rows_file, tmp_path, monkeypatch):
    import errno

    from weitiao.model.methods.lora import Lora

    save, calls = Lora.save, []

    def full(self, model, folder, base):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, model, folder, base)

    monkeypatch.setattr(Lora, "save", full)
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "run", *FAST, "saving.every=2")
    assert code == 2 and "The last good checkpoint stands" in err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    monkeypatch.setattr(Lora, "save", save)
    assert weitiao("train", "run", "--resume")[0] == 0


def test_a_run_killed_before_its_first_checkpoint_begins_anew(weitiao, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "summary.json").unlink()
    code, out, err = weitiao("train", "run", "--resume")
    assert code == 0, err
    assert "from step 0 of" in out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_folder_that_appears_while_the_model_loads_is_left_alone(weitiao, model_folder, rows_file, tmp_path, monkeypatch):
    from weitiao.train import train as module

    settle = module.settle

    def slow(job, screen):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work")
        return settle(job, screen)

    monkeypatch.setattr(module, "settle", slow)
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "mine", *FAST)
    assert code == 2 and "mine exists already" in err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_place_that_cannot_be_written_to(weitiao, model_folder, rows_file, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "file/run", *FAST)
    assert code == 2 and "file/run cannot be made" in err


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(weitiao, model_folder, rows_file, tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    words = ["train", "--model", model_folder, "--data", rows_file, "--output", "r", *FAST]
    code, _, err = weitiao(*words)
    assert code == 2 and "a checkpoint takes" in err and "--force trains all the same" in err and not (tmp_path / "r").exists()
    assert weitiao(*words, "--force")[0] == 0


def test_a_disk_that_is_full_from_the_start_is_told_in_one_message(weitiao, model_folder, rows_file, tmp_path, monkeypatch):
    import errno

    from weitiao.train.folder import RunFolder

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ["train", "--model", model_folder, "--data", rows_file, "--output", "r", *FAST]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_json", full)
        code, _, err = weitiao(*words)
    assert code == 2 and "r cannot be written to: No space left on device." in err and not (tmp_path / "r").exists()
    monkeypatch.setattr(RunFolder, "append_metrics", full)
    code, _, err = weitiao(*words)
    assert "start again: nothing is kept" in err and not (tmp_path / "r").exists()


@pytest.mark.parametrize("steps", [0, 1])
def test_memory_that_runs_out_ends_in_one_message(weitiao, model_folder, rows_file, monkeypatch, tmp_path, steps):
    """steps: that were done before."""
    import torch

    from weitiao.train.loop import Training

    fit = Training.fit

    def meets_the_end(training):
        if steps:
            training.run.append_metrics({"step": 1, "loss": 1.0})
        torch.empty(1 << 50, dtype=torch.uint8)
        return fit(training)

    monkeypatch.setattr(Training, "fit", meets_the_end)
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "r", *FAST)
    assert code == 2 and "This machine ran out of memory: 1.07e+09 MiB more were asked for." in err and "training.memory=balanced" in err and "Traceback" not in err
    assert ("weitiao train r --resume" in err) == bool(steps) == (tmp_path / "r").exists()


def test_ctrl_c_before_the_first_step_says_that_nothing_is_kept(weitiao, model_folder, rows_file, monkeypatch, tmp_path):
    from weitiao.train import train as module

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "settle", interrupted)
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "r", *FAST)
    assert code == 130 and "Stopped before the first step was done; nothing is kept." in err and not (tmp_path / "r").exists()


def test_scores_are_shown_though_they_cannot_be_written(weitiao, finished, monkeypatch):
    import errno

    from weitiao.train import folder

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "write_text", full)
    code, out, err = weitiao("evaluate", finished, "--rows", 2, "--max-new-tokens", 2)
    assert code == 2 and "perplexity" in out and "samples.jsonl cannot be written: No space left on device" in err


def test_a_full_disk_at_the_very_end_is_told_and_can_be_mended(weitiao, model_folder, rows_file, tmp_path, monkeypatch):
    import errno

    def full(self, checkpoint, name):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("weitiao.train.folder.RunFolder.publish", full)
        code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "run", *FAST)
    assert code == 2 and "All 8 steps are done, but run cannot be finished" in err and "--resume" in err
    code, _, err = weitiao("train", "run", "--resume")
    assert code == 0, err
    assert (tmp_path / "run" / "adapter").is_dir() and (tmp_path / "run" / "summary.json").is_file()


def test_options_are_settings_too_and_a_mistyped_one_is_told_as_a_setting(weitiao, model_folder, rows_file, tmp_path):
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--epochs", 3)
    assert code == 2 and "There is no setting 'epochs'" in err and "training.epochs" in err
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "r", "--method.rank", 2,
                           "--training.steps=1")
    assert code == 0, err
    assert json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_a_pad_token_outside_the_embedding_does_no_harm(weitiao, model_folder, rows_file, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "model")
    code, _, err = weitiao("train", "--model", "./model", "--data", rows_file, "--output", "r", *FAST, "training.layout=padded",
                           "data.eval_share=0.2")
    assert code == 0, err
    assert weitiao("evaluate", "r")[0] == 0


def test_answers_end_where_the_models_positions_end(weitiao, tokenizer, tmp_path):
    from conftest import tiny_model

    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    turns = [{"role": r, "content": f"{r} says {i} things"} for i in range(8) for r in ("user", "assistant")]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    code, _, err = weitiao("train", "--model", "./gpt2", "--data", "chats.jsonl", "--output", "r", *FAST, "data.eval_share=0.25",
                           "evaluation.metric=exact_match")
    assert code == 0, err
    code, out, err = weitiao("generate", "r", "--prompt", "word " * 20, "--max-new-tokens", 250)
    assert code == 0, err


def test_other_rows_set_aside_than_at_first_are_not_measured(weitiao, model_folder, tmp_path):
    row = '{"prompt": "a", "completion": "b%d"}\n'
    (tmp_path / "rows.jsonl").write_text("".join(row % i for i in range(10)))
    assert weitiao("train", "--model", model_folder, "--data", "rows.jsonl", "--output", "r", *FAST, "data.eval_share=0.2")[0] == 0
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("".join(row % i for i in range(10, 40)))
    code, _, err = weitiao("evaluate", "r")
    assert code == 2 and "set aside are no longer the same" in err and "--data rows.jsonl" in err


# ------------------------------------------------------------------------------------------------------------ use


def test_evaluate(weitiao, finished):
    code, out, err = weitiao("evaluate", finished, "--base")
    assert code == 0, err
    scores = json.loads((finished / "scores.json").read_text())
    assert set(scores) >= {"base", "tuned"}
    assert scores["tuned"]["loss"] < scores["base"]["loss"]
    assert scores["tuned"]["perplexity"] == pytest.approx(2.718281828 ** scores["tuned"]["loss"], rel=1e-6)
    recorded = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    best = min(line["eval_loss"] for line in recorded if "eval_loss" in line)
    assert scores["tuned"]["loss"] == pytest.approx(best, rel=1e-5)
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 and set(samples[0]) == {"where", "prompt", "reference", "answer"}
    assert "exact_match" in out


def test_a_file_with_columns_of_its_own_is_measured_and_answered(weitiao, finished, tmp_path):
    (tmp_path / "other.jsonl").write_text("".join(f'{{"question": "What is {i} and 3?", "reply": "{i + 3}"}}\n' for i in range(4)))
    columns = "data.columns={instruction: question, output: reply}"
    code, _, err = weitiao("evaluate", finished, "--data", "other.jsonl")
    assert code == 2 and "data.columns=" in err
    code, out, err = weitiao("evaluate", finished, "--data", "other.jsonl", columns, "--max-new-tokens", 3)
    assert code == 0, err
    assert [json.loads(line)["reference"] for line in (finished / "samples.jsonl").read_text().splitlines()] == ["3", "4", "5", "6"]
    code, out, err = weitiao("generate", finished, "--file", "other.jsonl", columns, "--max-new-tokens", 3)
    assert code == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == [f"What is {i} and 3?" for i in range(4)], err
    wrong = "data.columns={instruction: frage, output: reply}"
    for command, given, said in (("evaluate", ["--data", "other.jsonl", wrong], "data.columns names 'frage', which no row has"),
                                 ("generate", ["--file", "other.jsonl", wrong], "data.columns names 'frage', which no row of other.jsonl has"),
                                 ("evaluate", [columns], "Expected --data beside it"), ("generate", ["--prompt", "x", columns], "Expected --file beside it"),
                                 ("evaluate", ["--data", "other.jsonl", "data.system=x"], "all else is as it was trained"), ("evaluate", ["data="], "Found 'data='"),
                                 ("evaluate", ["other.jsonl"], "A file is named by --data"), ("generate", ["What is 2?"], "a prompt by --prompt")):
        code, _, err = weitiao(command, finished, *given)
        assert code == 2 and said in err


def test_generate_takes_prompts_and_files_and_greedy_twice_is_the_same(weitiao, finished, tmp_path, rows_file):
    first = weitiao("generate", finished, "--prompt", "What is 3 and 3?", "--max-new-tokens", 12)
    assert first[0] == 0 and first == weitiao("generate", finished, "--prompt", "What is 3 and 3?", "--max-new-tokens", 12)
    (tmp_path / "prompts.txt").write_text("What is 1 and 1?\n\nWhat is 3 and 3?\n")
    code, out, err = weitiao("generate", finished, "--file", "prompts.txt", "--max-new-tokens", 12, "--output", "a.jsonl")
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["What is 1 and 1?", "What is 3 and 3?"]
    assert lines[1]["answer"].strip() == first[1].strip()  # alone or in a padded batch
    code, out, err = weitiao("generate", finished, "--file", rows_file, "--max-new-tokens", 3)
    assert code == 0 and len(out.splitlines()) == 24, err
    assert weitiao("generate", finished)[0] == 2


def test_chat_streams_remembers_and_resets(weitiao, finished, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 3 and 3?\n/reset\nWhat is 3 and 3?\n/nonsense\n/exit\n"))
    code, out, err = weitiao("chat", finished, "--max-new-tokens", 8)
    assert code == 0, err
    before, after = out.split("(begun anew)")
    assert before.strip() and before.strip() == after.replace("/reset begins anew, /exit leaves.", "").strip()


def test_a_checkpoint_can_be_used_in_the_place_of_a_run(weitiao, finished):
    step = max(int(p.name) for p in (finished / "checkpoints").iterdir())
    code, out, err = weitiao("generate", finished / "checkpoints" / str(step), "--prompt", "x", "--max-new-tokens", 2)
    assert code == 0, err
    code, _, err = weitiao("generate", finished / "checkpoints" / "999", "--prompt", "x")
    assert code == 2 and "There is no checkpoint 999" in err


def test_merge_is_proven_and_loads_without_us(weitiao, finished, tmp_path, model_folder):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, err = weitiao("merge", finished, "--output", "merged")
    assert code == 0, err
    assert "Proven on" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), finished / "adapter")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("What is 3 and 3?", return_tensors="pt").input_ids
    with torch.inference_mode():
        difference = (merged(ids).logits - adapter.eval()(ids).logits).abs().max()
    assert difference < 1e-4
    assert merged.generation_config.eos_token_id == [2]
    code, _, err = weitiao("merge", finished, "--output", "merged")
    assert code == 2 and "merged exists already.\n" in err
    os.utime(tmp_path / "merged" / "config.json", (0, 0))
    code, _, err = weitiao("merge", finished, "--output", "merged")
    assert code == 2 and "merged exists already, and is older than what the run has learned by now." in err


def test_a_merge_that_is_not_what_was_trained_is_not_kept(weitiao, finished, tmp_path, monkeypatch):
    from weitiao.model.methods.lora import Lora

    merge = Lora.merge

    def spoil(self, model):
        merged = merge(self, model)
        merged.model.layers[0].mlp.up_proj.weight.data += 0.05
        return merged

    monkeypatch.setattr(Lora, "merge", spoil)
    code, _, err = weitiao("merge", finished, "--output", "merged")
    assert code == 2 and "not the one that was trained" in err
    assert not list(tmp_path.iterdir())


def test_prove_at_length_repeats_the_recorded_steps_to_the_bit(weitiao, finished):
    code, out, err = weitiao("prove", finished, "--batches", 2, "--steps", 2)
    assert code == 0, err
    report = json.loads((finished / "proof-long.json").read_text())
    assert report["trie"]["passed"] and report["trie"]["leak_max"] == 0
    assert report["repeated"]["loss_difference_max"] == 0 and len(report["repeated"]["steps"]) == 2
    assert "Proven." in out


def test_answers_on_stdout_have_nothing_else_among_them(weitiao, finished, monkeypatch):
    monkeypatch.setattr("weitiao.screen.PLAIN_LINE_EVERY", 0.0)
    code, out, err = weitiao("generate", finished, "--prompt", "a b", "--prompt", "c d", "--max-new-tokens", 4)
    assert code == 0 and "Answering: " in err and [json.loads(line)["prompt"] for line in out.splitlines()] == ["a b", "c d"]


def test_prove_says_that_a_record_was_made_of_other_nodes_and_asks_for_rounding_alone(weitiao, finished, tmp_path):
    """As by a version that computed rows' last tokens, too."""
    run = tmp_path / "older"
    shutil.copytree(finished, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "nodes" in line:
            line |= {"nodes": line["nodes"] + 3, "loss": line["loss"] + 1e-6}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = weitiao("prove", run, "--batches", 1, "--steps", 2)
    assert code == 0 and "made of other nodes then" in out and "Proven." in out, err
    assert json.loads((run / "proof-long.json").read_text())["repeated"]["same_nodes"] is False


def test_the_best_checkpoint_by_a_metric_is_the_one_published(weitiao, model_folder, tmp_path):
    rows = [{"prompt": f"{a}?", "completion": json.dumps({"a": a % 2})} for a in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = weitiao("train", "--model", model_folder, "--data", "rows.jsonl", "--output", "r", *FAST, "training.epochs=6",
                             "data.eval=rows.jsonl", "evaluation.metric=field_f1", "evaluation.every=4", "saving.every=5")
    assert code == 0, err
    run = tmp_path / "r"
    scored = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "field_f1" in line]
    assert [line["step"] for line in scored] == [4, 8, 12]
    best = max(scored, key=lambda line: line["field_f1"])["step"]
    assert json.loads((run / "summary.json").read_text())["published_step"] == best
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (run / "checkpoints" / str(best) / name).read_bytes()
    code, _, err = weitiao("train", "--model", model_folder, "--data", "rows.jsonl", "--output", "s", "evaluation.metric=field_f1")
    assert code == 2 and "data.eval" in err


def test_labels_are_compared_alone_in_every_command(weitiao, model_folder, tmp_path, monkeypatch):
    rows = [{"text": "good" if a % 2 else "bad", "label": a % 2} for a in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = weitiao("train", "--model", model_folder, "--data", "rows.jsonl", "--output", "r", *FAST, "training.epochs=30",
                           "data.labels={'0': neg, '1': pos}", "data.label_scoring=sequence", "data.eval=rows.jsonl", "evaluation.every=end", "saving.every=end")
    assert code == 0, err
    code, out, err = weitiao("evaluate", "r")
    assert code == 0, err
    scores = json.loads((tmp_path / "r" / "scores.json").read_text())["tuned"]
    assert scores["accuracy"] == scores["macro_f1"] == 1.0 and scores["confusion"] == [[6, 0], [0, 6]]
    assert "label ↓, answer →" in out and "accuracy" in out
    code, out, err = weitiao("generate", "r", "--prompt", "good", "--prompt", "bad")
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["answer"] for a in answers] == ["pos", "neg"] and all(0.5 < a["probability"] <= 1 for a in answers)
    assert re.fullmatch(r"pos \(\d+\.\d%\)\n", weitiao("generate", "r", "--prompt", "good")[1])
    monkeypatch.setattr(sys, "stdin", io.StringIO("good\nbad\n"))
    code, out, err = weitiao("chat", "r")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["pos", "neg"], err


@pytest.mark.parametrize("name, setting", [
    ("answers", "data.label_scoring=sequence"), ("answers", "data.cut=front"), ("labels", "evaluation.rows=3"),
    ("labels", "evaluation.max_new_tokens=3"),
])
def test_settings_that_the_rows_leave_nothing_to_do_are_refused(weitiao, model_folder, rows_file, tmp_path, name, setting):
    if name == "labels":
        rows_file = tmp_path / "labels.jsonl"
        rows_file.write_text('{"text": "good", "label": "1"}\n{"text": "bad", "label": "0"}\n' * 6)
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "r", setting, "data.eval_share=0.3")
    assert code == 2 and f"{setting.split('=3')[0]} would do nothing on rows with" in err and not (tmp_path / "r").exists()


def test_rows_to_measure_are_read_as_the_rows_that_are_learned(weitiao, model_folder, rows_file, tmp_path):
    """Text and label beside rows with answers are answered in words; the run opens again."""
    (tmp_path / "labels.jsonl").write_text('{"text": "good", "label": "1"}\n{"text": "bad", "label": "0"}\n' * 3)
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "r", "data.eval=labels.jsonl", "training.steps=1")
    assert code == 0, err
    code, out, err = weitiao("evaluate", "r")
    assert code == 0 and "exact_match" in out and "accuracy" not in out, err
    assert weitiao("train", "r", "--resume")[0] == 0


def test_a_folder_in_the_place_of_settings_tells_what_it_holds(weitiao, tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "run.yaml").write_text("data: rows.jsonl")
    code, _, err = weitiao("train", "job")
    assert code == 2 and "job is a folder, and no run." in err and "It holds job/run.yaml." in err


def test_a_prompt_longer_than_the_model_is_refused(weitiao, finished):
    code, _, err = weitiao("generate", finished, "--prompt", "word " * 400)
    assert code == 2 and "Prompt 1 has" in err and "The model takes 256" in err


def test_the_commonest_slips_are_told_by_their_cure(weitiao, rows_file):
    assert "weitiao train --data x.jsonl" in weitiao("train", "x.jsonl")[2]
    assert "without spaces around the =" in weitiao("train", "--data", rows_file, "training.epochs", "=", "2")[2]
    assert weitiao("--version")[:2] == (0, "0.1.0\n")


def test_several_data_options_are_several_files(weitiao, model_folder, rows_file, tmp_path):
    (tmp_path / "more.csv").write_text("prompt;completion\na;b\n")  # as half of Europe's spreadsheets write it
    code, out, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--data", "more.csv", "--output", "r", "training.steps=1")
    assert code == 0, err
    assert "25 to learn from" in out


def test_generate_looks_at_its_files_before_it_answers(weitiao, finished, tmp_path):
    (tmp_path / "there.jsonl").write_text("mine")
    for name, found in (("there.jsonl", "exists already"), ("none/x.jsonl", "There is no folder none")):
        code, _, err = weitiao("generate", finished, "--prompt", "x", "--output", name)
        assert code == 2 and found in err
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    (tmp_path / "gbk.txt").write_bytes("你好，请介绍一下你自己。\n".encode("gbk"))
    code, _, err = weitiao("generate", finished, "--file", "gbk.txt")
    assert code == 2 and "gb18030" in err


def test_rows_to_answer_need_no_answers(weitiao, finished, tmp_path):
    files = {"a.jsonl": {"instruction": "What is", "input": "3 and 3?"}, "b.jsonl": {"prompt": "x"}, "c.jsonl": {"question": "x"},
             "d.jsonl": {"messages": [{"role": "user", "content": "x"}]},
             "e.jsonl": {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}, "f.jsonl": {"text": "x"}}
    for name, row in files.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        code, out, err = weitiao("generate", finished, "--file", name, "--max-new-tokens", 2, "--output", f"out-{name}")
        assert code == 0, (name, err)
        assert json.loads((tmp_path / f"out-{name}").read_text())["prompt"] == ("What is\n3 and 3?" if name == "a.jsonl" else "x")


def test_a_damaged_run_is_told_with_its_checkpoints(weitiao, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    code, _, err = weitiao("generate", "run", "--prompt", "x")
    assert code == 2 and "cannot be read from run/adapter" in err and "run/checkpoints/N" in err


def test_a_full_disk_while_merging_leaves_nothing(weitiao, finished, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(merged, trained, folder):
        folder.mkdir()
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("weitiao.use.merge.write", full)
    code, _, err = weitiao("merge", finished, "--output", "merged")
    assert code == 2 and "merged cannot be written: No space left on device" in err
    assert not list(tmp_path.iterdir())


def test_chat_survives_bytes_that_are_no_text(finished):
    talk = subprocess.run([sys.executable, "-m", "weitiao", "chat", str(finished), "--max-new-tokens", "3"], timeout=120,
                          input="你好\n/exit\n".encode("gbk"), capture_output=True)
    assert talk.returncode == 0, talk.stderr.decode()


def test_a_changed_template_is_refused(weitiao, finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "template.jinja").write_text((copy / "template.jinja").read_text() + "\n")
    code, _, err = weitiao("generate", copy, "--prompt", "x")
    assert code == 2 and "not the template that the run was trained with" in err


def test_no_such_run(weitiao):
    for command in ("chat", "evaluate", "merge", "prove"):
        code, _, err = weitiao(command, "runs/none")
        assert code == 2 and "There is no run folder runs/none" in err


def test_train_help_lists_every_setting(weitiao):
    from weitiao.config import every_setting

    code, out, _ = weitiao("train", "--help")
    assert code == 0
    for name, _, _ in every_setting():
        assert f"  {name}  [" in out
    assert "training.batch_size  [whole number >= 1 (rows), default 16]" in out


def test_what_torch_reads_is_there_before_any_command(monkeypatch):
    from weitiao import cli

    for name in cli.TORCH_READS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")  # a user's own stays
    found = {}
    monkeypatch.setattr(cli, "app", lambda: found.update({name: os.environ[name] for name in cli.TORCH_READS}))
    main()
    assert found == cli.TORCH_READS | {"LRU_CACHE_CAPACITY": "7"}
