"""Prompts -> answers: batched for files and evaluation, streamed for a chat.

A model that was just trained still drops out at random and, with checkpointing, has its cache off; `answering` puts it
right for as long as it answers, and puts it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from weitiao.data.templates import Template
from weitiao.model.load import model_limit, virtual_places


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0: greedy, the same text each time. max_new_tokens counts the answer alone."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def arguments(self) -> dict[str, object]:
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Answer:
    """What a model said. tokens: how many, the stop token left out; cut: did the room end before the answer did?"""

    text: str
    tokens: int
    cut: bool

    @property
    def note(self) -> str:
        """What a person is told behind it."""
        return f"… (cut at {self.tokens} tokens)" if self.cut else ""


@contextmanager
def answering(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, for the block, with the mode of every part restored after it."""
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def answer_all(
    model, template: Template, prompts: Sequence[np.ndarray], sampling: Sampling, batch_size: int = 16,
    progress: Callable[[Iterable, str], Iterable] = lambda items, what: items,
) -> list[str]:
    """The texts of `answers_to`."""
    return [answer.text for answer in answers_to(model, template, prompts, sampling, batch_size, progress)]


def answers_to(
    model, template: Template, prompts: Sequence[np.ndarray], sampling: Sampling, batch_size: int = 16,
    progress: Callable[[Iterable, str], Iterable] = lambda items, what: items,
) -> list[Answer]:
    """Answers to prompts (int32 ids each), in their order; prompts of like length go together."""
    batches = batches_of([len(p) for p in prompts], batch_size, alike=padding_shows(model))
    answers: dict[int, Answer] = {}
    with answering(model):
        for batch in progress(batches, "Answering"):
            made = _generate(model, template, [prompts[i] for i in batch], sampling)
            answers |= {i: _answer(template, ids) for i, ids in zip(batch, made, strict=True)}
    return [answers[i] for i in range(len(prompts))]


def batches_of(lengths: Sequence[int], batch_size: int, alike: bool) -> list[list[int]]:
    """Indices of prompts that go together, the short ones first; alike: only prompts of one length do."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and len(batches[-1]) < batch_size and not (alike and lengths[batches[-1][0]] != lengths[i]):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def padding_shows(model) -> bool:
    """A prefix lies in the cache before a row's padding, and a sliding window counts cached places, padding too."""
    return getattr(model, "prefix_places", 0) > 0 and bool(getattr(model.config.get_text_config(), "sliding_window", None))


def room(model) -> int:
    """The most tokens of prompt and answer together that the model takes, its virtual tokens taken off."""
    return model_limit(model.config) - virtual_places(model)


def stream(
    model, template: Template, prompt: np.ndarray, sampling: Sampling, autocast: Callable[[], Any] = nullcontext,
    ended: Callable[[Answer], None] = lambda answer: None,
) -> Iterator[str]:
    """The answer to one prompt, piece by piece as it is made. Closing the iterator ends the answer.

    autocast: entered where the model runs, which is a thread of its own; the caller's would not reach there.
    ended: is given the whole answer behind its last piece; it is not called for one that was broken off.
    """
    from threading import Event, Thread

    from transformers import StoppingCriteriaList

    enough = Event()
    stop_when_enough = StoppingCriteriaList(
        [lambda ids, scores, **_: torch.full((len(ids),), enough.is_set(), dtype=torch.bool, device=ids.device)])
    streamer = streamer_for(template.tokenizer)
    failure: list[BaseException] = []
    whole: list[Answer] = []

    def work() -> None:
        try:
            with answering(model), autocast():
                (ids,) = _generate(model, template, [prompt], sampling, streamer=streamer, stopping_criteria=stop_when_enough)
            whole.append(_answer(template, ids))
        except BaseException as error:  # handed to the thread that reads
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        enough.set()
        thread.join()
    if failure:
        raise failure[0]
    ended(whole[0])


def streamer_for(tokenizer: Any) -> Any:
    """transformers' streamer of an answer's text, which begins the text anew after a line break; sentencepiece would take
    the first space of the next line for its own there. So the line break stays before it."""
    from transformers import TextIteratorStreamer

    class Streamer(TextIteratorStreamer):
        def put(self, value: Any) -> None:
            before = self.token_cache
            super().put(value)
            if before and not self.token_cache:  # a line is out
                self.token_cache = before[-1:]
                self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _generate(model, template: Template, prompts: Sequence[np.ndarray], sampling: Sampling, **more) -> list[list[int]]:
    """New ids for each prompt, up to the stop and with it. Prompts are padded to the left, under a mask."""
    width = max(len(p) for p in prompts)
    left = room(model) - width  # past its last position a model fails, or babbles
    if left < 1:
        return [[] for _ in prompts]
    ids = torch.full((len(prompts), width), template.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    out = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=min(sampling.max_new_tokens, left),
        use_cache=True, eos_token_id=template.stop_ids, pad_token_id=template.pad_id, **sampling.arguments(), **more,
    )
    return [_through_stop(row, template.stop_ids) for row in out[:, width:].tolist()]


def _through_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in stops]
    return ids[: ends[0] + 1] if ends else ids


def _answer(template: Template, ids: list[int]) -> Answer:
    """ids: as `_generate` gives them."""
    stopped = bool(ids) and ids[-1] in template.stop_ids
    said = ids[:-1] if stopped else ids
    # An answer that was cut may end in a part of a character.
    return Answer(template.tokenizer.decode(said, skip_special_tokens=True).rstrip("\ufffd"), len(said), not stopped)
