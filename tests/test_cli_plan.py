"""`weitiao plan` as a user types it: what is refused before anything is traced, and no figure that means nothing."""

from __future__ import annotations

import contextlib
import json

import pytest

from weitiao.cli import main
from weitiao.train.plan import about


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path, model_folder):
    """Run `weitiao plan` in this process, in an empty folder: (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["weitiao", "plan", *map(str, words), "--model", str(model_folder)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert (stop.value.code or 0) == code and "Traceback" not in err, (out, err)
        return out, err

    return run


def test_a_file_that_cannot_be_written_is_refused_before_the_work(plan):
    out, err = plan("--json", "nowhere/plan.json", code=2)
    assert "there is no folder nowhere" in err and "mkdir -p nowhere" in err and not out


def test_rows_are_named_or_made_up(plan, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    out, err = plan("--data", "rows.jsonl", "--tokens", 64, code=2)
    assert "--tokens and --rows make rows up, and rows are named too" in err and not out


def test_made_up_rows_take_the_place_of_a_files(plan, tmp_path):
    (tmp_path / "run.yaml").write_text("data: {train: rows/that-are-elsewhere}\n")
    out, _ = plan("run.yaml", "--gpu", "8GB", "--tokens", 16, "--rows", 2)
    assert "2 made-up rows of 16 tokens" in out


@pytest.mark.parametrize("data", ["rows/that-are-elsewhere", "{path: elsewhere.jsonl, split: test}", "{train: none, eval: elsewhere.jsonl}"])
def test_rows_that_are_not_read_need_not_be_here(plan, tmp_path, data):
    (tmp_path / "run.yaml").write_text(f"data: {data}\n")
    words = () if "none" in data else ("--tokens", 16)
    out, _ = plan("run.yaml", "--gpu", "8GB", *words, "--rows", 2)
    assert "2 made-up rows" in out


def test_a_well_known_model_goes_by_any_of_its_names(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, found in (("qwen2.5-0.5b-instruct", None), ("qwen2.5-0.5-instruct", "Did you mean 'Qwen/Qwen2.5-0.5B-Instruct'")):
        monkeypatch.setattr("sys.argv", ["weitiao", "plan", "--model", name, "--gpu", "24GB", "--tokens", "16", "--rows", "2"])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert (stop.value.code or 0) == (2 if found else 0) and (found or "made-up rows") in (err if found else out), (out, err)


@pytest.mark.parametrize("size", ["100MB", "0.5 GiB"])
def test_a_size_that_leaves_nothing_is_refused(plan, size):
    out, err = plan("--memory", size, code=2)
    assert f"'{size}' of memory" in err and "at least 2GB" in err and not out


def test_no_memory_size_is_told_as_such(plan):
    out, err = plan("--memory", "lots", code=2)
    assert "'lots' is no size of memory" in err and "such as 8GB" in err and "RTX" not in err and not out


def test_no_figure_is_nothing(plan, tmp_path):
    out, _ = plan("--memory", "8GB", "--rows", 1, "--tokens", 8, "--json", "plan.json")
    assert "1 made-up row of 8 tokens" in out and " 0.0 MiB" not in out
    assert "an epoch ┃" not in out, "a GPU that is known by its size has no speed"
    assert json.loads((tmp_path / "plan.json").read_text())["rows"] == 1


def test_a_time_is_no_more_exact_than_an_estimate():
    assert [about(s) for s in (0.2, 42, 185, 10304)] == ["less than 1 s", "about 42 s", "about 3:05", "about 2:52:00"]


def test_a_run_that_does_not_fit_is_refused_and_goes_on_by_force(monkeypatch, capsys, tmp_path, model_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weitiao.train.memory.free", lambda device: 2**20)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "What is {n}?", "completion": "A number."}}\n' for n in range(4)))
    words = ["weitiao", "train", "--data", "rows.jsonl", "--model", str(model_folder), "--output", "run", "training.steps=1"]

    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "This run would need" in err and "--force trains all the same" in err
    assert "Loading" not in out and not (tmp_path / "run").exists()

    monkeypatch.setattr("sys.argv", [*words, "--force"])
    with contextlib.suppress(SystemExit):
        main()
    out, _ = capsys.readouterr()
    assert "It goes on, since --force was given" in out and "planned" in out and (tmp_path / "run/plan.json").is_file()
