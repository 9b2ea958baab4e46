"""A run folder is whole or it says so."""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import pytest

from weitiao import config
from weitiao.errors import Interrupted, RunError
from weitiao.train.folder import RunFolder, free_name, open_run, torn, write_text


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.start(config.parse({"data": "rows.jsonl"}))
    return folder


def writer(text="weights"):
    def write(folder):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "w.bin").write_text(text)
        (folder / "progress.json").write_text('{"step": 1, "best": {}}')

    return write


def test_settings_come_back_as_they_were(run):
    assert run.settings() == config.parse({"data": "rows.jsonl"})


def test_checkpoints_are_rotated_and_the_spared_one_stays(run):
    for step in (10, 20, 30, 40):
        run.save_checkpoint(step, writer(), keep=2, spare={10})
    assert [c.step for c in run.checkpoints()] == [10, 30, 40]
    assert all(torn(c.path) is None for c in run.checkpoints())


@pytest.mark.parametrize(("harm", "defect"), [
    (lambda p: (p / "adapter" / "w.bin").unlink(), "adapter/w.bin is missing"),
    (lambda p: (p / "adapter" / "w.bin").write_text("short"), "has 5 bytes, not 7"),
    (lambda p: (p / "adapter" / "w.bin").write_text("WEIGHTS"), "does not match its hash"),
    (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is missing or broken"),
])
def test_a_torn_newest_checkpoint_is_told_and_the_one_before_it_used(run, harm, defect):
    run.save_checkpoint(1, writer(), 2, set())
    run.save_checkpoint(2, writer(), 2, set())
    harm(run.checkpoints_folder / "2")
    told = []
    assert run.newest_whole(told.append).step == 1
    assert len(told) == 1 and "Checkpoint 2 is torn" in told[0] and defect in told[0]


def test_what_was_just_saved_outlives_torn_ones_of_later_steps(run):
    for step in (5, 10, 15):
        run.save_checkpoint(step, writer(), 2, set())
    for step in (10, 15):
        (run.checkpoints_folder / str(step) / "manifest.json").unlink()
    run.save_checkpoint(6, writer(), 2, set())
    assert run.newest_whole(lambda text: None).step == 6
    run.forget_after(6)
    assert [c.step for c in run.checkpoints()][-1] == 6


def test_a_full_disk_while_saving_leaves_the_older_checkpoint_and_nothing_half_written(run):
    run.save_checkpoint(1, writer(), 2, set())

    def write(folder):
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run.save_checkpoint(2, write, 2, set())
    assert [p.name for p in run.checkpoints_folder.iterdir()] == ["1"]


def test_safetensors_and_torch_report_a_full_disk_by_errors_of_their_own(run):
    from safetensors import SafetensorError

    for error in (SafetensorError("I/O error: No space left on device (os error 28)"), RuntimeError("PytorchStreamWriter failed")):
        def write(folder, error=error):
            raise error

        with pytest.raises(OSError, match=str(error)[:10]):
            run.save_checkpoint(2, write, 2, set())


def test_metrics_are_cut_back_and_a_torn_last_line_is_left_out(run):
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": step / 3})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [m["step"] for m in run.read_metrics()] == [1, 2, 3]
    run.cut_metrics(2)
    assert (run.path / "metrics.jsonl").read_text() == "".join(
        json.dumps({"step": s, "loss": s / 3}) + "\n" for s in (1, 2))


def test_two_at_once_on_one_folder_the_second_is_refused(run):
    with run.locked(), pytest.raises(RunError, match="Another training is at work"), RunFolder(run.path).locked():
        pass
    with run.locked():
        pass  # free again


def test_a_folder_that_holds_something_is_never_written_over(run, tmp_path):
    with pytest.raises(RunError, match="exists already"):
        RunFolder.refuse_taken(run.path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        RunFolder.refuse_taken(tmp_path / "other")
    RunFolder.refuse_taken(tmp_path / "new")


def test_names_are_numbered(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows-2").mkdir()
    assert free_name(tmp_path, "rows").name == "rows-3"


def test_open_run_takes_a_run_or_one_of_its_checkpoints(run, capsys):
    with pytest.raises(RunError, match="has learned nothing yet"):
        open_run(run.path)
    run.save_checkpoint(7, writer(), 2, set())
    assert open_run(run.checkpoints_folder / "7")[0] == run
    assert not capsys.readouterr().err
    assert open_run(run.path)[1] == open_run(run.path)[1] == run.checkpoints_folder / "7"
    told = capsys.readouterr()
    assert not told.out and told.err.count("has not finished; what it had learned by step 7 is taken") == 1 and f"weitiao train {run.path} --resume" in told.err
    with pytest.raises(RunError, match="There is no checkpoint 8.*\n.*It has 7"):
        open_run(run.checkpoints_folder / "8")
    run.publish(run.checkpoints()[0], "adapter")
    assert open_run(run.path)[1] == run.path


def test_a_mistyped_run_is_told_with_the_nearest(run):
    with pytest.raises(RunError, match="no run folder .*rn\\.\n.*\nDid you mean 'run'?"):
        open_run(run.path.with_name("rn"))


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    write_text(file, "old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_place_where_no_folder_can_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(RunError, match="rows.csv/runs/x cannot be made: .*rows.csv is no folder"):
        RunFolder.refuse_taken(tmp_path / "rows.csv" / "runs" / "x")
    RunFolder.refuse_taken(tmp_path / "new" / "runs" / "x")


@pytest.mark.parametrize("steps", [0, 3])
def test_a_new_run_that_is_ended_at_once_says_what_is_kept(tmp_path, steps):
    from weitiao.train.train import claim

    with pytest.raises(Interrupted) as told, claim(SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True)), tmp_path / "run") as run:
        run.start(config.parse({"data": "rows.jsonl"}))
        for step in range(steps):
            run.append_metrics({"step": step + 1, "loss": 1.0})
        raise KeyboardInterrupt
    kept = f"Stopped at once. Go on: weitiao train {tmp_path / 'run'} --resume"
    assert str(told.value) == (kept if steps else "Stopped before the first step was done; nothing is kept.") and told.value.exit_code == 130
    assert (tmp_path / "run").exists() == bool(steps)
