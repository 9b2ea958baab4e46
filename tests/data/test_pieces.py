"""Texts cut at their special tokens have the ids that they have whole; a tokenizer for which that is not so is not cut for."""

import json

import pytest

from weitiao.data.pieces import Pieces

TEXTS = ["", "a", "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n", "<|im_end|><|im_end|>", " <|pad|> 是的。 <|pad|>", "<|im_start", "你好\u2028x"]


def cut(pieces, texts):
    return [ids.tolist() for ids in pieces.encode(texts)]


def whole(tokenizer, texts):
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def metaspace(scheme):
    """Pieces that begin a text get a space in front; with `first`, others don't."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "\u2581a": 1, "a": 2, "<s>": 3}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<s>", unk_token="<unk>")


def test_texts_in_pieces_are_texts_as_a_whole(tokenizer):
    pieces = Pieces(tokenizer)
    assert pieces.marks is not None
    for _ in range(2):  # met for the first time, and again
        assert cut(pieces, TEXTS) == whole(tokenizer, TEXTS)
    assert cut(pieces, []) == []


@pytest.mark.parametrize("scheme, is_cut", [("never", True), ("always", True), ("first", False)])
def test_a_tokenizer_that_looks_at_where_a_piece_stands_gets_whole_texts(scheme, is_cut):
    tokenizer = metaspace(scheme)
    pieces = Pieces(tokenizer)
    assert bool(pieces.marks) is is_cut
    texts = ["a<s>a", "a a<s> a", "<s>a"]
    assert cut(pieces, texts) == whole(tokenizer, texts)


def test_tokens_that_take_the_spaces_beside_them_are_not_cut_at():
    from tokenizers import AddedToken

    tokenizer = metaspace("never")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<mask>", lstrip=True, special=True)]})
    pieces = Pieces(tokenizer)
    assert pieces.marks is None
    assert cut(pieces, ["a <mask>a<s>"]) == whole(tokenizer, ["a <mask>a<s>"])


def test_tokens_that_are_added_later_are_cut_at():
    tokenizer = metaspace("never")
    pieces = Pieces(tokenizer)
    texts = ["a<new>a<s>a"]
    before = cut(pieces, texts)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert cut(pieces, texts) == whole(tokenizer, texts) != before


def test_what_is_remembered_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr("weitiao.data.pieces.MOST_CHARACTERS", 100)
    pieces = Pieces(tokenizer)
    for i in range(100):
        text = f"<|im_start|>{i} and more<|im_end|>"
        assert cut(pieces, [text]) == whole(tokenizer, [text])
        assert sum(map(len, pieces.known)) <= 150


def test_real_rows_in_pieces(shared):
    from transformers import GPT2Tokenizer

    folder = shared / "tokenizers/gpt2"
    tokenizer = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    rows = json.loads((shared / "data/alpaca_zh/alpaca_zh_demo.json").read_text("utf-8"))[:200]
    texts = [f"Human: {row['instruction']} <|endoftext|>\n{row['output']}<|endoftext|>" for row in rows]
    pieces = Pieces(tokenizer)
    assert pieces.marks is not None and cut(pieces, texts) == whole(tokenizer, texts)
