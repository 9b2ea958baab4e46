"""What the name of a source, or a short file, gives away."""

from __future__ import annotations

import json

import pytest

from weitiao.data import glance as module
from weitiao.data.glance import glance
from weitiao.errors import RowError, SourceError
from weitiao.settings.data import DataSettings, Source

GOOD, STRANGE = {"prompt": "a", "completion": "b"}, {"a": "b"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def look(*rows, read=True, name="rows.jsonl", **settings):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    glance(Source(path=name), DataSettings(train=name, **settings), read)


def test_rows_that_can_be_read_say_nothing():
    look(STRANGE, GOOD)  # one of unknown columns may stand before others
    look({"q": "a", "r": "b"}, columns={"prompt": "q", "completion": "r"})
    glance(Source(path="hub:owner/rows"), DataSettings(train="hub:owner/rows"), True)


@pytest.mark.parametrize("rows, told", [((GOOD, "{"), "rows.jsonl:2, column 2, is not JSON"), ((), "holds no rows"), ((STRANGE,), "has the columns a")])
def test_rows_that_cannot_are_told_where_they_are_read(rows, told):
    with pytest.raises(RowError, match=told):
        look(*rows)
    look(*rows, read=False)


def test_columns_whose_names_say_what_they_are_come_with_their_cure():
    with pytest.raises(RowError) as told:
        look({"问题": "a", "答案": "b"})
    assert told.value.next_step == "Say which is which: data.columns='{question: 问题, answer: 答案}'; or rename them in the file."


def test_a_long_file_is_left_to_those_who_read_it(monkeypatch):
    monkeypatch.setattr(module, "SHORT", 10)
    look(STRANGE, "{", STRANGE)


def test_what_is_packed_or_a_pipe_is_left_to_them_too():
    import gzip
    import os

    with gzip.open("rows.jsonl.gz", "wt") as file:
        file.write("{")
    os.mkfifo("rows.jsonl")
    for name in ("rows.jsonl.gz", "rows.jsonl"):
        glance(Source(path=name), DataSettings(train=name), True)


@pytest.mark.parametrize("read", [True, False])
def test_a_source_that_is_not_there(read):
    with pytest.raises(SourceError, match="no such file"):
        glance(Source(path="nowhere.jsonl"), DataSettings(train="nowhere.jsonl"), read)
