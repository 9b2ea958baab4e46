"""What a person sees: messages, short tables, progress. Live on a terminal, plain lines elsewhere.

CJK characters are two cells wide; rich counts them so, which is why everything that must align goes through it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

PLAIN_LINE_EVERY = 10.0  # seconds between lines where the output is no terminal


def duration(seconds: float) -> str:
    """`42 s`, `3:07`, `1:02:45`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def times(number: float) -> str:
    """`once`, `1.33 times`"""
    return "once" if number == 1 else f"{number:.3g} times"


def format_bytes(count: float) -> str:
    """`12.3 GiB`, and below a tenth of that `45 MiB`: in the units of nvidia-smi and PyTorch's own messages, here as everywhere."""
    if 0 < abs(count) < 2**30 / 10:
        return f"{count / 2**20:.1f} MiB" if abs(count) < 10 * 2**20 else f"{count / 2**20:.0f} MiB"
    return f"{count / 2**30:,.1f} GiB"


class Screen:
    """Prints through rich. quiet: say nothing (processes other than the first)."""

    def __init__(self, quiet: bool = False):
        from rich.console import Console

        self.quiet = quiet
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=not sys.stdout.isatty())
        self.live = self.console.is_terminal and not quiet

    def tell(self, text: str = "", style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)

    def table(self, title: str, rows: Sequence[tuple[str, Any]]) -> None:
        """Two columns: what, and how much."""
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, str(value))
        self.console.print()
        self.console.print(table)

    def grid(self, header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table with a header."""
        from rich.table import Table

        table = Table(*header, title=title or None, title_justify="left", show_lines=len(header) > 2)
        for column in table.columns:
            column.overflow = "fold"
        for row in rows:
            table.add_row(*(_literal(cell) for cell in row))
        self.console.print(table)

    def progress(self, items: Iterable, what: str) -> Iterator:
        """Items, with a bar; without an end in sight where nobody knows how many there are."""
        total = len(items) if hasattr(items, "__len__") else None
        if total in (0, 1):
            yield from items
            return
        if not self.live:
            yield from self._progress_by_lines(items, what, total)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            yield from bar.track(items, total, description=what)

    def _progress_by_lines(self, items: Iterable, what: str, total: int | None) -> Iterator:
        """`what: 32 of 60, 12 s left`, as soon and as often as it takes long; on stderr, since stdout may be a file of answers."""
        started = last_line = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            if now - last_line >= PLAIN_LINE_EVERY and not self.quiet:
                last_line = now
                left = f" of {total:,}, {duration((now - started) / done * (total - done))} left" if total and done else ""
                print(f"{what}: {done:,}{left}", file=sys.stderr, flush=True)
            yield item

    def meter(self, what: str, total: int | None) -> Meter:
        """Progress over rows whose number nobody knows before; total: bytes of their files, where that is known."""
        return Meter(self, what, total)

    def pair(self, word: str, style: str, text: str) -> None:
        """A word in colour, and a text behind it."""
        from rich.text import Text

        self.console.print(Text.assemble((word, f"bold {style}"), ": ", text))

    def indent(self, text: str, by: int = 2) -> None:
        """A text set in from the left, however often it is broken."""
        from rich.padding import Padding

        if self.console.soft_wrap:
            self.tell("\n".join(" " * by + line for line in text.splitlines()))
        else:
            self.console.print(Padding(_literal(text), (0, 0, 0, by)))


class Meter:
    """Rows, rows/s and the part of the files' bytes that is done: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, screen: Screen, what: str, total: int | None):
        self.screen, self.what, self.total = screen, what, total
        self.bar = None

    def __enter__(self) -> Meter:
        self.started = self.last_line = time.monotonic()
        if self.screen.live:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn()) if self.total else ()
            self.bar = Progress(TextColumn("{task.description}"), *columns, TextColumn("{task.fields[text]}"),
                                console=self.screen.console, transient=True, refresh_per_second=4)
            self.task = self.bar.add_task(self.what, total=self.total, text="")
        return self

    def reach(self, rows: int, bytes_done: int) -> None:
        speed = f"{rows:,} rows, {rows / max(time.monotonic() - self.started, 1e-9):,.0f} rows/s"
        if self.bar:
            self.bar.start()  # not before: its thread is no company for a process that forks
            self.bar.update(self.task, completed=bytes_done, text=speed)
        elif time.monotonic() - self.last_line >= PLAIN_LINE_EVERY:
            self.last_line = time.monotonic()
            part = f", {min(bytes_done / self.total, 1):.0%}" if self.total else ""
            self.screen.tell(f"{self.what}: {speed}{part}")

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()


def _literal(text: str) -> Any:
    """Text as it stands: brackets in an answer are no markup."""
    from rich.text import Text

    return Text(text)


class StepLine:
    """The one line of a run: loss, rows/s, tokens/s and nodes/s, memory, time left. A listener of the loop."""

    def __init__(self, screen: Screen, steps: int, first_step: int, memory: Any):
        self.screen, self.steps, self.first_step, self.memory = screen, steps, first_step, memory
        self.started = self.last_line = time.monotonic()
        self.totals = {"rows": 0, "tokens": 0, "nodes": 0}
        self.done = first_step
        self.training = 0.0  # seconds spent in steps, without measuring and saving
        self.bar = None
        if screen.live:
            from rich.progress import BarColumn, Progress, TextColumn

            self.bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"),
                                console=screen.console, refresh_per_second=4)
            self.task = self.bar.add_task(f"step {first_step}/{steps}", total=steps, completed=first_step, text="")
            self.bar.start()

    def on_step(self, line: dict[str, Any], seconds: float) -> None:
        self.done = line["step"]
        self.training += seconds
        for key in self.totals:
            self.totals[key] += line[key]
        text = self._text(line)
        if self.bar:
            self.bar.update(self.task, completed=self.done, description=f"step {self.done}/{self.steps}", text=text)
        elif time.monotonic() - self.last_line >= PLAIN_LINE_EVERY or self.done in (self.first_step + 1, self.steps):
            self.last_line = time.monotonic()
            self.screen.tell(f"step {self.done}/{self.steps}  {text}")

    def on_evaluation(self, line: dict[str, Any]) -> None:
        scores = "  ".join(f"{k} {v:.4f}" for k, v in line.items() if k not in ("step", "epoch"))
        self.screen.tell(f"step {line['step']}/{self.steps}  measured: {scores}")

    def on_message(self, text: str) -> None:
        self.screen.tell(text, style="yellow")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def speeds(self) -> dict[str, float]:
        """rows, tokens and nodes per second of training, measuring and saving left out."""
        return {key: value / max(self.training, 1e-9) for key, value in self.totals.items()}

    def _text(self, line: dict[str, Any]) -> str:
        speeds = self.speeds()
        made = self.done - self.first_step
        left = self.seconds / made * (self.steps - self.done)
        ending = f"  {duration(left)} left" if made > 1 else ""  # a first step warms up, and tells too much
        return (
            f"loss {line['loss']:.4f}  {speeds['rows']:.1f} rows/s  {speeds['tokens']:,.0f} tokens/s "
            f"({speeds['nodes']:,.0f} computed)  {format_bytes(self.memory())}{ending}"
        )


def error(text: str) -> None:
    """One message on stderr, in red on a terminal."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty()).print(text, style="red", markup=False)


# Told once an import, and once a layer a pass; what there is to say about 8 bits, quantize.dtype_notes says.
BITSANDBYTES_LINES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
}


def quiet_libraries() -> None:
    """The libraries' own bars and hints are not ours to show; their errors still are."""
    import logging as standard
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate)(\..*)?")
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # nor needed: their state lies where they would page it to
    for name in BITSANDBYTES_LINES:
        standard.getLogger(name).addFilter(_worth_showing)


def _worth_showing(record: Any) -> bool:
    return not record.getMessage().startswith(BITSANDBYTES_LINES[record.name])
