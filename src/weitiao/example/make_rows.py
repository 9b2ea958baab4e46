"""Makes the bundled example: short passages to read and the JSON answer to extract from each.

A seed enters; `train.jsonl` and `heldout.jsonl` beside this file leave, one row a line:

    {"instruction": INSTRUCTION, "input": passage, "output": '{"person": …, "year": …}'}

    words and templates ──split by seed──┬── training pools ── 360 rows, a sixth of them Chinese
                                         └── held-out pools ──  60 rows, a sixth of them Chinese

Every person and organisation is invented by combining parts. The parts (given names, surnames,
organisation stems) are split before anything is composed, so a held-out row shares no part with a
training row and no answer can be had by remembering; some held-out rows also use sentences that
training never shows. Cities and roles are public words and are shared.

`python -m weitiao.example.make_rows` rewrites the files; the same seed gives the same bytes.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

# The instruction doesn't say what a staff record holds: that is the house format that the rows teach.
INSTRUCTION = "Write the staff record for this text as JSON."
KEYS = {"person": "name", "employer": "organization", "post": "role", "place": "city", "year": "year"}
"""What a record calls each fact, in the order it writes them."""
SEED = 7
TRAIN_COUNTS = {"english": 300, "chinese": 60}
HELDOUT_COUNTS = {"english": 50, "chinese": 10}
HELDOUT_SHARE = 0.2  # of each pool of parts
YEARS = range(1998, 2025)

# Dealt in turn and then shuffled, so that small splits keep the shares too.
MISSING = (None, None, None, "city", None, None, None, None, None, "year", None, None, None)
DISTRACTORS = (None, None, "city", None, None) + (None, None, "year", None, None)
DISTRACTORS += (None, None, "name", None, None)


class Sector(NamedTuple):
    """Kinds of organisation and the roles that people have in them."""

    kinds: tuple[str, ...]  # English: "the " in front where prose says it; not part of the name
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Language:
    """What passages of one language are composed from.

    In a template, `[…]` is left out where the fact named in it is not stated. `{org}` carries its
    article, `{a_role}` its a or an. A distractor is one more sentence with a city, a year or a
    name that is plainly not the one asked for.
    """

    given: tuple[str, ...]
    surnames: tuple[str, ...]
    stems: tuple[str, ...]
    sectors: tuple[Sector, ...]
    cities: tuple[str, ...]
    templates: tuple[str, ...]
    heldout_templates: tuple[str, ...]  # used in held-out rows only, beside `templates`
    distractors: dict[str, tuple[str, ...]]
    full_name: str  # format of {given} and {surname}
    organization: str  # format of {stem} and {kind}
    gap: str  # between two sentences


@dataclass(frozen=True)
class Pools:
    """The parts of names that one split may use."""

    given: tuple[str, ...]
    surnames: tuple[str, ...]
    stems: tuple[str, ...]


class Plan(NamedTuple):
    """What one row is to be made of; the rest is drawn when it is."""

    template: str
    stem: str
    missing: str | None  # the key whose fact is not stated
    distractor: str | None  # the kind of the added sentence
    person: tuple[str, str]  # given name, surname
    predecessor: tuple[str, str]


def _combine(heads: str, tails: str) -> tuple[str, ...]:
    return tuple(head + tail for head in heads.split() for tail in tails.split())


ENGLISH = Language(
    given=_combine(
        "Al Ber Cal Dor El Fen Hal Jor Kel Lin Mar Nel Or Per Quin Ros Sel Tam Ver Yor",
        "iva orin essa uwen ando ilde aro enka imar ulin",
    ),
    surnames=_combine(
        "Ash Bram Cor Dun Ester Fal Grem Hol Ing Kest Lor Mund Nes Ot Pren Rud Stav Thor Ul Wend",
        "ovane istow erling adine enholt imoor elby iford omere asky",
    ),
    stems=_combine(
        "Avel Brin Cend Drav Emb Fior Glav Hest Ilm Jund Korv Lumb Merv Nold Opal Pelt Quor Rind "
        "Sult Tarv Umbr Vant Wyl Xand Zeph",
        "ora ix ane emont ium estra oway ite",
    ),
    sectors=(
        Sector(
            ("the Institute", "the Laboratory", "the Observatory", "University", "College"),
            ("research director", "data scientist", "laboratory manager", "chief astronomer",
             "admissions officer", "professor of chemistry"),
        ),
        Sector(
            ("the Museum", "the Library", "the Theatre", "the Gallery"),
            ("chief curator", "head archivist", "artistic director", "education officer",
             "exhibition designer", "events manager"),
        ),
        Sector(
            ("Systems", "Robotics", "Energy", "Logistics", "Foods", "Airlines"),
            ("chief engineer", "head of design", "operations manager", "software architect",
             "product director", "sales director", "chief accountant"),
        ),
        Sector(
            ("Hospital", "the Clinic", "Health"),
            ("head nurse", "chief surgeon", "clinical pharmacist", "medical director",
             "infection specialist"),
        ),
        Sector(
            ("the Foundation", "the Trust", "the Society"),
            ("programme director", "grants officer", "legal adviser", "executive director",
             "press secretary"),
        ),
    ),
    cities=tuple(
        "Lisbon Porto Madrid Seville Lyon Geneva Vienna Prague Warsaw Helsinki Oslo Bergen Dublin "
        "Glasgow Leeds Bristol Toronto Boston Denver Chicago Lima Bogota Nairobi Accra Cairo "
        "Mumbai Jakarta Hanoi Seoul Osaka Sydney Perth Auckland".split()
    ) + ("Cape Town", "New York", "Buenos Aires"),
    templates=(
        "{name} has been appointed {role} at {org}[ in {city}], taking up the post[ in {year}] "
        "after a public search.",
        "{org}[ in {city}] announced[ in {year}] that {name} would join its staff as {role} and "
        "lead a small team.",
        "[In {year}, ]{name} left a quiet teaching job to become {role} at {org}[ in {city}].",
        "The board of {org}[ in {city}] voted[ in {year}] to make {name} its {role}, a decision "
        "that was widely welcomed.",
        "{name}, {a_role} at {org}, spent a week[ in {city}][ in {year}] meeting partners and "
        "students.",
        "After a long search, {org} hired {name} as {role}[ for its office in {city}]"
        "[, starting in {year}].",
        "Colleagues[ in {city}] welcomed {name}, who became {role} at {org}[ in {year}] after many "
        "years abroad.",
        "A short notice[ from {year}] reports that {org}[, based in {city},] chose {name} as its "
        "next {role}.",
        "{name} became the first {role} of {org} when it opened a new building[ in {city}]"
        "[ in {year}].",
        "The new {role} at {org}[ in {city}] is {name}, who was chosen[ in {year}] from forty "
        "applicants.",
        "[News from {city}: ]{name} has signed a contract with {org} and begins work as {role}"
        "[ in {year}].",
        "Staff at {org} met {name}, their new {role}, during a small reception[ held in {city}]"
        "[ in {year}].",
        "Since the spring[ of {year}], the {role} at {org}[ in {city}] has been {name}, a former "
        "school teacher.",
        "{org} thanked its {role}, {name}, at a ceremony[ in {city}][ in {year}] for years of "
        "patient work.",
        "[In {city}, ]{name} accepted an offer from {org} and started work as {a_role}"
        "[ in {year}].",
        "A grant[ awarded in {year}] lets {name}, {a_role} at {org}[ in {city}], train six young "
        "assistants.",
    ),
    heldout_templates=(
        "When {org} needed {a_role}[ in {city}], it turned to {name}, who agreed to start"
        "[ in {year}].",
        "The local paper[ in {city}] ran a profile[ in {year}] of {name}, the {role} at {org}, "
        "with two photographs.",
        "[Late in {year}, ]{org} introduced {name} to the press as {role}[ of its branch in {city}]"
        ", ending weeks of rumours.",
        "Applause filled the hall[ in {city}] as {org} presented {name}, its {role}, with a medal"
        "[ in {year}].",
    ),
    distractors={
        "city": ("{surname} grew up in {other_city}.", "{surname} had studied in {other_city}.",
                 "{surname} had earlier worked in {other_city}."),
        "year": ("{surname} had graduated in {other_year}.", "{org} was founded in {other_year}."),
        "name": ("The position was previously held by {other_name}.",
                 "The previous holder of the post, {other_name}, has retired."),
    },
    full_name="{given} {surname}",
    organization="{stem} {kind}",
    gap=" ",
)

CHINESE = Language(
    given=_combine("知 予 景 霁 映 承 若 思 清 怀 望 书", "澜 舟 衡 川 砚 禾 微 棠 屿 岑"),
    surnames=tuple("林 周 沈 顾 陆 许 宋 韩 叶 苏 程 冯 邓 曹 彭 秦 邵 孟 贺 姚 谭 廖 傅 郝 崔".split()),
    stems=_combine("澄 衡 砚 穹 朔 瑶 峤 泓 翎 汀", "岚 星 野 泉 原 帆 峰 禾"),
    sectors=(
        Sector(("研究院", "大学", "天文台"), ("首席研究员", "实验室主任", "数据科学家", "招生主任")),
        Sector(("博物馆", "图书馆", "美术馆"), ("馆长", "首席策展人", "档案主管", "教育专员")),
        Sector(("科技公司", "物流公司", "能源公司"), ("总工程师", "设计总监", "运营经理", "财务总监")),
        Sector(("医院", "诊所"), ("护士长", "外科主任", "临床药师", "医务总监")),
        Sector(("基金会", "协会"), ("秘书长", "项目主管", "法律顾问", "新闻发言人")),
    ),
    cities=tuple("杭州 成都 南京 武汉 西安 厦门 青岛 长沙 昆明 大连 苏州 重庆 广州 哈尔滨 兰州 合肥".split()),
    templates=(
        "{org}[{year}年]宣布，聘请{name}担任{role}[，工作地点在{city}]。",
        "[{year}年，]{name}加入[位于{city}的]{org}，出任{role}，负责带领一支新团队。",
        "在[{city}举行的]新闻发布会上，{org}介绍了新任{role}{name}[，任期从{year}年开始]。",
        "经过公开选拔，{name}[于{year}年]成为{org}的{role}[，常驻{city}]。",
        "{name}是{org}的{role}，[{year}年]曾[在{city}]为中学生举办讲座，很受欢迎。",
        "[{city}消息：]{org}理事会[在{year}年]投票决定，由{name}出任{role}。",
        "[{year}年春天，]{org}在[{city}的]新楼里迎来了新任{role}{name}，同事们都很高兴。",
    ),
    heldout_templates=(
        "{name}告诉记者，自己[{year}年]收到{org}的邀请，[前往{city}]担任{role}。",
        "感谢信中写道，{org}的{role}{name}[{year}年]在[{city}的]社区服务中表现突出。",
    ),
    distractors={
        "city": ("{name}早年曾在{other_city}求学。", "{name}的家乡是{other_city}。"),
        "year": ("{org}成立于{other_year}年。", "{name}毕业于{other_year}年。"),
        "name": ("这一职位此前由{other_name}担任。", "前任{other_name}已经退休。"),
    },
    full_name="{surname}{given}",
    organization="{stem}{kind}",
    gap="",
)

LANGUAGES = {"english": ENGLISH, "chinese": CHINESE}


def make_rows(seed: int = SEED) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training rows and the held-out rows, each shuffled; pure in `seed`."""
    rng = random.Random(seed)
    train: list[dict[str, str]] = []
    heldout: list[dict[str, str]] = []
    for key, language in LANGUAGES.items():
        train_pools, heldout_pools = split_pools(language, rng)
        every_template = language.templates + language.heldout_templates
        train += _compose(language, train_pools, language.templates, TRAIN_COUNTS[key], rng)
        heldout += _compose(language, heldout_pools, every_template, HELDOUT_COUNTS[key], rng)
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def split_pools(language: Language, rng: random.Random) -> tuple[Pools, Pools]:
    """Divides every pool of parts into (training, held-out); no part is in both."""
    halves = [_split(pool, rng) for pool in (language.given, language.surnames, language.stems)]
    return Pools(*(train for train, _ in halves)), Pools(*(heldout for _, heldout in halves))


def _split(pool: Sequence[str], rng: random.Random) -> tuple[tuple[str, ...], tuple[str, ...]]:
    shuffled = rng.sample(pool, len(pool))
    held = round(len(pool) * HELDOUT_SHARE)
    return tuple(shuffled[held:]), tuple(shuffled[:held])


def _compose(
    language: Language, pools: Pools, templates: Sequence[str], count: int, rng: random.Random
) -> list[dict[str, str]]:
    """`count` rows; no two people in them, predecessors included, have the same full name."""
    people = [(given, surname) for given in pools.given for surname in pools.surnames]
    named = rng.sample(people, 2 * count)
    plans = map(
        Plan,
        _deal(templates, count, rng),
        _deal(pools.stems, count, rng),
        _deal(MISSING, count, rng),
        _deal(DISTRACTORS, count, rng),
        named[:count],
        named[count:],
    )
    return [_row(language, plan, rng) for plan in plans]


def _deal(cards: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """`count` cards in random order, each card as often as any other, give or take one."""
    dealt = list(islice(cycle(cards), count))
    rng.shuffle(dealt)
    return dealt


def _row(language: Language, plan: Plan, rng: random.Random) -> dict[str, str]:
    facts, words = _invent(language, plan, rng)
    passage = _fill(plan.template, {**words, **facts})
    if plan.distractor is not None:
        # A second city where the first is not stated would pass for the answer.
        kind = "name" if plan.distractor == plan.missing else plan.distractor
        added = rng.choice(language.distractors[kind])
        passage += language.gap + _fill(added, {**words, **facts})
    output = json.dumps({key: facts[fact] for key, fact in KEYS.items()}, ensure_ascii=False)
    return {"instruction": INSTRUCTION, "input": passage, "output": output}


def _invent(
    language: Language, plan: Plan, rng: random.Random
) -> tuple[dict[str, str | None], dict[str, str]]:
    """The facts to extract, and the other words a passage may need."""
    sector = rng.choice(language.sectors)
    kind, role = rng.choice(sector.kinds), rng.choice(sector.roles)
    city, other_city = rng.sample(language.cities, 2)
    year = rng.choice(YEARS)
    article, bare_kind = ("the ", kind[4:]) if kind.startswith("the ") else ("", kind)
    organization = language.organization.format(stem=plan.stem, kind=bare_kind)
    facts: dict[str, str | None] = {
        "name": _full_name(language, plan.person),
        "organization": organization,
        "role": role,
        "city": city,
        "year": str(year),
    }
    if plan.missing is not None:
        facts[plan.missing] = None
    words = {
        "org": article + organization,
        "a_role": ("an " if role[0] in "aeiou" else "a ") + role,
        "surname": plan.person[1],
        "other_city": other_city,
        "other_year": str(year - rng.choice(range(9, 25))),
        "other_name": _full_name(language, plan.predecessor),
    }
    return facts, words


def _full_name(language: Language, person: tuple[str, str]) -> str:
    given, surname = person
    return language.full_name.format(given=given, surname=surname)


def _fill(template: str, words: dict[str, str | None]) -> str:
    """The sentence, with a capital first letter, less each `[…]` whose fact is None.

    `Staff met {name}[ in {city}].` with city None gives `Staff met Aliva Corerling.`
    """

    def keep(bracket: re.Match[str]) -> str:
        slots = re.findall(r"\{(\w+)\}", bracket[1])
        return "" if any(words[slot] is None for slot in slots) else bracket[1]

    sentence = re.sub(r"\[([^\]]*)\]", keep, template).format(**words)
    return sentence[0].upper() + sentence[1:]


def to_jsonl(rows: Sequence[dict[str, str]]) -> str:
    """One row a line, in UTF-8's own characters rather than escapes."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(folder: Path | None = None) -> None:
    """Writes `train.jsonl` and `heldout.jsonl` into `folder`, by default beside this file."""
    folder = folder or Path(__file__).parent
    train, heldout = make_rows()
    for name, rows in (("train", train), ("heldout", heldout)):
        (folder / f"{name}.jsonl").write_bytes(to_jsonl(rows).encode("utf-8"))


if __name__ == "__main__":
    main()
