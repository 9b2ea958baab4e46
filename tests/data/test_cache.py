"""A second run finds its rows as the first one made them; whatever would change them, or has torn them, makes them anew."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from weitiao.data import cache as caching
from weitiao.data import dataset
from weitiao.data.cache import Cache
from weitiao.data.survey import Facts, Survey
from weitiao.data.templates import Template, load_template
from weitiao.errors import RowError
from weitiao.settings.data import DataSettings

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(40)]
DEFECTS = [{"prompt": "1", "completion": ""}, ROWS[3], {"prompt": "7" * 60, "completion": "8" * 40}]
CHAT = [{"messages": [{"role": ("user", "assistant")[i % 2], "content": f"{n} {i}"} for i in range(2 * n + 2)]} for n in range(6)]
LABELS = [{"text": "1" * n, "label": "34"[n % 2]} for n in range(1, 30)]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caching, "LEAST_BYTES", 0)


@pytest.fixture
def made(monkeypatch):
    """How often rows were encoded."""
    calls = []
    monkeypatch.setattr(caching, "load", lambda *args, **more: calls.append(args) or dataset.load(*args, **more))
    return calls


@pytest.fixture
def template(tokenizer):
    return load_template("plain", tokenizer)


def write(rows, name="rows.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return name


def read(cache, template, surveyed=True, limit=200, seed=0, vocabulary=300, task="auto", max_tokens=None, **settings):
    settings = DataSettings(**({"train": "rows.jsonl", "bad_share": 0.5} | settings))
    survey = Survey(Facts.of(settings, template, 300)) if surveyed else None
    data = cache.load(settings.train, settings, template, limit, vocabulary, seed, max_tokens, task=task, survey=survey)
    return data, survey


def told(data, survey, limit=200):
    """All that is known of rows."""
    rows = [(row.where, row.conversation, [(e.ids.tolist(), e.weights.tolist(), e.row) for e in row.examples]) for row in data.rows]
    facts = (data.fingerprint(), data.tokens, data.learned_tokens, data.max_tokens, data.cut, data.skipped, data.labels and data.labels.as_dict())
    halves = [half.fingerprint() for half in data.split(0.3, 7)]
    noted = survey.findings(survey.lengths(limit, None, data.labels), "") if survey is not None else []
    return rows, facts, halves, noted


@pytest.mark.parametrize("rows, settings", [
    (ROWS + DEFECTS, {}), (ROWS + DEFECTS, {"max_tokens": 40}), (CHAT, {"max_tokens": 12}), (LABELS, {}), (LABELS, {"max_tokens": 14}),
    (ROWS, {"system": "Be short."}),
])
def test_what_is_found_is_what_was_made_and_what_is_made_without(made, template, rows, settings):
    write(rows)
    cache = Cache(Path("kept"), 10**9)
    without = told(*read(Cache(Path("kept"), 0), template, **settings))
    first, second = (told(*read(cache, template, **settings)) for _ in range(2))
    assert without == first == second
    assert len(made) == 2
    assert without[3] or rows in (CHAT, LABELS)


def test_a_run_that_goes_on_finds_them_by_what_was_settled_and_by_other_names(made, template, tmp_path):
    write(ROWS + DEFECTS)
    cache = Cache(Path("kept").absolute(), 10**9)
    first, noted = read(cache, template)
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    again, found = read(cache, template, train=str(tmp_path / "rows.jsonl"), max_tokens=first.max_tokens, task="answer")
    assert len(made) == 1 and again.fingerprint() == first.fingerprint()
    assert [row.where for row in again.rows] == [str(tmp_path / row.where) for row in first.rows]
    assert [one.where for one in again.skipped] == [str(tmp_path / "rows.jsonl:41")]
    places = [place for finding in found.findings(found.lengths(200, None), "") for place in finding.where]
    assert places and all(place.startswith(f"{tmp_path}/rows.jsonl:") for place in places)


def changed_file(settings, template):
    write([*ROWS[:-1], ROWS[0]])
    return settings, template


def another_setting(settings, template):
    return settings | {"system": "1"}, template


def another_limit(settings, template):
    return settings | {"limit": 30}, template


def another_longest_row(settings, template):
    return settings | {"max_tokens": 20}, template


def another_template(settings, template):
    return settings, load_template("alpaca", template.tokenizer)


def another_stop_token(settings, template):
    return settings, Template(template.tokenizer, template.name, template.source, 3, template.begins_with_bos)


def another_tokenizer(settings, template):
    import copy

    tokenizer = copy.deepcopy(template.tokenizer)
    tokenizer.add_tokens(["What"])
    return settings | {"vocabulary": 310}, load_template("plain", tokenizer)


def another_version(settings, template):
    return settings, template


@pytest.mark.parametrize("change", [
    changed_file, another_setting, another_limit, another_longest_row, another_template, another_stop_token, another_tokenizer, another_version,
])
def test_whatever_decides_the_ids_is_told_apart(made, template, change, monkeypatch):
    write(ROWS)
    cache = Cache(Path("kept"), 10**9)
    read(cache, template)
    if change is another_version:
        monkeypatch.setattr(caching, "_of_code", lambda: "another")
    settings, template = change({}, template)
    found, _ = read(cache, template, **settings)
    plain, _ = read(Cache(Path("kept"), 0), template, **settings)
    assert len(made) == 3 and found.fingerprint() == plain.fingerprint()


def test_shares_depend_on_the_seed_and_rows_in_order_do_not(made, template):
    write(ROWS), write(CHAT, "chat.jsonl")
    cache = Cache(Path("kept"), 10**9)
    read(cache, template, seed=0), read(cache, template, seed=1)
    assert len(made) == 1
    mixed = [{"path": "rows.jsonl", "share": 1}, {"path": "chat.jsonl", "share": 2}]
    one, two, three = (read(cache, template, train=mixed, seed=seed)[0] for seed in (0, 1, 0))
    assert len(made) == 3 and one.fingerprint() == three.fingerprint() != two.fingerprint()
    assert [row.where for row in one.rows] == [row.where for row in three.rows]


def test_rows_that_are_kept_without_notes_are_read_again_for_them(made, template):
    write(ROWS)
    cache = Cache(Path("kept"), 10**9)
    read(cache, template, surveyed=False)
    _, survey = read(cache, template)
    assert len(made) == 2 and survey.rows == len(ROWS)
    read(cache, template, surveyed=False)
    assert len(made) == 2


def entry() -> Path:
    (facts,) = Path("kept").glob("*/facts")
    return facts.parent


def cut_short(file: Path):
    os.truncate(file, file.stat().st_size - 1)


def one_byte_changed(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["ids", "weight", "said", "survey-line", "facts"])
@pytest.mark.parametrize("tear", [cut_short, one_byte_changed, Path.unlink])
def test_what_is_torn_is_made_anew(made, template, name, tear):
    write(ROWS + DEFECTS)
    cache = Cache(Path("kept"), 10**9)
    first = told(*read(cache, template))
    tear(entry() / name)
    assert told(*read(cache, template)) == first and len(made) == 2
    assert told(*read(cache, template)) == first and len(made) == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(template, monkeypatch):
    write(ROWS)

    def load(*args, **more):
        data = dataset.load(*args, **more)
        write(CHAT)
        return data

    monkeypatch.setattr(caching, "load", load)
    read(Cache(Path("kept"), 10**9), template)
    assert not list(Path("kept").glob("*/facts")) and not list(Path("kept").glob("*.partial-*"))


def test_what_a_killed_process_left_half_written_goes_and_what_another_is_writing_stays(template):
    write(ROWS)
    left, being_written = (Path("kept", f"{key}.partial-1") for key in ("left", "written"))
    for folder in (left, being_written):
        folder.mkdir(parents=True)
        (folder / "ids").write_bytes(b"1")
    cache = Cache(Path("kept"), 10**9)
    with FileLock(cache._lock(being_written.name)):
        read(cache, template)
    assert not left.exists() and (being_written / "ids").exists() and entry()


def test_what_a_killed_process_left_is_cleared_where_it_can_be_and_no_lock_is_held_meanwhile(template, monkeypatch):
    write(ROWS)
    Path("kept/ba.lock").mkdir(parents=True)  # cannot be opened as a lock
    Path("kept/bad.partial-1").mkdir()
    Path("kept/left.partial-1").mkdir()
    Path("kept/same.partial-1").write_text("key 1")
    cache, gone, remove = Cache(Path("kept"), 10**9), [], shutil.rmtree

    def with_its_lock_free(folder, **how):
        with FileLock(cache._lock("left"), timeout=0):
            gone.append(folder)
            remove(folder, **how)

    monkeypatch.setattr(shutil, "rmtree", with_its_lock_free)
    read(cache, template)
    assert gone and entry()
    assert [one.name for one in Path("kept").glob("*.partial-*")] == ["bad.partial-1"]


@pytest.mark.parametrize("torn", [b"", b"\xff 1", b"key", b"key one"])
def test_a_torn_note_of_the_same_rows_is_made_anew(made, template, torn):
    write(ROWS)
    cache = Cache(Path("kept"), 10**9)
    first, _ = read(cache, template)
    stray = Path("kept", "stray.same")
    for file in (*Path("kept").glob("*.same"), stray):
        file.write_bytes(torn)
    again, _ = read(cache, template, max_tokens=first.max_tokens)
    assert len(made) == 2 and again.fingerprint() == first.fingerprint() and not stray.exists() and list(Path("kept").glob("*/facts"))
    read(cache, template, max_tokens=first.max_tokens)
    assert len(made) == 2


def test_those_not_used_for_longest_go_first(made, template):
    for name in "abc":
        write(ROWS + [{"prompt": name, "completion": name}], f"{name}.jsonl")
    roomy = Cache(Path("kept"), 10**9)
    read(roomy, template, train="a.jsonl")
    size = sum(file.stat().st_size for file in entry().iterdir())
    read(roomy, template, train="b.jsonl")
    for i, facts in enumerate(Path("kept").glob("*/facts")):
        os.utime(facts, (i, i))
    read(roomy, template, train="a.jsonl")  # used again
    read(Cache(Path("kept"), int(2.5 * size)), template, train="c.jsonl")
    assert len(made) == 3 and len(list(Path("kept").glob("*/facts"))) == 2
    read(roomy, template, train="a.jsonl"), read(roomy, template, train="c.jsonl")
    assert len(made) == 3
    read(roomy, template, train="b.jsonl")
    assert len(made) == 4


def test_rows_too_many_to_be_kept_are_used_all_the_same(template):
    write(ROWS)
    said = []
    data, survey = read(Cache(Path("kept"), 10, said.append), template)
    assert told(data, survey) == told(*read(Cache(Path("kept"), 0), template))
    assert len(said) == 1 and "data.cache_gb" in said[0] and not list(Path("kept").glob("*/"))


def test_a_folder_that_cannot_be_written_keeps_no_run_from_its_rows(template):
    write(ROWS)
    Path("kept").write_text("no folder")
    said = []
    data, _ = read(Cache(Path("kept"), 10**9, said.append), template)
    assert len(data) == len(ROWS) and said[0].startswith("Encoded rows cannot be kept for the next run:")


def test_a_date_in_the_template_and_few_rows_are_not_kept(template, monkeypatch):
    write(ROWS)
    dated = Template(template.tokenizer, "dated", template.source + "{# strftime_now #}", template.stop_id, template.begins_with_bos)
    read(Cache(Path("kept"), 10**9), dated)
    monkeypatch.setattr(caching, "LEAST_BYTES", 1 << 20)
    read(Cache(Path("kept"), 10**9), template)
    assert not Path("kept").exists()


def test_refused_rows_are_refused_again_and_leave_nothing(template):
    write([{"prompt": "1", "completion": ""}] * 3)
    for _ in range(2):
        with pytest.raises(RowError, match="Nothing can be learned"):
            read(Cache(Path("kept"), 10**9), template)
    assert not list(Path("kept").glob("*/"))


def test_rows_that_are_found_are_held_against_the_embedding_too(template):
    write(ROWS)
    cache = Cache(Path("kept"), 10**9)
    read(cache, template)
    with pytest.raises(RowError, match="outside the model's embedding of 10 rows"):
        read(cache, template, vocabulary=10)
