"""Every token is spelled as its vocabulary has it, and a character that several share is whole."""

import itertools

import pytest

from weitiao.data.spelling import Spelling, seen, whole_characters
from weitiao.data.templates import load_template

TRICKY = "它说：“是·非”\t→ {1}\r\n\n👨‍👩‍👧 naïve\u3000\u200b\u202eé \x1b[31m 𠀀"


def spelled(tokens):
    return [(stop - start, text) for start, stop, text in whole_characters(tokens)]


def test_tokens_are_joined_until_a_character_ends():
    assert spelled([b"a", b"\xe6\x98", b"\xaf", b"b"]) == [(1, "a"), (2, "是"), (1, "b")]
    # The middle token ends one character and begins the next.
    assert spelled([b"\xe4\xb8", b"\xad\xe5", b"\x9b\xbd"]) == [(3, "中国")]


@pytest.mark.parametrize("tokens, expected", [
    ([b"\xe6", b"\x98"], [(1, "\\xe6"), (1, "\\x98")]),  # cut off at the end
    ([b"\xe6", b"a"], [(1, "\\xe6"), (1, "a")]),  # begun, and something else follows
    ([b"\x98", b"a"], [(1, "\\x98"), (1, "a")]),
    ([b"\xe6", b"\xe6\x98\xaf"], [(1, "\\xe6"), (1, "是")]),
    ([], []),
])
def test_bytes_without_a_character_are_told_as_bytes(tokens, expected):
    assert spelled(tokens) == expected


def test_no_cut_of_a_text_loses_a_byte():
    """However three cuts part it, the pieces are the text, and tell of every token."""
    text = "是é𠀀a"
    whole = text.encode()
    for cuts in itertools.combinations(range(1, len(whole)), 3):
        tokens = [whole[a:b] for a, b in zip((0, *cuts), (*cuts, len(whole)))]
        found = list(whole_characters(tokens))
        assert "".join(piece for _, _, piece in found) == text
        assert [start for start, _, _ in found] == [0, *(stop for _, stop, _ in found[:-1])] and found[-1][1] == 4


def test_a_byte_level_vocabulary(tokenizer):
    spelling = Spelling(tokenizer)
    assert spelling.in_bytes
    ids = tokenizer("<|im_start|>user\n是 Paris<|im_end|>").input_ids
    pieces = spelling.pieces(ids)
    assert ("是", 3) in [(p.text, len(p.ids)) for p in pieces]
    assert "".join(p.text for p in pieces) == "<|im_start|>user\n是 Paris<|im_end|>"
    assert [p.text for p in pieces if p.special] == ["<|im_start|>", "<|im_end|>"]
    assert [i for p in pieces for i in p.ids] == ids
    assert [s for p in pieces for s in p.stored] == tokenizer.convert_ids_to_tokens(ids)
    assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])]


def test_every_text_comes_back(tokenizer):
    ids = tokenizer(TRICKY).input_ids
    assert "".join(p.text for p in Spelling(tokenizer).pieces(ids)) == TRICKY == tokenizer.decode(ids)


def test_what_has_no_shape_is_shown():
    assert seen(TRICKY) == r"它说：“是·非”→→·{1}\r⏎⏎👨\u200d👩\u200d👧·naïve\u3000\u200b\u202eé·\x1b[31m·𠀀"
    assert seen("\u0301a") == "◌\u0301a"  # an accent whose letter is another token
    assert seen("❤\ufe0f") == "❤\\ufe0f"


def test_an_id_without_a_token_is_told_by_its_number(tokenizer):
    assert [p.text for p in Spelling(tokenizer).pieces([60, 4000])] == [tokenizer.decode([60]), "[4000]"]


def test_gpt2_spells_chinese_rows(shared):
    from transformers import GPT2Tokenizer

    folder = shared / "tokenizers/gpt2"
    gpt2 = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    text = (shared / "data/alpaca_zh/alpaca_zh_demo.json").read_text("utf-8")[:20_000]
    pieces = Spelling(gpt2).pieces(gpt2(text).input_ids)
    assert "".join(p.text for p in pieces) == text and "\ufffd" not in text
    assert {len(p.ids) for p in pieces} >= {1, 2, 3}


def test_yuan2_spells_pieces_bytes_and_named_tokens(shared):
    from weitiao.model.families.yuan2_tokenizer import Yuan2Tokenizer

    yuan2 = Yuan2Tokenizer(vocab_file=str(shared / "tokenizers/yuan2/tokenizer.model"))
    spelling = Spelling(yuan2)
    assert not spelling.in_bytes
    ids = [*yuan2("自然语言 处理").input_ids, *yuan2.convert_tokens_to_ids(["<sep>", "<eod>"])]
    pieces = spelling.pieces(ids)
    assert "".join(p.text for p in pieces) == " 自然语言 处理<sep><eod>"
    assert [p.text for p in pieces if p.special] == ["<sep>", "<eod>"]


def test_byte_pieces_of_a_sentencepiece_vocabulary():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    inner = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()])
    llama = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    spelling = Spelling(llama)
    assert not spelling.in_bytes
    assert [(p.text, len(p.ids)) for p in spelling.pieces(llama("a 你 a").input_ids)] == [("a", 1), (" ", 1), ("你", 3), (" a", 1)]


def test_templates_stop_token_is_special(tokenizer):
    assert load_template("auto", tokenizer).stop_id in Spelling(tokenizer).named
