"""A path stands for a file, or for a folder's files of one split; one that is not there is told with the nearest."""

import json

import pytest
from sources import A, B, fields, in_an_empty_folder, lines, refusal, write  # noqa: F401

from weitiao.data.rows import read_rows
from weitiao.errors import SourceError


def test_a_folder_is_read_in_name_order():
    write("rows/b.jsonl", lines(B))
    write("rows/a.json", json.dumps([A]))
    write("rows/README.md", "not rows")
    write("rows/dataset_infos.json", "{}")
    assert [(row.fields, row.where) for row in read_rows("rows/")] == [
        (A, "rows/a.json, row 1"),
        (B, "rows/b.jsonl:1"),
    ]


def test_a_folder_whose_file_names_say_splits_does_not_train_on_its_test():
    write("rows/data/train-00000-of-00001.jsonl", lines(A))
    write("rows/data/test-00000-of-00001.jsonl", lines(B))
    assert fields("rows") == [A]
    assert fields("rows", split="test") == [B]
    assert refusal(SourceError, "rows", split="validation") == (
        "rows has no split 'validation'.\nThere: test, train.\nName one of those."
    )


@pytest.mark.parametrize("asked", ["validation", "dev", "val"])
def test_the_words_for_validation_are_one(asked):
    write("rows/my_dev.jsonl", lines(B))
    write("rows/more.jsonl", lines(A))
    assert fields("rows", split=asked) == [B]
    assert fields("rows") == [A]


def test_a_folder_without_rows_is_refused():
    write("rows/notes.md", "none")
    message = refusal(SourceError, "rows")
    assert message.startswith("rows: a folder without files of rows.") and ".jsonl" in message


def test_a_missing_file_comes_at_once_with_the_nearest_one_there():
    write("data/train.jsonl", lines(A))
    write("data/notes.md", "")
    with pytest.raises(SourceError) as caught:
        read_rows("data/trian.jsonl")  # before the first row is asked for
    assert str(caught.value) == (
        "data/trian.jsonl: no such file or folder.\nThe folder holds: train.jsonl.\nDid you mean 'train.jsonl'?"
    )


def test_of_what_is_there_some_are_named_and_only_what_is_like_it_is_meant():
    for n in range(9):
        write(f"data/part{n}.jsonl", lines(A))
    write("data/notes/a.md", "")
    write("data/reviews/train.csv", "a,b")
    with pytest.raises(SourceError) as caught:
        read_rows("data/other.jsonl")  # .jsonl is no likeness
    told = str(caught.value)
    assert "holds: notes, part0.jsonl" in told and "part6.jsonl, …." in told and "Check the path." in told and "mean" not in told
    with pytest.raises(SourceError, match=r"The folder holds: .*\nDid you mean 'reviews'"):
        read_rows("data/review")
    with pytest.raises(SourceError, match="Did you mean 'part0.jsonl'"):
        read_rows("data/part0.json")


def test_a_missing_folder_is_told():
    assert "nor is there a folder nowhere" in refusal(SourceError, "nowhere/rows.jsonl")


def test_a_web_address_is_told_to_be_downloaded():
    assert "Download it" in refusal(SourceError, "https://example.org/rows.jsonl")


def test_a_file_of_unknown_kind_is_told_the_known_ones():
    write("rows.xlsx", b"PK")
    message = refusal(SourceError, "rows.xlsx")
    assert message.startswith("rows.xlsx: the name does not say what kind") and ".parquet" in message
    assert "CSV UTF-8" in message
