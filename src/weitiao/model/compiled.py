"""C of our own, built by the machine's C compiler the first time it is needed: the files in `native/`.

What is built lies in weitiao's cache by the files' content, the compiler and the processor. Where there is no compiler, or where what
was built does not do what it should, PyTorch and the C library do the work: the same numbers, later. WEITIAO_COMPILE=0 forbids it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from weitiao.model.source.cache import cache_folder

NATIVE = Path(__file__).with_name("native")
LIBRARIES = {
    "kernels": ("attention.c", "elementwise.c", "tails.c", "vectors.h"),  # for processors with AVX-512
    "heap": ("heap.c",),  # for any
}
COMPILERS = ("gcc", "cc")
# No -ffast-math: what is no number has to stay none. -fopenmp is not for the link: its calls are
# answered by the library whose threads torch has started.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC")


@contextmanager
def apart() -> Iterator[None]:
    """A trial does not mix with what surrounds the first call: tensors without numbers, a checkpoint that counts what is saved, autocast."""
    with unset_fake_temporarily(), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), \
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


class NotBuilt(Exception):
    """Why PyTorch's kernels are taken, in a sentence."""


@functools.cache
def loaded(library: str = "kernels") -> ctypes.CDLL:
    """One of `LIBRARIES`.

    Raises:
        NotBuilt: no compiler, or what it made cannot be loaded.
    """
    if os.environ.get("WEITIAO_COMPILE") == "0":
        raise NotBuilt("WEITIAO_COMPILE=0 forbids to build it.")
    try:
        built = ctypes.CDLL(str(_built(library)))
    except OSError as error:
        raise NotBuilt(f"What {compiler()} built cannot be loaded: {error}.") from error
    return built


def off(trial: Callable[[torch.dtype], float], tolerances: Mapping[torch.dtype, float]) -> str | None:
    """In which type a trial differs by more than it may, in a sentence; None if in none."""
    for kind, tolerance in tolerances.items():
        worst = trial(kind)
        if not worst <= tolerance:  # a NaN is trouble too
            return f"What {compiler()} made of it is off by {worst:.1g} in {str(kind).removeprefix('torch.')}."
    return None


@functools.cache
def compiler() -> str:
    for name in (os.environ.get("CC"), *COMPILERS):
        if name and (found := shutil.which(name)):
            return found
    raise NotBuilt("No C compiler is here (gcc).")


def _built(library: str) -> Path:
    """The file of the library, built unless it lies in the cache."""
    named, files = compiler(), [NATIVE / name for name in LIBRARIES[library]]
    told = "\n".join((*(file.read_text("utf-8") for file in files), _run([named, "--version"]), " ".join(FLAGS), _processor()))
    target = cache_folder() / "built" / f"{library}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            parts = {file: Path(folder, f"{file.stem}.o") for file in files if file.suffix == ".c"}
            for file, part in parts.items():
                _run([named, *FLAGS, "-c", str(file), "-o", str(part)])
            whole = Path(folder, "whole.so")
            _run([named, "-shared", *map(str, parts.values()), "-o", str(whole), "-lm"])
            whole.replace(target)
    except OSError as error:
        raise NotBuilt(f"{target.parent} cannot be written to: {error.strerror}.") from error
    return target


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{command[0]} cannot be run: {error}.") from error
    if done.returncode:
        if refused := re.search("#error (.*)", done.stderr):
            raise NotBuilt(refused[1])
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[0]
        raise NotBuilt(f"{command[0]} ends with {done.returncode}: {said[:200]}")
    return done.stdout


def _processor() -> str:
    """What -march=native looks at: a cache may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.is_file() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(told))) or f"{platform.machine()} {platform.processor()}"
