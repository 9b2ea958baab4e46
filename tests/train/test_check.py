"""A check reads what a training would, without weights: what it finds, what it tells, what it ends with, and what it costs."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from weitiao.cli import app
from weitiao.config import read
from weitiao.data.findings import Finding
from weitiao.errors import SourceError
from weitiao.screen import Screen
from weitiao.train import check as checking

WORDS = ("fir", "oak", "elm", "ash", "yew", "pine", "palm", "lime", "plum", "pear", "apple", "birch", "beech", "maple", "cedar", "hazel")
CLEAN = [{"prompt": f"What is {word}?", "completion": f"It is a {word} tree."} for word in WORDS]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def without_weights(model_folder, tmp_path_factory):
    """The model's folder as a check needs it."""
    folder = tmp_path_factory.mktemp("bare") / "tiny-llama"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    return name


@pytest.fixture
def checked(without_weights):
    def checked(rows, workers=1, most=None, **settings):
        if isinstance(rows, list):
            rows = write("rows.jsonl", rows)
        given = {"model.name": str(without_weights), "data.train": rows, "data.max_tokens": settings.pop("max_tokens", 200), "training.batch_size": 2}
        settings = read(None, [f"{name}={value}" for name, value in settings.items()], **given)
        return checking.check(settings, Screen(quiet=True), most, workers)

    return checked


@pytest.fixture
def command(without_weights):
    def command(*words):
        return CliRunner().invoke(app, ["check", "--model", str(without_weights), *words, "training.batch_size=2"])

    return command


def by_kind(report):
    return {finding.kind: finding for finding in report.findings}


def test_clean_rows_are_one_line(command):
    done = command("--data", write("rows.jsonl", CLEAN))
    assert done.exit_code == 0
    assert done.stdout.strip().replace("\n", " ") == "No defects found in 16 rows: longest 36 tokens, 50.0% learned."


def test_broken_lines_are_told_and_the_rest_is_read(checked):
    report = checked([*CLEAN[:3], '{"prompt": "1", "completion": ', *CLEAN[3:7], "{", *CLEAN[7:], "[1]"])
    found = by_kind(report)
    assert set(found) == {"broken_row"} and report.rows == len(CLEAN)
    no_json, no_object = sorted(report.findings, key=lambda finding: finding.where)[::-1]
    assert (no_json.severity, no_json.count, no_json.where) == ("error", 2, ("rows.jsonl:4", "rows.jsonl:9"))
    assert "is not JSON" in no_json.what and "Mend or remove this row." in no_json.cure
    assert no_object.where == ("rows.jsonl:19",) and "Expected an object" in no_object.cure


def test_a_csv_with_a_short_line(checked):
    with open("rows.csv", "w") as file:
        file.write("prompt,completion\nWhat is oak?,A tree.\nhalf\nWhat is elm?,Another tree.\n")
    report = checked("rows.csv")
    assert by_kind(report)["broken_row"].where == ("rows.csv:3",) and report.rows == 2


def test_a_json_file_that_breaks_off_ends_there(checked):
    with open("rows.json", "w") as file:
        file.write(json.dumps(CLEAN)[:-5])
    report = checked("rows.json")
    assert {finding.kind for finding in report.findings if finding.severity == "error"} == {"broken_row"}
    assert report.rows == 0


def test_columns_of_no_format(checked):
    (finding,) = checked([{"问": "1", "答": "2"}] * 3).findings
    assert (finding.kind, finding.severity, finding.where) == ("unknown_columns", "error", ("rows.jsonl:1",))
    assert "rows.jsonl:1 has the columns 问, 答." in finding.what and "data.columns" in finding.cure


def test_labels_that_collide_are_told_and_do_not_stop(checked):
    rows = [{"text": word, "label": ("good day", "good night")[n % 2]} for n, word in enumerate(WORDS)]
    report = checked(rows)
    found = by_kind(report)
    assert found["labels"].severity == "error" and "both begin with the token" in found["labels"].what
    assert "data.label_scoring=sequence" in found["labels"].cure
    assert report.labels == {"good day": 8, "good night": 8}
    assert checked(rows, **{"data.label_scoring": "sequence"}).findings == []


def test_one_label_alone(checked):
    assert by_kind(checked([{"text": word, "label": "3"} for word in WORDS]))["labels"].what.startswith("All rows are answered with '3'.")


def test_rows_to_measure_on(checked):
    write("eval.jsonl", [CLEAN[2], {"prompt": "What is new?", "completion": "Nothing at all."}, {"prompt": "x", "completion": ""}])
    report = checked(CLEAN, **{"data.eval": "eval.jsonl"}, **{"data.bad_share": 0.5})
    found = by_kind(report)
    assert set(found) == {"eval_overlap", "no_answer"} and report.eval_rows == 3
    assert found["eval_overlap"].where == ("eval.jsonl:1",)
    assert found["no_answer"].what == "data.eval: 1 of 3 rows skipped: no answer."


@pytest.mark.parametrize("max_tokens, cure", [
    (10, "data.max_tokens=12 keeps 99 % of the rows whole, data.max_tokens=32 keeps all of them whole."),
    (12, "data.max_tokens=32 keeps all of them whole."),
    (None, "data.max_tokens=32 keeps all rows whole; the default keeps 99 % of them."),
])
def test_the_limit_that_would_keep_rows_whole(checked, max_tokens, cure):
    rows = [{"prompt": "1", "completion": "2" * 10}] * 300 + [{"prompt": "1", "completion": "2" * 30}] * 2  # 12 tokens, 32 tokens
    found = by_kind(checked(rows, max_tokens=max_tokens, **{"data.template": "plain"}))
    assert found["answer_cut"].cure == cure and found["answer_cut"].count == (302 if max_tokens == 10 else 2)


def test_the_models_limit(checked):
    found = by_kind(checked([*CLEAN, {"prompt": "1", "completion": "2" * 300}], max_tokens=None, **{"data.template": "plain"}))
    assert found["answer_cut"].cure == ("The model takes 256 tokens, which hold 94.1% of the rows; the longest has 302. Shorten the others, or split them.")


def test_the_report_is_the_same_whatever_the_number_of_processes(checked, monkeypatch):
    monkeypatch.setattr(checking, "PEEKED", 100)
    rows = [{"prompt": f"What is {a} {b}?", "completion": f"A {b} of {a}."} for a in WORDS for b in WORDS for _ in range(1 + (a == b))] * 3
    rows[700] = {"prompt": "1", "completion": None}
    rows[701:701] = ["{broken"]
    one, two = (checked(rows, workers=workers) for workers in (1, 2))
    same = [name for name in vars(one) if name not in ("seconds", "workers")]
    assert {name: getattr(one, name) for name in same} == {name: getattr(two, name) for name in same}
    assert (one.workers, two.workers) == (1, 2) and one.rows == len(rows) - 1


def test_the_first_rows_only(checked):
    report = checked([*CLEAN, {"prompt": "1", "completion": ""}], most=10)
    assert (report.rows, report.findings) == (10, [])


def test_no_more_is_read_than_the_processes_are_about_to_take(monkeypatch):
    ahead = []

    def chunks():
        for n in range(40):
            ahead.append(n - len(done))
            yield [n], "completion"

    done = []
    for part in checking.in_order(chunks(), echo, workers=2):
        done.append(part)
    assert [rows for rows, _ in done] == [[n] for n in range(40)] and max(ahead) <= 6


def echo(rows, format):
    return rows, format


def test_errors_end_with_2_and_warnings_if_strict(command):
    empty = write("empty.jsonl", [*CLEAN * 2, {"prompt": "1", "completion": ""}])
    assert command("--data", empty).exit_code == 0
    assert command("--data", empty, "--strict").exit_code == 2
    assert command("--data", write("broken.jsonl", [*CLEAN, "{"])).exit_code == 2
    assert isinstance(command("--data", "missing.jsonl").exception, SourceError)


def test_what_is_shown_fits_80_columns_in_chinese(command):
    rows = [{"prompt": f"请介绍{word}。", "completion": f"{word}是一种树。"} for word in WORDS] + [{"树的内容": "树", "林的内容": "是"}]
    done = command("--data", write("行.jsonl", rows), "--json", "found.json")
    assert "warning: 1 of 17 rows " in done.stdout and "树的内容" in done.stdout and "行.jsonl:17" in done.stdout
    stored = json.loads(open("found.json", encoding="utf-8").read())
    assert stored["rows"] == 17 and stored["taught"] == 16 and sum(span["rows"] for span in stored["histogram"]) == 16
    kinds = {finding["kind"]: finding for finding in stored["findings"]}
    assert kinds["foreign_columns"]["where"] == ["行.jsonl:17"] and kinds["foreign_columns"]["count"] == 1
    assert kinds["too_many_skipped"]["what"] == "1 of 17 rows (5.9%) cannot teach, and data.bad_share allows 5%." and done.exit_code == 2


def test_a_file_is_named_once_for_its_places():
    def shown(count, *where):
        return checking.places(Finding("kind", "note", "", where, "", count))

    assert shown(5, "a.jsonl:4", "a.jsonl:9", "b.jsonl:9") == "a.jsonl:4, 9, b.jsonl:9, …"
    assert shown(2, "a.json, row 4", "a.json, row 9") == "a.json, row 4, 9"
    assert shown(1, "a.bin") == "a.bin" and shown(0) == shown(9) == ""


def test_a_training_tells_briefly_and_keeps_the_report(model_folder, capsys):
    from weitiao.train.train import train

    rows = write("rows.jsonl", [*CLEAN * 2, {"prompt": "1", "completion": ""}])
    settings = read(None, ["training.steps=1", "training.batch_size=2", "training.layout=padded", "data.max_tokens=200"],
                    **{"model.name": str(model_folder), "data.train": rows, "output": "run"})
    train(settings)
    shown = capsys.readouterr().out
    assert "warning: 16 of 33 rows (48.5%) repeat an earlier one" in shown and "warning: 1 of 33 rows skipped: no answer. (rows.jsonl:33)" in shown
    assert "weitiao check" in shown
    stored = json.loads(open("run/check.json", encoding="utf-8").read())
    assert {"duplicates", "no_answer"} <= {finding["kind"] for finding in stored["findings"]}
    assert (stored["rows"], stored["taught"]) == (33, 32)


# -- real files --------------------------------------------------------------------------------------------------------


def test_a_real_bad_row(checked, shared):
    file = shared / "data/alpaca_zh/sample_with_a_bad_row.json"
    report = checked(str(file), max_tokens=None)
    found = by_kind(report)
    assert found["foreign_columns"].where == (f"{file}, row 1196",) and "指示" in found["foreign_columns"].what
    assert found["no_answer"].where == (f"{file}, row 243",)
    assert report.rows == 1517 and report.workers == 1


def test_real_long_and_broken_chats(checked, shared):
    report = checked(str(shared / "data/multi_turn/sharegpt_zh_1k.jsonl"), max_tokens=None)
    found = by_kind(report)
    assert found["ends_on_human"].count == 7 and found["ends_on_human"].where[0].endswith(":119") and "wrong_end" not in found
    assert found["empty_turn"].count == 1 and report.rows == 1000
    assert found["chat_cut"].count + found["answer_cut"].count > 500  # the tiny model takes 256 tokens


def test_real_labels_in_blocks(checked, shared):
    found = by_kind(checked(str(shared / "data/rotten_tomatoes/train.jsonl"), max_tokens=None, **{"data.labels": "['3', '4']"}))
    assert found["label_blocks"].severity == "note" and "changes of label from row to row: 1," in found["label_blocks"].what
    assert "unbalanced" not in found
