"""Is a model's folder whole? Every file that its weights need is there, and none of them is a pickle or a pointer.

A folder enters; what it lacks leaves, as a message that says what to do, or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from weitiao.errors import SourceError
from weitiao.model.source import pickled

# What belongs to a model's folder.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# What a folder without config.json may be instead, and what to do then. {0} is what was found.
MISTAKEN_FOLDERS = {
    "adapter_config.json": "It is an adapter. Name its base model here.",
    "*/config.json": "Did you mean {0.parent}?",
    "snapshots/*/config.json": "Did you mean {0.parent}?",
    "*.gguf": "Did you mean {0}?",
}
CONVERT_ADVICE = (
    "model.convert_pickle=true reads the tensors of pytorch_model*.bin and nothing else, and keeps them as safetensors."
)


def whole(folder: Path) -> Path:
    if flaw := flaw_of(folder):
        raise flaw
    return folder


def flaw_of(folder: Path) -> SourceError | None:
    """What a model folder lacks, or None if it is whole. The tokenizer is left to whoever loads it."""
    files = {entry.name: entry for entry in folder.iterdir() if entry.is_file()} if folder.is_dir() else {}
    if "config.json" not in files:
        return _no_config(folder)
    weights = {name: path for name, path in files.items() if name.endswith(".safetensors")}
    if not weights:
        return no_safetensors(str(folder), files)
    try:
        missing = sorted(_shards(files.get("model.safetensors.index.json")) - set(weights))
    except (ValueError, KeyError, AttributeError):
        return SourceError(
            f"{folder / 'model.safetensors.index.json'} cannot be read.",
            "JSON with a weight_map, as transformers writes it.",
            "Copy or download that file again.",
        )
    if missing:
        return SourceError(
            f"{folder} lacks {len(missing)} of its weight files, {missing[0]} the first.",
            "Every file that model.safetensors.index.json names.",
            "Copy or download the missing files.",
        )
    if pointers := [path for path in weights.values() if pickled.is_lfs_pointer(path)]:
        return SourceError(
            f"{pointers[0]} is a git-lfs pointer, not the weights.",
            "The weights themselves.",
            "Run `git lfs pull` in that folder.",
        )
    return None


def _no_config(folder: Path) -> SourceError:
    found = ((hint, match) for pattern, hint in MISTAKEN_FOLDERS.items() for match in sorted(folder.glob(pattern)))
    hint, match = next(found, ("Copy the whole model folder here.", folder))
    return SourceError(
        f"{folder} holds no config.json.",
        "A model folder holds config.json, *.safetensors and the tokenizer's files.",
        hint.format(match),
    )


def no_safetensors(owner: str, names: Iterable[str]) -> SourceError:
    unsafe = sorted(name for name in names if name.endswith(PICKLED))
    if not unsafe:
        return SourceError(
            f"{owner} holds no weights.", "config.json beside *.safetensors.", "Copy or download the weights too."
        )
    can_convert = any(fnmatch(name, pattern) for name in unsafe for pattern in pickled.WANTED)
    return SourceError(
        f"{owner} holds its weights as pickle only ({unsafe[0]}).",
        "safetensors only: opening a pickle can run any program that is hidden in it.",
        f"{CONVERT_ADVICE} Or use a revision that has *.safetensors." if can_convert else "Use a revision that has *.safetensors.",
    )


def _shards(index: Path | None) -> set[str]:
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index else set()
