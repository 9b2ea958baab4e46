"""Rows of a stream are those of the file, cut by its first block; what is wrong with one is told before a step wants it."""

from __future__ import annotations

import copy
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from weitiao.data import cache as caching
from weitiao.data import dataset, streamed
from weitiao.data.cache import Cache
from weitiao.data.dataset import load
from weitiao.data.streamed import GivenUp, begin
from weitiao.data.survey import Facts, Survey
from weitiao.data.templates import load_template
from weitiao.errors import RowError, SettingError, SourceError
from weitiao.settings.data import DataSettings

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(50)]
BAD = {"prompt": "1", "completion": ""}
LABELS = [{"text": "1" * n, "label": "34"[n % 2]} for n in range(1, 30)]


@pytest.fixture(autouse=True)
def blocks_of_eight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caching, "LEAST_BYTES", 0)
    monkeypatch.setattr(streamed, "BLOCK", 8)
    for module in (streamed, dataset):
        monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(dataset, "FEW", 8)
    monkeypatch.setattr(dataset, "usual_workers", lambda: 1)


@pytest.fixture
def template(tokenizer):
    return load_template("plain", tokenizer)


def write(rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    Path("rows.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")


def stream(template, cache=None, task="auto", vocabulary=300, **settings):
    settings = DataSettings(**({"train": "rows.jsonl", "bad_share": 0.5, "streaming": True} | settings))
    survey = Survey(Facts.of(settings, template, vocabulary))
    return begin(cache or Cache(Path("kept"), 0), settings.train, settings, template, 200, vocabulary, 0, task, survey)


def read(template, cache=None, max_tokens=None, surveyed=False, **settings):
    settings = DataSettings(**({"train": "rows.jsonl", "bad_share": 0.5} | settings))
    survey = Survey(Facts.of(settings, template, 300)) if surveyed else None
    return (cache or Cache(Path("kept"), 0)).load(settings.train, settings, template, 200, 300, 0, max_tokens, survey=survey), survey


def plain(rows, count):
    """All that a step takes of rows."""
    return [(row.where, row.conversation, [(e.ids.tolist(), e.weights.tolist()) for e in row.examples]) for row in (rows[i] for i in range(count))]


@pytest.mark.parametrize("rows, settings", [
    (ROWS, {}), (ROWS + [BAD] + ROWS[:3], {"max_tokens": 17}), ([BAD] * 3 + ROWS + [BAD] * 9 + ROWS, {}), (ROWS[:5], {}),
    (LABELS, {"labels": {"3": "3", "4": "4"}, "max_tokens": 14}),
])
def test_its_rows_are_those_of_the_file_cut_by_the_first_block(template, rows, settings):
    write(rows)
    first, all_rows = stream(template, **settings)
    whole, _ = read(template, **settings | {"max_tokens": first.max_tokens})
    heard = []
    with all_rows.encoding_beside(heard.append):
        assert all_rows.wait(10**9) == len(whole)
    assert plain(all_rows, len(whole)) == plain(whole.rows, len(whole))
    assert plain(first.rows, len(first)) == plain(whole.rows, len(first))
    assert all_rows.skipped == whole.skipped and len(heard) == 1 and f"All {len(rows)} rows are encoded: {len(whole)} can teach." in heard[0]
    assert all_rows.digest(len(whole)) == whole.fingerprint()
    assert all_rows.digest(9 % len(whole)) == whole.rows.of(slice(9 % len(whole))).digest()


def test_what_wants_all_rows_is_told_from_the_first_block(template):
    write(ROWS[:8] + [{"prompt": "long " * 20, "completion": "It is."}] * 30)
    first, all_rows = stream(template, bad_share=0.4)
    assert len(first) == 8 and first.max_tokens == max(len(e) for row in first.rows for e in row.examples)
    with all_rows.encoding_beside(lambda text: None), pytest.raises(RowError) as told:
        all_rows.wait(10**9)
    assert "8 of 16 rows cannot teach" in told.value.found and "cut away" in told.value.found
    assert told.value.next_step.startswith(f"The longest row in force, {first.max_tokens} tokens, is told from the first 8 rows: give data.max_tokens.")


def test_rows_are_there_before_all_are_encoded_and_no_more_are_asked_for_behind_the_end(template, monkeypatch):
    write(ROWS * 4)
    first, all_rows = stream(template)
    assert all_rows.wait(8) == 8 and not all_rows.ended  # nobody encodes yet
    gate, parts = threading.Event(), all_rows.encoding.parts

    def slow():
        for number, part in enumerate(parts):
            if number == 4:
                gate.wait()
            yield part

    object.__setattr__(all_rows.encoding, "parts", slow())
    with all_rows.encoding_beside(lambda text: None):
        assert all_rows.wait(24) == 24 and all_rows.starts[-1] == 24 and not all_rows.ended
        threading.Timer(0.05, all_rows.give_up).start()
        with pytest.raises(GivenUp):
            all_rows.wait(25)
        assert all_rows.wait(24) == 24
        gate.set()
    assert not all_rows.whole and all_rows.ended and all_rows.read < 200


@pytest.mark.parametrize("wrong, said", [
    (["{"], "rows.jsonl:31, column 2, is not JSON"), ([BAD] * 3, "2 of 32 rows cannot teach"), ([{"prompt": "a", "completion": "b", "weight": "x"}], "weight"),
])
def test_what_is_wrong_with_a_row_is_told_to_who_asks_for_rows_behind_it_and_to_nobody_before(template, wrong, said):
    write([row | {"weight": 1.0} for row in ROWS[:30]] + wrong + [row | {"weight": 1.0} for row in ROWS[30:31]])
    _, all_rows = stream(template, bad_share=0.05, weight_column="weight")
    heard = []
    with all_rows.encoding_beside(heard.append):
        with pytest.raises(RowError, match=said):
            all_rows.wait(25)
        assert all_rows.wait(24) == 24 and len(plain(all_rows, 24)) == 24
    assert not heard


def test_a_bad_first_block_is_refused_as_ever(template):
    write([BAD] * 8 + ROWS)
    with pytest.raises(RowError, match="Nothing can be learned from any of the 8 rows"):
        stream(template)


def test_a_full_disk_is_told_to_who_waits(template, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    write(ROWS)
    _, all_rows = stream(template)
    monkeypatch.setattr(streamed.Spill, "put", full)
    with all_rows.encoding_beside(lambda text: None), pytest.raises(SourceError, match="No space left on device"):
        all_rows.wait(9)


def test_a_cache_that_cannot_be_written_is_told_and_the_rows_are_there(template, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    write(ROWS)
    told = []
    _, all_rows = stream(template, Cache(Path("kept"), 10**9, told.append))
    monkeypatch.setattr(Cache, "_staging", full)
    with all_rows.encoding_beside(lambda text: None):
        assert all_rows.wait(10**9) == len(ROWS)
    assert len(told) == 1 and "cannot be kept" in told[0] and "No space left on device" in told[0]


@pytest.mark.parametrize("where", ["files", "the last cut"])
def test_a_disk_that_is_full_for_the_cache_alone_ends_no_training(template, monkeypatch, where):
    def full(*args):
        raise OSError(28, "No space left on device")

    write(ONE_LONGER)
    told, add, datasets = [], streamed.Gathered.add, dataset.Encoding.datasets
    _, all_rows = stream(template, Cache(Path("kept"), 10**9, told.append))
    if where == "files":
        monkeypatch.setattr(streamed.Gathered, "add", lambda self, part: full() if self.folder and self.rows else add(self, part))
    else:
        monkeypatch.setattr(dataset.Encoding, "datasets", lambda self, read, *limits: full() if len(limits) > 1 else datasets(self, read, *limits))
    put = streamed.Spill.put
    monkeypatch.setattr(streamed.Spill, "put", lambda *args: spilled.append([*Path("kept").glob("*.partial-*")]) or put(*args))
    spilled = []
    with all_rows.encoding_beside(lambda text: None):
        assert all_rows.wait(10**9) == len(ROWS)
    assert all_rows.whole and not all_rows.error and len(told) == 1 and "cannot be kept for the next run" in told[0]
    assert bool(spilled[-1]) == (where != "files")  # what was gathered makes room for the rows to come


def test_an_id_outside_the_embedding_behind_its_cut_ends_no_training(template):
    write([*ROWS, *[{"prompt": "What is 1?", "completion": "It is 2." + "1" * 60 + "Ω"}] * 20])
    told, tokenizer, outside = [], copy.deepcopy(template.tokenizer), len(template.tokenizer)
    tokenizer.add_tokens(["Ω"])
    _, all_rows = stream(load_template("plain", tokenizer), Cache(Path("kept"), 10**9, told.append), vocabulary=outside)
    with all_rows.encoding_beside(lambda text: None):
        assert all_rows.wait(10**9) == 70
    assert len(told) == 1 and f"token id {outside} is outside the model's embedding" in told[0]


def test_all_rows_are_there_before_they_are_kept(template, monkeypatch):
    write(ROWS)
    asked_for, keep = threading.Event(), Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda *args: asked_for.wait(5) and keep(*args))
    _, all_rows = stream(template, Cache(Path("kept"), 10**9))
    with all_rows.encoding_beside(lambda text: None):
        assert all_rows.wait(10**9) == len(ROWS) and all_rows.whole and not all_rows.ended
        asked_for.set()
    assert list(Path("kept").glob("*/facts"))


def test_labels_are_known_before_or_refused(template):
    write(LABELS)
    with pytest.raises(SettingError, match="data.labels"):
        stream(template)
    with pytest.raises(SettingError, match="data.labels"):
        stream(template, task="classify")
    first, _ = stream(template, labels={"3": "3", "4": "4"})
    assert first.labels.words == ("3", "4")
    assert stream(template, task="answer")[0].labels is None


# ------------------------------------------------------------------------------------------------ the cache


def encoded(template, cache, **settings):
    first, all_rows = stream(template, cache, **settings)
    with all_rows.encoding_beside(lambda text: None):
        count = all_rows.wait(10**9)
    return first, all_rows, plain(all_rows, count)


@pytest.fixture
def made(monkeypatch):
    """How often an ordinary run encoded rows."""
    calls = []
    monkeypatch.setattr(caching, "load", lambda *args, **more: calls.append(args) or load(*args, **more))
    return calls


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 17}])
def test_what_it_leaves_in_the_cache_is_what_an_ordinary_run_would(template, made, settings):
    write(ROWS + [BAD] + ROWS[:7])
    cache = Cache(Path("kept"), 10**9)
    encoded(template, cache, **settings)
    kept, noted = read(template, cache, surveyed=True, **settings)
    assert not made
    whole, survey = read(template, surveyed=True, **settings)
    assert kept.fingerprint() == whole.fingerprint() and kept.skipped == whole.skipped and kept.max_tokens == whole.max_tokens
    told = [one.findings(one.lengths(200, None), "") for one in (noted, survey)]
    assert told[0] == told[1] and told[0]


ONE_LONGER = [*ROWS, {"prompt": "7" * 50, "completion": "7" * 30}, BAD]
MANY_LONGER = [{"text": "1" * n, "label": "34"[n % 2]} for n in range(5, 45)]


@pytest.mark.parametrize("rows, settings", [
    (ROWS + [BAD], {"max_tokens": 30}), (ONE_LONGER, {}), (MANY_LONGER, {"labels": {"3": "3", "4": "4"}}), ([ONE_LONGER[-2], *ROWS * 4], {}),
])
def test_it_takes_from_the_cache_what_is_there_and_gives_the_same_rows(template, made, rows, settings, monkeypatch):
    write(rows)
    cache = Cache(Path("kept"), 10**9)
    first, all_rows, before = encoded(template, cache, **settings)
    monkeypatch.setattr(streamed.Streamed, "_take_rest", lambda self: pytest.fail("encoded again"))
    _, found, after = encoded(template, cache, **settings)
    assert after == before and found.skipped == all_rows.skipped and found.max_tokens == all_rows.max_tokens
    assert np.diff(found.starts).tolist() == [len(first), len(before) - len(first)]
    assert plain(read(template, cache, **settings | {"max_tokens": first.max_tokens})[0].rows, len(before)) == before
    kept, whole = read(template, cache, **settings)[0], read(template, **settings)[0]
    assert kept.fingerprint() == whole.fingerprint() and kept.cut == whole.cut and len(made) == 1
    assert (whole.max_tokens != first.max_tokens) == ("max_tokens" not in settings)


def test_it_adds_its_cut_to_what_an_ordinary_run_left_there(template, made, monkeypatch):
    write(ONE_LONGER)
    cache = Cache(Path("kept"), 10**9)
    whole, _ = read(template, cache, surveyed=True)
    before = encoded(template, cache)[2]
    assert read(template, cache, surveyed=True)[0].fingerprint() == whole.fingerprint() and len(made) == 1
    monkeypatch.setattr(streamed.Streamed, "_take_rest", lambda self: pytest.fail("encoded again"))
    assert encoded(template, cache)[2] == before


def test_rows_that_are_found_cut_elsewhere_are_refused_as_if_they_were_made(template):
    write([{"prompt": "7" * 60, "completion": "7"}, *ROWS * 4])  # the usual length leaves the one row no answer
    cache = Cache(Path("kept"), 10**9)
    encoded(template, cache, bad_share=0)
    for here in (cache, Cache(Path("kept"), 0)):
        with pytest.raises(RowError, match="1 of 201 rows cannot teach"):
            read(template, here, bad_share=0)


def test_what_is_told_of_the_rows_is_the_same_from_the_cache(template, monkeypatch):
    write([row | {"weight": n % 3} for n, row in enumerate(ROWS)] + [BAD | {"weight": 1}, {"prompt": "long " * 20, "completion": "1", "weight": 1}])
    cache = Cache(Path("kept"), 10**9)
    told = encoded(template, cache, max_tokens=30, weight_column="weight")[1].told()
    monkeypatch.setattr(streamed.Streamed, "_take_rest", lambda self: pytest.fail("encoded again"))
    assert encoded(template, cache, max_tokens=30, weight_column="weight")[1].told() == told
    assert told.startswith("All 52 rows are encoded: 33 can teach. Skipped:\n  1 row")


def test_an_end_before_the_end_leaves_nothing_in_the_cache(template):
    write(ROWS)
    _, all_rows = stream(template, Cache(Path("kept"), 10**9))
    all_rows.stopped = True
    all_rows._encode(lambda text: None)
    assert all_rows.ended and not all_rows.whole and not [p for p in Path("kept").iterdir() if p.suffix != ".lock"]


def test_several_processes_encode_them_in_order(template, monkeypatch):
    monkeypatch.setattr(dataset, "usual_workers", lambda: 3)
    write(ROWS * 3)
    assert encoded(template, None, max_tokens=30)[2] == plain(read(template, max_tokens=30)[0].rows, 150)


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_file_that_is_replaced_behind_the_first_block_mixes_no_rows_and_leaves_none(template, made, is_kept):
    write(ROWS)
    os.rename("rows.jsonl", "old.jsonl")
    write([row | {"completion": "9" * len(row["completion"])} for row in ROWS])
    cache, alone = Cache(Path("kept"), 10**9), Cache(Path("alone"), 0)
    new = read(template, alone, max_tokens=40)[0].fingerprint()
    if is_kept:
        read(template, cache, max_tokens=40)
    os.rename("rows.jsonl", "new.jsonl"), os.rename("old.jsonl", "rows.jsonl")
    old = read(template, alone, max_tokens=40)[0]
    _, all_rows = stream(template, cache, max_tokens=40)
    os.replace("new.jsonl", "rows.jsonl")
    with all_rows.encoding_beside(lambda text: None):
        assert plain(all_rows, all_rows.wait(10**9)) == plain(old.rows, len(old))
    assert read(template, cache, max_tokens=40)[0].fingerprint() == new


def test_a_cut_that_is_found_without_a_row_is_refused_as_if_it_were_made(template):
    write([{"prompt": "7" * 60, "completion": "7", "weight": 1}, *[row | {"weight": 0} for row in ROWS * 3]])
    cache = Cache(Path("kept"), 10**9)
    encoded(template, cache, weight_column="weight")
    for here in (cache, Cache(Path("kept"), 0)):
        with pytest.raises(RowError, match="each has a weight of 0"):
            read(template, here, weight_column="weight")


def test_a_cut_for_which_there_is_no_room_is_left_out_and_not_written_again(template, made):
    write([ROWS[-1], *ONE_LONGER])
    roomy = Cache(Path("roomy"), 10**9)
    read(template, roomy, surveyed=True)
    size = sum(file.stat().st_size for file in Path("roomy").glob("*/*") if file.name != "facts")
    told = []
    cache = Cache(Path("kept"), size + 500, told.append)
    whole = encoded(template, cache)[2]
    assert read(template, cache, surveyed=True)[0].fingerprint() == read(template, roomy)[0].fingerprint() and len(made) == 1
    (facts,) = Path("kept").glob("*/facts")
    kept = facts.stat().st_ino
    assert encoded(template, cache)[2] == whole and facts.stat().st_ino == kept and not told


def test_a_lock_is_left_where_nothing_can_be_gathered(template, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    write(ROWS)
    cache = Cache(Path("kept"), 10**9)
    _, all_rows = stream(template, cache)
    cache.place()
    monkeypatch.setattr(Cache, "_staging", full)
    with cache.beside(all_rows.asked) as staging, FileLock(cache._lock(all_rows.asked.key), timeout=0):
        assert staging is None
