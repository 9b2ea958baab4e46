"""Chunks of rows -> what is made of each, by several processes, in their order."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from weitiao.errors import SourceError, WeitiaoError

MOST_WORKERS = 8
BEHIND = 5  # how nice a process is that works beside a training


def usual_workers() -> int:
    """One a core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def in_order(chunks: Iterator[tuple[Any, ...]], work: Callable[..., Any], workers: int, beside: bool = False) -> Iterator[Any]:
    """`work` of each chunk's items, in the order of the chunks. No more chunks are read than the processes are about to take.

    Args:
        beside: something else goes on meanwhile. The processes give way to it, be it one alone, and Ctrl-C is not for them.

    Raises:
        SourceError: a process was ended from outside.
    """
    if workers == 1 and not beside:
        yield from (work(*chunk) for chunk in chunks)
        return
    # A fork has the tokenizer at once; elsewhere it is sent to each process as it starts.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work, beside))
    waiting: deque[Any] = deque()
    errors: list[WeitiaoError] = []
    try:
        for chunk in _up_to_an_error(chunks, errors):
            waiting.append(pool.submit(_work, *chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if errors:
            raise errors[0]
    except BrokenProcessPool as error:
        raise SourceError("A process that read rows was ended from outside, most likely for want of memory.", "",
                          "Try again with other programs closed; `weitiao check --workers 1` reads in one process.") from error
    finally:
        # Not future.cancel(): of Python 3.11.2, a pool whose last chunks are cancelled so waits for them for ever (cpython 94440).
        pool.shutdown(cancel_futures=True)


def _up_to_an_error(chunks: Iterator[Any], errors: list[WeitiaoError]) -> Iterator[Any]:
    """What was read before a row that cannot be comes out first, however many processes there are."""
    try:
        yield from chunks
    except WeitiaoError as error:
        errors.append(error)


def _begin(work: Callable[..., Any], beside: bool) -> None:
    global _work_of_all
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a pool ends its processes by it
    if beside:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(os, "nice"):
            os.nice(BEHIND)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    gc.freeze()  # nor does each go through, and so copy, what they share of the memory
    gc.set_threshold(100_000)  # a chunk's objects are many and no rings
    _work_of_all = work


def _end_with_parent() -> None:
    """A parent that is killed tells nobody, and a pool's processes wait for chunks from each other's end of the pipe for ever.

    Its end is that of a pipe that it alone writes into. Forked processes hold those of the ones before them: the last ends first.
    """
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(*chunk: Any) -> Any:
    return _work_of_all(*chunk)
