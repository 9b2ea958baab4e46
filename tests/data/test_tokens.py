"""Who is learned: the answer and its stop token, nothing of the prompt; and what is left of a row that must be cut."""

import numpy as np
import pytest

from weitiao.data.conversation import Conversation, Message
from weitiao.data.templates import Turn, load_template
from weitiao.data.tokens import EncodedTurn, encode_turn, examples

STOP = 9


def turn(prompt, answer, stop=(STOP,), weight=1.0):
    return EncodedTurn(np.array(prompt, np.int32), np.array(answer, np.int32), np.array(stop, np.int32), weight)


def paths(turns, max_tokens=100, row_weight=1.0):
    return [(e.ids.tolist(), e.weights.tolist()) for e in examples(turns, max_tokens, 7, row_weight)]


# -- text to ids -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seam():
    """A tokenizer that merges a space with the letter after it: `: a` is [:, Ġa], while `: ` ends in [Ġ]."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["</s>", "Ġa", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[("Ġ", "a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return load_template("human_assistant", PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))


def test_an_answer_goes_on_where_the_prompt_ends(seam):
    encoded = encode_turn(Turn("Human: q\n\nAssistant: ", "b a", 0.5), seam)
    assert seam.tokenizer.convert_ids_to_tokens(encoded.answer) == ["b", "Ġa"]
    assert encoded.stop.tolist() == [seam.stop_id] == [0]
    assert encoded.weight == 0.5 and len(encoded) == len(encoded.prompt) + 3
    assert encoded.prompt.dtype == encoded.answer.dtype == encoded.stop.dtype == np.int32


def test_a_merge_across_the_seam_does_not_change_the_prompt(seam):
    text = "Human: q\n\nAssistant: "
    encoded = encode_turn(Turn(text, "a a", 1.0), seam)
    assert encoded.prompt.tolist() == seam.encode_prompts([text])[0].tolist()
    assert seam.tokenizer.convert_ids_to_tokens(encoded.prompt)[-1] == "Ġ"
    assert seam.tokenizer.convert_ids_to_tokens(encoded.answer) == ["a", "Ġa"]
    assert seam.tokenizer.decode([*encoded.prompt, *encoded.answer, *encoded.stop]) == text + "a a</s>"


def test_what_is_given_and_what_is_learned_of_a_chat(tokenizer):
    template = load_template("auto", tokenizer)
    said = [("user", "1"), ("assistant", "22"), ("user", "3"), ("assistant", "44")]
    chat = Conversation(tuple(Message(role, text, float(role == "assistant")) for role, text in said))
    found = []
    for example in examples((encode_turn(t, template) for t in template.turns(chat)), 1000, 7, 1.0):
        learned = example.weights > 0
        found.append((tokenizer.decode(example.ids[~learned]), tokenizer.decode(example.ids[learned])))
        assert not learned[: np.argmax(learned)].any() and learned[np.argmax(learned) :].all()  # the end of the path, unbroken
        assert example.row == 7
    first = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
    assert found == [
        (first, "22<|im_end|>"),
        (first + "22<|im_end|>\n<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\n", "44<|im_end|>"),
    ]


def test_turns_of_a_chat_share_their_history_as_a_trie(tokenizer):
    from weitiao.trie import build

    template = load_template("auto", tokenizer)
    said = [("user", "1"), ("assistant", "22"), ("user", "3"), ("assistant", "44")]
    chat = Conversation(tuple(Message(role, text, float(role == "assistant")) for role, text in said))
    both = list(examples([encode_turn(t, template) for t in template.turns(chat)], 1000, 0, 1.0))
    trie = build(both)
    assert len(trie) == len(both[1])  # the first turn lies whole within the second
    assert len(trie.edges()) == 6  # 2 2 stop, 4 4 stop


# -- weights -----------------------------------------------------------------------------------------------------------


def test_the_answer_and_the_stop_are_learned_and_the_prompt_is_not():
    assert paths([turn([1, 2, 3], [4, 5])]) == [([1, 2, 3, 4, 5, STOP], [0, 0, 0, 1, 1, 1])]


def test_a_bare_label_is_learned_without_a_stop():
    assert paths([turn([1, 2, 3], [4], stop=())]) == [([1, 2, 3, 4], [0, 0, 0, 1])]


def test_the_weight_of_the_turn_times_the_weight_of_the_row():
    assert paths([turn([1], [2], weight=0.5)], row_weight=4.0) == [([1, 2, STOP], [0, 2, 2])]


def test_the_first_token_of_all_has_nothing_to_be_learned_from():
    assert paths([turn([], [4, 5])]) == [([4, 5, STOP], [0, 1, 1])]


# -- cutting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens, ids", [
    (7, [1, 2, 3, 4, 5, 6, STOP]),
    (6, [1, 2, 3, 4, 5, STOP]),
    (5, [1, 2, 3, 4, STOP]),  # one token of the answer, at least
    (4, None),
    (1, None),
])
def test_an_answer_is_cut_from_its_end_and_keeps_its_stop(max_tokens, ids):
    expected = [] if ids is None else [(ids, [0, 0, 0] + [1] * (len(ids) - 3))]
    assert paths([turn([1, 2, 3], [4, 5, 6])], max_tokens) == expected


def test_half_a_label_is_no_label():
    assert paths([turn([1, 2, 3], [4, 5], stop=())], 5) == [([1, 2, 3, 4, 5], [0, 0, 0, 1, 1])]
    assert paths([turn([1, 2, 3], [4, 5], stop=())], 4) == []


@pytest.mark.parametrize("max_tokens, turns", [(9, 2), (8, 1), (4, 1), (3, 1), (2, 0)])
def test_a_chat_ends_with_the_last_turn_that_fits_whole(max_tokens, turns):
    first, second = turn([1], [2, 3]), turn([1, 2, 3, STOP, 4], [5, 6, 7])
    expected = [([1, 2, 3, STOP], [0, 1, 1, 1]), ([1, 2, 3, STOP, 4, 5, 6, 7, STOP], [0, 0, 0, 0, 0, 1, 1, 1, 1])]
    if max_tokens == 3:
        expected = [([1, 2, STOP], [0, 1, 1])]  # even the first turn is too long: it alone is cut
    assert paths([first, second], max_tokens) == expected[:turns]


def test_no_later_turn_comes_back_after_one_that_did_not_fit():
    assert [ids for ids, _ in paths([turn([1], [2]), turn([1, 2], [3] * 9), turn([1], [4])], 5)] == [[1, 2, STOP]]
