"""The bundled example: its files are what the script makes, and held-out rows are truly unseen."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from weitiao.example import make_rows as example

FOLDER = Path(example.__file__).parent


def read(name):
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


TRAIN, HELDOUT = read("train"), read("heldout")
ROWS = TRAIN + HELDOUT


def is_english(row):
    return row["input"].isascii()


def answers(rows, english):
    return [json.loads(row["output"]) for row in rows if is_english(row) is english]


def name_parts(name):
    given, surname = name.split() if name.isascii() else (name[1:], name[0])
    return {given, surname}


def stem(organization):
    return organization.split()[0] if organization.isascii() else organization[:2]


def test_the_script_makes_the_files_beside_it(tmp_path):
    example.main(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_another_seed_makes_other_rows():
    assert example.make_rows(8) == example.make_rows(8) != example.make_rows(7)


def test_counts():
    assert [sum(map(is_english, rows)) for rows in (TRAIN, HELDOUT)] == [300, 50]
    assert (len(TRAIN), len(HELDOUT)) == (360, 60)


def test_every_row_has_the_same_columns_instruction_and_keys():
    for row in ROWS:
        assert list(row) == ["instruction", "input", "output"]
        assert row["instruction"] == example.INSTRUCTION
        assert list(json.loads(row["output"])) == list(example.KEYS)


def test_every_stated_fact_stands_in_its_passage_word_for_word():
    for row in ROWS:
        for value in json.loads(row["output"]).values():
            assert value is None or (isinstance(value, str) and value in row["input"])


def test_a_fact_that_is_null_is_nowhere_in_its_passage():
    cities = example.ENGLISH.cities + example.CHINESE.cities
    for row in ROWS:
        answer = json.loads(row["output"])
        if answer["year"] is None:
            assert not re.search(r"\d{4}", row["input"])
        if answer["place"] is None:
            assert not any(city in row["input"] for city in cities)


@pytest.mark.parametrize("rows", [TRAIN, HELDOUT])
def test_about_one_row_in_seven_lacks_its_city_or_year(rows):
    missing = Counter(
        tuple(key for key, value in json.loads(row["output"]).items() if value is None)
        for row in rows
    )
    assert set(missing) == {(), ("place",), ("year",)}
    assert 0.12 < 1 - missing[()] / len(rows) < 0.18


@pytest.mark.parametrize("rows", [TRAIN, HELDOUT])
def test_about_one_row_in_five_has_a_second_sentence(rows):
    sentences = [len(re.findall(r"\.|。", row["input"])) for row in rows]
    assert set(sentences) == {1, 2}
    assert 0.15 < sentences.count(2) / len(rows) < 0.25


def test_passages_are_short_and_well_formed():
    for row in ROWS:
        passage = row["input"]
        if is_english(row):
            assert 15 <= len(passage.split()) <= 35
            assert passage[0].isupper() and passage[-1] == "."
            assert not re.search(r"\b(a [aeiou]|an [^aeiou])", passage)
        else:
            assert 20 <= len(passage) <= 60
            assert passage[-1] == "。"
        assert not re.search(r"  | [,.]|[\[\]{}]|,,|，，|，。", passage)


def test_no_two_rows_share_a_passage_or_a_full_name():
    assert len({row["input"] for row in ROWS}) == len(ROWS)
    assert len({json.loads(row["output"])["person"] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("english", [True, False])
def test_heldout_answers_share_no_name_part_and_no_stem_with_training(english):
    train, heldout = answers(TRAIN, english), answers(HELDOUT, english)
    for parts in (lambda a: name_parts(a["person"]), lambda a: {stem(a["employer"])}):
        seen = set().union(*map(parts, train))
        unseen = set().union(*map(parts, heldout))
        assert seen and unseen and not seen & unseen


def test_no_training_passage_holds_a_heldout_part_even_as_a_predecessor():
    seen = {word for row in TRAIN for word in re.findall(r"\w+", row["input"])}
    for answer in answers(HELDOUT, english=True):
        assert not seen & {*name_parts(answer["person"]), stem(answer["employer"])}
    chinese = "\n".join(row["input"] for row in TRAIN if not is_english(row))
    for answer in answers(HELDOUT, english=False):
        assert answer["person"][1:] not in chinese
        assert stem(answer["employer"]) not in chinese


@pytest.mark.parametrize("language", example.LANGUAGES.values())
def test_pools_are_divided_without_rest_or_overlap(language):
    train, heldout = example.split_pools(language, random.Random(0))
    for pool in ("given", "surnames", "stems"):
        parts = getattr(train, pool) + getattr(heldout, pool)
        assert sorted(parts) == sorted(getattr(language, pool))
        assert len(set(parts)) == len(parts)


def test_some_sentences_are_kept_for_heldout_rows():
    for language, known, kept in ((example.ENGLISH, 14, 3), (example.CHINESE, 6, 1)):
        assert len(set(language.templates)) >= known
        assert len(set(language.heldout_templates)) >= kept
        for template in language.heldout_templates:
            # the longest run of fixed words tells a template from the others
            phrase = max(re.split(r"\[.*?\]|\{\w+\}", template), key=len).strip(" .,。，")
            assert not any(phrase in row["input"] for row in TRAIN)
            assert any(phrase in row["input"] for row in HELDOUT)
