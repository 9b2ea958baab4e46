"""A run on a stream takes the steps that its settings say, however its rows come: slowly, from the cache, or after a stop."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from weitiao import config
from weitiao.data import cache, dataset, streamed
from weitiao.errors import Interrupted, RowError, RunError, SettingError
from weitiao.train import loop
from weitiao.train.loop import Training
from weitiao.train.train import prepare, resume, train

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(60)]


@pytest.fixture(autouse=True)
def blocks_and_windows_of_eight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEITIAO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(streamed, "BLOCK", 8)
    monkeypatch.setattr(loop, "FIRST_WINDOW", 8)
    monkeypatch.setattr(dataset, "FEW", 8)
    monkeypatch.setattr(dataset, "usual_workers", lambda: 1)
    for module in (streamed, dataset):
        monkeypatch.setattr(module, "CHUNK", 4)


def write(rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    Path("rows.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")


@pytest.fixture
def begin(model_folder):
    """A run of 24 steps, five rows each, twice through the 60 rows."""
    def run(output, *more):
        return train(config.read(None, ["training.steps=24", "training.batch_size=5", "training.learning_rate=1e-2", "method.rank=4", "data.streaming=true",
                                        "saving.every=10", "method.dropout=0.1", *more],
                                 **{"model.name": str(model_folder), "data.train": "rows.jsonl", "output": output}))

    return run


def outcome(run) -> tuple[bytes, bytes]:
    return (run.path / "metrics.jsonl").read_bytes(), (run.path / "adapter" / "adapter_model.safetensors").read_bytes()


def stop_after(monkeypatch, step):
    monkeypatch.setattr(Training, "_should_stop", lambda self: self.step == step)


@pytest.mark.parametrize("at", [3, 11, 12, 17])
@pytest.mark.parametrize("kept", [0, 1])
def test_stopped_and_gone_on_with_is_the_run_that_was_not_stopped_bit_for_bit(begin, monkeypatch, at, kept):
    write(ROWS)
    whole = begin("whole", "data.cache_gb=0")
    with monkeypatch.context() as patch:
        stop_after(patch, at)
        with pytest.raises(Interrupted):
            begin("stopped", f"data.cache_gb={kept}")
    assert outcome(resume(Path("stopped"))) == outcome(whole)
    assert len((whole.path / "metrics.jsonl").read_text().splitlines()) == 24


def test_the_speed_of_the_encoder_decides_nothing(begin, monkeypatch):
    write(ROWS)
    quick = begin("quick", "data.cache_gb=0")
    put = streamed.Spill.put
    monkeypatch.setattr(streamed.Spill, "put", lambda *args: time.sleep(0.05) or put(*args))
    assert outcome(begin("slow", "data.cache_gb=0")) == outcome(quick)


@pytest.mark.parametrize("longest", [[], ["data.max_tokens=40"]])
def test_what_it_encoded_is_an_ordinary_runs_and_a_second_ones(begin, monkeypatch, longest):
    write([*ROWS, {"prompt": "1", "completion": ""}])
    first = begin("first", "data.bad_share=0.5", *longest)
    told = json.loads((first.path / "data.json").read_text())
    assert told["streamed"] == {"read": 61, "whole": True} and [one["where"] for one in told["skipped"]] == ["rows.jsonl:61"]
    monkeypatch.setattr(cache, "load", lambda *args, **more: pytest.fail("encoded again"))
    monkeypatch.setattr(streamed.Streamed, "_take_rest", lambda self: pytest.fail("encoded again"))
    second = begin("second", "data.bad_share=0.5", *longest)
    assert outcome(second) == outcome(first)
    assert json.loads((second.path / "data.json").read_text()) == told
    ordinary = begin("ordinary", "data.bad_share=0.5", "data.streaming=false", *longest)
    assert json.loads((ordinary.path / "data.json").read_text())["rows"] == 60


def test_a_broken_line_stops_the_run_before_its_window_and_mended_it_goes_on(begin):
    write(ROWS)
    whole = begin("whole", "data.max_tokens=40")
    write([*ROWS[:50], "{", *ROWS[50:]])
    with pytest.raises(RowError) as told:
        begin("broken", "data.max_tokens=40")
    assert told.value.found.startswith("After step 8: rows.jsonl:51, column 2, is not JSON")
    assert told.value.next_step.endswith("Then go on: weitiao train broken --resume")
    write(ROWS)
    assert outcome(resume(Path("broken"))) == outcome(whole)


def test_rows_that_were_learned_from_must_be_the_same(begin, monkeypatch):
    write(ROWS)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Interrupted):
            begin("run")
    write([*ROWS[:20], *ROWS[21:]])
    with pytest.raises(RunError, match="The first 40 rows are not those"):
        resume(Path("run"))


def test_rows_are_measured_at_the_epochs_end(begin):
    write(ROWS)
    Path("eval.jsonl").write_text(json.dumps(ROWS[0]) + "\n", "utf-8")
    run = begin("run", "data.eval=eval.jsonl")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [12, 24]
    assert [line["epoch"] for line in lines if "loss" in line][10:13] == [None, 1.0, 1.083333]


@pytest.mark.parametrize("more, said", [
    (["training.steps=null"], "data.streaming=true needs training.steps"),
    (["data.eval_share=0.1"], "cannot set data.eval_share"),
    (["data.train=[{path: rows.jsonl, share: 1}]"], "shares of a mix"),
])
def test_what_wants_all_rows_first_is_refused(begin, more, said):
    write(ROWS)
    with pytest.raises(SettingError) as told:
        begin("run", *more)
    assert said in str(told.value) and not Path("run").exists()


def test_several_processes_are_refused(model_folder, monkeypatch):
    from accelerate import Accelerator

    from weitiao.screen import Screen

    write(ROWS)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    settings = config.read(None, ["data.streaming=true", "training.steps=2"], **{"model.name": str(model_folder), "data.train": "rows.jsonl"})
    with pytest.raises(SettingError, match="there are 2"):
        prepare(settings, Screen(quiet=True))
