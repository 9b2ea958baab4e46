"""What a user can get wrong, as one outline. Mistakes of the programmer are asserts.

WeitiaoError             one message, no traceback; carries the exit code
├── SettingError         a setting that is unknown, out of bounds, or contradicts another
├── SourceError          a model or data set that is not there, or cannot be read or fetched
├── RowError             rows that cannot be read or cannot teach; names file and line
├── RunError             a run folder that is missing, busy, torn, or does not fit what is asked
├── TemplateError        a chat template that is unknown or refuses the conversation
├── OutOfMemory          what torch or Python say when they get no more
├── TrainingStopped      a run that had to end early: a loss or weight that is not finite, a full disk
└── Interrupted          a signal ended a run in good order; carries the shell's own exit code for it

Each says what was found, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
import errno
import re
import signal
from collections.abc import Iterable


class WeitiaoError(Exception):
    """A mistake that a person can mend.

    Args:
        found: what was met, with the file and row where there is one.
        expected: what would have been right.
        next_step: what to do now.
    """

    exit_code = 2

    def __init__(self, found: str, expected: str = "", next_step: str = ""):
        self.found, self.expected, self.next_step = found, expected, next_step
        super().__init__("\n".join(line for line in (found, expected, next_step) if line))


class SettingError(WeitiaoError):
    pass


class SourceError(WeitiaoError):
    pass


class RowError(WeitiaoError):
    pass


class RunError(WeitiaoError):
    pass


class TemplateError(WeitiaoError):
    pass


class OutOfMemory(WeitiaoError):
    # of torch for a CPU (Linux, Windows), for GPUs, of CUDA's libraries, of the C library, of C++
    WORDS = re.compile(r"(can.?t|cannot) allocate memory|out of memory|not enough memory|STATUS_ALLOC_FAILED|bad_alloc", re.IGNORECASE)
    WANTED = re.compile(r"tried to allocate ([\d.]+ ?[KMGT]iB|\d+(?= bytes))", re.IGNORECASE)
    GPU = re.compile("CUDA|CUBLAS|CUDNN|HIP|MPS|XPU")

    @classmethod
    def of(cls, error: BaseException, next_step: str = "Close what else takes memory, or take a smaller model.") -> OutOfMemory | None:
        """The same as a message, if it is what `error` tells."""
        text = str(error)
        told = isinstance(error, RuntimeError) and cls.WORDS.search(text) or isinstance(error, OSError) and error.errno == errno.ENOMEM
        if not (told or isinstance(error, MemoryError)):
            return None
        size = ""
        if wanted := cls.WANTED.search(text):
            size = f": {wanted[1] if wanted[1].endswith('B') else f'{int(wanted[1]) / 2**20:,.3g} MiB'} more were asked for"
        return cls(f"{'The GPU' if cls.GPU.search(text) else 'This machine'} ran out of memory{size}.",
                   "Expected as much to be free as this takes; `weitiao plan` tells what a training does.", next_step)


class TrainingStopped(WeitiaoError):
    pass


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a command as Ctrl-C does, what is half made put away, under the shell's own code for it."""


class Interrupted(WeitiaoError):
    """Ended by a signal: its number, or what it raised."""

    def __init__(self, found: str, by: int | KeyboardInterrupt):
        super().__init__(found)
        if isinstance(by, KeyboardInterrupt):
            by = signal.SIGTERM if isinstance(by, Terminated) else signal.SIGINT
        self.exit_code = 128 + by


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean …?` for the known name closest to `name`, or an empty string if none is close.

    A name that goes on where this one ends (adamw, adamw_torch) is closer than one that sounds alike.
    """
    known = list(known)
    longer = sorted((k for k in known if len(name) > 2 and k.startswith(name)), key=len)
    close = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else ""
