"""What tests of sources share: an empty folder to stand in, files of rows, and a refusal's message."""

import json
from pathlib import Path

import pytest

from weitiao.data.rows import read_rows

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
