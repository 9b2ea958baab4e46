"""Rows that are learned from while those behind them are still being encoded (data.streaming).

    a thread    block 1   block 2   block 3   block 4 …        4,096 rows of the files each: encoded, cut, checked, published
    the steps   window 1  window 2 (four times as long) …      4,096 rows that can teach, 16,384, …: each in an order of its own

Which row is learned in which step is a function of rows, settings and seed: a step waits for the window that it takes rows from
(train/loop.py). What wants all rows, the longest one in force and the survey, is found in the first block. Ids and texts lie in
a file that goes with the process; some 64 bytes a row stay in memory.

What is encoded is also gathered as an ordinary run does it, and handed to the cache when all of it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from weitiao.data.cache import Asked, Cache
from weitiao.data.dataset import Dataset, Encoding, Mixed, labels_in, refuse_idle, refuse_if_too_many, skipped_summary
from weitiao.data.encoded import CHUNK
from weitiao.data.gathered import LONG, Gathered, Part, Skipped
from weitiao.data.stored import COLUMNS, StoredRows, TrainingRow
from weitiao.data.survey import Survey
from weitiao.data.templates import Template
from weitiao.errors import RowError, SettingError, SourceError, WeitiaoError
from weitiao.settings.data import DataSettings, Source

BLOCK = 4096  # rows of the files that are published together


def begin(
    cache: Cache, sources: Sequence[Source], settings: DataSettings, template: Template, model_limit: int, vocabulary: int, seed: int,
    task: str, survey: Survey,
) -> tuple[Dataset, Streamed]:
    """The first block, as dataset.load would give it alone, and all rows, which begin with it. survey: takes note of the block.

    Raises:
        RowError, SourceError: the first block cannot be read or learned from.
        SettingError: the labels would not be known before all rows are read.
    """
    asked = Asked(sources, settings, template, model_limit, seed, settings.max_tokens, task, None)  # before a row is read
    mixed = Mixed(sources, settings, seed)
    if not settings.labels and (task == "classify" or (task == "auto" and "label" in mixed.formats)):
        raise SettingError("data.streaming=true begins to learn before all rows are read, and those to come may have labels that the first do not.",
                           "Expected all labels by name in data.labels, such as data.labels='[neg, pos]'.",
                           "Name them, or leave data.streaming out; task=answer learns them as text.")
    encoding = Encoding.of(mixed, settings, template, model_limit, vocabulary, labels_in(task, mixed, settings, template), survey, beside=True)
    parts = list(islice(encoding.parts, BLOCK // CHUNK))
    for part in parts:
        survey.merge(part.survey)
    first = encoding.dataset(_together(parts))
    refuse_idle(first, settings)
    return first, Streamed(encoding, parts, first, cache, asked, survey.another())


def _together(parts: Sequence[Part]) -> Gathered:
    read = Gathered(None)
    for part in parts:
        read.add(part)
    return read


class GivenUp(Exception):
    """Nobody waits any more for rows that are to come."""


class Streamed:
    """Rows by their number: from 0 as they stand in the files, those left out that cannot teach.

    Args:
        parts: the first block's; encoding: where more come from. first: the block, cut.
        asked, noted: under what the cache keeps all rows, and an empty survey for it.
    """

    def __init__(self, encoding: Encoding, parts: Sequence[Part], first: Dataset, cache: Cache, asked: Asked, noted: Survey):
        self.encoding, self.cache, self.asked, self.noted = encoding, cache, asked, noted
        self.waiting = list(parts)  # that are gathered for the cache as soon as it is known whether it wants them
        self.max_tokens = first.max_tokens
        self.skipped: list[Skipped] = list(first.skipped)
        self.read = self.first_rows = first.read  # rows of the files
        self.blocks: list[Callable[[], StoredRows]] = [lambda: first.rows]
        self.starts = [0, len(first)]  # the number of each block's first row, and of the next one's
        self.error: WeitiaoError | None = None
        self.whole = self.ended = self.stopped = False  # are all rows there? will no more come? were no more asked for?
        self.changed = threading.Condition()
        self._digests: dict[int, str] = {}

    # ------------------------------------------------------------------------------------------- what a step asks for

    def wait(self, count: int) -> int:
        """`count`, as soon as there are so many rows; or how many there are in all.

        Raises:
            WeitiaoError: there will not be so many, for a row before cannot be read, or too many cannot teach.
            GivenUp: by another thread, or a signal.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.starts[-1] >= count or self.whole or self.ended or self.stopped)
            if self.starts[-1] < count and not self.whole:
                if self.stopped:  # before an error: whoever stops us may stop the encoders too
                    raise GivenUp
                if self.error:
                    raise self.error
            return min(count, self.starts[-1])

    def __getitem__(self, i: int) -> TrainingRow:
        """A row that was waited for."""
        block = bisect_right(self.starts, i) - 1
        return self.blocks[block]()[int(i) - self.starts[block]]

    def digest(self, count: int) -> str:
        """Of the first `count` rows, which were waited for: that of StoredRows."""
        if count not in self._digests:
            told = hashlib.sha256()
            for start, rows in zip(self.starts[: bisect_right(self.starts, count - 1)], self.blocks):
                rows().of(slice(count - start)).tell(told)
            self._digests[count] = told.hexdigest()
        return self._digests[count]

    # ---------------------------------------------------------------------------------------------- who encodes them

    @contextlib.contextmanager
    def encoding_beside(self, notify: Callable[[str], None]) -> Iterator[None]:
        """In here the rest is encoded. notify: hears when all is."""
        thread = threading.Thread(target=self._encode, args=(notify,), name="encoding", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.give_up()
            thread.join()

    def give_up(self) -> None:
        """No more rows are wanted than there are."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def told(self) -> str:
        """How far it is; then which rows cannot teach."""
        count = f"All {self.read:,} rows are encoded" if self.whole else f"{self.read:,} rows were encoded, and the others not read"
        return f"{count}: {self.starts[-1]:,} can teach." + (f" Skipped:\n{skipped_summary(self.skipped)}" if self.skipped else "")

    def _encode(self, notify: Callable[[str], None]) -> None:
        try:
            self._take_known() or self._take_rest()
        except WeitiaoError as error:
            self.error = error
        except Exception as error:  # a full disk, say; whoever waits for these rows must not wait for ever
            self.error = SourceError(f"The rows behind the first {self.read:,} could not be encoded: {type(error).__name__}: {error}")
            self.error.__cause__ = error
        finally:
            self.encoding.parts.close()
            self.waiting = self.noted = None
            with self.changed:
                self.ended = True
                self.changed.notify_all()
        if self.whole:
            notify(self.told())

    def _take_known(self) -> bool:
        """From the cache, where an earlier run left them as they are wanted."""
        classified = self.encoding.labels is not None
        known = self.cache.find(self.asked, self.max_tokens, "classify" if classified else "answer")
        if known:
            rest = known.rows.of(slice(self.starts[-1], None))
            self.skipped, self.read = known.skipped, known.read
            self._refuse_if_too_many()
            self._publish(lambda: rest, len(rest))
            self._all_are_there()
        return known is not None

    def _take_rest(self) -> None:
        spill = Spill(self.cache.place())
        with contextlib.ExitStack() as beside:
            staging = beside.enter_context(self.cache.beside(self.asked))
            all_of_it = self._gather(Gathered(staging) if staging else None, self.waiting, beside)
            while not self.stopped and (parts := list(islice(self._until_stopped(), BLOCK // CHUNK))):
                all_of_it = self._gather(all_of_it, parts, beside)
                data = self.encoding.dataset(_together(parts), self.max_tokens)
                self.skipped += data.skipped
                self.read += data.read
                self._refuse_if_too_many()
                self._publish(spill.put(data.rows), len(data))
            if not self.stopped:
                self._all_are_there()
                self._keep(all_of_it)

    def _refuse_if_too_many(self) -> None:
        try:
            refuse_if_too_many(self.skipped, self.read, self.encoding.settings)
        except RowError as error:
            told = "" if self.encoding.settings.max_tokens or "cut away" not in error.found else \
                f"The longest row in force, {self.max_tokens} tokens, is told from the first {self.first_rows:,} rows: give data.max_tokens. "
            raise RowError(error.found, error.expected, told + error.next_step) from error

    def _until_stopped(self) -> Iterator[Part]:
        for part in self.encoding.parts:
            if self.stopped:
                return
            yield part

    def _gather(self, all_of_it: Gathered | None, parts: Sequence[Part], beside: contextlib.ExitStack) -> Gathered | None:
        """`all_of_it` and these parts, for the cache; None as soon as they cannot be kept: beside, what holds folder and lock, is closed then."""
        try:
            for part in parts if all_of_it else ():
                all_of_it.add(part)
                self.noted.merge(part.survey)
            return all_of_it
        except OSError as error:  # a full disk
            self.cache.cannot_keep(error)
            beside.close()
            return None

    def _keep(self, all_of_it: Gathered | None) -> None:
        try:
            if all_of_it:
                cuts = self.encoding.datasets(all_of_it, self.asked.max_tokens, self.max_tokens)
                self.cache.keep(self.asked, cuts, self.noted, all_of_it.folder)
        except Exception as error:  # all rows are there: whatever fails concerns the next run alone
            self.cache.cannot_keep(error)

    def _publish(self, rows: Callable[[], StoredRows], count: int) -> None:
        if count:
            with self.changed:
                self.blocks.append(rows)
                self.starts.append(self.starts[-1] + count)
                self.changed.notify_all()

    def _all_are_there(self) -> None:
        with self.changed:
            self.whole = True
            self.changed.notify_all()


class Spill:
    """The long columns of blocks, one behind the other in files that have no name and go with the process. folder: where they lie."""

    def __init__(self, folder: str | None):
        self.files = {name: tempfile.TemporaryFile(dir=folder) for name in LONG}
        self.maps = {name: np.zeros(0, COLUMNS[name]) for name in LONG}

    def put(self, rows: StoredRows) -> Callable[[], StoredRows]:
        """Rows -> who reads them back."""
        ends = {}
        begins = {name: file.tell() // np.dtype(COLUMNS[name]).itemsize for name, file in self.files.items()}
        for name, file in self.files.items():
            file.write(rows.columns[name].data)
            file.flush()
            ends[name] = begins[name] + len(rows.columns[name])
        short = {name: column for name, column in rows.columns.items() if name not in LONG}

        def read() -> StoredRows:
            return replace(rows_without, columns=short | {name: self._mapped(name, ends[name])[begins[name] :] for name in LONG})

        rows_without = replace(rows, columns=short)
        return read

    def _mapped(self, name: str, end: int) -> np.ndarray:
        """A column up to there."""
        found = self.maps[name]
        if len(found) < end:  # mapped as far as it is written by now, for those who ask next
            found = np.frombuffer(mmap.mmap(self.files[name].fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            found = self.maps[name] = found[: len(found) // np.dtype(COLUMNS[name]).itemsize * np.dtype(COLUMNS[name]).itemsize].view(COLUMNS[name])
        return found[:end]
