"""What to know before paying for a run: rows, tokenizer and settings -> findings. No weights are read.

    sources -> chunks of rows -> (several processes) surveys -> one survey -> Report

Rows are streamed: a few chunks are in memory at a time, and what is kept of a row are numbers and hashes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from weitiao.config import Settings
from weitiao.data import rows as reading
from weitiao.data.cache import Cache
from weitiao.data.dataset import labels_of, name_label, names_of_labels
from weitiao.data.defects import cure_of_columns
from weitiao.data.encoded import CHUNK
from weitiao.data.findings import SEVERITIES, Finding, Kind, Tally, worst_first
from weitiao.data.formats import detect
from weitiao.data.labels import Labels, words_of
from weitiao.data.lengths import Lengths
from weitiao.data.rows.readers import READERS
from weitiao.data.rows.row import Reading, Row
from weitiao.data.survey import Facts, Survey, Surveyor
from weitiao.data.templates import Template, load_template
from weitiao.data.workers import in_order, usual_workers
from weitiao.errors import RowError, SettingError
from weitiao.model import load as loading
from weitiao.model.methods import method_of
from weitiao.model.source.cache import cache_folder
from weitiao.screen import Screen, duration
from weitiao.settings.data import DataSettings, Source
from weitiao.train.fitness import setting_findings
from weitiao.train.folder import write_asked
from weitiao.train.tree import folder_of

PEEKED = 1000  # rows that a file's format is told from, and that make a small one
COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
SUFFIXES = "|".join(re.escape(suffix) for suffix in sorted(READERS, key=len, reverse=True))
BAR = 40  # characters
MOST_BRIEF = 6  # findings that a training tells

CHECKS: dict[str, Kind] = {
    "broken_row": Kind("error", "{count} broken {noun}. {detail}", ""),
    "no_rows": Kind("error", "{detail}", ""),
    "unknown_columns": Kind("error", "No format fits. {detail}", ""),
    "labels": Kind("error", "{detail}", ""),
}


@dataclass(frozen=True, eq=False)
class Report:
    """What a check found. rows: as read; taught: those that can teach; the rest counts tokens, as trained in one epoch."""

    findings: list[Finding]
    rows: int = 0
    taught: int = 0
    eval_rows: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    max_tokens: int = 0
    keeps_99_percent: int = 0
    cut: int = 0
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    workers: int = 1

    def worst(self) -> str | None:
        return self.findings[0].severity if self.findings else None

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        plain = {name: value for name, value in vars(self).items() if name not in ("findings", "histogram", "seconds")}
        return plain | {
            "rows_per_second": round(self.rows / self.seconds, 1) if self.seconds else None, "seconds": round(self.seconds, 2),
            "histogram": [{"from": low, "to": high, "rows": rows} for low, high, rows in self.histogram],
            "findings": [finding.as_dict() for finding in self.findings],
        }


def check(settings: Settings, screen: Screen, rows: int | None = None, workers: int | None = None) -> Report:
    """Read the rows of data.train and data.eval as a training would, and tell what is wrong with them.

    Args:
        rows: look at the first so many of each.
        workers: processes that read; default: one a core, 8 at most, and one alone for a small file.

    Raises:
        SourceError: there is no such file or model.
        SettingError: a setting cannot be carried out.
    """
    begun = time.monotonic()
    folder = folder_of(settings.model, screen)
    model_config = loading.load_config(folder, settings.model)
    template = load_template(settings.data.template, loading.load_tokenizer(folder, settings.model))
    room, vocabulary = room_and_vocabulary(settings, method_of(settings, template.tokenizer), template, model_config)
    reader = Reader(settings, template, room, vocabulary, screen, rows, workers)
    survey = reader.survey(settings.data.train, settings.data)
    measured = None
    if settings.data.eval:
        told = tuple(sorted(survey.words)) if reader.classified else ()
        measured = reader.survey(settings.data.eval, eval_settings(settings.data), told)
    findings = [*reader.findings(), *setting_findings(settings, template, model_config, None if rows else len(survey))]
    return report(settings, survey, measured, template, room, findings, time.monotonic() - begun, reader.used)


def report(
    settings: Settings, survey: Survey, measured: Survey | None, template: Template, room: int, findings: Sequence[Finding] = (),
    seconds: float = 0.0, workers: int = 1,
) -> Report:
    """What surveys come to, of the rows to learn from and of those to measure on."""
    found = list(findings)
    labels, refusals = told_labels(survey, settings.data, template)
    # Without labels nobody knows how long rows are with them, so none is said to be too long.
    lengths = lengths_of(survey, settings.data, template, room, labels, settings.data.max_tokens or (room if refusals else None))
    found += refusals + survey.findings(lengths, cure_of_cuts(lengths, room, settings.data))
    if measured is not None:
        cuts = lengths_of(measured, settings.data, template, room, labels, lengths.limit)
        found += [of_eval(finding) for finding in measured.findings(cuts, cure_of_cuts(cuts, room, settings.data))]
        found += [finding for finding in measured.beside(survey) if finding]
    return Report(
        worst_first(found), survey.rows, len(survey) - len(lengths.dropped) - len(lengths.weight_0), measured.rows if measured else 0,
        lengths.tokens, lengths.learned, int(lengths.longest.max(initial=0)), lengths.limit, lengths.keeping(0.99), lengths.cut,
        lengths.histogram(), survey.class_counts(), seconds, workers,
    )


def room_and_vocabulary(settings: Settings, method: Any, template: Template, model_config: Any) -> tuple[int, int]:
    """(tokens that the model leaves for a row, rows of its embedding)"""
    room = room_beside(method.virtual_tokens(settings.method, template.tokenizer), loading.model_limit(model_config))
    vocabulary = model_config.get_text_config().vocab_size
    return room, max(vocabulary, len(template.tokenizer)) if settings.tokens.add else vocabulary


def cache_of(settings: DataSettings, screen: Screen | None = None) -> Cache:
    """Where encoded rows are kept for the next run."""
    return Cache(cache_folder() / "rows", int(settings.cache_gb * 1e9), *([lambda text: screen.tell(text, style="yellow")] if screen else []))


def room_beside(virtual_tokens: int, limit: int) -> int:
    """What is left for a row, in tokens."""
    room = limit - virtual_tokens
    if virtual_tokens and room < 8:
        raise SettingError(f"{virtual_tokens} virtual tokens leave {max(room, 0)} of the model's {limit} places for a row.",
                           "Expected room for the rows.", "Lower method.virtual_tokens, or shorten method.text.")
    return room


def eval_settings(data: DataSettings) -> DataSettings:
    """Rows that are measured count alike: a weight column is the training rows' own."""
    return data.model_copy(update={"weight_column": None})


# ------------------------------------------------------------------------------------------------ reading


@dataclass(eq=False)
class Reader:
    """Sources -> surveys. It remembers what it met that is no row: broken lines, files of no format."""

    settings: Settings
    template: Template
    room: int
    vocabulary: int
    screen: Screen
    most: int | None
    workers: int | None
    broken: dict[str, Tally] = field(default_factory=dict)  # by cure
    unknown: list[Finding] = field(default_factory=list)
    classified: bool = False
    used: int = 1

    def survey(self, sources: Sequence[Source], data: DataSettings, words: tuple[str, ...] = ()) -> Survey:
        """words: the labels of the rows that these are measured for."""
        progress = Reading(self._note_broken)
        opened = [one for source in sources if (one := self._open(source, data, progress))]
        survey = Survey(Facts.of(data, self.template, self.vocabulary))
        if not words:
            task = self.settings.task
            self.classified = task == "classify" or (task == "auto" and bool(opened) and all(one.format == "label" for one in opened))
        for one in opened:
            survey.begin(one.peeked[:CHUNK], one.format)
        known = tuple(words_of((), data.labels)) if data.labels else ()
        surveyor = Surveyor(survey.facts, self.template, self.room, self.classified, known if self.classified else (), survey.frequent)
        chunks = (chunk for one in opened for chunk in one.chunks(self.most))
        small = all(one.is_small for one in opened)
        self.used = max(self.used, workers := 1 if small else self.workers or usual_workers())
        sizes = [reading.bytes_by_lines(source.path, source.split) for source in sources]
        total = sum(sizes) if all(sizes) and not self.most else None
        with self.screen.meter("Checking rows", total) as meter:
            for part in in_order(chunks, surveyor, workers):
                survey.merge(part)
                meter.reach(survey.rows, progress.bytes)
        return survey

    def _open(self, source: Source, data: DataSettings, progress: Reading) -> Opened | None:
        rows = reading.read_rows(source.path, split=source.split, name=source.subset, reading=progress)
        peeked: list[Row] = []
        broken = self.broken_rows
        try:
            peeked += islice(rows, PEEKED)
            format = detect(peeked, data)
        except RowError as error:
            if peeked:
                self.unknown.append(of_unknown(error, peeked[0]))
            elif self.broken_rows == broken:  # otherwise it is told why there are none
                self.unknown.append(of_error("no_rows", error))
            return None
        return Opened(peeked, rows, format, names_of_labels(source, format, data))

    def _note_broken(self, error: RowError) -> None:
        cure = " ".join(part for part in (error.expected, error.next_step) if part)
        self.broken.setdefault(cure, Tally()).add(place_of(error), error.found)

    @property
    def broken_rows(self) -> int:
        return sum(tally.count for tally in self.broken.values())

    def findings(self) -> list[Finding]:
        kind = CHECKS["broken_row"]
        return [*self.unknown, *(tally.finding("broken_row", replace(kind, cure=cure), 0) for cure, tally in self.broken.items())]


@dataclass(frozen=True, eq=False)
class Opened:
    """A source of which the first rows are read. names: what it calls its labels."""

    peeked: list[Row]
    rest: Iterator[Row]
    format: str
    names: dict[int, str] | None

    @property
    def is_small(self) -> bool:
        return len(self.peeked) < PEEKED

    def chunks(self, most: int | None) -> Iterator[tuple[list[Row], str]]:
        rows = islice(chain(self.peeked, self.rest), most)
        while some := [name_label(row, self.names) for row in islice(rows, CHUNK)]:
            yield some, self.format


# ------------------------------------------------------------------------------------------------ judging


def told_labels(survey: Survey, data: DataSettings, template: Template) -> tuple[Labels | None, list[Finding]]:
    """What rows are classified as, or why they cannot be."""
    if not survey.words:
        return None, []
    words = words_of((), data.labels) if data.labels else sorted(survey.words)
    try:
        return labels_of(words, survey.asked, data, template), []
    except RowError as error:
        return None, [of_error("labels", error)]


def lengths_of(survey: Survey, data: DataSettings, template: Template, room: int, labels: Labels | None, max_tokens: int | None) -> Lengths:
    head = 0
    if labels and survey.asked:
        head = template.head(survey.asked.as_dicts(survey.asked.turns()[0]), survey.asked.tools)
    return survey.lengths(room, max_tokens, labels, head)


def cure_of_cuts(lengths: Lengths, room: int, data: DataSettings) -> str:
    """Which data.max_tokens keeps rows whole."""
    most, all_but = int(lengths.longest.max(initial=0)), lengths.keeping(0.99)
    if lengths.limit == room and most > room:
        whole = float((lengths.longest <= room).mean())
        return f"The model takes {room:,} tokens, which hold {whole:.1%} of the rows; the longest has {most:,}. Shorten the others, or split them."
    if not data.max_tokens:
        return f"data.max_tokens={most} keeps all rows whole; the default keeps 99 % of them." if most <= room else f"data.max_tokens={room} is the most the model takes."
    ways = [f"data.max_tokens={all_but} keeps 99 % of the rows whole" if lengths.limit < all_but < most else "",
            f"data.max_tokens={most} keeps all of them whole" if most <= room else f"{room} is the most the model takes"]
    said = ", ".join(way for way in ways if way)
    return f"{said}."


def of_error(kind: str, error: RowError) -> Finding:
    """What a training would refuse with."""
    where = place_of(error)
    cure = "\n".join(part for part in (error.expected, error.next_step) if part)
    return Finding(kind, "error", CHECKS[kind].what.format(detail=error.found), (where,) if where else (), cure, 1)


def of_unknown(error: RowError, first: Row) -> Finding:
    """A file of no format: with its own names in the cure, where they can be guessed from its first row."""
    finding = of_error("unknown_columns", error)
    cure = cure_of_columns(first.fields)
    return replace(finding, cure=cure) if cure else finding


def place_of(error: RowError) -> str:
    """`rows.jsonl:7`, or `rows.jsonl`, at the front of a message."""
    met = re.match(r".+?(:\d+|, row \d+)", error.found) or re.match(rf".+?({SUFFIXES})(?=[ :])", error.found)
    return met[0] if met else ""


def of_eval(finding: Finding) -> Finding:
    """Of the rows to measure on."""
    return Finding(finding.kind, finding.severity, f"data.eval: {finding.what}", finding.where, finding.cure, finding.count)


# ------------------------------------------------------------------------------------------------ telling


def show(told: Report, screen: Screen) -> None:
    """Numbers, lengths, then errors before warnings before notes."""
    rows = f"{told.rows:,} {'row' if told.rows == 1 else 'rows'}" + (f" and {told.eval_rows:,} to measure on" if told.eval_rows else "")
    learned = f"{told.learned_tokens / told.tokens:.1%} learned" if told.tokens else "nothing learned"
    if all(finding.severity == "note" and not finding.count for finding in told.findings):  # nothing, or how the settings go together
        screen.tell(f"No defects found in {rows}: longest {told.longest:,} tokens, {learned}.", style="green")
    elif told.rows:
        facts = [("rows", f"{rows}; {told.taught:,} can teach")]
        if told.tokens:
            facts.append(("tokens", f"{told.tokens:,} an epoch, {learned}; longest row {told.longest:,}, limit {told.max_tokens:,}"))
        if told.labels:
            total = sum(told.labels.values())
            facts.append(("labels", ", ".join(f"{word} {count / total:.1%}" for word, count in list(told.labels.items())[:12])))
        screen.table("", [*facts, *([("lengths", bars(told.histogram))] if told.histogram else [])])
    for finding in told.findings:
        screen.tell()
        screen.pair(finding.severity, COLOURS[finding.severity], finding.what)
        for text in (places(finding), finding.cure):
            if text:
                screen.indent(text)
    if told.findings:
        screen.tell(f"\n{tally_of(told)}{f' in {rows}' if told.rows else ''}, {duration(told.seconds)}.")


def places(finding: Finding) -> str:
    """`rows.jsonl:4, 9, 12, …`: the file is named once."""
    named, before = [], ""
    for where in finding.where:
        file = where[: re.search(r"\d*$", where).start()]
        named.append(where.removeprefix(file) if file == before else where)
        before = file
    return ", ".join(named) + (", …" if finding.count > len(finding.where) > 0 else "")


def tally_of(told: Report) -> str:
    """`1 error, 3 warnings, 2 notes`"""
    counts = [(told.count(severity), severity) for severity in SEVERITIES]
    return ", ".join(f"{n} {word}" + ("s" if n > 1 else "") for n, word in counts if n)


def bars(histogram: Sequence[tuple[int, int, int]]) -> str:
    """Without the spans at both ends that no row has."""
    filled = [n for n, (_, _, rows) in enumerate(histogram) if rows]
    histogram = histogram[min(filled, default=0) : max(filled, default=-1) + 1]
    most = max((rows for _, _, rows in histogram), default=1)
    spans = [f"{low:,}–{high:,}" if low < high else f"{low:,}" for low, high, _ in histogram]
    width = max(map(len, spans), default=0)
    return "\n".join(f"{span:>{width}} {'█' * round(BAR * rows / most) or '▏' * bool(rows)} {rows:,}" for span, (_, _, rows) in zip(spans, histogram, strict=True))


def show_brief(told: Report, screen: Screen, command: str = "weitiao check") -> None:
    """Before a training: a line a finding, without notes."""
    serious = [finding for finding in told.findings if finding.severity != "note"]
    for finding in serious[:MOST_BRIEF]:
        first = f" ({finding.where[0]}{', …' if finding.count > 1 else ''})" if finding.where else ""
        screen.tell(f"{finding.severity}: {finding.what.splitlines()[0]}{first}", style=COLOURS[finding.severity])
    notes = told.count("note")
    rest = len(serious) - MOST_BRIEF
    if serious or notes:
        more = [f"{rest} more" if rest > 0 else "", f"{notes} note" + "s" * (notes > 1) if notes else ""]
        said = " and ".join(part for part in more if part)
        screen.tell(f"{said}: `{command}` with the same settings tells all." if said else f"`{command}` with the same settings tells what to do.")


def write(told: Report, file: Path) -> None:
    write_asked(file, json.dumps(told.as_dict(), ensure_ascii=False, indent=2) + "\n")


def exit_code(told: Report, strict: bool) -> int:
    return 2 if told.count("error") or (strict and told.count("warning")) else 0
