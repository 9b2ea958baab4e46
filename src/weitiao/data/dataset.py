"""Settings -> the rows that can teach, encoded; and an account of those that cannot.

    sources -> rows -> conversations -> turns -> ids -> cut to max_tokens -> StoredRows

Rows are streamed, and encoded by several processes where they are many. A row that cannot teach (no answer, an unknown
speaker, an answer cut away) is set aside with its place and the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from weitiao.data import rows as reading
from weitiao.data.conversation import Conversation
from weitiao.data.encoded import CHUNK, answer_of, read_row
from weitiao.data.formats import detect
from weitiao.data.gathered import Encoder, Fitted, Gathered, Part, Skipped, fit, longest_turns
from weitiao.data.labels import Labels, encode_labels, words_of
from weitiao.data.rows.mix import mix
from weitiao.data.rows.row import Reading, Row
from weitiao.data.stored import StoredRows
from weitiao.data.templates import Template
from weitiao.data.workers import in_order, usual_workers
from weitiao.errors import RowError
from weitiao.settings.data import DataSettings, Source

if TYPE_CHECKING:
    from weitiao.data.survey import Survey

UNLIMITED = 1 << 30
FEW = 4096  # rows that one process encodes as soon as several do


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows that can teach. max_tokens is the longest row in force; cut counts the rows that lost tokens to it.

    labels: what the rows are classified as; None where texts are learned. read: rows of the files, those of weight 0 and
    those that cannot teach included; where rows are split, all count for those to learn from.
    """

    rows: StoredRows = field(default_factory=StoredRows.none)
    skipped: list[Skipped] = field(default_factory=list)
    max_tokens: int = 0
    cut: int = 0
    labels: Labels | None = None
    read: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        return self.rows.tokens

    @property
    def learned_tokens(self) -> int:
        return self.rows.learned_tokens

    def fingerprint(self) -> str:
        """A hash of every id and weight, in order: the same rows, the same run."""
        return self.rows.digest()

    def split(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """(rows to learn from, rows to measure on): `share` of the rows, drawn by the seed, at least one of each; of each label, where
        there are labels, so that none is learned and not measured but one that a single row has."""
        places = self.rows.places()  # a row that shares repeat stays on one side
        count, random = int(places.max()) + 1, np.random.default_rng([seed, 0x5A])
        drawn = np.isin(places, self._drawn_by_label(places, share, random) if self.labels else random.permutation(count)[:_part(share, count)])
        return (
            replace(self, rows=self.rows.of(~drawn)),
            Dataset(self.rows.of(drawn), [], self.max_tokens, 0, self.labels),
        )

    def _drawn_by_label(self, places: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
        of_label: dict[bytes, dict[int, None]] = {}  # the places of each, in their order
        for place, row in zip(places.tolist(), self.rows, strict=True):
            last = row.examples[-1]
            of_label.setdefault(last.ids[last.weights > 0].tobytes(), {})[place] = None
        drawn = [random.permutation(list(own))[: _part(share, len(own))] for own in of_label.values() if len(own) > 1]
        return np.concatenate(drawn) if drawn else random.permutation(int(places.max()) + 1)[:1]


def _part(share: float, count: int) -> int:
    """How many of `count` that is: at least one, and not all."""
    return max(1, min(count - 1, round(share * count)))


def load(
    sources: Sequence[Source], settings: DataSettings, template: Template, model_limit: int, vocabulary: int, seed: int,
    max_tokens: int | None = None, progress: Callable[[Iterable, str], Iterable] = lambda items, what: items,
    task: str = "auto", labels: Labels | None = None, survey: Survey | None = None, rows: int | None = None, words: Sequence[str] = (),
    workers: int | None = None, folder: Path | None = None,
) -> Dataset:
    """Read, convert, encode and cut the rows of some sources.

    Args:
        model_limit: the longest row the model takes, in tokens. vocabulary: rows of its embedding.
        max_tokens, labels: in the place of the settings' defaults, for rows that are measured as others were trained.
        progress: wraps an iterable to show how far it is.
        survey: takes note of every row on the way, each once however often its file's share repeats it.
        rows: take the first so many of each source, and go on behind a broken line: for a look at them.
        words: the labels, where these rows may not have all of them.
        workers: processes that encode; default: one a core, 8 at most, and one alone for few rows.
        folder: where ids and what was said are written, in the place of memory.

    Raises:
        RowError: nothing can be learned from any row, too many rows cannot teach, or an id is outside the embedding.
    """
    mixed = Mixed(sources, settings, seed, rows)
    labels = labels or labels_in(task, mixed, settings, template, words)
    encoding = Encoding.of(mixed, settings, template, model_limit, vocabulary, labels, survey, workers)
    first = list(islice(encoding.parts, 1))  # processes begin before a bar does: its thread is no company for a fork
    read = Gathered(folder)
    for _ in progress(_gathered(read, chain(first, encoding.parts), survey), "Reading rows"):
        pass
    data = encoding.dataset(read, max_tokens)
    refuse_idle(data, settings)
    return data


@dataclass(frozen=True, eq=False)
class Encoding:
    """Rows on their way through the encoder: the parts as they come, and what they are made of."""

    settings: DataSettings
    template: Template
    model_limit: int
    vocabulary: int
    labels: Labels | None
    parts: Iterator[Part]

    @classmethod
    def of(
        cls, mixed: Mixed, settings: DataSettings, template: Template, model_limit: int, vocabulary: int, labels: Labels | None,
        survey: Survey | None, workers: int | None = None, beside: bool = False,
    ) -> Encoding:
        """survey: is shown the first rows; notes of all come with the parts. beside: while something else goes on."""
        if survey is not None:
            mixed.show_first(survey)
        encoder = Encoder(settings, template, model_limit, labels, survey.another() if survey is not None else None)
        return cls(settings, template, model_limit, vocabulary, labels, _parts(mixed, encoder, workers, beside))

    def dataset(self, read: Gathered, max_tokens: int | None = None) -> Dataset:
        """What was gathered, cut to the longest row in force.

        Raises:
            RowError: an id is outside the embedding.
        """
        (found,) = self.datasets(read, max_tokens)
        return found

    def datasets(self, read: Gathered, *limits: int | None) -> list[Dataset]:
        """The same cut to several lengths; those that come to the same are one. What is long lies there once for all."""
        longest = longest_turns(read, self.labels)
        usual = self.settings.max_tokens or usual_length(longest, self.labels is not None)
        each = dict.fromkeys(min(limit or usual, self.model_limit) for limit in limits)
        fitted = {limit: fit(read, longest, limit, self.labels, self.template, self.settings.cut) for limit in each}
        long = read.long_columns()
        return [self._dataset(read, StoredRows.all(one.columns | long, list(read.files)), one, limit) for limit, one in fitted.items()]

    def _dataset(self, read: Gathered, rows: StoredRows, fitted: Fitted, limit: int) -> Dataset:
        refuse_outside(rows, self.vocabulary)
        skipped = [Skipped(read.where(file, line), reason) for file, line, reason in read.skipped + fitted.skipped]
        return Dataset(rows, skipped, limit, fitted.cut, self.labels, read.rows)


def _parts(mixed: Mixed, encoder: Encoder, workers: int | None, beside: bool) -> Iterator[Part]:
    chunks = mixed.chunks()
    first = list(islice(chunks, FEW // CHUNK))
    if len(first) < FEW // CHUNK:
        return in_order(iter(first), encoder, workers or 1)
    usual = max(1, usual_workers() - beside)  # a core is left for what goes on beside
    return in_order(chain(first, chunks), encoder, workers or usual, beside)


def _gathered(read: Gathered, parts: Iterator[Part], survey: Survey | None) -> Iterator[None]:
    """Put all parts into `read`, and their notes into `survey`. An item a row, for whoever shows how far it is."""
    for part in parts:
        read.add(part)
        if survey is not None:
            survey.merge(part.survey)
        yield from (None for _ in range(part.rows))


# ------------------------------------------------------------------------------------------------- which rows


@dataclass(frozen=True, eq=False)
class Opened:
    """A source of which the first rows are read. names: what it calls its labels."""

    first: list[Row]
    rest: Iterator[Row]
    format: str
    names: dict[int, str] | None

    @classmethod
    def of(cls, source: Source, settings: DataSettings, most: int | None) -> Opened:
        told = Reading(on_error=(lambda error: None) if most else None)
        rows = islice(reading.read_rows(source.path, split=source.split, name=source.subset, reading=told), most)
        first: list[Row] = []
        format = detect((first.append(row) or row for row in rows), settings)
        first += islice(rows, max(0, CHUNK - len(first)))
        return cls(first, rows, format, names_of_labels(source, format, settings))

    def rows(self) -> Iterator[Row]:
        return (name_label(row, self.names) for row in chain(self.first, self.rest))


@dataclass(eq=False)
class Mixed:
    """The rows of some sources, one source after the other, or mixed by their shares.

    They are read anew each time they are asked for; those with shares stay in memory. most: rows of each source, in spite of
    broken ones.
    """

    sources: Sequence[Source]
    settings: DataSettings
    seed: int
    most: int | None = None

    def __post_init__(self) -> None:
        self._fresh: list[Opened] | None = self._open()
        self.formats = [one.format for one in self._fresh]
        self._first = [[name_label(row, one.names) for row in one.first[:CHUNK]] for one in self._fresh]

    def _open(self) -> list[Opened]:
        return [Opened.of(source, self.settings, self.most) for source in self.sources]

    def show_first(self, survey: Survey) -> None:
        """For what most rows share."""
        for first, format in zip(self._first, self.formats, strict=True):
            survey.begin(first, format)

    def rows(self) -> Iterator[tuple[Row, str, bool]]:
        """Each row with its format; is it here for the first time?"""
        if any(source.share is not None for source in self.sources):
            yield from self._drawn
            return
        opened, self._fresh = self._fresh or self._open(), None
        for one in opened:
            yield from ((row, one.format, True) for row in one.rows())

    @cached_property
    def _drawn(self) -> list[tuple[Row, str, bool]]:
        found = [list(one.rows()) for one in self._fresh]
        formats = {id(row): format for rows, format in zip(found, self.formats, strict=True) for row in rows}
        mixed = mix(found, [source.share for source in self.sources], self.seed)
        seen: set[int] = set()
        return [(row, formats[id(row)], not (id(row) in seen or seen.add(id(row)))) for row in mixed]

    def chunks(self) -> Iterator[tuple[tuple, ...]]:
        """(rows, formats, are they new?) of CHUNK rows each."""
        rows = self.rows()
        while some := list(islice(rows, CHUNK)):
            yield tuple(zip(*some, strict=True))


def names_of_labels(source: Source, format: str, settings: DataSettings) -> dict[int, str] | None:
    """What a data set itself calls the labels 0, 1, …, where it does and data.labels does not."""
    asked = format == "label" and not settings.labels
    return reading.label_names(source.path, split=source.split, name=source.subset) if asked else None


def name_label(row: Row, names: dict[int, str] | None) -> Row:
    """A label by its name; -1 stands for none there."""
    return replace(row, fields=row.fields | {"label": names.get(row.fields["label"])}) if names else row


# ------------------------------------------------------------------------------------------------- learned as what, how long


def labels_in(task: str, mixed: Mixed, settings: DataSettings, template: Template, words: Sequence[str] = ()) -> Labels | None:
    """What rows are classified as, if they are: asked for, or all of them text and label.

    Raises:
        RowError: there is one label only, or the labels cannot be told apart.
    """
    if task == "answer" or (task == "auto" and "label" not in mixed.formats):
        return None
    known = words or words_of((), settings.labels)
    alone: Conversation | None = None  # one that has a single answer
    others: Conversation | None = None
    met: dict[bool, set[str]] = {True: set(), False: set()}
    for row, format, _ in mixed.rows():
        one = read_row(row, format, settings)
        if one.reason:
            continue
        if task == "auto" and not one.conversation.is_label:
            return None
        single = len(one.conversation.turns()) == 1
        alone, others = alone or (one.conversation if single else None), others or one.conversation
        met[single].add(answer_of(one.conversation))
        if known and alone and (task == "classify" or set(mixed.formats) == {"label"}):
            break
    if others is None:
        return None
    return labels_of(known or sorted(met[True] or met[False]), alone or others, settings, template)


def labels_of(words: Sequence[str], asked: Conversation, settings: DataSettings, template: Template) -> Labels:
    """The labels that these words are, told behind one of the rows.

    Raises:
        RowError: there is one label only, or the labels cannot be told apart.
    """
    if len(words) < 2:
        raise RowError(f"All rows are answered with {words[0]!r}.", "Expected two labels or more to classify.",
                       "Look at the column of labels, name them all (data.labels), or learn the answers as text (task=answer).")
    return encode_labels(words, asked, template, settings.label_scoring)


def usual_length(longest: Sequence[int], whole: bool) -> int:
    """The 99th percentile of the rows' lengths; or the longest, where rows are to stay whole, as those with labels are."""
    if not len(longest):
        return UNLIMITED
    if whole:
        return int(max(longest))
    return int(np.percentile(longest, 99, method="higher"))


# ------------------------------------------------------------------------------------------------- what is refused, and told


def refuse_outside(found: StoredRows, vocabulary: int) -> None:
    """
    Raises:
        RowError: a row has an id that the model's embedding lacks.
    """
    if outside := found.first_outside(vocabulary):
        where, highest = outside
        raise RowError(
            f"{where}: token id {highest} is outside the model's embedding of {vocabulary} rows.",
            "Expected a tokenizer that belongs to the model.",
            "Use the tokenizer that came with the model, or leave out the tokens that were added to it.",
        )


def refuse_idle(data: Dataset, settings: DataSettings) -> None:
    """
    Raises:
        RowError: nothing can be learned from these rows, or too many of them cannot teach.
    """
    refuse_if_too_many(data.skipped, data.read, settings)
    if not len(data):
        raise RowError(f"Nothing can be learned from any of the {data.read} rows: each has a weight of 0.",
                       f"Expected weights above 0 in the column {settings.weight_column!r}.")


def refuse_if_too_many(skipped: Sequence[Skipped], rows: int, settings: DataSettings) -> None:
    """
    Raises:
        RowError: too many rows cannot teach, by data.bad_rows and data.bad_share.
    """
    if not skipped or (settings.bad_rows == "skip" and len(skipped) <= settings.bad_share * rows and len(skipped) < rows):
        return
    listing = skipped_summary(skipped)
    if len(skipped) == rows:
        cut, strange = (all(words in s.reason for s in skipped) for words in ("cut away", "its label is none of"))
        cure = "Raise data.max_tokens." if cut and settings.max_tokens else "Shorten the prompts." if cut else \
            "Name the labels as the rows have them, such as data.labels='{negative: neg, positive: pos}'; task=answer learns them as text." \
            if strange else "Look at the rows named; data.columns says which column is which."
        raise RowError(f"Nothing can be learned from any of the {rows} rows.\n{listing}", next_step=cure)
    longer = "A larger data.max_tokens keeps more of the answers. " if settings.max_tokens and any("cut away" in s.reason for s in skipped) else ""
    if settings.bad_rows == "refuse":
        raise RowError(f"{len(skipped)} of {rows} rows cannot teach.\n{listing}", "data.bad_rows=refuse stops on the first.",
                       longer + "Mend them, or skip them with data.bad_rows=skip.")
    if len(skipped) > settings.bad_share * rows:
        raise RowError(
            f"{len(skipped)} of {rows} rows cannot teach ({len(skipped) / rows:.1%}).\n{listing}",
            f"Expected at most {settings.bad_share:.0%} (data.bad_share).",
            longer + "Mend them, or allow them with a larger data.bad_share.",
        )


def skipped_summary(skipped: Sequence[Skipped], named: int = 3) -> str:
    """`3 rows: no answer (rows.jsonl:4, rows.jsonl:9, …)`, a line a reason."""
    by_reason = defaultdict(list)
    for item in skipped:
        by_reason[item.reason.split(":")[0]].append(item)
    lines = []
    for reason, items in sorted(by_reason.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        places = ", ".join(item.where for item in items[:named]) + (", …" if len(items) > named else "")
        text = items[0].reason if len({item.reason for item in items}) == 1 else reason
        lines.append(f"  {len(items)} {'row' if len(items) == 1 else 'rows'}: {text} ({places})")
    return "\n".join(lines)
