"""Settings -> the rows that can teach, encoded; and an account of those that cannot.

    sources -> rows -> conversations -> turns -> ids -> cut to max_tokens -> Examples

A row that cannot teach (no answer, an unknown speaker, an answer cut away) is set aside with its place and the reason.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from weitiao.config import DataSettings, Source
from weitiao.data import rows as reading
from weitiao.data.conversation import Conversation
from weitiao.data.formats import CannotTeach, convert, detect, row_weight
from weitiao.data.labels import Labels, encode_labels, words_of
from weitiao.data.rows import Row
from weitiao.data.templates import Template, Turn
from weitiao.data.tokens import EncodedTurn, cut_front, encode_prompts_alone, encode_turns, examples
from weitiao.errors import RowError, TemplateError
from weitiao.trie import Example

if TYPE_CHECKING:
    from weitiao.data.survey import Survey

UNLIMITED = 1 << 30
CHUNK = 256  # rows that are encoded together


@dataclass(frozen=True)
class Skipped:
    where: str
    reason: str


@dataclass(frozen=True, eq=False)
class TrainingRow:
    """A row that can teach: where it stands, what was said, and its paths (one for each learned turn)."""

    where: str
    conversation: Conversation
    examples: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows that can teach. max_tokens is the longest row in force; cut counts the rows that lost tokens to it.

    labels: what the rows are classified as; None where texts are learned.
    """

    rows: list[TrainingRow]
    skipped: list[Skipped] = field(default_factory=list)
    max_tokens: int = 0
    cut: int = 0
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(e) for row in self.rows for e in row.examples)

    @property
    def learned_tokens(self) -> int:
        return sum(int((e.weights > 0).sum()) for row in self.rows for e in row.examples)

    def fingerprint(self) -> str:
        """A hash of every id and weight, in order: the same rows, the same run."""
        digest = hashlib.sha256()
        for row in self.rows:
            for example in row.examples:
                digest.update(example.ids.tobytes())
                digest.update(example.weights.tobytes())
        return digest.hexdigest()

    def split(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """(rows to learn from, rows to measure on): `share` of the rows, drawn by the seed, at least one of each."""
        places = list(dict.fromkeys(row.where for row in self.rows))  # a row that shares repeat stays on one side
        measured = max(1, min(len(places) - 1, round(share * len(places))))
        drawn = {places[i] for i in np.random.default_rng([seed, 0x5A]).permutation(len(places))[:measured]}
        learn = [row for row in self.rows if row.where not in drawn]
        measure = [row for row in self.rows if row.where in drawn]
        return (
            Dataset(learn, self.skipped, self.max_tokens, self.cut, self.labels),
            Dataset(measure, [], self.max_tokens, 0, self.labels),
        )


def load(
    sources: Sequence[Source], settings: DataSettings, template: Template, model_limit: int, vocabulary: int, seed: int,
    max_tokens: int | None = None, progress: Callable[[Iterable, str], Iterable] = lambda items, what: items,
    task: str = "auto", labels: Labels | None = None, survey: Survey | None = None, rows: int | None = None, words: Sequence[str] = (),
) -> Dataset:
    """Read, convert, encode and cut the rows of some sources.

    Args:
        model_limit: the longest row the model takes, in tokens. vocabulary: rows of its embedding.
        max_tokens, labels: in the place of the settings' defaults, for rows that are measured as others were trained.
        progress: wraps an iterable to show how far it is.
        survey: takes note of every row on the way, each once however often its file's share repeats it.
        rows: take the first so many of each source, and go on behind a broken line: for a look at them.
        words: the labels, where these rows may not have all of them.

    Raises:
        RowError: nothing can be learned from any row, too many rows cannot teach, or an id is outside the embedding.
    """
    mixed = _read(sources, settings, seed, survey, rows)
    said = [read_row(row, format, settings) for row, format in mixed]
    labels = labels or _labels(task, [one.conversation for one in said if not one.reason], settings, template, words)
    encoded: list[EncodedRow] = []
    skipped: list[Skipped] = []
    seen: set[int] = set()
    for one in _encoded_in_chunks(progress(said, "Reading rows"), template, model_limit, labels):
        if survey is not None and id(one.row) not in seen:
            survey.add(one)
            seen.add(id(one.row))
        if one.reason:
            skipped.append(Skipped(one.row.where, one.reason))
        else:
            encoded.append(one)
    longest = [max(_length(turn, labels) for turn in one.turns) for one in encoded]
    limit = min(max_tokens or settings.max_tokens or usual_length(longest, labels is not None), model_limit)
    cut_in_front = labels is not None and settings.cut != "end"
    kept: list[TrainingRow] = []
    cut = 0
    for one, length in zip(encoded, longest, strict=True):
        row, conversation, turns = one.row, one.conversation, one.turns
        if length > limit and cut_in_front:
            turns = _cut_in_front(conversation, turns, template, limit, labels)
        fitting = tuple(examples(turns, limit, len(kept), row_weight(row, settings)))
        paths = tuple(path for path in fitting if path.weights.any())
        if fitting and not paths:
            continue  # its weight is 0, which is a wish and no defect
        if not paths:
            prompt = len(turns[0].prompt)
            skipped.append(Skipped(row.where, f"its answer is cut away: the prompt alone has {prompt} of {limit} tokens"))
            continue
        _refuse_outside(paths, vocabulary, row.where)
        kept.append(TrainingRow(row.where, conversation.first_turns(len(fitting)), paths))
        cut += length > limit
    _refuse_if_too_many(skipped, len(mixed), settings)
    if not kept:
        raise RowError(f"Nothing can be learned from any of the {len(mixed)} rows: each has a weight of 0.",
                       f"Expected weights above 0 in the column {settings.weight_column!r}.")
    return Dataset(kept, skipped, limit, cut, labels)


# ------------------------------------------------------------------------------------------------- row by row


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """A row on its way: as a conversation, then with what is learned of it as ids, before anything is cut.

    reason: why it cannot teach, if it cannot; then there are no turns.
    """

    row: Row
    conversation: Conversation | None
    turns: tuple[EncodedTurn, ...] = ()
    reason: str = ""


def read_row(row: Row, format: str, settings: DataSettings) -> EncodedRow:
    try:
        return EncodedRow(row, convert(row, format, settings))
    except CannotTeach as reason:
        return EncodedRow(row, None, reason=str(reason))


def encode_rows(said: Sequence[EncodedRow], template: Template, model_limit: int, classified: bool) -> list[EncodedRow]:
    """Rows with their ids, the tokenizer called once for the first turns of all, once for the second ones, and so on.

    classified: each row is a prompt alone, since its label is told by ids of its own.
    """
    turns: list[list[EncodedTurn]] = [[] for _ in said]
    reasons = [one.reason for one in said]
    going = {k: _turns_of(one.conversation, template, classified) for k, one in enumerate(said) if not one.reason}
    while going:
        met: dict[int, Turn] = {}
        for k, rest in going.items():
            try:
                met |= {k: turn for turn in islice(rest, 1)}
            except (CannotTeach, TemplateError) as reason:
                reasons[k] = str(reason)
        encode = encode_prompts_alone if classified else encode_turns
        for k, encoded in zip(met, encode(list(met.values()), template), strict=True):
            turns[k].append(encoded)
        # A chat goes on up to where the model's limit ends it; one of 300 turns is not read to its end.
        going = {k: going[k] for k in met if len(turns[k][-1]) <= model_limit}
    return [replace(one, turns=() if reason else tuple(found), reason=reason) for one, found, reason in zip(said, turns, reasons, strict=True)]


def _turns_of(conversation: Conversation, template: Template, classified: bool) -> Iterator[Turn]:
    return _asked(conversation, template) if classified else template.turns(conversation)


def _encoded_in_chunks(said: Iterable[EncodedRow], template: Template, model_limit: int, labels: Labels | None) -> Iterator[EncodedRow]:
    said = iter(said)
    while some := list(islice(said, CHUNK)):
        for one in encode_rows(some, template, model_limit, labels is not None):
            yield _labelled(one, labels) if labels else one


def _labels(
    task: str, conversations: Sequence[Conversation], settings: DataSettings, template: Template, words: Sequence[str] = (),
) -> Labels | None:
    """What rows are classified as, if they are: asked for, or all of them text and label.

    Raises:
        RowError: there is one label only, or the labels cannot be told apart.
    """
    if not conversations or task == "answer" or (task == "auto" and not all(c.is_label for c in conversations)):
        return None
    conversations = [c for c in conversations if len(c.turns()) == 1] or conversations
    return labels_of(words or words_of(conversations, settings.labels), conversations[0], settings, template)


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


def _read(sources: Sequence[Source], settings: DataSettings, seed: int, survey: Survey | None, most: int | None) -> list[tuple[Row, str]]:
    """Every row with the format of its file, mixed by the files' shares. most: rows of each file, in spite of broken ones."""
    files = []
    for source in sources:
        told = reading.Reading(on_error=(lambda error: None) if most else None)
        found = list(islice(reading.read_rows(source.path, split=source.split, name=source.subset, reading=told), most))
        format = detect(found, settings)
        names = names_of_labels(source, format, settings)
        found = [name_label(row, names) for row in found] if names else found
        if survey is not None:
            survey.begin(found[:CHUNK], format)
        files.append((found, format))
    formats = {id(row): format for found, format in files for row in found}
    mixed = reading.mix([found for found, _ in files], [source.share for source in sources], seed)
    return [(row, formats[id(row)]) for row in mixed]


def names_of_labels(source: Source, format: str, settings: DataSettings) -> dict[int, str] | None:
    """What a data set itself calls the labels 0, 1, …, where it does and data.labels does not."""
    asked = format == "label" and not settings.labels
    return reading.label_names(source.path, split=source.split, name=source.subset) if asked else None


def name_label(row: Row, names: dict[int, str] | None) -> Row:
    """A label by its name; -1 stands for none there."""
    return replace(row, fields=row.fields | {"label": names.get(row.fields["label"])}) if names else row


def _asked(conversation: Conversation, template: Template) -> Iterator[Turn]:
    """The one prompt of a row with a label."""
    first, *more = conversation.turns()
    if more:
        raise CannotTeach(f"{len(more) + 1} answers in one row, where one label is to be learned")
    yield Turn(template.render(conversation.as_dicts(first), True, conversation.tools), "", conversation.messages[first].weight)


def _labelled(one: EncodedRow, labels: Labels) -> EncodedRow:
    """The label's ids behind the one prompt."""
    one = refuse_unknown(one, labels.words)
    return one if one.reason else replace(one, turns=(replace(one.turns[0], answer=labels.of(answer_of(one.conversation))),))


def refuse_unknown(one: EncodedRow, words: Sequence[str]) -> EncodedRow:
    """The row, or why not: its label is another than these."""
    if one.reason or (word := answer_of(one.conversation)) in words:
        return one
    return replace(one, turns=(), reason=f"its label is none of {', '.join(words)}: {_short(word)!r}")


def answer_of(conversation: Conversation) -> str:
    """What is learned first: of a row with a label, its word."""
    return conversation.messages[conversation.turns()[0]].content


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[:most] + "…"


def _length(turn: EncodedTurn, labels: Labels | None) -> int:
    """What a turn takes; before any label the same room is left, so that no prompt's length tells its label."""
    return len(turn.prompt) + labels.longest if labels else len(turn)


def _cut_in_front(
    conversation: Conversation, turns: Sequence[EncodedTurn], template: Template, limit: int, labels: Labels | None,
) -> list[EncodedTurn]:
    """Each turn's prompt without the front of what was said, as far as it must."""
    def fitting(turn: EncodedTurn, place: int) -> EncodedTurn:
        too_much = _length(turn, labels) - limit
        if too_much <= 0:
            return turn
        head = template.head(conversation.as_dicts(place), conversation.tools)
        return replace(turn, prompt=cut_front(turn.prompt, len(turn.prompt) - too_much, head))

    return [fitting(turn, place) for turn, place in zip(turns, conversation.turns())]


def _refuse_outside(paths: Sequence[Example], vocabulary: int, where: str) -> None:
    for path in paths:
        if path.ids.max() >= vocabulary:
            raise RowError(
                f"{where}: token id {int(path.ids.max())} is outside the model's embedding of {vocabulary} rows.",
                "Expected a tokenizer that belongs to the model.",
                "Use the tokenizer that came with the model, or leave out the tokens that were added to it.",
            )


def _refuse_if_too_many(skipped: Sequence[Skipped], rows: int, settings: DataSettings) -> None:
    if not skipped:
        return
    listing = skipped_summary(skipped)
    if len(skipped) == rows:
        cut, strange = (all(words in s.reason for s in skipped) for words in ("cut away", "its label is none of"))
        cure = "Raise data.max_tokens." if cut and settings.max_tokens else "Shorten the prompts." if cut else \
            "Name the labels as the rows have them, such as data.labels='{negative: neg, positive: pos}'; task=answer learns them as text." \
            if strange else "Look at the rows named; data.columns says which column is which."
        raise RowError(f"Nothing can be learned from any of the {rows} rows.\n{listing}", next_step=cure)
    if settings.bad_rows == "refuse":
        raise RowError(f"{len(skipped)} of {rows} rows cannot teach.\n{listing}", "data.bad_rows=refuse stops on the first.",
                       "Mend them, or skip them with data.bad_rows=skip.")
    if len(skipped) > settings.bad_share * rows:
        raise RowError(
            f"{len(skipped)} of {rows} rows cannot teach ({len(skipped) / rows:.1%}).\n{listing}",
            f"Expected at most {settings.bad_share:.0%} (data.bad_share).",
            "Mend them, or allow them with a larger data.bad_share.",
        )


def skipped_summary(skipped: Sequence[Skipped], named: int = 3) -> str:
    """`3 rows: no answer (rows.jsonl:4, rows.jsonl:9, …)`, a line a reason."""
    by_reason = defaultdict(list)
    for item in skipped:
        by_reason[item.reason.split(":")[0]].append(item)
    lines = []
    for reason, items in sorted(by_reason.items(), key=lambda pair: -len(pair[1])):
        places = ", ".join(item.where for item in items[:named]) + (", …" if len(items) > named else "")
        text = items[0].reason if len({item.reason for item in items}) == 1 else reason
        lines.append(f"  {len(items)} {'row' if len(items) == 1 else 'rows'}: {text} ({places})")
    return "\n".join(lines)
