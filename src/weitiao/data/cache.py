"""Encoded rows on disk, found again by what they were made of: a second run on the same rows begins at once.

    files' content, tokenizer, template, settings ── key ── CACHE/<key>/facts      labels, skipped rows, what a survey noted
                                                                       ids, begin, …  the columns of StoredRows, mapped
                                                                       begin-1, …     the same rows cut elsewhere
                                                         CACHE/<key>.same   under which key rows lie that another key asks for, and which cut

A stream that is not told the longest row cuts at that of its first block, and an ordinary run at that of all rows. Both cuts are kept,
since neither run knows the other's before all is read; ids and texts lie there once, but for the rows that are cut.

Nothing in it is trusted: every file is told whole by its length and checksum, and what is not is made anew. An entry is
renamed into place, so that it is whole or absent. Rows stand by the number of their file, not by its name: a run that goes on
from elsewhere names the same file otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from weitiao import trie
from weitiao.data import rows as reading
from weitiao.data.dataset import Dataset, load, refuse_idle, refuse_outside
from weitiao.data.gathered import LONG, Skipped
from weitiao.data.labels import Labels
from weitiao.data.rows.row import place_of, where_of
from weitiao.data.stored import COLUMNS, StoredRows
from weitiao.data.survey import Survey
from weitiao.data.templates import Template
from weitiao.errors import SourceError
from weitiao.settings.data import DataSettings, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_BYTES = 1 << 20  # of the rows' files: less is encoded before it is found
# Settings that say nothing of the rows' ids, or are told otherwise.
ELSEWHERE = {"train", "eval", "eval_share", "template", "max_tokens", "cache_gb", "streaming"}
PACKAGES = ("transformers", "tokenizers", "jinja2")
BLOCK = 1 << 24  # bytes that are checked in one go


@dataclass(frozen=True)
class Cache:
    """folder: where entries lie. most: their bytes; beyond that, those go that were not used for longest."""

    folder: Path
    most: int
    notify: Callable[[str], None] = lambda text: None

    def load(
        self, sources: Sequence[Source], settings: DataSettings, template: Template, model_limit: int, vocabulary: int, seed: int,
        max_tokens: int | None = None, task: str = "auto", labels: Labels | None = None, survey: Survey | None = None, **how: Any,
    ) -> Dataset:
        """As dataset.load, from the cache where it holds these rows; else they are put into it. how: what changes no row."""
        asked = Asked(sources, settings, template, model_limit, seed, max_tokens or settings.max_tokens, task, labels)

        def made(survey: Survey | None, folder: Path | None = None) -> Dataset:
            return load(sources, settings, template, model_limit, vocabulary, seed, max_tokens, task=task, labels=labels,
                        survey=survey, folder=folder, **how)

        if not self._can_keep(asked):
            return made(survey)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            find = partial(self._find, asked.key, asked.names, survey is not None)
            if not (found := find()):  # a stream may have the lock for as long as its training takes, and what is here be found meanwhile
                with self._alone(asked.key):
                    found = find() or self._make(asked, survey, made)
        except (OSError, NotImplementedError) as error:  # a full disk, a file system without locks
            self.cannot_keep(error)
            return made(survey)
        data, noted = found
        refuse_outside(data.rows, vocabulary)
        refuse_idle(data, settings)  # a run that cut them elsewhere refused other rows
        if survey is not None:
            survey.merge(noted)
        return data

    def _can_keep(self, asked: Asked) -> bool:
        return self.most > 0 and asked.can_be_told()

    # ---------------------------------------------------------------------- for rows that are encoded beside something else

    def cannot_keep(self, error: Exception) -> None:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        self.notify(f"Encoded rows cannot be kept for the next run: {reason}. This one goes on without.")

    def place(self) -> str | None:
        """A folder that lies on a disk, for files of a while; None if it cannot be had."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return str(self.folder)
        except OSError:
            return None

    def find(self, asked: Asked, max_tokens: int, task: str) -> Dataset | None:
        """The rows asked for, cut to so many tokens, if they are here; nobody is waited for."""
        found = self._find(asked.key_with(max_tokens, task), asked.names, surveyed=False) if self._can_keep(asked) else None
        return found and found[0]

    @contextlib.contextmanager
    def beside(self, asked: Asked) -> Iterator[Path | None]:
        """A folder to gather these rows in, for `keep`; None where another process encodes them, or they are not to be kept."""
        with contextlib.ExitStack() as stack:
            staging = None
            try:
                if self._can_keep(asked) and self._has_room(asked):
                    stack.enter_context(FileLock(self._lock(asked.key), timeout=0))
                    staging = stack.enter_context(self._staging(asked))
            except Timeout:  # another process is at them
                staging = None
            except (OSError, NotImplementedError) as error:  # a full disk, a file system without locks
                stack.close()
                self.cannot_keep(error)
                staging = None
            yield staging

    def _has_room(self, asked: Asked) -> bool:
        """False where all cuts were here before, and too much."""
        try:
            return _read_facts(self.folder / asked.key / "facts")["wanted"] <= self.most
        except (OSError, ValueError, KeyError):
            return True

    def keep(self, asked: Asked, cuts: Sequence[Dataset], noted: Survey | None, staging: Path) -> None:
        """What was gathered there becomes an entry, as if `load` had made it. cuts: the rows asked for; then the same, cut elsewhere."""
        if not asked.is_unchanged():
            return
        try:
            self._keep(asked, cuts, noted, staging)
        except OSError as error:
            self.cannot_keep(error)

    # ---------------------------------------------------------------------------------------------- finding

    def _find(self, key: str, names: Sequence[str], surveyed: bool) -> tuple[Dataset, Survey | None] | None:
        entry, cut = self.folder / key, 0
        try:
            if not entry.is_dir():
                same, cut = _same(self.folder / f"{key}.same")
                entry = self.folder / same
            facts = _read_facts(entry / "facts")
            if surveyed and not facts["survey"]:
                return None
            found = _from_facts(facts, cut, surveyed, names, lambda name: _whole(entry / name, **facts["arrays"][name]))
            os.utime(entry / "facts")
            return found
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None

    # ---------------------------------------------------------------------------------------------- making

    def _make(self, asked: Asked, survey: Survey | None, made: Callable[..., Dataset]) -> tuple[Dataset, Survey | None]:
        with self._staging(asked) as staging:
            noted = None if survey is None else Survey(survey.facts)
            data = made(noted, staging)
            self.keep(asked, [data], noted, staging)
            return data, noted

    @contextlib.contextmanager
    def _staging(self, asked: Asked) -> Iterator[Path]:
        """Whoever asks holds the key's lock."""
        self._clear_leftovers(asked.key)
        staging = self.folder / f"{asked.key}.partial-{os.getpid()}"
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # what is mapped from it stays

    def _clear_leftovers(self, key: str) -> None:
        """What processes left that were killed: those still at work hold the locks of theirs."""
        mine = self.folder / f"{key}.partial-{os.getpid()}-left"  # nobody waits for another's lock while files are deleted
        for leftover in list(self.folder.glob("*.partial-*")):
            with contextlib.suppress(OSError, NotImplementedError):  # of those that cannot be cleared, too
                if self._lock(leftover.name) != self._lock(key):
                    with FileLock(self._lock(leftover.name), timeout=0):
                        leftover = leftover.rename(mine)
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _keep(self, asked: Asked, cuts: Sequence[Dataset], noted: Survey | None, staging: Path) -> None:
        facts, arrays = _to_facts(cuts, noted, asked.names)
        size = wanted = _bytes(arrays)
        if wanted > self.most:  # then the rows asked for, without those cut elsewhere
            cuts = cuts[:1]
            facts, arrays = _to_facts(cuts, noted, asked.names)
            size = _bytes(arrays)
        if size > self.most:
            self.notify(f"Encoded, the rows take {size / 1e9:.1f} GB: too much to be kept (data.cache_gb).")
            return
        _write(facts | {"wanted": wanted}, arrays, staging)
        target = self.folder / asked.key
        shutil.rmtree(target, ignore_errors=True)
        os.rename(staging, target)
        for number, data in enumerate(cuts):
            for task in {asked.task, "classify" if data.labels else "answer"}:  # as a run that goes on asks
                if (same := asked.key_with(data.max_tokens, task)) != asked.key:
                    part = self.folder / f"{asked.key}.partial-{os.getpid()}"  # under the lock that is held
                    part.write_text(f"{asked.key} {number}", "ascii")
                    os.replace(part, self.folder / f"{same}.same")
        with contextlib.suppress(OSError):  # another process makes room too
            self._make_room(target)

    def _make_room(self, newest: Path) -> None:
        entries = [facts.parent for facts in self.folder.glob("*/facts")]
        by_use = sorted((entry for entry in entries if entry != newest), key=lambda entry: (entry / "facts").stat().st_mtime)
        total = sum(map(_size, entries))
        for entry in by_use:
            if total <= self.most:
                break
            total -= _size(entry)
            going = entry.with_name(f"{entry.name}.partial-{os.getpid()}")
            os.rename(entry, going)
            shutil.rmtree(going, ignore_errors=True)
        for same in self.folder.glob("*.same"):
            if not (told := _same(same)) or not (self.folder / told[0]).is_dir():
                same.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Of several runs, or processes of one, that want the same rows, one encodes them. The lock ends with its process."""
        lock = FileLock(self._lock(key))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.notify("These rows are being encoded by another process; waiting for it …")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _lock(self, key: str) -> Path:
        return self.folder / f"{key[:2]}.lock"


# ------------------------------------------------------------------------------------------------ what rows are made of


@dataclass(frozen=True, eq=False)
class Asked:
    """All that decides what dataset.load gives, made before a row is read. stamps: of the files then; None where there are none to be had."""

    sources: Sequence[Source]
    settings: DataSettings
    template: Template
    model_limit: int
    seed: int
    max_tokens: int | None
    task: str
    labels: Labels | None
    stamps: list[tuple[str, int, int]] | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamps", self._stamps_now())

    @cached_property
    def files(self) -> list[reading.LocalFiles] | None:
        """None where a source lies on a hub: nobody tells when it changes."""
        return self._files_now()

    def _files_now(self) -> list[reading.LocalFiles] | None:
        found = [reading.local_files(source.path, source.split) for source in self.sources]
        return None if None in found else found

    @property
    def names(self) -> list[str]:
        return [name for one in self.files for name in one.names]

    def _stamps_now(self) -> list[tuple[str, int, int]] | None:
        try:
            files = [file for one in self._files_now() or () for file in one.files]
            return [(str(file), status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]] or None
        except (OSError, SourceError):  # who reads them tells better
            return None

    def is_unchanged(self) -> bool:
        """Were the files left alone while they were read?"""
        return self.stamps is not None and self.stamps == self._stamps_now()

    def can_be_told(self) -> bool:
        """Are rows many, and known by their content, which is that of the stamps? A template that writes the date gives other ids tomorrow."""
        try:
            many = self.stamps and sum(size for _, size, _ in self.stamps) >= LEAST_BYTES
            return bool(many and "strftime_now" not in self.template.source and self.tokenizer and self.content and self.is_unchanged())
        except OSError:  # who reads them tells better
            return False

    @cached_property
    def key(self) -> str:
        return self.key_with(self.max_tokens, self.task)

    def key_with(self, max_tokens: int | None, task: str) -> str:
        settings = self.settings.model_dump(mode="json", exclude=ELSEWHERE)
        has_shares = any(source.share is not None for source in self.sources)
        facts = [
            _of_code(), [version(name) for name in PACKAGES], self.tokenizer,
            self.template.source, self.template.stop_id, self.template.begins_with_bos,
            settings, [source.model_dump(exclude={"path"}) for source in self.sources], self.content, self.seed if has_shares else None,
            self.model_limit, max_tokens, task, list(self.labels.as_dict().items()) if self.labels else None,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    @cached_property
    def content(self) -> list[Any]:
        return [(one.kinds, [_of_file(file) for file in one.files]) for one in self.files]

    @cached_property
    def tokenizer(self) -> list[Any] | None:
        return _of_tokenizer(self.template.tokenizer)


def _of_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _of_code() -> str:
    """Of what makes ids of rows: another version of it may make others."""
    told = hashlib.sha256()
    for file in sorted([*Path(__file__).parent.rglob("*.py"), Path(trie.__file__)]):
        told.update(file.read_bytes())
    return told.hexdigest()


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    kind = type(tokenizer)
    told = [f"{kind.__module__}.{kind.__qualname__}", len(tokenizer), sorted(tokenizer.special_tokens_map.items()),
            [(i, str(token), repr(token)) for i, token in sorted(tokenizer.added_tokens_decoder.items())],
            getattr(tokenizer, "split_special_tokens", False)]
    try:
        code = _of_file(Path(inspect.getfile(kind)))
        inner = getattr(tokenizer, "backend_tokenizer", None)
        return [*told, code, _of_saved(tokenizer) if inner is None else _of_fast(inner)]
    except Exception:  # a tokenizer of a model's own code, which cannot be written down
        return None


def _of_fast(inner: Any) -> str:
    parts = json.loads(inner.to_str())
    return hashlib.sha256(json.dumps(parts | {"truncation": None, "padding": None}).encode()).hexdigest()


def _of_saved(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return [_of_file(file) for file in sorted(Path(folder).rglob("*")) if file.is_file()]


# ------------------------------------------------------------------------------------------------ an entry's files


def _to_facts(cuts: Sequence[Dataset], noted: Survey | None, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    numbers, data = {name: i for i, name in reversed(list(enumerate(names)))}, cuts[0]
    facts = {
        "files": [numbers[name] for name in data.rows.files], "read": data.read, "labels": data.labels.as_dict() if data.labels else None,
        "cuts": [{"max_tokens": one.max_tokens, "cut": one.cut,
                  "skipped": [[*place_of(row.where, numbers), row.reason] for row in one.skipped]} for one in cuts],
        "survey": None,
    }
    arrays = {_column(name, cut): column for cut, one in enumerate(cuts) for name, column in one.rows.columns.items()}
    if noted is not None:
        facts["survey"], columns = noted.as_facts(numbers)
        arrays |= {f"survey-{name}": column for name, column in columns.items()}
    return facts, arrays


def _from_facts(
    facts: dict[str, Any], cut: int, surveyed: bool, names: Sequence[str], array: Callable[[str], np.ndarray],
) -> tuple[Dataset, Survey | None]:
    """array: a file's, by its name."""
    told = facts["cuts"][cut]
    rows = StoredRows.all({name: array(_column(name, cut)) for name in COLUMNS}, [names[i] for i in facts["files"]])
    skipped = [Skipped(where_of(names[file], line), reason) for file, line, reason in told["skipped"]]
    noted = None
    if surveyed:
        columns = {name.removeprefix("survey-"): array(name) for name in facts["arrays"] if name.startswith("survey-")}
        noted = Survey.from_facts(facts["survey"], columns, names)
    return Dataset(rows, skipped, told["max_tokens"], told["cut"], Labels.from_dict(facts["labels"]), facts["read"]), noted


def _column(name: str, cut: int) -> str:
    """The file of a column."""
    return f"{name}-{cut}" if cut and name not in LONG else name


def _write(facts: dict[str, Any], arrays: dict[str, np.ndarray], folder: Path) -> None:
    for name, array in arrays.items():
        if not (folder / name).exists():
            array.tofile(folder / name)
    told = {name: {"dtype": array.dtype.str, "length": len(array), "check": _check(array)} for name, array in arrays.items()}
    text = json.dumps(facts | {"arrays": told})
    (folder / "facts").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", "ascii")


def _same(file: Path) -> tuple[str, int] | None:
    """The key and the cut that it tells; None if it is torn."""
    try:
        key, cut = file.read_text("ascii").split()
        return key, int(cut)
    except (OSError, ValueError):
        return None


def _read_facts(file: Path) -> dict[str, Any]:
    check, text = file.read_text("ascii").split("\n", 1)
    if hashlib.sha256(text.encode()).hexdigest() != check:
        raise ValueError(f"{file} is torn")
    return json.loads(text)


def _whole(file: Path, dtype: str, length: int, check: int) -> np.ndarray:
    """A file's array, mapped."""
    if file.stat().st_size != length * np.dtype(dtype).itemsize:
        raise ValueError(f"{file} is torn")
    array = np.memmap(file, dtype, "r").view(np.ndarray) if length else np.zeros(0, dtype)
    if _check(array) != check:
        raise ValueError(f"{file} is torn")
    return array


def _check(array: np.ndarray) -> int:
    found, content = 0, memoryview(array).cast("B") if len(array) else b""
    for at in range(0, len(content), BLOCK):
        found = zlib.crc32(content[at : at + BLOCK], found)
    return found


def _bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
