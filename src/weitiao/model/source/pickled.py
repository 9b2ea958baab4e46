"""Weights that come as pickle only -> safetensors, read as tensors and as nothing else.

    pytorch_model.bin                           model.safetensors
    pytorch_model-00001-of-00002.bin     ->     model-00001-of-00002.safetensors
    pytorch_model.bin.index.json                model.safetensors.index.json

A pickle is a program that makes what it holds. torch's restricted unpickler runs none: it knows tensors and plain containers,
and stops at anything else. Files are mapped and written one by one, so that memory holds little more than the tensors that had
to be copied. Types stay as they are. config.json, tokenizer and code go along as they came; code is run only where
model.trust_remote_code says so, as everywhere.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.errors import SourceError

if TYPE_CHECKING:
    import torch

WHOLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WANTED = [WHOLE, "pytorch_model-*.bin"]  # what a hub is asked for besides; the index is a .json
LFS_POINTER = b"version https://git-lfs"
TORCH_ADVICE = ("Weights only load failed", "Please file an issue", "Check the documentation")
ZIP = b"PK\x03\x04"  # what torch writes since 1.6; before it was bare pickles, which cannot be mapped


def is_only(folder: Path) -> bool:
    """Are the weights in `folder` pickle, with no sign of safetensors?"""
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    safe = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    return "config.json" in names and bool(names & {WHOLE, INDEX}) and not safe


def files(folder: Path) -> list[Path]:
    """The files of weights, in order."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))]


def flaw(folder: Path) -> SourceError | None:
    """What the pickled weights of a folder lack, or None."""
    try:
        parts = files(folder)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return SourceError(f"{folder / INDEX} cannot be read.", "JSON with a weight_map, as transformers writes it.",
                           "Copy or download that file again.")
    here = {entry.name for entry in folder.iterdir() if entry.is_file()}
    if missing := [path.name for path in parts if path.name not in here or path.parent != folder]:
        return SourceError(f"{folder} lacks {len(missing)} of its weight files, {missing[0]} the first.",
                           f"Every file that {INDEX} names.", "Copy or download the missing files.")
    if pointers := [path for path in parts if is_lfs_pointer(path)]:
        return SourceError(f"{pointers[0]} is a git-lfs pointer, not the weights.", "The weights themselves.",
                           "Run `git lfs pull` in that folder.")
    return None


def is_lfs_pointer(path: Path) -> bool:
    return _head(path, len(LFS_POINTER)) == LFS_POINTER


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def carried(folder: Path, wanted: Sequence[str]) -> list[Path]:
    """The files that go along with the weights: all that match a pattern of `wanted`."""
    return [entry for entry in sorted(folder.iterdir())
            if entry.is_file() and entry.name != INDEX and any(fnmatch(entry.name, pattern) for pattern in wanted)]


def convert(source: Path, target: Path, beside: Sequence[Path]) -> None:
    """Write the new folder `target`: the weights of `source` as safetensors, and copies of the files `beside` them.

    Raises:
        SourceError: a file holds more than named tensors, or is broken.
    """
    from safetensors.torch import save_file

    target.mkdir()
    for file in beside:
        shutil.copyfile(file, target / file.name)
    tied = _is_tied(json.loads((source / "config.json").read_text("utf-8")))
    parts, where, size = files(source), {}, 0
    for i, part in enumerate(parts, start=1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{i:05}-of-{len(parts):05}.safetensors"
        state = {key: tensor for key, tensor in apart(read(part), tied).items() if key not in where}
        save_file(state, target / name, {"format": "pt"})
        where |= dict.fromkeys(state, name)
        size += sum(tensor.nbytes for tensor in state.values())
        del state
    if len(parts) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Does the model tie its head to its embedding? As config.json says, else as transformers' class of that kind has it."""
    from transformers import CONFIG_MAPPING

    said, kind = config.get("tie_word_embeddings"), config.get("model_type")
    if said is None and kind in CONFIG_MAPPING:
        said = CONFIG_MAPPING[kind]().tie_word_embeddings
    return said is not False


def read(path: Path) -> dict[str, torch.Tensor]:
    """The named tensors in a pickle, mapped where it can be."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_head(path, len(ZIP)) == ZIP)
    except pickle.UnpicklingError as error:
        if wish := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _more_than_tensors(path, f"asks for {wish[1]}") from error
        raise _broken(path, error) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zip, pickle and torch each have kinds of their own for a file that is cut or changed
        raise _broken(path, error) from error
    if not isinstance(content, Mapping):
        raise _more_than_tensors(path, f"holds {type(content).__name__} in the place of named tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            raise _more_than_tensors(path, f"holds {type(tensor).__name__} under {name!r}")
    return dict(content)


def _is_plain(value: Any) -> bool:
    import torch

    if not isinstance(value, torch.Tensor) or value.is_quantized:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def _more_than_tensors(path: Path, what: str) -> SourceError:
    return SourceError(
        f"{path} {what}.",
        "Tensors under names, and nothing else. Nothing in it was run, and nothing is kept of it.",
        "Use a model that is published as safetensors; do not open this file by other means.",
    )


def _broken(path: Path, error: Exception) -> SourceError:
    lines = [line for line in str(error).splitlines() if line and not line.startswith(TORCH_ADVICE)]
    return SourceError(f"{path} cannot be read: {lines[0][:200] if lines else type(error).__name__}", "A whole file of weights, as torch.save writes it.",
                       "Copy or download that file again.")


def apart(state: Mapping[str, torch.Tensor], tied: bool) -> dict[str, torch.Tensor]:
    """Each tensor contiguous and in memory of its own, as safetensors has them.

    Of several names of the same tensor the first is kept, the embedding's before the head's: loading ties the others to it.
    tied: False where the config says that nothing is; each name then has a copy.
    """
    import torch

    made: dict[str, torch.Tensor] = {}
    whole, storages = set(), set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and tied and view in whole:
            continue
        shares = tensor.numel() and storage in storages
        tensor = tensor.detach()
        made[name] = tensor.clone(memory_format=torch.contiguous_format) if shares else tensor.contiguous()
        whole.add(view)
        storages.add(storage)
    return made
