"""Text that is not UTF-8 is told with its place, its likely encoding and the command that converts it."""

import gzip
from pathlib import Path

import pytest
from sources import in_an_empty_folder, refusal, write  # noqa: F401

from weitiao.data.rows import read_rows
from weitiao.data.rows.row import Reading
from weitiao.data.rows.utf8 import read_lines
from weitiao.errors import RowError


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


def test_a_file_of_prompts_is_converted_under_its_own_name():
    write("Prompts.TXT", "你好，世界\n".encode("gb18030"))
    with pytest.raises(RowError) as caught:
        list(read_lines("Prompts.TXT"))
    assert str(caught.value).endswith("Convert it: iconv -f gb18030 -t utf-8 Prompts.TXT > Prompts.utf8.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_lines_of_utf16_are_told_once_and_not_by_each_line(encoding):
    with open("rows.jsonl", "w", encoding=encoding) as file:
        file.write('{"prompt": "a", "completion": "b"}\n' * 5)
    told = []
    with pytest.raises(RowError, match="holds no rows"):
        list(read_rows("rows.jsonl", reading=Reading(told.append)))
    assert len(told) == 1 and encoding.replace("-", "")[:5] in str(told[0]).replace("-", "")


def test_every_row_of_a_list_that_is_none_is_told():
    with open("rows.json", "w") as file:
        file.write('["a", {"prompt": "a", "completion": "b"}, 3]')
    told = []
    assert [row.line for row in read_rows("rows.json", reading=Reading(told.append))] == [2]
    assert [error.found.partition(" is ")[0] for error in told] == ["rows.json, row 1", "rows.json, row 3"]
