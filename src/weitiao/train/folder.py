"""What a run folder holds, how it is written whole, and how it is read back.

    runs/NAME/
      config.yaml         the settings, all resolved: a run needs nothing else to go on
      environment.json    versions and machine
      data.json           fingerprints of the rows, and the rows that were set aside
      template.jinja      the template in force; template.json: its name, hash and stop ids
      metrics.jsonl       a line a step, and a line an evaluation: nothing in it depends on the clock
      proof.json          trie against plain rows, on the first batch
      checkpoints/N/      adapter/ or model/, trainer.pt, progress.json, manifest.json
      adapter/ or model/  what was learned: the best checkpoint's by the metric chosen
      check.json          what `weitiao check` would tell of rows and settings, as it was before the first step
      answers.jsonl       what it says to samples.prompts
      samples.jsonl, scores.json, summary.json, loss.png

A file is written under a temporary name and renamed. A checkpoint is staged in a folder of its own, listed with sizes and
hashes in a manifest, renamed, and only then are older ones removed; one that does not match its manifest is torn.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from weitiao import config
from weitiao.config import Settings
from weitiao.errors import RunError, nearest

STAGING = ".staging"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int

    def progress(self) -> dict[str, Any]:
        return json.loads((self.path / "progress.json").read_text("utf-8"))


@dataclass(frozen=True)
class RunFolder:
    path: Path

    # ------------------------------------------------------------------------------------------- making and opening

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """A run never writes over what is there."""
        if path.is_file() or (path.is_dir() and any(p.name != ".lock" for p in path.iterdir())):
            advice = f"Go on with it: weitiao train {path} --resume. Or choose another: --output NAME." \
                if (path / "config.yaml").is_file() else "Choose another: --output NAME."
            kind = "file" if path.is_file() else "folder"
            raise RunError(f"The {kind} {path} exists already.", "Expected a new folder; a run never writes over another.", advice)
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise RunError(f"{path} cannot be made: {above} is {'not to be written into' if above.is_dir() else 'no folder'}.", "Expected a place to write to.",
                           "Choose another: --output NAME.")

    def start(self, settings: Settings) -> None:
        """The last of a new run's first files: with it, the folder is a run."""
        self.write_text("config.yaml", config.to_yaml(settings))

    @staticmethod
    def open(path: Path) -> RunFolder:
        if not (path / "config.yaml").is_file():
            raise RunError(*_no_run(path))
        return RunFolder(path)

    def settings(self) -> Settings:
        return config.read(str(self.path / "config.yaml"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One training at a time; the lock falls with the process that holds it, however it ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.path} cannot be made: {error.strerror or error}.", "Expected a place to write to.",
                           "Choose another: --output NAME.") from None
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            with lock:
                yield
        except Timeout:
            raise RunError(f"Another training is at work in {self.path}.", "Expected one at a time.",
                           "Wait for it, stop it, or choose another folder with --output.") from None

    @property
    def is_worth_keeping(self) -> bool:
        """Is there anything to go on from?"""
        return bool(self.checkpoints() or self.read_metrics())

    # --------------------------------------------------------------------------------------------- small files

    def write_text(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, ensure_ascii=False, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text("utf-8"))

    def append_metrics(self, line: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line; a last one torn by a kill is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def cut_metrics(self, step: int) -> None:
        """Forget what came after `step`; a run that goes on writes it again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        self.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    # --------------------------------------------------------------------------------------------- checkpoints

    @property
    def checkpoints_folder(self) -> Path:
        return self.path / "checkpoints"

    def checkpoints(self) -> list[Checkpoint]:
        """Every finished checkpoint, oldest first, whole or torn."""
        if not self.checkpoints_folder.is_dir():
            return []
        found = [Checkpoint(p, int(p.name)) for p in self.checkpoints_folder.iterdir() if p.name.isdigit()]
        return sorted(found, key=lambda c: c.step)

    def newest_whole(self, tell: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that matches its manifest; `tell` hears of each torn one passed over."""
        for checkpoint in reversed(self.checkpoints()):
            defect = torn(checkpoint.path)
            if defect is None:
                return checkpoint
            tell(f"Checkpoint {checkpoint.step} is torn ({defect}); the one before it is used.")
        return None

    def save_checkpoint(self, step: int, write: Callable[[Path], None], keep: int, spare: set[int]) -> Checkpoint:
        """Stage, list, rename, rotate.

        Args:
            write: puts the checkpoint's files into the folder it is given.
            keep: how many of the newest stay; spare: steps that stay besides.

        Raises:
            OSError: the disk is full, say. Nothing half-written is left, and the older checkpoints stand.
        """
        staging = self.checkpoints_folder / f"{STAGING}-{step}"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True)
            _as_oserror(write, staging)
            write_text(staging / "manifest.json", json.dumps(_listing(staging), indent=2))
            for file in _files(staging):
                _sync(file)
            final = self.checkpoints_folder / str(step)
            if final.exists():  # a torn one that is made again
                shutil.rmtree(final)
            os.replace(staging, final)
        except OSError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        for old in self.checkpoints()[:-keep]:
            if old.step not in spare | {step}:
                shutil.rmtree(old.path, ignore_errors=True)
        return Checkpoint(final, step)

    def is_finished(self, step: int) -> bool:
        """Was all that a run leaves behind written after this step, and is what it learned still here?"""
        there = any((self.path / name).is_dir() for name in ("adapter", "model"))
        return there and (self.path / "summary.json").is_file() and step >= self.read_json("summary.json")["steps"]

    def forget_after(self, step: int) -> None:
        """Remove checkpoints of later steps: they are torn, or a run would not go on from this one."""
        for checkpoint in self.checkpoints():
            if checkpoint.step > step:
                shutil.rmtree(checkpoint.path, ignore_errors=True)

    def clear_staging(self) -> None:
        """What a killed run left half-written."""
        for folder in [*self.checkpoints_folder.glob(f"{STAGING}-*"), *self.path.glob(f"{STAGING}-*")]:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, checkpoint: Checkpoint, name: str) -> Path:
        """Copy what a checkpoint learned (adapter/ or model/) to the top of the run folder, whole or not at all."""
        staging = self.path / f"{STAGING}-{name}"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(checkpoint.path / name, staging)
        final = self.path / name
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staging, final)
        return final


def refuse_no_run(path: Path) -> None:
    """What `open_run` refuses at a glance.

    Raises:
        RunError: this is neither a run nor a checkpoint of one.
    """
    if _run_of_checkpoint(path) is None:
        RunFolder.open(path)


def _run_of_checkpoint(path: Path) -> RunFolder | None:
    """RUN of RUN/checkpoints/N, be that N there or not."""
    run = path.parent.parent
    return RunFolder(run) if path.parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


def open_run(path: str | Path) -> tuple[RunFolder, Path]:
    """(run, folder that holds adapter/ or model/) for RUN or RUN/checkpoints/N.

    Raises:
        RunError: there is no run there, it has learned nothing yet, or the checkpoint is torn.
    """
    path = Path(path)
    if run := _run_of_checkpoint(path):
        if not path.is_dir():
            steps = ", ".join(str(c.step) for c in run.checkpoints())
            raise RunError(f"There is no checkpoint {path.name} in {run.path}.", f"It has {steps or 'none'}.")
        defect = torn(path)
        if defect:
            raise RunError(f"{path} is torn: {defect}.", next_step="Use the run itself or another checkpoint.")
        return run, path
    run = RunFolder.open(path)
    if any((path / name).is_dir() for name in ("adapter", "model")):
        return run, path
    whole = run.newest_whole(lambda message: None)
    if whole is None:
        raise RunError(f"{path} has learned nothing yet.", "Expected a finished run or a checkpoint in it.",
                       f"Go on with it: weitiao train {path} --resume.")
    tell_unfinished(run.path, whole.step)
    return run, whole.path


@functools.cache  # once a process, however often it is opened
def tell_unfinished(path: Path, step: int) -> None:
    """On stderr: stdout may be an answer."""
    print(f"{path} has not finished; what it had learned by step {step} is taken. If it was stopped, go on with it: weitiao train {path} --resume", file=sys.stderr)


def free_name(parent: Path, stem: str) -> Path:
    """parent/stem, or parent/stem-2, -3, … where that is taken."""
    candidate, n = parent / stem, 1
    while candidate.exists():
        n += 1
        candidate = parent / f"{stem}-{n}"
    return candidate


def torn(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest, or None."""
    try:
        listed = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return "its manifest.json is missing or broken"
    for name, facts in listed.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes, not {facts['bytes']:,}"
        if _sha256(file) != facts["sha256"]:
            return f"{name} does not match its hash"
    return None


def refuse_unwritable(path: Path, such_as: str) -> None:
    """What is written at the end of the work is refused before it. such_as: a name for such a file.

    Raises:
        RunError: its folder is missing, it is a folder itself, or may not be written.
    """
    if path.is_dir():
        raise RunError(f"{path} is a folder.", "Expected the name of a file to write.", f"Name one in it, such as {path / such_as}.")
    if not path.parent.is_dir():
        raise RunError(f"{path} cannot be written: there is no folder {path.parent}.", "", f"Make it (mkdir -p {path.parent}), or give another path.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RunError(f"{path} cannot be written: Permission denied.", "", "Give another path.")


def write_asked(path: Path, text: str) -> None:
    """A file that a person named, whole or not at all.

    Raises:
        RunError: it cannot be written there.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}.", "Expected room and the right to write there.",
                       "Give another path, or make room.") from error


def write_text(path: Path, text: str) -> None:
    """A whole file or none: written beside, synced, renamed."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _as_oserror(write: Callable[[Path], None], folder: Path) -> None:
    """Run `write`; safetensors and torch report a full disk by errors of their own."""
    from safetensors import SafetensorError

    try:
        write(folder)
    except SafetensorError as error:
        raise OSError(str(error).splitlines()[0]) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        raise OSError(f"torch could not write the file whole; is the disk full? ({str(error).splitlines()[0]})") from error


def _no_run(path: Path) -> tuple[str, str, str]:
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        return f"There is no run folder {path}.", "Expected a folder that `weitiao train` has made.", nearest(path.name, siblings)
    if run := _run_of_checkpoint(path):
        return f"{path} is a checkpoint.", "Expected its run folder.", f"Give {run.path}: a run goes on from its newest checkpoint."
    return f"{path} is no run folder: it has no config.yaml.", "Expected a folder that `weitiao train` has made.", ""


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in _files(folder)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(file: Path) -> None:
    """Down to the disk before the rename, so that a power cut cannot leave a listed file empty."""
    descriptor = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
