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
import re
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
    # torch's own class for a GPU (RuntimeError of its allocator for a CPU), bitsandbytes', cuBLAS'
    WORDS = re.compile(r"can.t allocate memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
    WANTED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)

    @classmethod
    def of(cls, error: BaseException, next_step: str = "") -> OutOfMemory | None:
        """The same as a message, if it is what `error` tells."""
        text = str(error)
        if not (isinstance(error, MemoryError) or isinstance(error, RuntimeError) and cls.WORDS.search(text)):
            return None
        wanted = cls.WANTED.search(text)
        size = "" if not wanted else f"{int(wanted[1]) / 2**20:,.0f} MiB more were asked for" if wanted[2] == "bytes" else f"{wanted[1]} {wanted[2]} more were asked for"
        where = "The GPU's memory" if "CUDA" in text or "CUBLAS" in text else "Memory"
        return cls(f"{where} ran out{': ' + size if size else ''}.", "Expected as much to be free as `weitiao plan` tells for the same settings.",
                   next_step or "Less is needed with training.memory=balanced (or thrifty), with shorter rows (data.max_tokens), with model.quantize=nf4, and by smaller models.")


class TrainingStopped(WeitiaoError):
    pass


class Interrupted(WeitiaoError):
    def __init__(self, found: str, signal_number: int):
        super().__init__(found)
        self.exit_code = 128 + signal_number


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean …?` for the known name closest to `name`, or an empty string if none is close.

    A name that goes on where this one ends (adamw, adamw_torch) is closer than one that sounds alike.
    """
    known = list(known)
    longer = sorted((k for k in known if len(name) > 2 and k.startswith(name)), key=len)
    close = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else ""
