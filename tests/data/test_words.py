"""Texts cut into words have the ids that the tokenizer gives them whole; what is not sure to be so is left to it."""

import copy
import json
import random

import pytest

from weitiao.data.pieces import Pieces
from weitiao.data.words import _joined, words_of

# What patterns decide by: spaces before spaces, words and digits; contractions; characters that tokens join; scripts side by side.
SCRAPS = [
    " ", "  ", "\n", "\t", "\r\n", "\u3000", "a", "The", "Straße", "é", "'s", "'ll", "'", "'S", "7", "2024", ".", "...", "—", "。", "“", "（", "😀", "→", "_",
    "是", "的", "一个", "个", "数据", "据", "文件", "件", "龍", "猫x", "user", "```", "\\n", "×", "#", "²",
]
STRANGE = ["²", "\u00a0", "\u0301", "の", "〇", "१", "\u2028", "\x1c", "\x85", "ﬁ", "㐀", "\U00020000"]


def fast(tokenizer):
    return lambda texts: [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def ids(words, texts):
    return [memoryview(found).cast("i").tolist() for found in words.ids(texts)]


def drawn(scraps, count=2000, most=12, seed=3):
    random_ = random.Random(seed)
    return ["".join(random_.choices(scraps, k=random_.randint(1, most))) for _ in range(count)]


def gpt2(shared):
    from transformers import GPT2Tokenizer

    folder = shared / "tokenizers/gpt2"
    return GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


def with_steps(tokenizer, *steps):
    """The same vocabulary, its words cut otherwise."""
    from tokenizers import pre_tokenizers

    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return other


@pytest.mark.parametrize("individual", [None, True, False])
def test_drawn_texts_by_words_are_texts_as_a_whole(tokenizer, individual):
    from tokenizers import pre_tokenizers

    digits = [] if individual is None else [pre_tokenizers.Digits(individual_digits=individual)]
    tokenizer = with_steps(tokenizer, *digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    words = words_of(tokenizer, fast(tokenizer))
    texts = [text for text in drawn(SCRAPS) if words.fits(text)]
    assert len(texts) > 1000
    assert ids(words, texts) == fast(tokenizer)(texts)


def test_chinese_that_tokens_join_in_part_by_words(tokenizer):
    """A vocabulary that learned 数据, 一个, 文件 and parts of what stands behind them."""
    from tokenizers import pre_tokenizers, trainers

    tokenizer = copy.deepcopy(tokenizer)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    inner = copy.deepcopy(tokenizer.backend_tokenizer)
    inner.train_from_iterator(["数据一个 文件 数据文件 一个的", "x数据 猫据a The user"] * 3, trainer)
    tokenizer._tokenizer = inner
    words = words_of(tokenizer, fast(tokenizer))
    texts = [text for text in drawn([*"数据一个文件的猫是 xa", "。"], 4000) if words.fits(text)]
    assert len(texts) == 4000 and any(len(token) > 3 and set(token) <= set("æķ°į®ä¸Ģªĸ") for token in inner.get_vocab())
    assert ids(words, texts) == fast(tokenizer)(texts)


def test_gpt2_by_words(shared):
    tokenizer = gpt2(shared)
    words = words_of(tokenizer, fast(tokenizer))
    texts = [text for text in drawn(SCRAPS, 4000) if words.fits(text)]
    assert len(texts) > 500
    assert ids(words, texts) == fast(tokenizer)(texts)
    assert not words.fits("是")  # too many of its tokens join Chinese characters


@pytest.mark.parametrize("strange", STRANGE)
def test_a_text_with_a_character_that_is_not_known_is_left_to_the_tokenizer(tokenizer, strange):
    assert not words_of(tokenizer, fast(tokenizer)).fits(f"a {strange}b")


def test_the_tokenizer_is_asked_for_a_word_once(tokenizer):
    asked = []

    def encode(texts):
        asked.extend(texts)
        return fast(tokenizer)(texts)

    words = words_of(tokenizer, encode)
    words.ids(["a cat, a cat 猫猫", "a cat"])
    assert sorted(asked) == sorted({"a", " cat", ",", " a", " 猫", "猫"})


def test_what_a_token_joins_is_not_cut():
    stored = ["æķ°æį®", "Ġæ", "ä¸Ģä¸ª", "hello", "é¾į"]  # 数据, a space and a third of a character, 一个, hello, 龍
    assert _joined(stored) == ["个", "据"]
    a_part = {character for character in map(chr, range(0x4E00, 0x9FA6)) if character.encode()[:2] == b"\xe4\xbd"}
    assert set(_joined([*stored, "Ŀä½"])) == {"个", "据"} | a_part


def test_others_are_not_cut(tokenizer, shared):
    from tokenizers import Regex, normalizers, pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    others = [
        with_steps(tokenizer, pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        with_steps(tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=True)), with_steps(tokenizer, pre_tokenizers.WhitespaceSplit(), level),
    ]
    lowered = copy.deepcopy(tokenizer)
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["weitiao"])
    for other in (*others, lowered, added):
        assert words_of(other, fast(other)) is None
        assert [found.tolist() for found in Pieces(other).encode(drawn(SCRAPS, 50))] == other(drawn(SCRAPS, 50), add_special_tokens=False).input_ids


def test_what_is_remembered_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr("weitiao.data.words.MOST_WORDS", 50)
    words = words_of(tokenizer, fast(tokenizer))
    for text in drawn(SCRAPS[:-1], 200):
        assert ids(words, [text]) == fast(tokenizer)([text])
        assert len(words.known) <= 50 + 24


@pytest.mark.parametrize("file", ["alpaca_zh/alpaca_zh_demo.json", "alpaca_en/alpaca_en_demo.json"])
def test_real_rows_by_words(tokenizer, shared, file):
    texts = [row[name] for row in json.loads((shared / "data" / file).read_text("utf-8")) for name in ("instruction", "output")]
    words = words_of(tokenizer, fast(tokenizer))
    fitting = [text for text in texts if words.fits(text)]
    assert len(fitting) > 0.9 * len(texts)
    assert ids(words, fitting) == fast(tokenizer)(fitting)
