"""A hub's model: the copy in its cache, else what it sends; whatever it answers is one message."""

import errno
import socket
import sys
import time
import types

import pytest
from models import places, refused, write_model  # noqa: F401

from weitiao.model.source import hub as hubs
from weitiao.model.source import resolve

NAME = "smollm2-135m"


@pytest.fixture
def hub(monkeypatch):
    """A hub of which nothing is here and which cannot be reached; tests replace what they need."""
    import huggingface_hub

    def call(repository, **options):
        state.calls.append(options)
        state.asked.append(repository)
        answer = state.local if options.get("local_files_only") else state.online
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    def ask(self, repository, **options):
        if isinstance(state.facts, Exception):
            raise state.facts
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in state.facts])

    unreachable = ConnectionError("no route to the hub")
    state = types.SimpleNamespace(calls=[], asked=[], local=FileNotFoundError(), online=unreachable, facts=unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", call)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", ask)
    return state


def test_a_copy_in_the_hubs_cache_is_used_offline(hub, tmp_path):
    hub.local = write_model(tmp_path / "copy")
    assert resolve("owner/name") == resolve("hf:owner/name", revision="v1") == hub.local
    assert [call["revision"] for call in hub.calls] == [None, "v1"]
    assert all(call["local_files_only"] for call in hub.calls)


@pytest.mark.parametrize("name", ["gpt2", "hf:gpt2", "hub:gpt2", "hub:openai-community/gpt2"])
def test_the_hubs_old_bare_names_are_known(hub, tmp_path, name):
    hub.local = write_model(tmp_path / "copy")
    assert resolve(name) == hub.local and resolve(name, revision="v1") == hub.local
    assert set(hub.asked) == {"openai-community/gpt2"}


def test_a_folder_goes_before_an_old_bare_name(hub, tmp_path):
    folder = write_model(tmp_path / "here" / "gpt2")
    assert resolve("gpt2") == folder and not hub.asked
    assert "'gpt2-large'" in refused("gpt2-lrge").next_step
    assert "owner/name" in refused("bert").next_step


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json"])
def test_an_incomplete_copy_is_completed_online(hub, tmp_path, lost):
    hub.local, hub.online = write_model(tmp_path / "copy"), write_model(tmp_path / "fetched")
    (hub.local / lost).unlink()
    hub.facts, lines = ["model.safetensors"], []
    assert resolve("owner/name", revision="v1", notify=lines.append) == hub.online
    assert hub.calls[-1]["revision"] == "v1" and "*.safetensors" in hub.calls[-1]["allow_patterns"]
    assert len(lines) == 1


def test_an_unreachable_hub_is_one_message(hub):
    error = refused("owner/name")
    assert "not in the local cache" in error.found and "no route to the hub" in error.found
    assert all(way in error.next_step for way in ("folder here", "modelscope:owner/name", "HF_ENDPOINT", NAME))
    assert len(hub.calls) <= 2


def test_a_hub_that_breaks_off_is_one_message(hub):
    hub.facts = []
    assert "no route" in refused("owner/name").found
    hub.online = OSError(errno.ENOSPC, "No space left on device")
    error = refused("owner/name")
    assert "disk is full" in error.found and "HF_HOME" in error.next_step


def test_a_hub_whose_answer_never_comes_is_given_up(monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hubs, "PATIENCE", 1)
        start = time.monotonic()
        assert "cannot be reached" in refused("weitiao-tests/nothing-of-this-name").found
    assert time.monotonic() - start < 10


def test_what_the_hub_refuses_is_told_as_such(hub):
    for kind, words in {
        "GatedRepoError": "gated",
        "RepositoryNotFoundError": "no model owner/name",
        "RevisionNotFoundError": "no revision 'v9'",
    }.items():
        hub.facts = type(kind, (Exception,), {})("from the server")
        assert words in refused("owner/name", revision="v9").found


def test_a_repository_of_pickles_is_refused_before_the_download(hub):
    hub.facts = ["config.json", "pytorch_model.bin"]
    assert "safetensors only" in refused("owner/name").expected
    assert len(hub.calls) == 1


# ModelScope


def test_modelscope_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "pip install modelscope" in refused("modelscope:owner/name").next_step


def test_modelscope_offline_first_then_online(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(model, *, revision, local_files_only=False, **_):
        calls.append((model, revision, local_files_only))
        if local_files_only:
            raise ValueError("not here")
        return str(write_model(tmp_path / "fetched"))

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert resolve("modelscope:owner/name", revision="v1") == tmp_path / "fetched"
    assert calls == [("owner/name", "v1", True), ("owner/name", "v1", False)]


def test_modelscope_unreachable_is_one_message(monkeypatch):
    def snapshot_download(model, **_):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot_download))
    error = refused("modelscope:owner/name")
    assert "no route" in error.found and NAME in error.next_step
