"""What can be wrong with one row, seen from its text alone: a table of defects, each with what to say and how to find it.

    fields of a row, its Conversation (None: it could not be converted) -> a short detail of the first thing met, or None

A row is read once for all of them, and the last one's reading is kept. What a row may have at all is told first, by families
of defects (a text with "<" in it, an answer that begins as JSON): a clean row costs a few passes of a compiled pattern.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

from weitiao.data import mojibake
from weitiao.data.conversation import Conversation
from weitiao.data.findings import Kind
from weitiao.data.formats import COMPLETION_PAIRS, FORMATS, ROLES

AROUND = 20  # characters shown on either side of what is met
SHORT = 16  # an answer that may be no answer


@dataclass(frozen=True)
class Defect:
    """find: (fields as in the source, conversation) -> what was met, or None."""

    kind: Kind
    find: Callable[[Mapping[str, Any], Conversation | None], str | None]


def find_all(fields: Mapping[str, Any], conversation: Conversation | None) -> dict[str, str]:
    """Name of a defect -> what was met, of those that the row has."""
    global _last
    last = _last
    if last[0] is not fields or last[1] is not conversation:
        last = _last = fields, conversation, Read(fields, conversation).met()
    return last[2]


class Turn(NamedTuple):
    """role: None where the speaker is unknown."""

    speaker: str
    role: str | None
    text: str


class Read:
    """A row's texts, and what is met in them.

    texts: what is said. whole: all of it. exchanges: (what stands before it, answer) for every answer in words; labels are none.
    turns: who says what, in a chat.
    """

    def __init__(self, fields: Mapping[str, Any], conversation: Conversation | None):
        self.fields, self.conversation = fields, conversation
        if conversation is not None:
            messages = conversation.messages
            self.texts = [message.content for message in messages]
            self.exchanges = [] if conversation.is_label else [
                (self.texts[i - 1] if i else "", m.content) for i, m in enumerate(messages) if m.role == "assistant"
            ]
        else:
            self.texts = list(_strings(list(fields.values())))
            self.exchanges = _exchanges(fields)
        self.whole = "\n".join(self.texts)
        self.turns = _turns(fields, conversation)

    def met(self) -> dict[str, str]:
        """Name of a defect -> detail."""
        met = {}
        for looks, may_be in FAMILIES:
            if may_be(self):
                for name, look in looks:
                    detail = look(self)
                    if detail is not None:
                        met[name] = detail
        return met

    @cached_property
    def misread(self) -> tuple[mojibake.Misread, str] | None:
        """(the first piece that was read in another encoding, the text it stands in)"""
        return next(((found, text) for text in self.texts if (found := mojibake.misread(text))), None)

    @cached_property
    def broken_json(self) -> dict[str, str]:
        """Defect -> detail, for the first answer that begins as JSON and is none."""
        return next((found for _, answer in self.exchanges if (found := _json_defects(answer))), {})


_last: tuple[Mapping[str, Any] | None, Conversation | None, dict[str, str]] = None, None, {}
ANSWER_PAIRS = (("instruction", "output"), *COMPLETION_PAIRS)


def _exchanges(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The answer of a row that could not be converted, if it stands in a column of ours."""
    for question, answer in ANSWER_PAIRS:
        if isinstance(fields.get(answer), str):
            prompt = fields.get(question)
            return [(prompt if isinstance(prompt, str) else "", fields[answer])]
    return []


def _strings(value: Any) -> Iterator[str]:
    """Every text within, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _turns(fields: Mapping[str, Any], conversation: Conversation | None) -> list[Turn]:
    """Who says what, as it stands in the source where that is a list; else as it was converted, if that is a chat."""
    listed = fields.get("messages", fields.get("conversations"))
    if isinstance(listed, (list, tuple)):
        return [_turn(turn) for turn in listed if isinstance(turn, Mapping)]
    messages = conversation.messages if conversation is not None else ()
    return [Turn(m.role, m.role, m.content) for m in messages] if len(messages) > 3 else []


def _turn(turn: Mapping[str, Any]) -> Turn:
    speaker = str(turn.get("role", turn.get("from")))
    said = turn.get("content", turn.get("value"))
    text = said if isinstance(said, str) else "".join(_strings(said)) or ("" if said is None else str(said))
    called = "(calls a tool)" if turn.get("tool_calls") else ""
    return Turn(speaker, ROLES.get(speaker.lower()), text or called)


# ---------------------------------------------------------------------------------------------------- showing what was met


def shown(text: str) -> str:
    """On one line, each character that cannot be seen by its number: `well U+0085 then`."""
    return "".join(character if _is_seen(character) else " " if character in "\n\r\t" else f"[{_code(character)}]" for character in text)


def _is_seen(character: str) -> bool:
    return character.isprintable() or character == "\u3000"


def _code(character: str) -> str:
    return f"U+{ord(character):04X}"


def around(text: str, start: int, end: int) -> str:
    """text[start:end] with a little of what stands about it."""
    end = min(end, start + 2 * AROUND)
    front, back = max(start - AROUND, 0), min(end + AROUND, len(text))
    return f"'{'…' if front else ''}{shown(text[front:back])}{'…' if back < len(text) else ''}'"


def _beginning(text: str, most: int = 2 * AROUND) -> str:
    return around(text, 0, most) if len(text) > most else f"'{shown(text)}'"


def _met(pattern: re.Pattern[str], texts: Sequence[str]) -> tuple[re.Match[str], str] | None:
    return next(((found, text) for text in texts if (found := pattern.search(text))), None)


def _first(pattern: re.Pattern[str], texts: Sequence[str]) -> str | None:
    found = _met(pattern, texts)
    return around(found[1], found[0].start(), found[0].end()) if found else None


# --------------------------------------------------------------------------------------------------------------- encodings


def _misread(kind: str) -> Callable[[Read], str | None]:
    def look(read: Read) -> str | None:
        if read.misread is None:
            return None
        found, text = read.misread
        if ("mixed_encodings" if found.mixed else found.kind) != kind:
            return None
        return f"{around(text, found.start, found.end)}, where {_beginning(text[found.start : found.end])} stands for {_beginning(found.meant)}"

    return look


LOST_PIECES = ("\ufffd", "锟斤拷", "烫烫烫", "屯屯屯")  # what stands for it; the same in GBK; memory that was never written
LOST = re.compile("|".join(LOST_PIECES))


def _lost(read: Read) -> str | None:
    return _first(LOST, read.texts)


# ------------------------------------------------------------------------------------------------------------- characters

# As classes of a pattern.
_CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f"
_C1 = r"\x80-\x9f"
_INVISIBLE = "\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
_PRIVATE = "\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd"
_NONCHARACTERS = "\ufdd0-\ufdef" + "".join(f"{chr(p + 0xFFFE)}-{chr(p + 0xFFFF)}" for p in range(0, 0x110000, 0x10000))
_SURROGATES = "\ud800-\udfff"
ODD = re.compile(f"[{_CONTROLS}{_C1}{_INVISIBLE}{_PRIVATE}{_NONCHARACTERS}{_SURROGATES}]")
C1, INVISIBLE = re.compile(f"[{_C1}]"), re.compile(f"[{_INVISIBLE}]")
RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdcf\ufe70-\ufefc]")  # scripts in which direction marks have their place
_DIRECTION_MARKS = str.maketrans("", "", "\u200e\u200f\u202a\u202b\u202c\u2066\u2067\u2068\u2069")


def _has_odd(read: Read) -> bool:
    """Nothing that Python calls printable is odd, and that is fast to ask; the pattern has the last word."""
    usual = read.whole.replace("\n", "").replace("\t", "").replace("\u3000", "").replace("\xa0", "")
    return not usual.isprintable() and ODD.search(usual) is not None


def _characters(characters: str) -> Callable[[Read], str | None]:
    pattern = re.compile(f"[{characters}]")
    return lambda read: _first(pattern, read.texts)


def _c1(read: Read) -> str | None:
    """A C1 control is next to always a byte of cp1252: the character that was meant is told."""
    found = None if read.misread else _met(C1, read.texts)
    if not found:
        return None
    met, text = found
    meant = met[0].encode("latin-1").decode("cp1252", "ignore")
    return around(text, met.start(), met.end()) + (f", where {_code(met[0])} stands for {meant}" if meant else "")


def _invisible(read: Read) -> str | None:
    texts = [text.translate(_DIRECTION_MARKS) if RIGHT_TO_LEFT.search(text) else text for text in read.texts]
    return _first(INVISIBLE, texts)


# ------------------------------------------------------------------------------------------------------------------ texts

HTML = re.compile(r"&(?:amp|nbsp|lt|gt|quot|apos|#\d{2,6}|#x[\da-fA-F]{2,5});|</?(?:br|p|div|span|font|strong|em|b|i|u|h[1-6])(?: [^<>]*)?/?>")
CODE = re.compile(r"```|<html|<!DOCTYPE|<body", re.IGNORECASE)


def _html(read: Read) -> str | None:
    """In answers; where one is about HTML, or is code, it belongs there."""
    answers = [answer for _, answer in read.exchanges if HTML.search(answer) and not CODE.search(answer)]
    return _first(HTML, answers) if answers and "html" not in read.whole.lower() else None


ESCAPED_BREAK = re.compile(r"(?<!\\)\\(?:r\\)?n(?![a-z])")  # no \nabla, no C:\new


def _escaped_breaks(read: Read) -> str | None:
    texts = [text for text in read.texts if "\n" not in text.strip() and text[:1] not in "{[" and not re.search(r"['\"`$]", text)]
    return _first(ESCAPED_BREAK, texts)


# As a cell that was empty is written by who made a text of it; lower-case none may be an answer.
STAND_INS = {"nan", "NaN", "NAN", "None", "null", "NULL", "Null", "N/A", "n/a", "#N/A", "NA", "<NA>", "undefined", "NaT"}


def _stand_in(read: Read) -> str | None:
    return next((f"'{a.strip()}'" for _, a in read.exchanges if a.strip() in STAND_INS), None)


def _no_words(read: Read) -> str | None:
    short = (answer for _, answer in read.exchanges if len(answer) < SHORT)
    return next((f"'{shown(a)}'" for a in short if a and a.strip() not in EMPTY_JSON and all(_is_no_word(c) for c in a)), None)


EMPTY_JSON = {"{}", "[]", '""'}


def _is_no_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "PZC"  # punctuation, spaces, controls


BOILERPLATE = re.compile(
    r"\s*(?:(?:I'm sorry|I am sorry|Sorry|I apologize|My apologies)[,.]? (?:but )?)?"
    r"(?:As an? (?:AI|artificial intelligence)(?: language| chat)?(?: model| assistant|bot)?(?:,| I\b| (?:developed|created|trained)\b)"
    r"|I(?:'m| am) (?:just |only )?an AI language model|I am ChatGPT"
    r"|(?:很?抱歉|对不起|非常抱歉)?[，,]?(?:作为|我是|我只是)一[个名种款](?:AI|人工智能|大型?语言|语言)(?:语言)?(?:模型|助手|助理))", re.IGNORECASE,
)


def _boilerplate(read: Read) -> str | None:
    return next((_beginning(a) for _, a in read.exchanges if BOILERPLATE.match(a)), None)


LEAST_REPEATED = 24  # bytes, which are 8 Chinese characters: less may well be the answer, such as a greeting


def _is_prompt(read: Read) -> str | None:
    return next((_beginning(a) for p, a in read.exchanges if a[:4] == p[:4] and a.strip() == p.strip() and _is_long(p)), None)


def _repeats_prompt(read: Read) -> str | None:
    repeats = (a for p, a in read.exchanges if len(a) > len(p) and a.startswith(p) and _is_long(p) and not IN_A_WORD.match(a[len(p) :]))
    return next((_beginning(a) for a in repeats), None)


IN_A_WORD = re.compile("[a-zA-Z0-9]")


def _is_long(prompt: str) -> bool:
    return len(prompt.encode(errors="replace")) >= LEAST_REPEATED


def _open_fence(read: Read) -> str | None:
    return next((f"'…{shown(a[-2 * AROUND:])}'" for _, a in read.exchanges if a.count("```") % 2 and FENCE.search(a)), None)


FENCE = re.compile(r"^[ \t>]*```", re.MULTILINE)

# ------------------------------------------------------------------------------------------- what templates write themselves

SPECIAL = re.compile(
    r"[<\[](?:\|[a-zA-Z_0-9]{2,28}\|>|/?s>|/?INST\]|</?SYS>>|(?:start|end)_of_turn>|(?:eod|eos|bos|pad|unk|sep)>|(?:gMASK|sMASK|CLS|SEP|PAD|UNK)\]"
    r"|｜[^｜<>]{2,28}｜>)"
)
MARKER = re.compile(
    r"^(?:(?:Human|Assistant|USER|ASSISTANT):|#{2,3} ?(?:Response|Instruction|Human|Assistant|指令|回答)[:：])", re.MULTILINE,
)
MARKER_PIECES = ("Human:", "Assistant:", "USER:", "ASSISTANT:", "##")


def _special(read: Read) -> str | None:
    return _first(SPECIAL, read.texts)


def _marker(read: Read) -> str | None:
    return _first(MARKER, [answer for _, answer in read.exchanges])


# ------------------------------------------------------------------------------------------------------------------- JSON

JSON_BEGIN = re.compile(r"""\s*(?:\{\s*["']|\[\s*(?:\{\s*["']|["']))""")
PYTHON_BEGIN = re.compile(r"""\[?\s*[\[{]\s*'[^'"]*'\s*[:,\]]""")


class _Twice(ValueError):
    pass


def _unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _Twice(next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unlike)


def _json_defects(answer: str) -> dict[str, str]:
    """Defect -> detail, of an answer that means to be JSON; empty if it is, or means something else."""
    if not JSON_BEGIN.match(answer):
        return {}
    text = answer.strip()
    try:
        end = _DECODER.raw_decode(text)[1]
    except _Twice as twice:
        return {"json_twice": f"{str(twice)!r} in {_beginning(text)}"}
    except json.JSONDecodeError as error:
        if text.lstrip("[{ ")[:1] == "'":
            return {"json_python": _beginning(text)} if PYTHON_BEGIN.match(text) else {}
        if error.pos >= len(text) or error.msg.startswith("Unterminated string") and not re.search(r"[}\]]\s*$", text):
            return {"json_cut": f"'…{shown(text[-2 * AROUND:])}'"}
        return {"json_broken": f"{error.msg} at character {error.pos + 1}: {around(text, error.pos, error.pos + 1)}"}
    except RecursionError:
        return {"json_broken": "nested too deeply"}
    except ValueError:  # a number of more digits than Python reads: JSON all the same
        return {}
    return {"json_and_more": around(text, end, end + 2 * AROUND)} if end < len(text) else {}


def _json(defect: str) -> Callable[[Read], str | None]:
    return lambda read: read.broken_json.get(defect)


# ---------------------------------------------------------------------------------------------------------------- columns

# What people call a column, in lower case -> ours. The first that a row has is taken.
ALIASES = {
    "instruction": ("指令", "指示", "任务", "说明", "instruct", "instruction_text", "指令文本", "instrucción", "指図"),
    "input": ("输入", "輸入", "inputs", "上下文", "入力", "entrada", "eingabe"),
    "output": ("输出", "輸出", "回复", "回覆", "outputs", "target", "出力", "salida", "ausgabe", "response_text"),
    "question": ("问题", "問題", "提问", "问", "questions", "q", "質問", "frage", "pregunta"),
    "answer": ("答案", "回答", "答", "解答", "answers", "a", "antwort", "respuesta"),
    "prompt": ("提示", "提示词", "提示詞", "prompts", "user", "human", "query_text"),
    "completion": ("补全", "完成", "completions", "assistant", "gpt", "bot"),
    "messages": ("对话", "對話", "消息", "message", "dialog", "dialogue", "chat"),
    "conversations": ("会话", "會話", "conversation"),
    "text": ("文本", "句子", "内容", "評論", "评论", "sentence", "review", "texto"),
    "label": ("标签", "標籤", "类别", "類別", "labels", "category", "sentiment", "etiqueta"),
}
OURS_BY_ALIAS = {alias: ours for ours, aliases in ALIASES.items() for alias in (ours, *aliases)}
PARTNERS = {"instruction": "output", "question": "answer", "prompt": "completion", "input": "output"}
ANSWERS = ("output", "answer", "completion")


def _foreign_columns(read: Read) -> str | None:
    """Names that mean ours, where the row could not be read by ours."""
    columns: dict[str, str] = {}
    for name in read.fields:
        ours = OURS_BY_ALIAS.get(str(name).strip().lower())
        if ours and ours != name and ours not in columns and ours not in read.fields:
            columns[ours] = str(name)
    if _is_format({}, read.fields):
        return None  # by its names it could be read; something else is wrong with it
    if not _is_format(columns, read.fields):
        columns = _paired(columns, read.fields)
    if columns:
        pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
        return f"{', '.join(map(str, read.fields))}: set data.columns='{{{pairs}}}'"
    strange = [str(name) for name in read.fields if not str(name).isascii()]
    return ", ".join(strange) + ": set data.columns='{instruction: …, output: …}'" if strange else None


def _is_format(columns: Mapping[str, str], fields: Mapping[str, Any]) -> bool:
    """Do the names make a format, with those of `columns` in the place of theirs?"""
    names = (set(fields) - set(columns.values())) | set(columns)
    return any(needed <= names for kind in FORMATS.values() for needed in kind.columns)


def _paired(columns: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, str]:
    """A question and an answer by names of two formats (指令 and 回答), as those of one."""
    theirs = {name: name for name in fields} | dict(columns)
    asked = next((ours for ours in PARTNERS if ours in theirs), None)
    answer = next((theirs[ours] for ours in ANSWERS if ours in theirs), None)
    if asked is None or answer is None:
        return {}
    pair = {asked: theirs[asked], PARTNERS[asked]: answer}
    return {ours: name for ours, name in pair.items() if ours != name}


def _preference(read: Read) -> str | None:
    return "chosen, rejected" if {"chosen", "rejected"} <= set(read.fields) else None


TEXT_COLUMNS = {"instruction", "input", "output", "prompt", "completion", "question", "answer", "query", "response", "text", "system"}


def _not_text(read: Read) -> str | None:
    for name, value in read.fields.items():
        if not isinstance(value, str) and value is not None and name in TEXT_COLUMNS and not _is_chat(value):
            return f"{name} = {shown(str(value))[: 2 * AROUND]} ({type(value).__name__})"
    return None


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(turn, Mapping) and "role" in turn for turn in value)


# ------------------------------------------------------------------------------------------------------------------ roles

MANY_TURNS = 100
SAID_ONCE = {"user": ("user", "human"), "assistant": ("assistant", "gpt", "bot", "chatgpt", "model")}  # tool calls may come in a row


def _unknown_speaker(read: Read) -> str | None:
    return next((f"{turn.speaker!r} in turn {i}" for i, turn in enumerate(read.turns, 1) if turn.role is None), None)


def _same_speaker(read: Read) -> str | None:
    turns = read.turns
    for i in range(1, len(turns)):
        first, second = turns[i - 1], turns[i]
        if first.role == second.role and all(turn.speaker.lower() in SAID_ONCE.get(turn.role or "", ()) for turn in (first, second)):
            return f"turns {i} and {i + 1} are both by {second.speaker}"
    return None


def _begins_with_answer(read: Read) -> str | None:
    first = next((turn for turn in read.turns if turn.role != "system"), None)
    return _beginning(first.text) if first and first.role == "assistant" and len(read.turns) > 1 else None


def _system_inside(read: Read) -> str | None:
    inside = (i for i, turn in enumerate(read.turns) if i and turn.role == "system" and read.turns[i - 1].role != "system")
    return next((f"turn {i + 1}: {_beginning(read.turns[i].text)}" for i in inside), None)


def _empty_turn(read: Read) -> str | None:
    turns = read.turns
    return next((f"turn {i} of {len(turns)}, by {turn.speaker}" for i, turn in enumerate(turns, 1) if turn.text.strip() == ""), None)


def _ends_on_human(read: Read) -> str | None:
    last = None if "chosen" in read.fields else read.turns[-1]  # the answer may stand beside the turns
    return _beginning(last.text) if last and last.role in ("user", "system", "tool") else None


def _many_turns(read: Read) -> str | None:
    return f"{len(read.turns)} turns" if len(read.turns) > MANY_TURNS else None


# -------------------------------------------------------------------------------------------------------------- the table

_SEVERAL = "{count} of {rows} rows"
# name -> family, what to say, how to find it in a row that the family may be in
TABLE: dict[str, tuple[str, Kind, Callable[[Read], str | None]]] = {
    "utf8_as_latin": ("foreign", Kind(
        "warning", f"{_SEVERAL} hold text in UTF-8 that was read as Latin-1 or cp1252, such as {{detail}}.",
        "Write the file again from its source, read with encoding='utf-8'. If only this file is left, "
        "text.encode('cp1252').decode('utf-8') turns each such text back."), _misread("utf8_as_latin")),
    "utf8_as_gbk": ("foreign", Kind(
        "warning", f"{_SEVERAL} hold text in UTF-8 that was read as GBK, such as {{detail}}.",
        "Write the file again from its source, read with encoding='utf-8'. If only this file is left, "
        "text.encode('gb18030').decode('utf-8') turns back what has lost nothing."), _misread("utf8_as_gbk")),
    "gbk_as_latin": ("foreign", Kind(
        "warning", f"{_SEVERAL} hold text in GBK that was read as Latin-1, such as {{detail}}.",
        "Write the file again from its source, read with encoding='gb18030'. If only this file is left, "
        "text.encode('latin-1').decode('gb18030') turns each such text back."), _misread("gbk_as_latin")),
    "mixed_encodings": ("foreign", Kind(
        "warning", f"{_SEVERAL} hold text that was read in a wrong encoding beside text that was read right, such as {{detail}}.",
        "Parts in several encodings were joined: read each part in its own (utf-8, gb18030, cp1252) and join them again. "
        "No one encoding mends the whole file; what is left of such rows can be turned back piece by piece."), _misread("mixed_encodings")),
    "lost_characters": ("lost", Kind(
        "warning", f"{_SEVERAL} hold replacement characters, where a wrong encoding lost what was written: {{detail}}.",
        "They cannot be turned back. Read the source again in its own encoding, utf-8 or gb18030, without errors='replace' or 'ignore'; "
        "or take these rows out."), _lost),
    "c1_controls": ("odd", Kind(
        "warning", f"{_SEVERAL} hold control characters U+0080 to U+009F, bytes of cp1252 that were read as Latin-1: {{detail}}.",
        "Read the source with encoding='cp1252'. If only this file is left, replace each by what it stands for: "
        "bytes([ord(c)]).decode('cp1252')."), _c1),
    "control_characters": ("odd", Kind(
        "warning", f"{_SEVERAL} hold control characters that no text has: {{detail}}.",
        "Take them out: re.sub(r'[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f]', '', text)."), _characters(_CONTROLS)),
    "invisible_characters": ("odd", Kind(
        "note", f"{_SEVERAL} hold characters that cannot be seen (zero-width, direction marks, a BOM, soft hyphens): {{detail}}.",
        "A model learns to write them, and words with one inside are other tokens. Take them out, unless they are meant."), _invisible),
    "private_use": ("odd", Kind(
        "warning", f"{_SEVERAL} hold private-use characters, which mean something in one font alone: {{detail}}.",
        "They often come from PDF, Word lists or icon fonts. Replace them by what they show, or take them out."), _characters(_PRIVATE)),
    "noncharacters": ("odd", Kind(
        "warning", f"{_SEVERAL} hold code points that are no characters: {{detail}}.",
        "They come from a broken conversion. Take them out, or convert the source again."), _characters(_NONCHARACTERS)),
    "lone_surrogates": ("odd", Kind(
        "warning", f"{_SEVERAL} hold half of a surrogate pair, which is no text, and cannot teach: {{detail}}.",
        "An emoji was cut in two, or written by JSON as one half (\\ud83d). Write the whole pair, or take the half out: "
        "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'ignore')."), _characters(_SURROGATES)),
    "html": ("html", Kind(
        "note", f"{_SEVERAL} have leftovers of HTML in their answers: {{detail}}.",
        "The model will write them too. html.unescape(text) turns &amp; back; take tags out, or leave them if answers are to be HTML."), _html),
    "escaped_breaks": ("escaped", Kind(
        "warning", f"{_SEVERAL} spell line breaks as a backslash and n: {{detail}}.",
        "They were escaped twice. text.replace('\\\\n', '\\n') gives line breaks."), _escaped_breaks),
    "stand_ins": ("short", Kind(
        "warning", f"{_SEVERAL} are answered by what programs write for an empty cell: {{detail}}.",
        "Take these rows out, or fill in their answers; pandas: read_csv(…, keep_default_na=False), dropna()."), _stand_in),
    "no_words": ("short", Kind(
        "warning", f"{_SEVERAL} have an answer of nothing but spaces or punctuation: {{detail}}.",
        "Take these rows out, or fill in their answers."), _no_words),
    "json_broken": ("json", Kind(
        "warning", f"{_SEVERAL} have an answer that begins as JSON and cannot be read as such: {{detail}}.",
        "Mend these answers; json.dumps(value, ensure_ascii=False) writes JSON that can be read."), _json("json_broken")),
    "json_python": ("json", Kind(
        "warning", f"{_SEVERAL} are answered by a Python dict or list in single quotes, which is no JSON: {{detail}}.",
        "Write them with json.dumps(value, ensure_ascii=False); ast.literal_eval reads what is there."), _json("json_python")),
    "json_cut": ("json", Kind(
        "warning", f"{_SEVERAL} have an answer in JSON that breaks off: {{detail}}.",
        "Whoever wrote it met a limit of length. Take these rows out, or write their answers again."), _json("json_cut")),
    "json_and_more": ("json", Kind(
        "warning", f"{_SEVERAL} have an answer in JSON with text behind it: {{detail}}.",
        "Whoever reads the model's answers as JSON will meet the same. Take the text out, if answers are to be JSON alone."), _json("json_and_more")),
    "json_twice": ("json", Kind(
        "warning", f"{_SEVERAL} have an answer in JSON with the same name twice in one object, of which readers keep the last: {{detail}}.",
        "Collect the values in a list under one name."), _json("json_twice")),
    "preference": ("unread", Kind(
        "warning", f"{_SEVERAL} hold a preferred answer and a rejected one, and none by the name of an answer: {{detail}}.",
        "weitiao learns answers, not preferences. Write the preferred one as the last turn of its chat; beside a column of prompts, data.columns='{completion: chosen}' is enough."),
        _preference),
    "foreign_columns": ("unread", Kind(
        "warning", f"{_SEVERAL} cannot teach, since their columns have other names: {{detail}}.",
        "data.columns says which is which, and leaves rows with the usual names as they are; or rename them in the file."), _foreign_columns),
    "not_text": ("row", Kind(
        "note", f"{_SEVERAL} have a value that is no text where a text belongs: {{detail}}.",
        "It is written as JSON or as Python prints it. Write it as it should be answered: '1.0' is not '1', nor 'True' 'yes'."), _not_text),
    "unknown_speaker": ("chat", Kind(
        "warning", f"{_SEVERAL} have a turn by a speaker that is not known, and cannot teach: {{detail}}.",
        f"Known are {', '.join(ROLES)}. Rename the speaker in the file."), _unknown_speaker),
    "same_speaker": ("chat", Kind(
        "warning", f"{_SEVERAL} have two turns in a row by the same speaker: {{detail}}.",
        "A turn between them is missing, or they are one: join them, or take the row out. Some templates refuse such chats."), _same_speaker),
    "begins_with_answer": ("chat", Kind(
        "warning", f"{_SEVERAL} begin with the assistant, before anything was asked: {{detail}}.",
        "That turn is not learned, and stands before what is. Take it out, or give the question that it answers."), _begins_with_answer),
    "system_inside": ("chat", Kind(
        "warning", f"{_SEVERAL} have a system text in the middle of a chat: {{detail}}.",
        "Many templates refuse it, or write it at the beginning. Put it first, or make it part of what the user says."), _system_inside),
    "empty_turn": ("chat", Kind(
        "warning", f"{_SEVERAL} have a turn without any text: {{detail}}.",
        "What follows answers nothing. Fill it in, or end the chat before it."), _empty_turn),
    "ends_on_human": ("chat", Kind(
        "warning", f"{_SEVERAL} end on a turn that the assistant does not answer: {{detail}}.",
        "Such a chat is left out as a whole. Take its last turn out, and the answers before it are learned."), _ends_on_human),
    "many_turns": ("chat", Kind(
        "note", f"{_SEVERAL} have more than {MANY_TURNS} turns: {{detail}}.",
        "A chat ends with the last turn that fits data.max_tokens. Split it, if its later turns are to be learned."), _many_turns),
    "special_tokens": ("special", Kind(
        "warning", f"{_SEVERAL} spell special tokens in their text: {{detail}}.",
        "A tokenizer that knows one reads it as such: it ends the answer early or begins another turn. Take it out, unless it is "
        "meant; rows that were written for a template already want data.template=plain."), _special),
    "role_markers": ("marker", Kind(
        "warning", f"{_SEVERAL} have a line in their answer that begins as a turn of a template does: {{detail}}.",
        "The model learns to go on with the next turn by itself. Split such rows into turns (messages), or take the rest out."), _marker),
    "open_fence": ("fence", Kind(
        "note", f"{_SEVERAL} have an answer that opens a code block (```) and does not close it: {{detail}}.",
        "The answer may be cut off. Close the block, or write the answer again."), _open_fence),
    "boilerplate": ("answer", Kind(
        "note", f"{_SEVERAL} have an answer that begins with what assistants say of themselves: {{detail}}.",
        "The model will say so as often. Take these rows out, or cut the opening, unless it is meant."), _boilerplate),
    "answer_is_prompt": ("answer", Kind(
        "warning", f"{_SEVERAL} are answered by the prompt itself: {{detail}}.",
        "Take these rows out; or see whether two columns were mixed up (data.columns)."), _is_prompt),
    "repeats_prompt": ("answer", Kind(
        "warning", f"{_SEVERAL} have an answer that begins with the whole prompt: {{detail}}.",
        "The model learns to repeat what it is asked. Cut the prompt off, unless a repetition is meant."), _repeats_prompt),
}

# family -> may the row have a defect of it at all?
_MAY_BE: dict[str, Callable[[Read], bool]] = {
    "row": lambda read: True,
    "unread": lambda read: read.conversation is None,
    "odd": _has_odd,
    "foreign": lambda read: mojibake.is_suspicious(read.whole),
    "lost": lambda read: not read.whole.isascii() and any(piece in read.whole for piece in LOST_PIECES),
    "html": lambda read: ";" in read.whole or ">" in read.whole,
    "special": lambda read: ">" in read.whole or "]" in read.whole,
    "escaped": lambda read: "\\n" in read.whole,
    "fence": lambda read: "```" in read.whole,
    "marker": lambda read: any(piece in read.whole for piece in MARKER_PIECES),
    "short": lambda read: any(len(answer) < SHORT for _, answer in read.exchanges),
    "answer": lambda read: bool(read.exchanges),
    "json": lambda read: any(answer.lstrip()[:1] in ("{", "[") for _, answer in read.exchanges),
    "chat": lambda read: bool(read.turns),
}
FAMILIES = [([(name, look) for name, (of, _, look) in TABLE.items() if of == family], may_be) for family, may_be in _MAY_BE.items()]


def _find(name: str, fields: Mapping[str, Any], conversation: Conversation | None) -> str | None:
    return find_all(fields, conversation).get(name)


DEFECTS: dict[str, Defect] = {name: Defect(kind, partial(_find, name)) for name, (_, kind, _) in TABLE.items()}
