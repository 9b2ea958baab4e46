"""Repeats are found at their first place, and sketches are as alike as the texts they were made of."""

import numpy as np
import pytest

from weitiao.data.alike import ALIKE, BINS, earlier_equal, first_among, grams, loose, nearly_earlier, sketch, sketches_of
from weitiao.data.conversation import Conversation, Message


def test_the_first_equal_value_before_each():
    assert earlier_equal(np.array([7, 8, 7, 7, 9, 8])).tolist() == [-1, -1, 0, 0, -1, 1]
    assert earlier_equal(np.zeros(0, np.uint64)).tolist() == []
    assert first_among(np.array([5, 8, 7]), np.array([8, 7, 8, 7])).tolist() == [-1, 0, 1]
    assert first_among(np.array([5]), np.array([], int)).tolist() == [-1]


def said(text):
    return Conversation((Message("user", text), Message("assistant", "", 1.0)))


def test_sketches_are_alike_as_the_texts_are():
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    none = np.zeros(0, np.uint32)
    for changed, alike in ((0, (1, 1)), (2, (0.85, 1)), (60, (0.2, 0.65))):
        shares = []
        for _ in range(40):
            text = rng.choice(letters, 600)
            other = text.copy()
            other[rng.choice(600, changed, replace=False)] = "0" if changed else text[0]
            one, two = (np.frombuffer(sketch(grams("".join(t)), none), np.uint8) for t in (text, other))
            shares.append((one == two).mean())
        assert alike[0] <= np.mean(shares) <= alike[1]


def test_texts_sketched_together_are_sketched_as_alone():
    rng = np.random.default_rng(2)
    texts = ["".join(rng.choice(list("abcdef是的"), length)) for length in (0, 1, 4, 5, 40, 0, 300, 3, 20, 90, 4)]
    for frequent in (np.zeros(0, np.uint32), np.unique(grams(texts[6])[:50])):
        assert sketches_of(texts, frequent) == b"".join(sketch(grams(text), frequent) for text in texts)
        assert sketches_of([], frequent) == b""


@pytest.mark.parametrize("text", ["", "Hello, World_12!", "".join(map(chr, range(128)))])
def test_ascii_is_rid_of_what_is_no_letter_as_any_text_is(text):
    assert loose(said(text)) == loose(said(text + "是")).removesuffix("是")


def test_near_repeats_are_found_and_others_are_not():
    rng = np.random.default_rng(1)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    texts = ["".join(rng.choice(letters, 800)) for _ in range(200)]
    texts += [text[:400] + "xyz" + text[400:] for text in texts[:100]]  # 100 near repeats of the first 100
    none = np.zeros(0, np.uint32)
    sketches = np.frombuffer(b"".join(sketch(grams(text), none) for text in texts), np.uint8).reshape(-1, BINS)
    found = nearly_earlier(np.arange(len(texts)), sketches)
    assert (found[:200] == -1).all()
    assert (found[200:] == np.arange(100)).sum() >= 95 and set(found[200:][found[200:] != np.arange(100)]) <= {-1}
    assert ALIKE / BINS < 0.9


def test_case_digits_spaces_and_punctuation_do_not_count():
    assert loose(said("Hello,  World 12!")) == loose(said("hello world")) == "helloworld"
    assert loose(said("你好，世界。")) == "你好世界"
    assert loose(said("")) == ""
