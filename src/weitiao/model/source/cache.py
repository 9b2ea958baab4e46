"""weitiao's cache of models: a folder is made there once, and is whole or absent.

A conversion happens beside its target and is renamed into place:

    models/<key>.lock               held by the one run that converts; others wait, then find it finished
    models/<key>.partial-<pid>/     fetched and converted here; removed by the next run if this one is killed
    models/<key>/                   exists only after the rename
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from weitiao.errors import SourceError
from weitiao.model.source.request import Notify
from weitiao.model.source.whole import flaw_of, whole

# Words of any program's error -> what was found, what to do. Text, because torch, safetensors and pip raise their own types.
# {0} is the variable that moves the cache in question.
STORAGE_TROUBLE = {
    "No space left": ("The disk is full", "Make room, or set {0} (and TMPDIR, for pip) to another disk."),
    "not enough space": ("The disk is full", "Make room, or set {0} (and TMP, for pip) to another disk."),
    "quota exceeded": ("Your disk quota is used up", "Make room, or set {0} to another disk."),
    "Permission denied": ("A file cannot be opened", "Give yourself access to it, or set {0} to a folder of yours."),
    "Read-only file system": ("A file cannot be written", "Set {0} to a folder that can be written to."),
}


def cache_folder() -> Path:
    """Where converted models are kept: $WEITIAO_CACHE, else $XDG_CACHE_HOME/weitiao, else ~/.cache/weitiao."""
    if own := os.environ.get("WEITIAO_CACHE"):
        return Path(own).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "weitiao"


def converted(key: str, make: Callable[[Path], Path], notify: Notify) -> Path:
    """The folder `key` of the cache; if it isn't there yet, the one that `make(staging)` leaves in `staging`."""
    target = cache_folder() / "models" / key
    if not flaw_of(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target, notify):
        if flaw_of(target):  # else another run made it while this one waited
            _make(target, make)
    return target


@contextlib.contextmanager
def _alone(target: Path, notify: Notify) -> Iterator[None]:
    """Only one run at a time works on `target`. The lock ends with its process, however that ends."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notify(f"Another run is preparing {target.name}; waiting for it…")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(target: Path, make: Callable[[Path], Path]) -> None:
    for leftover in [target, *target.parent.glob(f"{target.name}.partial-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    staging = target.with_name(f"{target.name}.partial-{os.getpid()}")
    staging.mkdir()
    try:
        os.rename(whole(make(staging)), target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def plain(text: str) -> str:
    """`text` as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", text)


WHOLLY_HASHED = 2**30  # bytes


def fingerprint(path: Path) -> str:
    """Of the content up to 1 GiB. Above that of path, size and time of change: a huge file isn't read anew for every run."""
    if path.stat().st_size <= WHOLLY_HASHED:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return fingerprint_unread([path])


def fingerprint_unread(paths: list[Path]) -> str:
    """Of path, size and time of change of each."""
    facts = ((path, path.stat()) for path in paths)
    text = "|".join(f"{path}|{status.st_size}|{status.st_mtime_ns}" for path, status in facts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def trouble_with_storage(text: str, cache: str = "WEITIAO_CACHE") -> SourceError | None:
    for words, (found, next_step) in STORAGE_TROUBLE.items():
        if words in text:
            line = next(line.strip() for line in text.splitlines() if words in line)
            return SourceError(f"{found}: {line}", "", next_step.format(cache))
    return None


def reason(error: Exception) -> str:
    """The first line of the error at the bottom: that is the one which says why."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
