"""Turns -> `Example`s: ids and, per token, how much it is learned. The one place that decides who is learned.

    given     every token of the prompt                         weight 0
    learned   every token of the answer, and the stop token     weight of the turn x weight of the row

Prompt and answer meet as they do at inference: the prompt is encoded alone, and the answer is what encoding both together
adds to it. Where that would change the prompt's own ids (a merge across the seam), the answer is encoded alone instead.
The stop token is added by id, never as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from weitiao.data.templates import Template, Turn
from weitiao.trie import Example


@dataclass(frozen=True, eq=False)
class EncodedTurn:
    """A turn as ids, before anything is cut. prompt and answer int32; stop: the id that ends it; none after a label.

    seam: are the prompt's own ids how the text of both begins? Where not, the answer was encoded alone.
    """

    prompt: np.ndarray
    answer: np.ndarray
    stop: np.ndarray
    weight: float
    seam: bool = True

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer) + len(self.stop)


def encode_turn(turn: Turn, template: Template) -> EncodedTurn:
    return encode_turns([turn], template)[0]


def encode_turns(turns: Sequence[Turn], template: Template) -> list[EncodedTurn]:
    """Several turns in one call of the tokenizer."""
    texts = [text for turn in turns for text in (turn.prompt, turn.prompt + turn.answer)]
    ids = iter(template.encode_prompts(texts))
    return [_encoded(turn, prompt, both, template) for turn, prompt, both in zip(turns, ids, ids, strict=True)]


def encode_prompts_alone(turns: Sequence[Turn], template: Template) -> list[EncodedTurn]:
    """Turns whose answers are told by ids of their own: labels, which end without a stop token."""
    none = np.zeros(0, np.int32)
    prompts = template.encode_prompts([turn.prompt for turn in turns])
    return [EncodedTurn(prompt, none, none, turn.weight) for turn, prompt in zip(turns, prompts, strict=True)]


def _encoded(turn: Turn, prompt: np.ndarray, both: np.ndarray, template: Template) -> EncodedTurn:
    seam = len(both) > len(prompt) and np.array_equal(both[: len(prompt)], prompt)
    answer = both[len(prompt) :] if seam else template.encode(turn.answer)
    return EncodedTurn(prompt, answer, np.asarray([template.stop_id], np.int32), turn.weight, seam)


def cut_front(prompt: np.ndarray, most: int, head: int) -> np.ndarray:
    """The first `head` tokens of a prompt and its last ones, `most` in all; unchanged if it is shorter, or there is no room.

    cut_front([s, 1, 2, 3, 4], most=3, head=1) = [s, 3, 4]
    """
    if len(prompt) <= most or most <= head:
        return prompt
    return np.concatenate([prompt[:head], prompt[len(prompt) - (most - head) :]])


def examples(turns: Iterable[EncodedTurn], max_tokens: int, row: int, row_weight: float) -> Iterator[Example]:
    """The paths of one row, none longer than max_tokens.

    A chat ends with the last turn that fits whole. Where even the first turn is too long, its answer is cut and keeps
    its stop token; if nothing of the answer is left, there is no path. A label is whole or not there.
    """
    for i, turn in enumerate(turns):
        room = max_tokens - len(turn.prompt) - len(turn.stop)
        if len(turn.answer) > room and (i > 0 or room < 1 or not len(turn.stop)):
            return
        learned = np.concatenate([turn.answer[:room], turn.stop])
        weights = np.zeros(len(turn.prompt) + len(learned), np.float32)
        weights[len(turn.prompt) :] = turn.weight * row_weight
        weights[0] = 0.0  # a prompt without a token leaves the first learned token nothing to be learned from
        yield Example(np.concatenate([turn.prompt, learned]), weights, row)
