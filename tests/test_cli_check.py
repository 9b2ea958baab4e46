"""`weitiao check` as a user types it: rows in front, rows shown, a page, and what is refused before anything is read."""

from __future__ import annotations

import json

import pytest

from weitiao.cli import main, rows_first
from weitiao.config import read
from weitiao.screen import Screen
from weitiao.train import check as checking
from weitiao.train import first_rows as showing

WORDS = ("fir", "oak", "elm", "ash", "yew", "pine", "palm", "lime", "plum", "pear")
CLEAN = [{"prompt": f"What is {word}?", "completion": f"It is a {word} tree."} for word in WORDS]


@pytest.fixture
def check(monkeypatch, capsys, tmp_path, model_folder):
    """Run `weitiao check` in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: object, code: int = 0) -> tuple[str, str]:
        given = ["weitiao", "check", *map(str, words), "--model", str(model_folder), "training.batch_size=2"]
        monkeypatch.setattr("sys.argv", given)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert (stop.value.code or 0) == code and "Traceback" not in err, (out, err)
        return out, err

    return run


def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    return name


def settings_for(model_folder, rows, **settings):
    return read(None, [f"{name}={value}" for name, value in settings.items()], **{"model.name": str(model_folder), "data.train": rows})


# ------------------------------------------------------------------------------------------------ rows in front


def test_files_of_rows_need_no_option(check):
    out, _ = check(write("a.jsonl", CLEAN[:4]), write("b.jsonl", CLEAN[4:]), "data.max_tokens=200")
    assert "No defects found in 10 rows" in out


def test_a_folder_of_rows_in_front(check, tmp_path):
    (tmp_path / "mine").mkdir()
    write("mine/a.jsonl", CLEAN)
    assert "No defects found in 10 rows" in check("mine", "data.max_tokens=200")[0]


def test_rows_in_front_and_behind_data_are_checked_together(check):
    assert "in 10 rows" in check(write("a.jsonl", CLEAN[:4]), "data.max_tokens=200", "--data", write("b.jsonl", CLEAN[4:]))[0]


def test_a_file_of_settings_stays_one(check):
    write("rows.jsonl", CLEAN)
    write("run.yaml", ["data: {train: rows.jsonl, max_tokens: 200}"])
    assert "No defects found in 10 rows" in check("run.yaml")[0]


def test_what_stands_in_front_is_rows_unless_it_is_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    write("run/config.yaml", [])
    assert rows_first(["a.jsonl", "b.csv.gz", "x=1", "c.jsonl"]) == (["a.jsonl", "b.csv.gz"], ["x=1", "c.jsonl"])
    assert rows_first(["run.yaml", "x=1"]) == ([], ["run.yaml", "x=1"])
    assert rows_first(["run"]) == ([], ["run"])
    assert rows_first(["rows.jsnl", "max_tokens"]) == (["rows.jsnl"], ["max_tokens"])
    assert rows_first([]) == ([], [])


def test_a_mistyped_file_is_told_the_nearest(check):
    write("rows.jsonl", CLEAN)
    _, err = check("rows.jsnl", code=2)
    assert "rows.jsnl: no such file or folder." in err and "Did you mean 'rows.jsonl'?" in err


def test_training_still_refuses_a_file_of_rows_in_front(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["weitiao", "train", "rows.jsonl"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "weitiao train --data rows.jsonl" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ rows shown


def test_findings_first_and_then_rows(check):
    out, _ = check(write("rows.jsonl", [*CLEAN, {"prompt": "1", "completion": ""}]), "--show", 1, "data.max_tokens=200", "data.bad_share=1")
    assert out.index("1 of 11 rows skipped: no answer.") < out.index("rows.jsonl:1 · ")
    assert "rows.jsonl:2 · " not in out and "⟦I¦t¦·is¦" in out


def test_ids_are_shown_beside_tokens(check):
    write("rows.jsonl", CLEAN)
    out, _ = check("rows.jsonl", "--show", 1, "--ids", "data.max_tokens=200")
    assert " 1 <|im_start|>" in out
    _, err = check("rows.jsonl", "--ids", code=2)
    assert "--show N" in err


def test_a_page_carries_findings_and_twenty_rows(check, tmp_path):
    rows = [{"prompt": f"What is {a} {b}?", "completion": f"A {b} of {a}."} for a in WORDS[:5] for b in WORDS[:6]]
    out, _ = check(write("rows.jsonl", [*rows, {"prompt": "1", "completion": ""}]), "--html", "page.html", "data.max_tokens=200")
    page = (tmp_path / "page.html").read_text("utf-8")
    shown = page.count('<section class="row"')
    assert 20 <= shown <= 22 and f"{shown} of 30 rows" in page  # with two that share much
    assert "1 of 31 rows skipped: no answer." in page
    assert "page.html" in out and "⟦" not in out


def test_rows_on_the_screen_and_on_the_page(check, tmp_path):
    out, _ = check(write("rows.jsonl", CLEAN), "--show", 2, "--html", "page.html", "data.max_tokens=200")
    assert "rows.jsonl:2 · " in out and "The same as a page: page.html" in out
    assert (tmp_path / "page.html").read_text("utf-8").count('<section class="row"') == out.count("rows.jsonl:") - out.count("with rows.jsonl:")


@pytest.mark.parametrize("rows, why", [
    ([], "rows.jsonl holds no rows."),
    ([{"prompt": "1", "completion": ""}] * 3, "Nothing can be learned from any of the 3 rows."),
    ([{"问题": "1", "答案": "2"}], "rows.jsonl:1 has the columns 问题, 答案."),
    ([{"text": word, "label": "3"} for word in WORDS], "All rows are answered with '3'."),
])
def test_where_no_row_can_be_shown_a_sentence_says_why(check, tmp_path, rows, why):
    out, err = check(write("rows.jsonl", rows), "--show", 2, "--html", "page.html", code=2)
    assert f"No row can be shown. {why} No page is written." in out.replace("\n", " ") and not err
    assert not (tmp_path / "page.html").exists()


def test_many_bad_rows_and_broken_lines_hide_no_good_one(check):
    out, _ = check(write("rows.jsonl", ["{broken", {"prompt": "1", "completion": ""}, CLEAN[0]]), "--show", 1, code=2)
    assert "1 broken row. rows.jsonl:1, column 2, is not JSON" in out and "rows.jsonl:3 · " in out


def test_a_few_rows_of_many_are_read_and_cut_as_all_are(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(showing, "LOOKED_AT", 5)
    rows = [{"prompt": "1", "completion": "2" * 40}] + [{"prompt": "1", "completion": "2" * 10}] * 200
    settings = settings_for(model_folder, write("rows.jsonl", rows), **{"data.template": "plain"})
    screen = Screen(quiet=True)
    told = checking.check(settings, screen)
    data, _ = showing.first_rows(settings, told, 3, screen)
    assert [row.where for row in data.rows] == [f"rows.jsonl:{n}" for n in range(1, 6)]
    assert data.max_tokens == told.max_tokens == 12 and len(data.rows[0].examples[0]) == 12
    assert len(showing.first_rows(settings, told, 7, screen)[0]) == 7
    assert len(showing.first_rows(settings, told, 7, screen, most=3)[0]) == 3


def test_labels_are_those_of_all_rows(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(showing, "LOOKED_AT", 5)
    rows = [{"text": word, "label": label} for label in "01" for word in WORDS]  # the first five know one label only
    settings = settings_for(model_folder, write("rows.jsonl", rows))
    screen = Screen(quiet=True)
    data, _ = showing.first_rows(settings, checking.check(settings, screen), 3, screen)
    assert data.labels.words == ("0", "1") and all(row.examples[0].ids[-1] == data.labels.of("0")[0] for row in data.rows)


# ------------------------------------------------------------------------------------------------ refused at once


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_a_place_that_cannot_be_written_is_told_before_rows_are_read(check, tmp_path, monkeypatch, option):
    monkeypatch.setattr(checking, "check", lambda *_: pytest.fail("rows were read"))
    write("rows.jsonl", CLEAN)
    _, err = check("rows.jsonl", option, "no/such/file", code=2)
    assert "no/such/file cannot be written: there is no folder no/such." in err and "mkdir -p no/such" in err
    _, err = check("rows.jsonl", option, tmp_path, code=2)
    assert "is a folder." in err


# ------------------------------------------------------------------------------------------------ what is told


def test_each_kind_of_broken_row_has_its_cure(check):
    write("rows.csv", ["prompt,completion", "What is oak?,A tree.", "half", '"never closed', "What is elm?,A tree."])
    out, _ = check("rows.csv", code=2)
    assert "rows.csv:3 has 1 cell, the header has 2: half" in out
    assert "rows.csv:4: the record that starts on this line cannot be read, nor what is behind it" in out
    assert "Close the quotes" in out and out.count("error: 1 broken row.") == 2


def test_chinese_columns_are_told_with_their_names_in_the_cure(check):
    out, _ = check(write("rows.jsonl", [{"问题": "什么是橡树？", "答案": "一种树。"}]), code=2)
    cure = "data.columns='{question: 问题, answer: 答案}'"
    assert "rows.jsonl:1 has the columns 问题, 答案." in out and cure in out
    check("rows.jsonl", "data.columns={question: 问题, answer: 答案}", "data.max_tokens=200")


def test_a_finding_about_labels_names_no_place(check):
    out, _ = check(write("rows.jsonl", [{"text": word, "label": "3"} for word in WORDS]), code=2)
    assert "error: All rows are answered with '3'.\n  Expected two labels or more" in out
    assert "no room for an answer" not in out


def test_spans_that_no_row_has_are_left_out_at_the_ends():
    assert checking.bars([(1, 10, 0), (11, 20, 4), (21, 30, 0), (31, 40, 2), (41, 50, 0)]).splitlines() == [
        f"11–20 {'█' * 40} 4", "21–30  0", f"31–40 {'█' * 20} 2"]
    assert checking.bars([]) == ""
