"""What many rows are like together: their lengths, their repeats, their labels. Rows pass once and are not kept.

    EncodedRow -> a few numbers and hashes in flat arrays, and a tally for each kind of defect -> Findings

A row takes about 80 bytes here, so a million of them fit beside anything. Two surveys of rows that follow each other are
merged into one, which is how several processes read one file.

Near duplicates are found by MinHash (Broder 1997) over runs of 5 characters, one permutation with empty bins filled from the
next one (Shrivastava and Li 2014), of which a byte a bin is kept (b-bit MinHash, Li and König 2010): 32 bytes a row, in
4 bands of 8. Rows that share a band are compared byte by byte; what most rows share, such as an instruction, is left out.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weitiao.data.conversation import Conversation
from weitiao.data.dataset import usual_length
from weitiao.data.defects import DEFECTS, find_all
from weitiao.data.encoded import EncodedRow, answer_of, encode_rows, read_row, refuse_unknown
from weitiao.data.findings import MOST_PLACES, Finding, Kind, Severity, Tally
from weitiao.data.formats import row_weight
from weitiao.data.labels import Labels
from weitiao.data.rows.row import Row, place_of, where_of
from weitiao.data.stored import conversation_of, said_by
from weitiao.data.templates import Template
from weitiao.errors import RowError
from weitiao.settings.data import DataSettings

# ---------------------------------------------------------------------------------------------- what there is to say

def _skipped(what: str, cure: str, severity: Severity = "warning") -> Kind:
    return Kind(severity, "{count} of {rows} rows skipped: " + what, cure)


# How a reason begins -> what to say of all rows that have it.
SKIPS: dict[str, tuple[str, Kind]] = {
    "no answer with": ("unlearned", _skipped("{detail}.", "Give the answers to be learned a loss_weight above 0, or remove these rows.")),
    "no answer": ("no_answer", _skipped("no answer.", "Write the answers, or remove these rows; if they stand in another column: data.columns='{output: NAME}'.")),
    "no prompt": ("no_prompt", _skipped("an answer without a prompt.", "Write the prompts, or remove these rows; if they stand in another column, name it in data.columns.")),
    "no label": ("no_label", _skipped("no label.", "Label them, or remove them.")),
    "its label is none of": ("unknown_label", _skipped("a label that is not among those to be told; of the first one, {detail}.",
                             "Name every label in data.labels, or mend these rows.")),
    "no turns": ("no_turns", _skipped("a conversation without turns.", "Remove these rows.")),
    "ends on": ("wrong_end", _skipped("a conversation that does not end with the assistant's answer; the first one {detail}.",
                "Remove the last turn, or write its answer.")),
    "unknown speaker": ("unknown_speaker", _skipped("a turn of a role that is not known; in the first one, {detail}.",
                        "Rename it: system, user (or human), assistant (or gpt), tool.")),
    "its columns are": ("columns", _skipped("columns unlike the file's others; of the first one, {detail}.",
                        "Name the columns as in the other rows.")),
    "The template": ("refused_by_template", _skipped("refused by the chat template. {detail}.",
                     "Let the roles come as the template wants them, mostly user and assistant in turn, or choose another one (data.template).")),
}
# What a look at the row's fields has said better, with the row's place.
SAID_BY_DEFECTS = {
    "ends on": {"ends_on_human", "preference"}, "unknown speaker": {"unknown_speaker"}, "its columns are": {"foreign_columns", "preference"},
    "half of a surrogate": {"lone_surrogates"},
}
CANNOT_TEACH = ("cannot_teach", _skipped("{detail}.", "Mend or remove these rows."))

SURVEY: dict[str, Kind] = {
    "nothing_to_learn": Kind("error", "Nothing can be learned from any of the {rows} rows.", "The other findings say why."),
    "too_many_skipped": Kind("error", "{count} of {rows} rows ({share}) cannot teach, {detail}.", "Mend them, or allow them: data.bad_rows=skip with a larger data.bad_share."),
    "weight": Kind("error", "{count} of {rows} rows without a weight that can be read. {detail}", "Give each row a number of 0 or more in the column of data.weight_column."),
    "outside": Kind("error", "{count} of {rows} rows with a token outside the model's embedding: {detail}.",
                    "Use the tokenizer that came with the model, or leave out the tokens that were added to it."),
    "dropped": Kind("warning", "{count} of {rows} rows skipped: the prompt alone leaves no room for an answer within {detail}.", ""),
    "answer_cut": Kind("warning", "{count} of {rows} rows ({share}) lose the end of their answer, being longer than {detail}. "
                                  "The stop token is kept: the model learns to break off there.", ""),
    "chat_cut": Kind("warning", "{count} of {rows} chats ({share}) lose their last turns, being longer than {detail}. The turns before stay whole.", ""),
    "front_cut": Kind("warning", "{count} of {rows} rows ({share}) lose the front of their text, being longer than {detail}. Their label is kept.", ""),
    "weight_0": Kind("note", "{count} of {rows} rows have a weight of 0: nothing is learned of them.", "If that is not meant, mend the column of data.weight_column."),
    "little_learned": Kind("note", "{detail} of all tokens are learned: the prompts dwarf the answers.",
                           "Shorter prompts train faster; what prompts share, the token trie computes once."),
    "duplicates": Kind("warning", "{count} of {rows} rows ({share}) repeat an earlier one, prompt and answer: {detail}.",
                       "Remove them. If a row is to count more, say so in a column of weights (data.weight_column)."),
    "contradicting_labels": Kind("warning", "{count} of {rows} rows with the text of an earlier one, and another label: {detail}.", "Decide on one label for each text."),
    "several_answers": Kind("note", "{count} of {rows} rows ({share}) with the prompt of an earlier one, and another answer: {detail}.",
                            "Keep one answer a prompt, unless several are meant."),
    "near_duplicates": Kind("note", "{count} of {rows} rows ({share}) say nearly the same as an earlier one: {detail}.",
                            "Where they differ in nothing that matters, keep one."),
    "second_bos": Kind("warning", "{count} of {rows} rows begin with the beginning-of-sequence token twice.",
                       "Take it out of the rows' text, or out of the template (data.template)."),
    "stop_inside": Kind("warning", "{count} of {rows} rows with the stop token inside an answer: {detail}. The model learns to end there, and to go on.",
                        "Take the text of that token out of the answers."),
    "seam": Kind("note", "In {count} of {rows} rows ({share}) prompt and answer, encoded together, would merge across the seam. "
                         "The answer is encoded alone, as it will be generated.", "Nothing has to be done. A template whose prompts end in a line end avoids it."),
    "unbalanced": Kind("warning", "Labels out of balance: {detail}.",
                       "Add rows of the rare ones or let them count more (data.weight_column), and choose by evaluation.metric=macro_f1."),
    "label_blocks": Kind("note", "The rows stand in blocks of one label: {detail}.", "Nothing has to be done, weitiao shuffles. The first rows of the file would show one label only."),
    "eval_overlap": Kind("warning", "{count} of {rows} rows of data.eval ({share}) are also learned from: {detail}.", "Remove them from one of the two; scores would be too good."),
    "eval_prompts": Kind("warning", "{count} of {rows} rows of data.eval ({share}) have the prompt of a training row, and another answer: {detail}.",
                         "Remove them from one of the two, unless a prompt has several answers."),
    "eval_new_labels": Kind("warning", "{count} of {rows} rows of data.eval have a label that no training row has: {detail}.",
                            "Add training rows of it, or name the labels alike (data.labels)."),
}

# ------------------------------------------------------------------------------------------------ texts, without what differs little

LITTLE = 0.02  # of the tokens
NOT_LETTERS = re.compile(r"[\W\d_]+")
NO_ASCII_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())  # the same, ten times as fast
LEAST_LETTERS = 8  # of a text that is told by them: 1+1=2 and 3+5=8 have none
MOST_CHARACTERS = 20_000  # of a conversation that are looked at
GRAM = 5
TOGETHER = 100_000  # characters whose runs are hashed in one go
BINS, BANDS, ALIKE = 32, 4, 28  # 28 of 32 bytes alike: rows that share about nine of ten runs of characters
EDGES = np.arange(BINS, dtype=np.uint32) << np.uint32(27)
FACTORS = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1], np.uint32)
NO_SKETCH = bytes(BINS)


def loose(conversation: Conversation) -> str:
    """What is said, without case, digits, punctuation and spaces."""
    said = "\n".join(m.content for m in conversation.messages if m.role != "system")
    said = said[:MOST_CHARACTERS].casefold()
    return said.encode().translate(None, NO_ASCII_LETTERS).decode() if said.isascii() else NOT_LETTERS.sub("", said)


def grams(text: str) -> np.ndarray:
    """A hash of each run of 5 characters, uint32."""
    letters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    if len(letters) < GRAM:
        return np.zeros(0, np.uint32)
    last = len(letters) - GRAM + 1
    mixed = letters[:last] * FACTORS[0]
    for i in range(1, GRAM):
        mixed = (mixed ^ (mixed >> np.uint32(13))) + letters[i : last + i] * FACTORS[i]
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x2C1B3C6D)
    mixed ^= mixed >> np.uint32(12)
    mixed *= np.uint32(0x297A2D39)
    return mixed ^ (mixed >> np.uint32(15))


def sketches_of(texts: Sequence[str], frequent: np.ndarray) -> bytes:
    """A sketch each. Their runs are hashed together, and those across the end of a text left out: short ones cost most by their number."""
    hashes = grams("".join(texts))
    ends = np.cumsum([len(text) for text in texts]).tolist()
    return b"".join([sketch(hashes[end - len(text) : max(end - GRAM + 1, end - len(text))], frequent) for text, end in zip(texts, ends, strict=True)])


def sketch(hashes: np.ndarray, frequent: np.ndarray) -> bytes:
    """32 bytes, of which two texts share as large a part as of their runs of characters; 0s for a text too short to tell."""
    if len(frequent) and len(hashes):
        hashes = hashes[frequent[np.searchsorted(frequent, hashes) % len(frequent)] != hashes]
    if len(hashes) < BINS // 2:
        return NO_SKETCH
    hashes = np.sort(hashes)
    least = np.searchsorted(hashes, EDGES)  # the least hash of each bin; of an empty one, that of the next
    least[least == len(hashes)] = 0
    return (hashes[least] & np.uint32(255)).astype(np.uint8).tobytes()


def frequent_grams(texts: Iterable[str], least: int = 16, share: float = 0.1) -> np.ndarray:
    """The runs of characters that more than a tenth of the texts have, sorted: an instruction that all share."""
    each = [np.unique(grams(text)) for text in texts]
    if len(each) < least:
        return np.zeros(0, np.uint32)
    found, counts = np.unique(np.concatenate(each), return_counts=True)
    return found[counts >= max(least, share * len(each))]


def digest(*parts: bytes) -> int:
    told = hashlib.blake2b(digest_size=8)
    for part in parts:
        told.update(part)
    return int.from_bytes(told.digest(), "little")


# ------------------------------------------------------------------------------------------------ the survey


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


def _dtype(column: array) -> np.dtype:
    return np.dtype(f"{'i' if column.typecode == 'i' else 'u'}{column.itemsize}")


# ------------------------------------------------------------------------------------------------ repeats


def earlier_equal(values: np.ndarray) -> np.ndarray:
    """The place of the first equal value before each; -1 for the first ones. [7, 8, 7, 7] -> [-1, -1, 0, 0]"""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, bool)
    heads = order[np.maximum.accumulate(np.where(begins, np.arange(len(values)), 0))] if len(values) else order
    found = np.full(len(values), -1, np.int64)
    found[order[~begins]] = heads[~begins]
    return found


def first_among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The place of each value's first occurrence in `known`, or -1."""
    if not len(known):
        return np.full(len(values), -1, np.int64)
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known[order], values), len(known) - 1)
    return np.where(known[order][at] == values, order[at], -1)


def nearly_earlier(texts: np.ndarray, sketches: np.ndarray) -> np.ndarray:
    """The place of an earlier row that says nearly the same; -1 for the others.

    texts: a hash of each text without case, digits, punctuation and spaces. sketches: uint8 [rows, 32].
    """
    found = earlier_equal(texts)
    told = np.flatnonzero(sketches.any(1))
    for band in sketches[told].view(np.uint64).T if len(told) else ():
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        heads = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
        befores = np.concatenate([[0], order[:-1]])
        later = ~begins
        for others in (heads, befores):  # the first of its group, and its neighbour there
            mine, theirs = told[order[later]], told[others[later]]
            alike = (sketches[mine] == sketches[theirs]).sum(1) >= ALIKE
            mine, theirs = mine[alike], theirs[alike]
            new = found[mine] < 0
            found[mine[new]] = theirs[new]
    return found


# ------------------------------------------------------------------------------------------------ many rows


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
