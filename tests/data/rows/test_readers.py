"""Rows leave a file as they stand in it, and a defect is told with its place and its cure."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from sources import A, B, fields, in_an_empty_folder, lines, refusal, write  # noqa: F401

from weitiao.data.rows import read_rows
from weitiao.data.rows.row import Row
from weitiao.errors import RowError, SourceError

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


# -- JSON lines --------------------------------------------------------------------------------------------------------


def test_jsonl_gives_rows_with_their_physical_lines():
    write("rows.jsonl", "\ufeff" + lines(A) + "\n  \n" + lines(B))
    assert list(read_rows("rows.jsonl")) == [Row(A, "rows.jsonl", 1), Row(B, "rows.jsonl", 4)]


def test_jsonl_needs_no_last_line_end_and_takes_windows_ones():
    write("rows.jsonl", lines(A, B).replace("\n", "\r\n").rstrip())
    assert fields("rows.jsonl") == [A, B]


def test_rows_before_a_broken_line_are_given_so_it_is_streamed():
    write("rows.jsonl", lines(A) + "{broken\n")
    rows = read_rows("rows.jsonl")
    assert next(rows).fields == A
    with pytest.raises(RowError):
        next(rows)


@pytest.mark.parametrize("broken, reason", [
    ('{"a": "b\tc"}', "a tab, a line end or the like inside a text"), ('{"a": "b}', "a text that is not closed"), ('{"a": None}', "no value of JSON stands here"),
    ('{"a": "b" "c": "d"}', "a comma or a closing bracket is missing"), ('{"a" "b"}', "a colon is missing"), ('{"a": "b",}', "a name in double quotes is missing"),
    ('{"a": "b"} {}', "there is more behind its end"), (r'{"a": "\d"}', "a backslash that must be written twice"), (r'{"a": "\u12"}', "a \\u without its four digits"),
])
def test_what_is_wrong_with_a_line_is_told_in_the_files_own_words(broken, reason):
    write("rows.jsonl", lines(A) + broken + "\n")
    told = refusal(RowError, "rows.jsonl")
    assert told.startswith("rows.jsonl:2, column ") and reason in told or sys.version_info >= (3, 13) and "a comma after the last item" in told


def test_a_broken_line_is_named_with_place_excerpt_reason_and_cure():
    write("rows.jsonl", lines(A) + "{'text': 'single quotes'}\n")
    assert refusal(RowError, "rows.jsonl") == (
        "rows.jsonl:2, column 2, is not JSON (a name in double quotes is missing): "
        "{'text': 'single quotes'}\n"
        "Expected JSON: double quotes around names and text, no comma after the last item.\n"
        "Mend or remove this row."
    )


def test_a_long_broken_line_is_shown_around_the_break():
    write("rows.jsonl", '{"text": "' + "x" * 500 + '" "label": 1, "more": "' + "y" * 500 + '"}\n')
    message = refusal(RowError, "rows.jsonl")
    assert "rows.jsonl:1, column 513," in message
    assert 'xxx" "label": 1, "more"' in message and "…" in message and len(message) < 350


def test_a_number_too_long_for_python_is_a_broken_row_too():
    write("rows.jsonl", '{"n": ' + "1" * 5000 + "}\n")
    assert "rows.jsonl:1, column 1, is not JSON (Exceeds the limit" in refusal(RowError, "rows.jsonl")


@pytest.mark.parametrize(
    "line, what", [('["a", "b"]', "a list"), ('"a"', "a string"), ("3", "a number"), ("null", "null"), ("true", "true")]
)
def test_a_line_that_is_no_object_is_named(line, what):
    write("rows.jsonl", lines(A) + line + "\n")
    message = refusal(RowError, "rows.jsonl")
    assert message.startswith(f"rows.jsonl:2 is {what}") and line in message
    assert "Expected an object with named fields" in message and "Give the values names" in message


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_named_jsonl_is_told_its_right_name(indent):
    write("rows.jsonl", json.dumps([A, B], indent=indent))
    assert "If the whole file is one JSON list, let its name end in .json." in refusal(RowError, "rows.jsonl")


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        [A, B],
        {"data": [A, B]},
        {"version": 1, "tags": ["x"], "data": [A, B]},
        {"text": [A["text"], B["text"]], "label": [0, 1]},
    ],
    ids=["list", "list in an object", "list beside others", "columns"],
)
def test_json_gives_rows_with_their_numbers(content):
    write("rows.json", "\ufeff" + json.dumps(content, indent=2))
    assert list(read_rows("rows.json")) == [Row(A, "rows.json", 1), Row(B, "rows.json", 2)]


def test_columns_whose_cells_are_objects_are_columns():
    write("rows.json", json.dumps({"text": ["a", "b"], "meta": [{"n": 1}, {"n": 2}]}))
    assert fields("rows.json") == [{"text": "a", "meta": {"n": 1}}, {"text": "b", "meta": {"n": 2}}]


@pytest.mark.parametrize("tail", ["", "\n\n"])
def test_json_lines_under_the_name_json_are_read_as_such(tail):
    write("rows.json", lines(A) + tail + lines(B))
    assert [(row.fields, row.where) for row in read_rows("rows.json")] == [
        (A, "rows.json, row 1"),
        (B, "rows.json, row 2"),
    ]


def test_a_break_in_json_lines_under_the_name_json_is_told_by_line():
    write("rows.json", lines(A) + "\n{,\n")
    assert "rows.json:3, column 2, is not JSON" in refusal(RowError, "rows.json")


def test_broken_json_is_named_with_line_column_and_excerpt():
    write("rows.json", '[\n  {"text": "a"},\n  {"text": "b",}\n]')
    message = refusal(RowError, "rows.json")
    assert message.startswith("rows.json:3, column ") and '{"text": "b",}' in message
    assert "no comma after the last item" in message and "Mend or remove this row." in message


def test_a_json_row_that_is_no_object_is_named_by_number():
    write("rows.json", json.dumps([A, ["x"]]))
    assert refusal(RowError, "rows.json").startswith('rows.json, row 2 is a list: ["x"]\n')


@pytest.mark.parametrize(
    "content, found",
    [
        ({"train": [A], "test": [B]}, "rows.json holds an object with 'train', 'test'; 2 of these are lists of rows."),
        ({"text": "a", "label": 0}, "rows.json holds an object with 'text', 'label'."),
        ("text", "rows.json holds no list."),
        ({"text": ["a", "b"], "label": [0]}, "rows.json holds an object with 'text', 'label'."),
    ],
)
def test_json_of_another_shape_is_refused(content, found):
    write("rows.json", json.dumps(content))
    message = refusal(RowError, "rows.json")
    assert message.startswith(found) and 'as {"data": [...]}' in message and "into a .jsonl file" in message


def test_not_a_number_is_a_mere_value():
    write("rows.json", '[{"score": Infinity}]')
    assert fields("rows.json") == [{"score": float("inf")}]


# -- CSV ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, comma", [("rows.csv", ","), ("rows.tsv", "\t")])
def test_csv_gives_the_line_where_each_record_starts(name, comma):
    write(name, f'\ufefftext{comma}label\r\n"one{comma}\r\ntwo ""quoted"""{comma}0\r\n\r\n三{comma}1\r\n')
    assert list(read_rows(name)) == [
        Row({"text": f'one{comma}\r\ntwo "quoted"', "label": "0"}, name, 2),
        Row({"text": "三", "label": "1"}, name, 5),
    ]


def test_csv_takes_big_cells():
    write("rows.csv", "text\n" + "x" * 300_000 + "\n")
    assert len(fields("rows.csv")[0]["text"]) == 300_000


@pytest.mark.parametrize("record, count", [("a", "1 cell"), ("a,0,b", "3 cells")])
def test_csv_with_too_many_or_few_cells_is_named(record, count):
    write("rows.csv", f'text,label\n"two\nlines",1\n{record}\n')
    message = refusal(RowError, "rows.csv")
    assert message.startswith(f"rows.csv:4 has {count}, the header has 2: {record}\nExpected text, label.\n")
    assert "in double quotes" in message


def test_a_quote_that_is_never_closed_does_not_swallow_the_file():
    write("rows.csv", 'text,label\na,0\n"b,1\nc,0\n')
    message = refusal(RowError, "rows.csv")
    assert "rows.csv:3: the record that starts on this line cannot be read" in message and "Close the quotes" in message


def test_a_header_that_names_a_column_twice_is_refused():
    write("rows.csv", "text,text\na,b\n")
    assert "rows.csv:1: the header has 'text' more than once." in refusal(RowError, "rows.csv")


# -- Packed, Parquet, Arrow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, where",
    [
        ("rows.jsonl.gz", lines(A, B), "rows.jsonl.gz:2"),
        ("rows.json.gz", json.dumps([A, B]), "rows.json.gz, row 2"),
        ("ROWS.CSV.GZ", "text\na\nb\n", "ROWS.CSV.GZ:3"),
    ],
)
def test_packed_files_are_read_as_what_is_in_them(name, content, where):
    write(name, gzip.compress(content.encode()))
    assert list(read_rows(name))[1].where == where


def test_a_packed_file_that_was_cut_off_is_refused():
    write("rows.jsonl.gz", gzip.compress(lines(A, B).encode())[:-10])
    message = refusal(SourceError, "rows.jsonl.gz")
    assert message.startswith("rows.jsonl.gz cannot be unpacked:") and message.endswith("Fetch it again.")


def test_parquet_gives_rows_over_row_groups():
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([A, B, A]), "rows.parquet", row_group_size=2)
    assert fields("rows.parquet") == [A, B, A]
    assert list(read_rows("rows.parquet"))[2].where == "rows.parquet, row 3"


@pytest.mark.parametrize("layout", ["new_file", "new_stream"])
def test_arrow_is_read_in_both_its_layouts(layout):
    arrow = pytest.importorskip("pyarrow")
    table = arrow.Table.from_pylist([A, B])
    with getattr(arrow.ipc, layout)("rows.arrow", table.schema) as writer:
        writer.write_table(table)
    assert list(read_rows("rows.arrow")) == [Row(A, "rows.arrow", 1), Row(B, "rows.arrow", 2)]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_pointer_in_place_of_a_table_is_refused(name):
    pytest.importorskip("pyarrow")
    write(name, "version https://git-lfs.github.com/spec/v1\n")
    message = refusal(SourceError, name)
    assert message.startswith(f"{name} cannot be read:") and "a Git LFS pointer of a few lines is not" in message


def test_a_missing_package_is_told_with_its_command(monkeypatch):
    write("rows.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refusal(SourceError, "rows.parquet")
    assert "needs the package pyarrow" in message and message.endswith('Run: pip install "weitiao[datasets]"')


# -- No rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content",
    [("r.jsonl", ""), ("r.jsonl", "\n \n"), ("r.json", ""), ("r.json", "[]"), ("r.json", '{"data": []}'),
     ("r.csv", ""), ("r.csv", "text,label\n")],
)  # fmt: skip
def test_a_source_without_rows_is_refused(name, content):
    write(name, content)
    assert refusal(RowError, name).startswith(f"{name} holds no rows.\n")


# -- Real files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, count",
    {
        "resume/seed_200.json": 200,
        "resume/train_instruct.jsonl": 3821,
        "resume/dev_instruct.jsonl": 463,
        "rotten_tomatoes/train.jsonl": 8530,  # 54 of its rows hold C1 bytes, U+0085 among them
        "rotten_tomatoes/validation.jsonl": 1066,
        "alpaca_zh/alpaca_zh_demo.json": 1000,
        "alpaca_zh/ruozhiba_qa2449_gpt4o.json": 2449,
        "alpaca_zh/sample_with_a_bad_row.json": 1517,
        "alpaca_en/alpaca_en_demo.json": 999,
        "multi_turn/sharegpt_zh_1k.jsonl": 1000,
        "multi_turn/dummy_conversation.json": 500,
        "multi_turn/openai_typed_parts.jsonl": 500,
        "multi_turn/glaive_toolcall_zh_demo.json": 300,
        "role_play/roleplay.json": 3146,
        "preference/dpo_zh_500.jsonl": 500,
    }.items(),
)
def test_real_files_give_all_their_rows(file, count):
    path = SHARED / file
    if not path.exists():
        pytest.skip(f"../shared/data/{file} is not here")
    rows = list(read_rows(str(path)))
    assert len(rows) == count and [row.line for row in rows] == list(range(1, count + 1))
