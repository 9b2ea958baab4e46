"""Rows leave a source as they stand in it, and a defect is told with its place and its cure."""

import gzip
import json
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from weitiao.data.rows import Row, label_names, mix, read_rows
from weitiao.errors import RowError, SourceError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
A, B = {"text": "你好", "label": 0}, {"text": "line\u2028and\u0085next", "label": 1}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Sources are typed as a user types them, relative to where she stands."""
    monkeypatch.chdir(tmp_path)


def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fields(path, **options):
    return [row.fields for row in read_rows(path, **options)]


def refusal(kind, path, **options):
    with pytest.raises(kind) as caught:
        list(read_rows(path, **options))
    return str(caught.value)


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


def test_a_broken_line_is_named_with_place_excerpt_reason_and_cure():
    write("rows.jsonl", lines(A) + "{'text': 'single quotes'}\n")
    assert refusal(RowError, "rows.jsonl") == (
        "rows.jsonl:2, column 2, is not JSON (Expecting property name enclosed in double quotes): "
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


# -- Folders -----------------------------------------------------------------------------------------------------------


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


def saved(datasets, **columns):
    label = datasets.ClassLabel(names=["neg", "pos"])
    return datasets.Dataset.from_dict(
        columns, features=datasets.Features({"text": datasets.Value("string"), "label": label})
    )


def test_a_saved_data_set_gives_its_own_values_and_the_names_of_its_labels():
    datasets = pytest.importorskip("datasets")
    saved(datasets, text=["bad", "good"], label=[0, 1]).with_format("numpy").save_to_disk("reviews")
    rows = list(read_rows("reviews"))
    assert rows == [Row({"text": "bad", "label": 0}, "reviews", 1), Row({"text": "good", "label": 1}, "reviews", 2)]
    assert type(rows[0].fields["label"]) is int
    assert label_names("reviews") == {0: "neg", 1: "pos"}


def test_a_saved_dict_gives_the_split_asked_for():
    datasets = pytest.importorskip("datasets")
    one, two = saved(datasets, text=["a"], label=[0]), saved(datasets, text=["b"], label=[1])
    datasets.DatasetDict(train=one, validation=two).save_to_disk("reviews")
    assert fields("reviews", split="validation") == [{"text": "b", "label": 1}]
    assert refusal(SourceError, "reviews", split="validatoin") == (
        "reviews has no split 'validatoin'.\nThere: train, validation.\nDid you mean 'validation'?"
    )


def test_a_saved_folder_that_is_torn_is_refused():
    pytest.importorskip("datasets")
    write("reviews/state.json", "{}")
    assert refusal(SourceError, "reviews").startswith("reviews cannot be read: ")


def test_files_have_no_label_names():
    write("rows.jsonl", lines(A))
    assert label_names("rows.jsonl") is None


# -- Hubs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers, with whatever `hub.load` is set to; `hub.asked` keeps the questions."""
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    stub = types.SimpleNamespace(asked=[], reach=lambda: None, offline=None)
    stub.load = lambda: saved(datasets, text=["bad", "good"], label=[0, 1])

    def load_dataset(*args, **options):
        stub.asked.append((args, options))
        stub.offline = datasets.config.HF_HUB_OFFLINE
        return stub.load()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **options: stub.reach())
    return stub


def failing(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    "path, set_id",
    [("owner/name", "owner/name"), ("hub:owner/name", "owner/name"), ("hub:rotten_tomatoes", "rotten_tomatoes")],
)
def test_a_hub_set_is_loaded_by_its_id(hub, path, set_id):
    rows = list(read_rows(path, split="test", name="en"))
    assert hub.asked == [((set_id, "en"), {"split": "test"})]
    assert rows[1] == Row({"text": "good", "label": 1}, path, 2) and rows[1].where == f"{path}, row 2"
    assert label_names(path) == {0: "neg", 1: "pos"}


@pytest.mark.parametrize(
    "path", ["rows.jsonl", "data/rows.jsonl", "./owner/name", "a/b/c", "~/rows", "C:\\rows", "C:/rows", "rows", "rows/"]
)
def test_what_looks_like_a_path_never_goes_to_a_hub(hub, path):
    assert "no such file" in refusal(SourceError, path)
    assert not hub.asked


def test_an_id_whose_first_part_is_a_folder_here_is_a_path(hub):
    write("data/rows.jsonl", lines(A))
    message = refusal(SourceError, "data/row")
    assert message.startswith("data/row: no such file or folder.\nThe folder holds: rows.jsonl.\n")
    assert message.endswith("write hub:data/row") and not hub.asked


def test_a_bare_name_is_told_how_to_be_written(hub):
    assert refusal(SourceError, "rotten_tomatoes").endswith("write hub:rotten_tomatoes") and not hub.asked


def test_without_a_network_one_message_comes_at_once_and_says_how_to_go_on(hub):
    hub.reach = failing(OSError("Name or service not known"))
    hub.load = failing(ConnectionError("OfflineModeIsEnabled"))
    with pytest.raises(SourceError) as caught:
        read_rows("owner/name")  # before the first row is asked for
    message = str(caught.value)
    assert message.startswith(
        "owner/name cannot be loaded: ConnectionError: the hub cannot be reached (Name or service not known)\n"
    )
    assert "No file or folder here has this name" in message
    assert "hf download --repo-type dataset owner/name" in message
    assert "HF_ENDPOINT" in message and "modelscope:owner/name" in message
    assert hub.offline and len(hub.asked) == 1  # no half a minute of retries


def test_without_a_network_what_was_fetched_before_is_read_and_nothing_stays_switched(hub):
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    hub.reach = failing(OSError("no route"))
    assert len(fields("owner/name")) == 2
    assert datasets.config.HF_HUB_OFFLINE == before


def test_an_unknown_split_of_a_hub_set_is_told(hub):
    hub.load = failing(ValueError('Unknown split "tset". Should be one of [\'train\', \'test\'].'))
    message = refusal(SourceError, "hub:owner/name", split="tset")
    assert "Should be one of ['train', 'test']" in message and "Name one of those in the message." in message


def test_a_hub_set_that_is_not_there_or_private_is_told(hub):
    from datasets.exceptions import DatasetNotFoundError

    hub.load = failing(DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub or cannot be accessed."))
    message = refusal(SourceError, "owner/name")
    assert "doesn't exist on the Hub" in message and "hf auth login" in message


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_modelscope_set_is_loaded_by_its_id(monkeypatch, wrapped):
    rows, asked = [{"text": "a"}, {"text": "b"}], []

    def load(set_id, **options):
        asked.append((set_id, options))
        return types.SimpleNamespace(ds_instance=rows) if wrapped else rows

    package, module = types.ModuleType("modelscope"), types.ModuleType("modelscope.msdatasets")
    package.msdatasets, module.MsDataset = module, types.SimpleNamespace(load=load)
    monkeypatch.setitem(sys.modules, "modelscope", package)
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", module)
    assert list(read_rows("modelscope:owner/name", split="test", name="zh")) == [
        Row({"text": "a"}, "modelscope:owner/name", 1),
        Row({"text": "b"}, "modelscope:owner/name", 2),
    ]
    assert asked == [("owner/name", {"subset_name": "zh", "split": "test"})]
    assert label_names("modelscope:owner/name") is None


@pytest.mark.parametrize(
    "path, module, extras",
    [("owner/name", "datasets", "datasets"), ("modelscope:owner/name", "modelscope", "modelscope,datasets")],
)
def test_a_missing_client_is_told_with_its_command(monkeypatch, path, module, extras):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "modelscope.msdatasets", raising=False)
    message = refusal(SourceError, path)
    assert f"needs the package {module}" in message and f'pip install "weitiao[{extras}]"' in message


# -- Sources that are not there, empty, or in another encoding ---------------------------------------------------------


def test_a_missing_file_comes_at_once_with_the_nearest_one_there():
    write("data/train.jsonl", lines(A))
    write("data/notes.md", "")
    with pytest.raises(SourceError) as caught:
        read_rows("data/trian.jsonl")  # before the first row is asked for
    assert str(caught.value) == (
        "data/trian.jsonl: no such file or folder.\nThe folder holds: train.jsonl.\nDid you mean 'train.jsonl'?"
    )


def test_a_missing_folder_is_told():
    assert "nor is there a folder nowhere" in refusal(SourceError, "nowhere/rows.jsonl")


def test_a_web_address_is_told_to_be_downloaded():
    assert "Download it" in refusal(SourceError, "https://example.org/rows.jsonl")


def test_a_file_of_unknown_kind_is_told_the_known_ones():
    write("rows.xlsx", b"PK")
    message = refusal(SourceError, "rows.xlsx")
    assert message.startswith("rows.xlsx: the name does not say what kind") and ".parquet" in message
    assert "CSV UTF-8" in message


@pytest.mark.parametrize(
    "name, content",
    [("r.jsonl", ""), ("r.jsonl", "\n \n"), ("r.json", ""), ("r.json", "[]"), ("r.json", '{"data": []}'),
     ("r.csv", ""), ("r.csv", "text,label\n")],
)  # fmt: skip
def test_a_source_without_rows_is_refused(name, content):
    write(name, content)
    assert refusal(RowError, name).startswith(f"{name} holds no rows.\n")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_gb18030_is_recognised_and_its_conversion_told(name):
    write(name, b'{"text": "plain"}\n' + '{"text": "微调大语言模型"}\n'.encode("gb18030"))
    message = refusal(RowError, name)
    # 微 is ce a2, which happens to be valid UTF-8 as well; 调 (b5 f7) is not.
    assert message.startswith(f"{name} is not UTF-8: line 2, byte 13 is 0xb5; the likely encoding is gb18030.\n")
    suffix = Path(name).suffix
    assert message.endswith(f"Convert it: iconv -f gb18030 -t utf-8 {name} > rows.utf8{suffix}")


@pytest.mark.parametrize("encoding, told", [("utf-16", "utf-16"), ("utf-16-le", "utf-16le"), ("utf-16-be", "utf-16be")])
@pytest.mark.parametrize("text", ["plain", "微调大语言模型"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_utf16_is_recognised(name, text, encoding, told):
    write(name, f'{{"text": "{text}"}}\n'.encode(encoding))
    message = refusal(RowError, name)
    assert f"{name} is not UTF-8: line 1, byte " in message and f"the likely encoding is {told}.\n" in message
    assert f"iconv -f {told} -t utf-8 {name}" in message


def test_a_western_encoding_is_not_taken_for_a_chinese_one():
    write("rows.csv", "text,label\nMüller läuft über größere Brücken,1\n".encode("cp1252"))
    message = refusal(RowError, "rows.csv")
    assert message.startswith("rows.csv is not UTF-8: line 2, byte 2 is 0xfc; the likely encoding is cp1252.\n")


def test_one_damaged_byte_in_utf8_is_told_apart_from_another_encoding():
    write("rows.jsonl.gz", gzip.compress('{"text": "微调大语言模型"}\n'.encode().replace(b"\xe8", b"", 1)))
    message = refusal(RowError, "rows.jsonl.gz")
    assert "the text around it is UTF-8, so something was damaged here" in message
    assert "gunzip -c rows.jsonl.gz | iconv -c -f utf-8 -t utf-8 > rows.utf8.jsonl" in message


# -- Mixing ------------------------------------------------------------------------------------------------------------


def sources(*sizes):
    return [[Row({"n": n}, f"{i}.jsonl", n + 1) for n in range(size)] for i, size in enumerate(sizes)]


def taken(rows):
    return Counter(row.file for row in rows)


def test_without_shares_all_rows_come_one_after_the_other():
    one, two = sources(3, 2)
    assert mix([one, two], [None, None], seed=1) == one + two


def test_with_shares_the_total_stays_and_the_counts_follow_the_shares():
    assert taken(mix(sources(10, 90), [1, 3], seed=1)) == {"0.jsonl": 25, "1.jsonl": 75}
    assert taken(mix(sources(4, 3, 3), [1, 1, 1], seed=1)) == {"0.jsonl": 4, "1.jsonl": 3, "2.jsonl": 3}
    assert taken(mix(sources(5, 5), [0, 2.5], seed=1)) == {"1.jsonl": 10}


def test_no_row_comes_again_before_all_have_come():
    rows = [row for row in mix(sources(10, 90), [1, 3], seed=1) if row.file == "0.jsonl"]
    assert set(Counter(row.line for row in rows).values()) == {2, 3}
    assert len({row.line for row in rows[:10]}) == len({row.line for row in rows[10:20]}) == 10
    assert rows[:10] != rows[10:20]


def test_a_mix_is_the_same_for_the_same_seed_and_another_for_another():
    first, again, other = (mix(sources(50, 50), [1, 1], seed=seed) for seed in (7, 7, 8))
    assert first == again != other


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
