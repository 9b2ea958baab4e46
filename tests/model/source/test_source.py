"""A model's name becomes a whole local folder, or one message that says why not."""

import json
import os
from pathlib import Path

import pytest
from models import places, refused, write_model  # noqa: F401

from weitiao.model.source import resolve
from weitiao.model.source.cache import cache_folder

NAME = "smollm2-135m"


# Where things are kept


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("WEITIAO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "weitiao"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "weitiao"


# Folders and paths


def test_a_folder_is_used_where_it_lies(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    folder = tmp_path / "here" / "tiny"
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    assert resolve("./tiny") == resolve("tiny") == resolve("tiny/") == resolve(str(folder)) == folder
    assert not cache_folder().exists()


def test_a_folder_says_what_it_lacks(tmp_path):
    folder = write_model(tmp_path / "here" / "broken")
    (folder / "model.safetensors").unlink()
    assert "no weights" in str(refused("./broken"))

    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    error = refused("./broken")
    assert "pytorch_model.bin" in error.found and "safetensors only" in error.expected
    assert "model.convert_pickle=true" in error.next_step

    (folder / "config.json").unlink()
    assert "no config.json" in str(refused("./broken"))


def test_a_folder_that_is_something_else_says_what_to_name_instead(tmp_path):
    here = tmp_path / "here"
    write_model(here / "run" / "model")
    assert str(here / "run" / "model") in refused("./run").next_step
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    assert "base model" in refused("./adapter").next_step
    (here / "files").mkdir()
    (here / "files" / "x.gguf").write_bytes(b"")
    assert "x.gguf" in refused("./files").next_step


def test_missing_shards_and_lfs_pointers_are_told(tmp_path):
    folder = write_model(tmp_path / "here" / "m")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}}))
    assert "second.safetensors" in refused("./m").found
    index.write_text("{")
    assert "cannot be read" in refused("./m").found
    index.unlink()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert "git lfs pull" in refused("./m").next_step


@pytest.mark.parametrize(
    "name",
    ["./modles/qwen", "modles/qwen/", "a/b/c", "~/modles", "../x", r"C:\modles", r"modles\qwen", "x.gguf", "models/qwem"],
)
def test_what_looks_like_a_path_never_reaches_a_hub(name, tmp_path):
    write_model(tmp_path / "here" / "models" / "qwen")
    error = refused(name)
    assert "nothing at" in error.found


def test_a_mistyped_path_is_offered_its_nearest_sibling(tmp_path):
    folder = write_model(tmp_path / "here" / "models" / "qwen")
    assert str(folder) in refused(str(folder.with_name("qwem"))).next_step
    assert "models/qwen" in refused("./models/qwem").next_step
    assert "'models'" in refused("./modles/qwen").next_step
    assert "models/qwen" in refused(r"models\qwen").next_step or os.name == "nt"
    assert "hf:models/qwem" in refused("models/qwem").next_step


def test_one_file_of_a_model_points_to_its_folder(tmp_path):
    folder = write_model(tmp_path / "here" / "m")
    assert str(folder) in refused("m/model.safetensors").next_step


def test_a_word_that_is_nothing_is_offered_the_nearest_alias():
    error = refused("smollm-135m")
    assert repr(NAME) in error.next_step and "modelscope:owner/name" in error.expected
    assert "'modelscope'" in refused("modelscop:owner").next_step
    assert refused("").next_step


@pytest.mark.parametrize("name", ["hf:owner", "hf:../x", "hf:a/b/c", "modelscope:ow ner/x", "pypi:package", "pypi:-r==1"])
def test_a_name_that_does_not_fit_its_prefix_is_refused(name):
    assert refused(name).expected


def test_only_hubs_have_revisions(tmp_path):
    write_model(tmp_path / "here" / "m")
    for name in (NAME, "./m", "pypi:package==1"):
        assert "revision" in str(refused(name, revision="main"))
