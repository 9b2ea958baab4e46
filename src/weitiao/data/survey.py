"""What many rows are like together: their lengths, their repeats, their labels. Rows pass once and are not kept.

    EncodedRow -> a few numbers and hashes in flat arrays, and a tally for each kind of defect -> Findings

A row takes about 80 bytes here, so a million of them fit beside anything. Two surveys of rows that follow each other are
merged into one, which is how several processes read one file.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weitiao.data.alike import BINS, digest, earlier_equal, first_among, frequent_grams, loose, nearly_earlier, sketches_of
from weitiao.data.conversation import Conversation
from weitiao.data.dataset import usual_length
from weitiao.data.defects import DEFECTS, find_all
from weitiao.data.encoded import EncodedRow, answer_of, encode_rows, read_row, refuse_unknown
from weitiao.data.findings import MOST_PLACES, Finding, Tally
from weitiao.data.formats import row_weight
from weitiao.data.labels import Labels
from weitiao.data.lengths import Lengths
from weitiao.data.remarks import CANNOT_TEACH, SAID_BY_DEFECTS, SKIPS, SURVEY
from weitiao.data.rows.row import Row, place_of, where_of
from weitiao.data.stored import conversation_of, said_by
from weitiao.data.templates import Template
from weitiao.errors import RowError
from weitiao.settings.data import DataSettings

LITTLE = 0.02  # of the tokens
LEAST_LETTERS = 8  # of a text that is told by them: 1+1=2 and 3+5=8 have none
TOGETHER = 100_000  # characters whose runs are hashed in one go


@dataclass(frozen=True)
class Facts:
    """What a row is judged by: the ids that end and begin one, the embedding's rows, the column of weights."""

    settings: DataSettings
    stop_id: int
    bos_id: int | None
    vocabulary: int

    @classmethod
    def of(cls, settings: DataSettings, template: Template, vocabulary: int) -> Facts:
        return cls(settings, template.stop_id, template.tokenizer.bos_token_id, vocabulary)


class Survey:
    """Notes of rows in their order: arrays with an item a row that teaches, or an item a turn; tallies for the rest."""

    ROWS = {"file": "H", "line": "I", "turns": "I", "weighed": "B", "prompt": "Q", "whole": "Q", "loose": "Q", "label": "i"}
    TURNS = {"given": "i", "learned": "i"}

    def __init__(self, facts: Facts, frequent: np.ndarray | None = None):
        self.facts = facts
        self.frequent = np.zeros(0, np.uint32) if frequent is None else frequent
        self.rows = self.skipped = 0
        self.files: dict[str, int] = {}
        self.words: dict[str, int] = {}
        self.columns = {name: array(code) for name, code in (self.ROWS | self.TURNS).items()}
        self._sketches = bytearray()
        self._said: list[str] = []  # not sketched yet
        self._characters = 0
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self.skips: defaultdict[str, Tally] = defaultdict(Tally)
        self.asked: Conversation | None = None

    def __len__(self) -> int:
        """How many rows can teach, before any is cut."""
        return len(self.columns["line"])

    @property
    def bytes(self) -> int:
        return len(self.sketches) + sum(len(column) * column.itemsize for column in self.columns.values())

    def another(self) -> Survey:
        """An empty one, to be merged into this one."""
        return Survey(self.facts, self.frequent)

    def begin(self, rows: Sequence[Row], format: str) -> None:
        """The first rows of a file, for what most of them share."""
        self.sketch_all()
        said = [read_row(row, format, self.facts.settings) for row in rows]
        shared = frequent_grams(loose(one.conversation) for one in said if not one.reason)
        self.frequent = np.union1d(self.frequent, shared)

    def add(self, one: EncodedRow) -> None:
        row, conversation = one.row, one.conversation
        self.rows += 1
        met = find_all(row.fields, conversation)
        for name, detail in met.items():
            self.tallies[name].add(row.where, detail)
        if one.reason:
            self.skipped += 1
            words = next((words for words in SKIPS if one.reason.startswith(words)), "")
            if not met.keys() & SAID_BY_DEFECTS.get(words, set()):
                self.skips[words].add(row.where, one.reason)
            return
        self._note(one, row, conversation)
        self._look(one, row, "special_tokens" in met)

    def _note(self, one: EncodedRow, row: Row, conversation: Conversation) -> None:
        """The numbers of a row that can teach."""
        self.asked = self.asked or conversation
        last = one.turns[-1]
        is_label = not len(last.stop)
        word = answer_of(conversation) if is_label else ""
        prompt = last.prompt.tobytes()
        said = loose(conversation)
        noted = {
            "file": self.files.setdefault(row.file, len(self.files)), "line": row.line, "turns": len(one.turns), "weighed": self._weighed(row),
            "prompt": digest(prompt), "whole": digest(prompt, b"|", word.encode() if is_label else last.answer.tobytes()),
            "loose": digest(said.encode() if len(said) >= LEAST_LETTERS else prompt), "label": self.words.setdefault(word, len(self.words)) if is_label else -1,
        }
        for name, value in noted.items():
            self.columns[name].append(value)
        self.columns["given"].extend(len(turn.prompt) for turn in one.turns)
        self.columns["learned"].extend(0 if is_label else len(turn.answer) + 1 for turn in one.turns)
        self._said.append(said)
        self._characters += len(said)
        if self._characters > TOGETHER:
            self.sketch_all()

    @property
    def sketches(self) -> bytearray:
        """32 bytes a row."""
        self.sketch_all()
        return self._sketches

    def sketch_all(self) -> None:
        """Of what was said since the last time."""
        self._sketches += sketches_of(self._said, self.frequent)
        self._said, self._characters = [], 0

    def _weighed(self, row: Row) -> bool:
        try:
            return row_weight(row, self.facts.settings) > 0
        except RowError as error:
            self.tallies["weight"].add(row.where, error.found)
            return True

    def _look(self, one: EncodedRow, row: Row, marked: bool) -> None:
        """Defects that show in the ids. marked: its text was seen to hold special tokens, and is told so."""
        facts, last = self.facts, one.turns[-1]
        highest = max(int(ids.max()) for ids in (last.prompt, last.answer, last.stop) if len(ids)) if len(last.prompt) + len(last.answer) else 0
        if highest >= facts.vocabulary:
            self.tallies["outside"].add(row.where, f"id {highest} in an embedding of {facts.vocabulary:,} rows")
        if facts.bos_id is not None and last.prompt[:2].tolist() == [facts.bos_id] * 2:
            self.tallies["second_bos"].add(row.where)
        if not all(turn.seam for turn in one.turns):
            self.tallies["seam"].add(row.where)
        if len(last.stop) and not marked and any((turn.answer == facts.stop_id).any() for turn in one.turns):
            self.tallies["stop_inside"].add(row.where, f"id {facts.stop_id}")

    def merge(self, later: Survey) -> None:
        """The same with rows that come after these."""
        files = np.array([self.files.setdefault(file, len(self.files)) for file in later.files], np.uint16)
        words = np.array([*(self.words.setdefault(word, len(self.words)) for word in later.words), -1], np.int32)  # -1 stays -1
        for name, column in later.columns.items():
            values = np.frombuffer(column, _dtype(column)) if len(column) else np.zeros(0, _dtype(column))
            values = files[values] if name == "file" else words[values] if name == "label" else values
            self.columns[name].frombytes(values.astype(_dtype(column)).tobytes())
        self.sketches.extend(later.sketches)
        self.rows += later.rows
        self.skipped += later.skipped
        self.asked = self.asked or later.asked
        for mine, theirs in ((self.tallies, later.tallies), (self.skips, later.skips)):
            for name, tally in theirs.items():
                mine[name].merge(tally)

    def as_facts(self, files: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(what can be written as JSON, the columns); places by the numbers of their files."""
        def plain(tallies: Mapping[str, Tally]) -> dict[str, Any]:
            return {name: [tally.count, [place_of(where, files) for where in tally.where], tally.detail] for name, tally in tallies.items()}

        facts = {
            "rows": self.rows, "skipped": self.skipped, "files": [files[file] for file in self.files], "words": list(self.words),
            "tallies": plain(self.tallies), "skips": plain(self.skips), "asked": said_by(self.asked).decode() if self.asked else None,
        }
        columns = {name: self.column(name) for name in self.columns}
        return facts, columns | {"sketches": np.frombuffer(bytes(self.sketches), np.uint8)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], columns: Mapping[str, np.ndarray], files: Sequence[str]) -> Survey:
        """What `as_facts` was made of, its files named as they are here; to be merged into another."""
        survey = cls(Facts(DataSettings.model_construct(), 0, None, 0))

        def read(tallies: Mapping[str, Any]) -> dict[str, Tally]:
            return {name: Tally(count, [where_of(files[file], line) for file, line in places], detail) for name, (count, places, detail) in tallies.items()}

        survey.rows, survey.skipped = facts["rows"], facts["skipped"]
        survey.files = {files[number]: i for i, number in enumerate(facts["files"])}
        survey.words = {word: i for i, word in enumerate(facts["words"])}
        survey.tallies.update(read(facts["tallies"]))
        survey.skips.update(read(facts["skips"]))
        survey.asked = conversation_of(facts["asked"].encode()) if facts["asked"] else None
        for name, column in survey.columns.items():
            column.frombytes(columns[name].tobytes())
        survey._sketches += columns["sketches"].tobytes()
        return survey

    # ------------------------------------------------------------------------------------ what it comes to

    def column(self, name: str) -> np.ndarray:
        return np.array(self.columns[name], _dtype(self.columns[name]))

    def where(self, i: int) -> str:
        return where_of(list(self.files)[self.columns["file"][i]], self.columns["line"][i])

    def tally(self, found: np.ndarray, detail: str = "") -> Tally:
        """Of rows by number."""
        return Tally(len(found), [self.where(int(i)) for i in found[:MOST_PLACES]], detail)

    def lengths(self, model_limit: int, max_tokens: int | None, labels: Labels | None = None, head: int = 0) -> Lengths:
        """What is cut and learned; the arithmetic of dataset.load, for all rows at once.

        Args:
            max_tokens: the limit asked for, if any. labels: where they are told in the place of answers.
            head: how many tokens of a prompt stay in front when its text is cut.
        """
        given, learned = self.column("given").astype(np.int64), self.column("learned").astype(np.int64)
        turns, weighed = self.column("turns").astype(np.int64), self.column("weighed").astype(bool)
        if not len(turns):
            return Lengths(min(max_tokens or model_limit, model_limit), given, *[turns] * 5, tokens=0, learned=0)
        room = learned
        if labels:  # before any label the same room is left
            own = np.array([len(labels.of(word)) for word in self.words if word in labels.words], np.int64)
            learned, room = own[self.column("label")], np.full(len(given), labels.longest)
        first = np.concatenate([[0], np.cumsum(turns)[:-1]])
        longest = np.maximum.reduceat(given + room, first)
        limit = min(max_tokens or usual_length(longest, labels is not None), model_limit)
        number = np.arange(len(given)) - np.repeat(first, turns)  # of a turn in its row
        kept = np.minimum(np.minimum.reduceat(np.where(given + room <= limit, len(given), number), first), turns)
        in_front = labels is not None and self.facts.settings.cut != "end"
        can_be_cut = np.full(len(turns), limit - labels.longest > head and in_front) if labels else given[first] + 2 <= limit
        cut = (kept == 0) & can_be_cut  # what is left of the first turn
        whole = number < np.repeat(kept, turns)
        used, told = np.where(whole, given + learned, 0), np.where(whole, learned - (given == 0), 0)
        used[first[cut]] = limit - labels.longest + learned[first[cut]] if labels else limit
        told[first[cut]] = learned[first[cut]] if labels else limit - np.maximum(given[first[cut]], 1)
        dropped = (kept == 0) & ~cut
        teaches = np.repeat(weighed & ~dropped, turns)
        cases = (dropped, cut & weighed & (labels is None), (kept > 0) & (kept < turns) & weighed, cut & weighed & (labels is not None), ~weighed & ~dropped)
        return Lengths(limit, longest, *map(np.flatnonzero, cases), tokens=int(used[teaches].sum()), learned=int(told[teaches].sum()))

    def findings(self, lengths: Lengths, cure: str) -> list[Finding]:
        """All there is to say of these rows. cure: what keeps rows whole, where some are cut."""
        kinds = SURVEY | DEFECTS
        found = [tally.finding(name, kinds[name], self.rows) for name, tally in self.tallies.items()]
        for words, tally in self.skips.items():
            name, kind = SKIPS.get(words, CANNOT_TEACH)
            found.append(replace(tally, detail=tally.detail.rstrip(".")).finding(name, kind, self.rows))
        at = f"{lengths.limit:,} tokens"
        cuts = {"dropped": lengths.dropped, "answer_cut": lengths.answer_cut, "chat_cut": lengths.chat_cut, "front_cut": lengths.front_cut}
        found += [self._say(name, rows, at, cure=cure) for name, rows in cuts.items()]
        found += [self._say("weight_0", lengths.weight_0), self._little_learned(lengths)]
        found += self._repeats() + self._labels() + self._too_many(lengths)
        return [one for one in found if one]

    def _say(self, name: str, rows: np.ndarray | Tally, detail: str = "", cure: str = "") -> Finding | None:
        tally = rows if isinstance(rows, Tally) else self.tally(rows, detail)
        kind = replace(SURVEY[name], cure=cure) if cure else SURVEY[name]
        return tally.finding(name, kind, self.rows) if tally.count else None

    def _of_all(self, name: str, is_so: bool, detail: str) -> Finding | None:
        """Something that is said of the rows together."""
        return self._say(name, Tally(self.rows if is_so else 0, [], detail))

    def _little_learned(self, lengths: Lengths) -> Finding | None:
        share = lengths.learned / max(lengths.tokens, 1)
        return self._of_all("little_learned", lengths.tokens > 0 and share < LITTLE and not self.words, f"{share:.1%}")

    def _too_many(self, lengths: Lengths) -> list[Finding | None]:
        """What the training refuses."""
        lost = self.skipped + len(lengths.dropped)
        settings = self.facts.settings
        if self.rows and len(self) == len(lengths.dropped) + len(lengths.weight_0):
            return [self._of_all("nothing_to_learn", True, "")]
        most = 0 if settings.bad_rows == "refuse" else settings.bad_share * self.rows
        allowed = "and data.bad_rows=refuse allows none" if settings.bad_rows == "refuse" else f"and data.bad_share allows {settings.bad_share:.0%}"
        return [self._say("too_many_skipped", Tally(lost if lost > most else 0, [], allowed))]

    def _repeats(self) -> list[Finding | None]:
        whole, prompt, label = self.column("whole"), self.column("prompt"), self.column("label")
        earlier = earlier_equal(whole)
        same = np.flatnonzero(earlier >= 0)
        first = earlier_equal(prompt)
        other = np.flatnonzero((first >= 0) & (earlier < 0))
        labelled = label[other] >= 0
        near = nearly_earlier(self.column("loose"), np.frombuffer(bytes(self.sketches), np.uint8).reshape(-1, BINS))
        alike = np.flatnonzero((near >= 0) & (earlier < 0) & (first < 0))
        return [
            self._say("duplicates", same, self._pair(same, earlier, "is")),
            self._say("contradicting_labels", other[labelled], self._pair(other[labelled], first, "has the text of", self._labels_of)),
            self._say("several_answers", other[~labelled], self._pair(other[~labelled], first, "has the prompt of")),
            self._say("near_duplicates", alike, self._pair(alike, near, "is nearly")),
        ]

    def _pair(self, rows: np.ndarray, earlier: np.ndarray, verb: str, more: Any = None) -> str:
        """`b.jsonl:9 is a.jsonl:4`"""
        if not len(rows):
            return ""
        i, j = int(rows[0]), int(earlier[rows[0]])
        return f"{self.where(i)} {verb} {self.where(j)}" + (more(i, j) if more else "")

    def _labels_of(self, i: int, j: int) -> str:
        words, label = list(self.words), self.columns["label"]
        return f" ({words[label[i]]!r} and {words[label[j]]!r})"

    def class_counts(self) -> dict[str, int]:
        label = self.column("label")
        counts = np.bincount(label[label >= 0], minlength=len(self.words))
        return {word: int(counts[i]) for word, i in self.words.items()}

    def _labels(self) -> list[Finding | None]:
        counts = self.class_counts()
        if len(counts) < 2:
            return []
        rows, (least, most) = sum(counts.values()), (min(counts.values()), max(counts.values()))
        shares = ", ".join(f"{word} {count / rows:.1%}" for word, count in sorted(counts.items(), key=lambda pair: -pair[1])[:8])
        label = self.column("label")
        changes = int((label[1:] != label[:-1]).sum())
        by_chance = rows * (1 - sum((count / rows) ** 2 for count in counts.values()))
        is_sorted = rows >= 20 and changes < 2 * len(counts) and changes * 4 < by_chance
        is_unbalanced = most > 4 * least or least < min(0.05, 0.5 / len(counts)) * rows
        return [
            self._of_all("unbalanced", is_unbalanced, shares),
            self._of_all("label_blocks", is_sorted, f"changes of label from row to row: {changes}, by chance {by_chance:,.0f}"),
        ]

    def beside(self, train: Survey) -> list[Finding | None]:
        """What these rows, those to measure on, have in common with the training rows, and what they lack."""
        whole, prompt = self.column("whole"), self.column("prompt")
        first_whole, first_prompt = first_among(whole, train.column("whole")), first_among(prompt, train.column("prompt"))
        same = np.flatnonzero(first_whole >= 0)
        asked = np.flatnonzero((first_whole < 0) & (first_prompt >= 0))
        missing = [i for word, i in self.words.items() if word not in train.words]
        new = np.flatnonzero(np.isin(self.column("label"), missing)) if missing else np.zeros(0, np.int64)

        def pair(rows: np.ndarray, first: np.ndarray) -> str:
            return f"{self.where(int(rows[0]))} is in training as {train.where(int(first[rows[0]]))}" if len(rows) else ""

        return [
            self._say("eval_overlap", same, pair(same, first_whole)), self._say("eval_prompts", asked, pair(asked, first_prompt)),
            self._say("eval_new_labels", new, ", ".join(repr(word) for word in self.words if word not in train.words)),
        ]


def _dtype(column: array) -> np.dtype:
    return np.dtype(f"{'i' if column.typecode == 'i' else 'u'}{column.itemsize}")


@dataclass(frozen=True, eq=False)
class Surveyor:
    """Some rows of a file -> their survey; the same steps as dataset.load's, in any process.

    classified: rows are answered with a label. words: the labels, where they are known before.
    """

    facts: Facts
    template: Template
    model_limit: int
    classified: bool
    words: tuple[str, ...]
    frequent: np.ndarray

    def __call__(self, rows: Sequence[Row], format: str) -> Survey:
        survey = Survey(self.facts, self.frequent)
        said = [read_row(row, format, self.facts.settings) for row in rows]
        for one in encode_rows(said, self.template, self.model_limit, self.classified):
            survey.add(refuse_unknown(one, self.words) if self.words else one)
        survey.sketch_all()  # it may go to another process, without what was said
        return survey
