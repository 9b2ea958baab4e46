"""How long rows are, and what a limit cuts of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Lengths:
    """limit: the longest row in force. longest: tokens of each row uncut, int64. Rows by number: those dropped, cut in their
    one answer, cut to fewer turns, cut in front of a label, weighing 0. tokens, learned: as trained, over all turns."""

    limit: int
    longest: np.ndarray
    dropped: np.ndarray
    answer_cut: np.ndarray
    chat_cut: np.ndarray
    front_cut: np.ndarray
    weight_0: np.ndarray
    tokens: int
    learned: int

    @property
    def cut(self) -> int:
        return len(self.answer_cut) + len(self.chat_cut) + len(self.front_cut)

    def keeping(self, share: float) -> int:
        """The max_tokens under which this share of the rows stay whole."""
        return int(np.percentile(self.longest, 100 * share, method="higher")) if len(self.longest) else 0

    def histogram(self, bins: int = 12) -> list[tuple[int, int, int]]:
        """(from, up to and with, rows) by length, in steps of a round number."""
        if not len(self.longest):
            return []
        top = max(self.keeping(0.999), 8)
        raw = top / bins
        unit = 10 ** int(np.floor(np.log10(raw)))
        step = max(1, int(next(unit * k for k in (1, 2, 5, 10) if unit * k >= raw)))
        edges = list(range(0, top + step, step))
        counts = np.histogram((self.longest - 1) // step, bins=np.arange(len(edges)))[0] if len(edges) > 1 else []
        found = [(low + 1, low + step, int(count)) for low, count in zip(edges, counts)]
        beyond = int((self.longest > found[-1][1]).sum()) if found else 0
        return [*found, (found[-1][1] + 1, int(self.longest.max()), beyond)] if beyond else found
