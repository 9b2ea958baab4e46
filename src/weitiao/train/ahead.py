"""What the next step needs is made while this one computes: by one thread, one step ahead.

    main      step 1 ────── step 2 ────── step 3 ──
    thread    2 ──          3 ──          4 ──
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Ahead:
    """make: a step's number -> what it needs; a function of nothing else that steps change. last: the last step there is.

    An error of `make` is raised where its step asks. Leaving ends the thread, with at most one step made for nothing.
    """

    def __init__(self, make: Callable[[int], Any], last: int):
        self.make, self.last = make, last
        self.waiting: dict[int, Future] = {}

    def __enter__(self) -> Ahead:
        self.thread = ThreadPoolExecutor(1, "ahead")
        return self

    def __exit__(self, *_: Any) -> None:
        self.thread.shutdown(cancel_futures=True)
        self.waiting.clear()

    def __call__(self, step: int) -> Any:
        """What `step` needs; the next one is begun."""
        mine = self.waiting.pop(step, None)
        made = mine.result() if mine else self.make(step)
        if step < self.last:
            self.waiting = {step + 1: self.thread.submit(self.make, step + 1)}
        return made
