"""Rows as the model sees them, token by token, on a terminal.

    rows.jsonl:1 · 24 tokens, 5 learned · ends with <|im_end|>
      <|im_start|>¦user¦⏎¦
      What¦·is¦·1¦?¦<|im_end|>¦⏎¦
      <|im_start|>¦assistant¦⏎
    ▌ ⟦It¦·is¦·1¦.¦<|im_end|>⟧

With colours a token is told from the next by its underline and learned ones are green, so ¦ ⟦ ⟧ are left out. Lines are
broken by the cells they take: a Chinese character has two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path as File
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from weitiao.data.dataset import Dataset
from weitiao.data.stored import TrainingRow
from weitiao.data.findings import Finding
from weitiao.data.spelling import MARKS, Piece, Spelling, visible
from weitiao.data.templates import Template
from weitiao.screen import Screen
from weitiao.train.folder import write_asked
from weitiao.train.paths import Path, Stretch, choose, paths_of, row_header, shared_note, turn_header
from weitiao.train.show_html import html_page

MOST_TOKENS = 120  # of one stretch that is given
MORE_LEARNED = 4  # times as many, where it is learned
LEAST_FOLDED = 8  # shared tokens; fewer are shown
WIDEST = 120
COLUMN = 19  # cells of a token with its id: four in 80
SMALL = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
LINE_END = "\n"
GAP = "   "  # in the legend

# what a token is -> rich style
STYLES = {
    "shared": "dim", "given": "", "special": "magenta", "learned": "green", "learned special": "bold green",
    "stop": "bold reverse green", "weight": "yellow", "count": "cyan",
}

# sign or style, what it says; with colours, without them
LEGENDS = {
    True: (("learned", "learned"), ("stop", "learned stop"), ("given", "given"), ("special", "<special>"),
           ("shared", "shared with an earlier row, computed once"), ("given", "underlined in turn: token by token")),
    False: (("given", "⟦learned⟧"), ("given", "¦ between tokens"), ("given", "⋮ shared with an earlier row, computed once")),
}
SIGNS = (("given", "· space"), ("given", "⏎ line break"), ("given", "→ tab"), ("given", "字₃ a character in 3 tokens"))

Part = tuple[str, str]  # a sign that is not broken, its style


def show(
    data: Dataset, template: Template, count: int, screen: Screen, html: File | None = None, findings: Sequence[Finding] = (),
    ids: bool = False, total: int | None = None, on_screen: bool = True,
) -> None:
    """The first rows, and two that share much if those don't; also as a page, if its place is given.

    Args:
        total: how many rows there are, where the data are the first of them. on_screen: False for a page alone.

    Raises:
        RunError: the page cannot be written.
    """
    rows = choose(data.rows, count)
    if on_screen:
        show_rows(rows, template, screen, ids=ids)
    if html:
        write_asked(html, html_page(rows, template, f"{len(rows)} of {total or len(data):,} rows, token by token", findings))
        screen.tell(f"\nThe same as a page: {html}" if on_screen else f"\n{len(rows)} rows, token by token, as a page: {html}")


def show_rows(
    rows: Sequence[TrainingRow], template: Template, screen: Screen, most_tokens: int = MOST_TOKENS, ids: bool = False,
) -> None:
    """Each row's paths, and at the end how many nodes of the trie they are.

    Args:
        most_tokens: of a stretch that is given; its middle is folded beyond that, that of a learned one beyond four times as many.
        ids: each token with its id, in columns.
    """
    if screen.quiet:
        return
    for line in Page(template, screen.console, most_tokens, ids).lines(rows):
        screen.console.print(line, soft_wrap=True)  # they are as wide as they may be


class Page:
    """Rows -> lines that fit a console."""

    def __init__(self, template: Template, console: Any, most_tokens: int, ids: bool):
        self.console, self.most_tokens, self.ids = console, most_tokens, ids
        self.spelling, self.stop_id = Spelling(template.tokenizer), template.stop_id
        self.width = min(console.width, WIDEST)
        self.coloured = console.is_terminal and not console.no_color and console.color_system is not None

    def lines(self, rows: Sequence[TrainingRow]) -> Iterator[Text]:
        by_row, totals = paths_of(rows)
        yield from self.legend()
        for paths in by_row:
            yield Text()
            yield from self.wrapped(Text(row_header(paths, self.spelling, self.stop_id), "bold"))
            for path in paths:
                if path.turns > 1:
                    yield from self.wrapped(Text(turn_header(path), "italic"))
                yield from self.path(path)
        yield Text()
        yield from self.wrapped(Text(totals.text(), "bold"))

    def legend(self) -> Iterator[Text]:
        lines = [Text()]
        for kind, words in (*LEGENDS[self.coloured], *SIGNS):
            if lines[-1] and lines[-1].cell_len + len(GAP) + cell_len(words) > self.width:
                lines.append(Text())
            lines[-1].append(GAP if lines[-1] else "").append(words, STYLES[kind])
        for line in lines:
            yield from self.wrapped(line)

    def wrapped(self, text: Text) -> Iterator[Text]:
        for line in text.wrap(self.console, self.width):
            line.rstrip()
            yield line

    def path(self, path: Path) -> Iterator[Text]:
        writer = Writer(self.width)
        stretches = path.stretches(self.spelling)
        for stretch, following in zip(stretches, [*stretches[1:], None], strict=True):
            if stretch.kind == "shared" and len(stretch) >= LEAST_FOLDED:
                writer.note(shared_note(path, stretch))
            else:
                self.stretch(writer, stretch, following)
        return writer.lines()

    def stretch(self, writer: Writer, stretch: Stretch, following: Stretch | None) -> None:
        learned = stretch.kind == "learned"
        first, hidden, last = stretch.folded(self.most_tokens * (MORE_LEARNED if learned else 1))
        if stretch.weight not in (0.0, 1.0):
            writer.add([(f"×{stretch.weight:.3g}{' ' if self.coloured else ''}", STYLES["weight"])], learned)
        parts = self.columns(stretch, first + last) if self.ids else self.running(stretch, first + last, following)
        for place, piece in enumerate(parts):
            if hidden and place == len(first) or self.ids and place == 0:
                writer.end_line()
            if hidden and place == len(first):
                writer.note(f"… {hidden:,} more tokens …")
            writer.add(piece, learned)
        if self.ids:
            writer.end_line()

    def running(self, stretch: Stretch, pieces: Sequence[Piece], following: Stretch | None) -> Iterator[list[Part]]:
        """Tokens as the text they are, with their boundaries."""
        learned = stretch.kind == "learned"
        for place, piece in enumerate(pieces):
            opening = "⟦" if learned and place == 0 else ""
            closing = "¦"
            if place == len(pieces) - 1:
                closing = "⟧" if learned else "" if following and following.kind == "learned" else "¦"
            parts = list(self.signs(piece, self.style(stretch, piece, underlined=place % 2 == 1)))
            if not self.coloured:
                parts.insert(len(parts) - (parts[-1][0] == LINE_END), (closing, ""))
                parts.insert(0, (opening, ""))
            yield parts

    def columns(self, stretch: Stretch, pieces: Sequence[Piece]) -> Iterator[list[Part]]:
        """`id piece`, each token in a column; a wide one takes several."""
        for piece in pieces:
            style = self.style(stretch, piece, underlined=False)
            for part, id in enumerate(piece.ids, 1):
                count = f" {part}/{len(piece.ids)}" if len(piece.ids) > 1 else ""
                parts = [(f"{id:>6} ", "dim"), *((sign, style) for sign in visible(piece.text)), (count, STYLES["count"])]
                cells = sum(cell_len(sign) for sign, _ in parts)
                yield [*parts, (" " * (COLUMN - cells % COLUMN), "")]

    def signs(self, piece: Piece, style: str) -> Iterator[Part]:
        """A piece as it can be seen; a line ends behind its line breaks."""
        for place, sign in enumerate(visible(piece.text)):
            yield sign, f"dim {style}" if piece.text[place] in MARKS and "reverse" not in style else style
            if piece.text[place] == "\n" and piece.text[place + 1 : place + 2] != "\n":
                if place + 1 == len(piece.text) and len(piece.ids) > 1:
                    break
                yield LINE_END, ""
        if len(piece.ids) > 1:
            yield str(len(piece.ids)).translate(SMALL), STYLES["count"]

    def style(self, stretch: Stretch, piece: Piece, underlined: bool) -> str:
        kind: str = stretch.kind
        if kind == "given" and piece.special:
            kind = "special"
        elif kind == "learned" and piece.special:
            kind = "stop" if piece.ids[0] == self.stop_id else "learned special"
        return f"{STYLES[kind]}{' underline' if underlined and self.coloured and kind != 'stop' else ''}".strip()


@dataclass
class Writer:
    """Lines of at most `width` cells behind a gutter, which is marked beside what is learned."""

    width: int
    finished: list[Text] = field(default_factory=list)
    line: list[Part] = field(default_factory=list)
    cells: int = 0
    marked: bool = False

    @property
    def room(self) -> int:
        return self.width - 2

    def add(self, parts: Sequence[Part], marked: bool = False) -> None:
        """Parts that stay on one line if one has the room."""
        together = sum(cell_len(sign) for sign, _ in parts if sign != LINE_END)
        if self.cells + together > self.room >= together:
            self.end_line()
        for sign, style in parts:
            if sign == LINE_END or self.cells + cell_len(sign) > self.room:
                self.end_line()
            if sign and sign != LINE_END:
                self.line.append((sign, style))
                self.cells += cell_len(sign)
                self.marked |= marked

    def note(self, text: str) -> None:
        """A line of ours between the tokens."""
        self.end_line()
        for place, word in enumerate(text.split(" ")):
            self.add([(" " if place else "", ""), *((sign, "dim italic") for sign in word)])
        self.end_line()

    def end_line(self) -> None:
        if self.line:
            runs = [("".join(sign for sign, _ in signs), style) for style, signs in groupby(self.line, key=itemgetter(1))]
            text = Text.assemble("▌ " if self.marked else "  ", *runs)
            text.rstrip()
            self.finished.append(text)
        self.line, self.cells, self.marked = [], 0, False

    def lines(self) -> Iterator[Text]:
        self.end_line()
        yield from self.finished
