"""A model that lies here: a folder is used where it is, a .gguf file is converted once. A path is never sent to a hub."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from weitiao.errors import SourceError
from weitiao.model.source.cache import converted, fingerprint, plain
from weitiao.model.source.gguf import from_gguf
from weitiao.model.source.ready import ready
from weitiao.model.source.request import ID, Request

# Starts with . / ~ or a drive letter, holds a backslash or two slashes, ends with a slash or a model file's suffix.
PATH = re.compile(r"[./~]|[A-Za-z]:|.*\\|.*/.*/|.*/$|.*\.(gguf|safetensors|bin|json)$", re.IGNORECASE)


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))


def is_path(name: str) -> bool:
    return bool(name) and (bool(PATH.match(name)) or Path(name.partition("/")[0]).is_dir())


def is_folder(name: str) -> bool:
    return is_path(name) and _path(name).is_dir()


def from_folder(request: Request) -> Path:
    """A folder is used where it lies, if it is whole."""
    folder = _path(request.name).absolute()
    return ready(folder, folder.name, request)


def from_file(request: Request) -> Path:
    """A .gguf file is converted into the cache, under the fingerprint of its content."""
    refuse_absent(request.name)
    path = _path(request.name).absolute()
    if path.suffix.lower() != ".gguf":
        raise SourceError(
            f"{path} is one file of a model.",
            "A model is a folder, or a single .gguf file.",
            f"Name the folder that holds it: {path.parent}",
        )
    key = f"gguf-{plain(path.stem)}-{fingerprint(path)}"
    return converted(key, lambda staging: from_gguf(path, staging, path.name, request.notify), request.notify)


def refuse_absent(name: str) -> None:
    """
    Raises:
        SourceError: there is no file at the path `name`.
    """
    if not _path(name).is_file():
        raise _no_such_path(name)


def _no_such_path(name: str) -> SourceError:
    close = _closest_path(_path(name.replace("\\", "/")))
    is_id_too = ID.fullmatch(name) is not None
    return SourceError(
        f"The model {name!r} is a path, and there is nothing at {_path(name).absolute()}.",
        "A folder with config.json, or a .gguf file. A path is never looked up on a hub.",
        (f"Did you mean {str(close)!r}?" if close else "Check the path.")
        + (f" For the model of the hub write 'hf:{name}'." if is_id_too else ""),
    )


def _closest_path(path: Path) -> Path | None:
    """`path` with the first part that doesn't exist replaced by the sibling spelled most like it."""
    if path.exists():
        return path
    parent = path.parent
    if not parent.exists():
        return _closest_path(parent) if parent != path else None
    close = difflib.get_close_matches(path.name, os.listdir(parent), n=1, cutoff=0.6) if parent.is_dir() else []
    return parent / close[0] if close else None
