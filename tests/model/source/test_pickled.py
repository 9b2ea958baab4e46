"""Weights that come as pickle only: read as tensors, kept as safetensors, and refused where they are anything else."""

from __future__ import annotations

import json
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from weitiao.errors import SourceError
from weitiao.model.load import load_model
from weitiao.model.source import model_folder, pickled, resolve
from weitiao.model.source.cache import cache_folder
from weitiao.settings.model import ModelSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("WEITIAO_CACHE", str(tmp_path / "cache"))


def bloom(dtype=torch.float16):
    """A tied model, as the first tutorial's is."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)).to(dtype).eval()


def llama(tied: bool = False):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()


def write(folder: Path, model, shards: int = 1, **options) -> Path:
    """As transformers wrote models before safetensors, with what lies beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "own.py").write_text("raise SystemExit('code of the folder was run')")
    (folder / "training_args.bin").write_bytes(b"not weights")
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return folder
    names = list(state)
    parts = [names[i::shards] for i in range(shards)]
    where = {}
    for i, part in enumerate(parts, start=1):
        file = f"pytorch_model-{i:05}-of-{shards:05}.bin"
        torch.save({name: state[name] for name in part}, folder / file, **options)
        where |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def refused(name, **options) -> SourceError:
    with pytest.raises(SourceError) as caught:
        resolve(str(name), **options)
    return caught.value


def models() -> list[str]:
    folder = cache_folder() / "models"
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix != ".lock") if folder.is_dir() else []


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 12)[None]).logits


def assert_same(folder: Path, model) -> None:
    """Loads as weitiao loads it, without a word about missing weights, and computes the same."""
    loaded = load_model(folder, ModelSettings(name="x"), model.dtype).eval()
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert torch.equal(logits(loaded), logits(model))


# -- the conversion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("make", [bloom, llama, lambda: llama(tied=True)], ids=["bloom", "llama", "llama-tied"])
def test_the_converted_model_is_the_model(tmp_path, make, shards):
    model = make()
    folder = write(tmp_path / "old", model, shards)
    lines = []
    made = resolve(str(folder), convert_pickle=True, notify=lines.append)
    assert_same(made, model)
    assert made.parent == cache_folder() / "models" and models() == [made.name] and len(lines) == 1
    assert len(list(made.glob("*.safetensors"))) == shards and not list(made.glob("*.bin*"))
    assert resolve(str(folder), convert_pickle=True, notify=lines.append) == made and len(lines) == 1, "converted once"


def test_what_lies_beside_the_weights_goes_along_and_no_code_is_run(tmp_path):
    folder = write(tmp_path / "old", bloom())
    made = model_folder(ModelSettings(name=str(folder), convert_pickle=True))
    for name in ("config.json", "tokenizer.json", "own.py"):
        assert (made / name).read_bytes() == (folder / name).read_bytes()
    assert "old" in (made / "README.md").read_text() and not (made / "training_args.bin").exists()
    load_model(made, ModelSettings(name="x"), torch.float16)


def test_files_of_old_torch_are_read_too(tmp_path):
    model = bloom()
    folder = write(tmp_path / "old", model, _use_new_zipfile_serialization=False)
    assert_same(resolve(str(folder), convert_pickle=True), model)


def test_one_name_is_kept_of_a_tied_weight_and_each_its_own_where_nothing_is_tied(tmp_path):
    made = resolve(str(write(tmp_path / "tied", bloom())), convert_pickle=True)
    names = load_file(made / "model.safetensors")
    assert "transformer.word_embeddings.weight" in names and "lm_head.weight" not in names
    model = llama(tied=True)
    folder = write(tmp_path / "untied", model)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"tie_word_embeddings": False}))
    made = resolve(str(folder), convert_pickle=True)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(load_file(made / "model.safetensors"))
    assert torch.equal(logits(load_model(made, ModelSettings(name="x"), torch.float32).eval()), logits(model))


def test_views_into_one_memory_are_written_apart():
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"q": whole[:2], "k": whole[2:], "t": whole.T, "same": whole[:2], "empty": whole[:0]}
    made = pickled.apart(state, tied=True)
    assert set(made) == {"q", "k", "t", "empty"}
    assert all(torch.equal(made[name], state[name]) and made[name].is_contiguous() for name in made)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted as Linux counts it")
def test_memory_holds_a_small_part_of_the_file(tmp_path, monkeypatch):
    """64 MB of weights, one of 4 MB a transposed view that has to be copied: what is mapped is the disk's."""
    def own_memory() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    folder = write(tmp_path / "old", llama())
    state = {f"w{i}": torch.ones(2**20) for i in range(15)} | {"t": torch.ones(2**10, 2**10).T}
    torch.save(state, folder / "pytorch_model.bin")
    del state
    at_save = []
    save_file = safetensors.torch.save_file
    monkeypatch.setattr("safetensors.torch.save_file", lambda *a: (save_file(*a), at_save.append(own_memory())))
    before = own_memory()
    pickled.convert(folder, tmp_path / "new", [])
    assert at_save[0] - before < 16 * 2**20
    assert (tmp_path / "new" / "model.safetensors").stat().st_size > 64 * 2**20


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_without_the_setting_the_refusal_names_it(tmp_path):
    error = refused(write(tmp_path / "old", bloom()))
    assert "pickle only (pytorch_model.bin)" in error.found and "model.convert_pickle=true" in error.next_step
    (tmp_path / "old" / "pytorch_model.bin").rename(tmp_path / "old" / "weights.pt")
    for options in ({}, {"convert_pickle": True}):
        error = refused(tmp_path / "old", **options)
        assert "pickle only" in error.found and "convert_pickle" not in error.next_step
    assert models() == []


class Program:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_program_in_a_pickle_is_told_and_not_run(tmp_path, zipped):
    folder, mark = write(tmp_path / "old", bloom()), tmp_path / "was-run"
    torch.save({"w": torch.zeros(2), "x": Program(mark)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    error = refused(folder, convert_pickle=True)
    assert "asks for posix.mkdir" in error.found or os.name == "nt"
    assert "Nothing in it was run" in error.expected and not mark.exists() and models() == []
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "it was a program"


@pytest.mark.parametrize(("content", "words"), [
    ([torch.zeros(2)], "holds list in the place"),
    ({"state_dict": {"w": torch.zeros(2)}}, "holds dict under 'state_dict'"),
    ({"w": torch.zeros(2), "step": 3}, "holds int under 'step'"),
    ({0: torch.zeros(2)}, "under 0"),
    ({"w": torch.zeros(2, 2).to_sparse()}, "under 'w'"),
])
def test_what_is_no_named_tensor_is_told(tmp_path, content, words):
    folder = write(tmp_path / "old", bloom())
    torch.save(content, folder / "pytorch_model.bin")
    assert words in refused(folder, convert_pickle=True).found and models() == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x80\x02not a pickle", pickle.dumps({"w": 1})[:-3]])
def test_a_broken_file_is_told(tmp_path, content):
    folder = write(tmp_path / "old", bloom())
    (folder / "pytorch_model.bin").write_bytes(content)
    assert "cannot be read" in refused(folder, convert_pickle=True).found and models() == []


def test_a_program_in_the_last_shard_leaves_nothing_of_the_first(tmp_path):
    folder = write(tmp_path / "old", bloom(), shards=2)
    torch.save({"x": Program(tmp_path / "was-run")}, folder / "pytorch_model-00002-of-00002.bin")
    assert "00002" in refused(folder, convert_pickle=True).found and models() == []


def test_missing_shards_pointers_and_paths_out_of_the_folder_are_told(tmp_path):
    folder = write(tmp_path / "old", bloom(), shards=2)
    second = folder / "pytorch_model-00002-of-00002.bin"
    second.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refused(folder, convert_pickle=True).next_step
    second.unlink()
    assert second.name in refused(folder, convert_pickle=True).found
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../old/pytorch_model-00001-of-00002.bin"}}))
    assert "lacks 1" in refused(folder, convert_pickle=True).found
    index.write_text("{")
    assert "cannot be read" in refused(folder, convert_pickle=True).found


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    error = refused(write(tmp_path / "old", bloom()), convert_pickle=True)
    assert "disk is full" in error.found and "WEITIAO_CACHE" in error.next_step and models() == []


def test_another_content_is_converted_anew(tmp_path):
    folder = write(tmp_path / "old", bloom(torch.float32), shards=2)
    first = resolve(str(folder), convert_pickle=True)
    model = bloom(torch.bfloat16)
    write(folder, model, shards=2)
    second = resolve(str(folder), convert_pickle=True)
    assert second != first
    assert_same(second, model)
    (folder / "tokenizer.json").write_text('{"mended": true}')
    assert "mended" in (resolve(str(folder), convert_pickle=True) / "tokenizer.json").read_text()


def test_safetensors_go_first(tmp_path):
    folder = write(tmp_path / "both", bloom())
    bloom().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert resolve(str(folder), convert_pickle=True) == folder and models() == []


# -- hubs --------------------------------------------------------------------------------------------------------------


class Hub:
    """A hub's repository, and a cache that holds of it what was asked for."""

    def __init__(self, repository: Path, cache: Path):
        self.repository, self.cache, self.calls = repository, cache, []

    def fetch(self, name, *, allow_patterns, ignore_patterns, local_files_only=False, **_):
        from huggingface_hub.utils import filter_repo_objects

        if local_files_only:
            if not self.cache.is_dir():
                raise FileNotFoundError("nothing here")
            return str(self.cache)
        files = [p.name for p in self.repository.iterdir()]
        self.calls.append(sorted(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        self.cache.mkdir(parents=True, exist_ok=True)
        for file in self.calls[-1]:
            (self.cache / file).write_bytes((self.repository / file).read_bytes())
        return str(self.cache)

    def info(self, *_, **__):
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=p.name) for p in self.repository.iterdir()])

    @property
    def fetched(self) -> set[str]:
        return {file for call in self.calls for file in call}


@pytest.fixture(params=["hf", "modelscope"])
def hub(request, tmp_path, monkeypatch):
    import huggingface_hub

    name = "snapshots/" + COMMIT if request.param == "hf" else "owner/name"
    hub = Hub(tmp_path / "repository", tmp_path / "cache of the hub" / name)
    hub.name = f"{request.param}:owner/name"
    if request.param == "hf":
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.fetch)
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", hub.info)
    else:
        monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=hub.fetch))
    return hub


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pickled_model_of_a_hub_is_fetched_and_converted_when_asked_for(hub, shards):
    model = bloom()
    write(hub.repository, model, shards)
    error = refused(hub.name)
    assert "model.convert_pickle=true" in error.next_step and "owner/name" in error.found
    assert not any(name.endswith(".bin") for name in hub.fetched), "no pickle comes unasked"
    folder = resolve(hub.name, convert_pickle=True)
    assert_same(folder, model)
    assert "training_args.bin" not in hub.fetched and "owner-name" in folder.name
    assert (COMMIT in folder.name) == hub.name.startswith("hf:")
    calls = len(hub.calls)
    assert resolve(hub.name, convert_pickle=True) == folder and len(hub.calls) == calls, "the second time nobody is asked"


def test_no_pickle_is_fetched_where_there_are_safetensors(hub):
    model = bloom()
    write(hub.repository, model)
    model.save_pretrained(hub.repository)
    assert resolve(hub.name, convert_pickle=True) == hub.cache
    assert "model.safetensors" in hub.fetched and "pytorch_model.bin" not in hub.fetched


def test_a_copy_without_its_last_shard_is_completed(hub):
    write(hub.repository, bloom(), shards=2)
    write(hub.cache, bloom(), shards=2)
    (hub.cache / "pytorch_model-00002-of-00002.bin").unlink()
    assert_same(resolve(hub.name, convert_pickle=True), bloom())
    assert "pytorch_model-00002-of-00002.bin" in hub.fetched


# -- from the command line ---------------------------------------------------------------------------------------------


def test_a_run_on_a_pickled_model_trains_goes_on_and_answers(model_folder, rows_file, tmp_path, monkeypatch, capsys):
    from weitiao.cli import main

    def weitiao(*words) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["weitiao", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, "\n".join(capsys.readouterr())

    old, run = tmp_path / "old", tmp_path / "run"
    old.mkdir()
    for file in model_folder.iterdir():
        if file.suffix == ".safetensors":
            torch.save(load_file(file), old / "pytorch_model.bin")
        else:
            (old / file.name).write_bytes(file.read_bytes())
    words = ["train", "--model", old, "--data", rows_file, "--output", run, "training.steps=2", "method.rank=4"]
    code, said = weitiao(*words)
    assert code == 2 and "model.convert_pickle=true" in said and not run.exists()
    code, said = weitiao(*words, "model.convert_pickle=true")
    assert code == 0 and "Converting" in said, said
    code, said = weitiao("generate", run, "--prompt", "What is 3 and 3?", "--max-new-tokens", 4)
    assert code == 0 and "Converting" not in said, said
    assert weitiao("train", run, "--resume")[0] == 0
    assert weitiao("merge", run)[0] == 0
