"""A model's name becomes a whole local folder, or one message that says why not."""

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest

from weitiao.errors import SourceError
from weitiao.model import source
from weitiao.model.source import EMBEDDED, Wheel, cache_folder, resolve

NAME = "smollm2-135m"
MEMBER = "package/tiny.gguf"
REAL_CACHE = str(cache_folder())


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Every test has its own cache and its own working folder."""
    monkeypatch.setenv("WEITIAO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write_model(folder: Path) -> Path:
    """What stands for a model where nobody loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def refused(name: str, **options) -> SourceError:
    with pytest.raises(SourceError) as caught:
        resolve(name, **options)
    return caught.value


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
def test_what_looks_like_a_path_never_reaches_a_hub(name, tmp_path, monkeypatch):
    write_model(tmp_path / "here" / "models" / "qwen")
    monkeypatch.setattr(source, "from_hub", None)
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


# The Hugging Face hub


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
        monkeypatch.setattr(source, "PATIENCE", 1)
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


# Wheels and GGUF files


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

    def convert(gguf, folder):
        state.converted.append(gguf.read_bytes())
        write_model(folder)
        time.sleep(0.2)
        if state.failure:
            raise state.failure

    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    state = types.SimpleNamespace(archive=archive, requests=[], converted=[], stderr="", failure=None)
    monkeypatch.setattr(source, "run_pip", run_pip)
    monkeypatch.setattr(source, "convert_gguf", convert)
    monkeypatch.setitem(EMBEDDED, NAME, Wheel("package", "1.0", MEMBER, checksum, "Apache-2.0", 93))
    return state


def write_wheel(archive: Path, *members: str) -> None:
    with zipfile.ZipFile(archive, "w") as wheel:
        for member in members:
            wheel.writestr(member, f"weights of {member}")


def models() -> list[str]:
    """What the cache holds, locks aside."""
    folder = cache_folder() / "models"
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix != ".lock") if folder.is_dir() else []


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
from weitiao.model import source

def convert(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    os._exit(9)

source.convert_gguf = convert
source.resolve(sys.argv[1])
"""


def test_what_a_killed_conversion_leaves_is_removed_by_the_next(index, tmp_path):
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"weights")
    assert subprocess.run([sys.executable, "-c", KILLED, str(gguf)]).returncode == 9
    assert len(models()) == 1 and ".partial-" in models()[0]  # half a model, and not under a name that counts
    folder = resolve(str(gguf))
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


@pytest.mark.parametrize("limit", [source.WHOLLY_HASHED, 0])
def test_a_gguf_file_is_converted_once_for_its_content(index, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(source, "WHOLLY_HASHED", limit)
    gguf = tmp_path / "here" / "my model.gguf"
    gguf.write_bytes(b"one")
    first = resolve("./my model.gguf")
    assert resolve(str(gguf)) == first and gguf.is_file()
    gguf.write_bytes(b"another")
    assert resolve("my model.gguf") != first
    assert index.converted == [b"one", b"another"]


# The real conversion


def write_gguf(path: Path) -> None:
    """A Llama of one layer whose byte vocabulary has one merge: two spaces."""
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    draw = np.random.default_rng(0)
    tokens = [*bytes_to_unicode().values(), "ĠĠ", "<end>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_bos_token_id(len(tokens) - 1)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_plain_bf16_folder(tmp_path, capfd):
    import torch
    from gguf import GGUFReader
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf")
    folder = resolve(str(tmp_path / "tiny.gguf"))
    assert "|" not in capfd.readouterr().err, "no progress bars"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    stored = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    up = torch.tensor(stored["blk.0.ffn_up.weight"]).bfloat16()
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], up)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("=  5") == ["=", "ĠĠ", "5"], "spaces before a digit stay together, as SmolLM was trained"


@pytest.mark.skipif(os.environ.get("WEITIAO_TEST_EMBEDDED") == "0", reason="WEITIAO_TEST_EMBEDDED is 0")
def test_the_real_embedded_model_knows_paris(monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # In the cache that people use, so that it is fetched once a machine and not once a test run.
    monkeypatch.setenv("WEITIAO_CACHE", REAL_CACHE)
    try:
        folder = resolve(NAME)
    except SourceError as error:
        if "pip could not download" in error.found:
            pytest.skip(error.found)
        raise
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
