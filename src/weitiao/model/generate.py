"""Prompts -> answers: many at once for files and evaluation, streamed for a chat.

Many prompts go by decode.py, which computes what they share once and lets rows leave as they stop. Where the model does not
take that way (`no_decoding`), and in a chat, transformers' generate answers, a batch at a time.

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
from weitiao.model import tails
from weitiao.model.attention import TrieUnsupported
from weitiao.model.decode import decode
from weitiao.model.load import causal_lm, device_of, model_limit, trie_obstacle, virtual_places
from weitiao.model.methods.wiring import kv_shape

Progress = Callable[[Iterable, str], Iterable]

ROWS = 64  # answered at once, where nobody says how many
ROWS_PADDED = 16  # and by transformers, which keeps every key of each
SHARE_OF_MEMORY = 0.25  # of what is free: for keys and values of rows
# What a generation_config may say without keeping a model's prompts from decode.py: what is told per call, or changes no token.
PLAIN_GENERATION = {
    "_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens",
    "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "use_cache", "cache_implementation", "output_attentions",
    "output_hidden_states", "output_scores", "return_dict_in_generate",
}


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
    model, template: Template, prompts: Sequence[np.ndarray], sampling: Sampling, batch_size: int | None = None,
    progress: Progress = lambda items, what: items, layout: str = "trie",
) -> list[str]:
    """The texts of `answers_to`."""
    return [answer.text for answer in answers_to(model, template, prompts, sampling, batch_size, progress, layout)]


def answers_to(
    model, template: Template, prompts: Sequence[np.ndarray], sampling: Sampling, batch_size: int | None = None,
    progress: Progress = lambda items, what: items, layout: str = "trie",
) -> list[Answer]:
    """Answers to prompts (int32 ids each), in their order.

    batch_size: rows answered at once; default: as many as memory is well used by. layout: how the model's rows are laid out in
    training, trie or padded; a model whose rows could not be tries there answers no tries here.
    """
    with answering(model):
        ends = Ends(len(prompts), _ids_of(model, template, prompts, sampling, batch_size, layout))
        answers = {i: _answer(template, ids) for i, ids in progress(ends, "Answering")}
    return [answers[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class Ends:
    """(which prompt, its ids), as answers end; so many that a bar can count them."""

    count: int
    ends: Iterator[tuple[int, list[int]]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return self.ends


def _ids_of(model, template, prompts, sampling: Sampling, batch_size: int | None, layout: str) -> Iterator[tuple[int, list[int]]]:
    """(which prompt, its new ids up to the stop and with it) of each."""
    left = [room(model) - len(prompt) for prompt in prompts]  # past its last position a model fails, or babbles
    open_ones = [i for i in range(len(prompts)) if left[i] > 0]
    yield from ((i, []) for i in range(len(prompts)) if left[i] <= 0)
    # The same prompt has the same answer, unless it is drawn.
    same: dict[Any, list[int]] = {}
    for i in open_ones:
        same.setdefault(prompts[i].tobytes() if sampling.temperature == 0 else i, []).append(i)
    asked = [alike[0] for alike in same.values()]
    others = {alike[0]: alike for alike in same.values()}
    for i, ids in _ways(model, template, prompts, asked, sampling, batch_size, layout):
        yield from ((j, ids) for j in others[i])


def _ways(model, template, prompts, asked: list[int], sampling, batch_size, layout) -> Iterator[tuple[int, list[int]]]:
    if no_decoding(model, layout) is None:
        try:
            yield from _decoded(model, template, prompts, asked, sampling, batch_size)
            return
        except TrieUnsupported:  # told at the first row, before any answer
            pass
    yield from _generated(model, template, prompts, asked, sampling, batch_size or ROWS_PADDED)


def _decoded(model, template, prompts, asked: list[int], sampling: Sampling, batch_size: int | None) -> Iterator[tuple[int, list[int]]]:
    some = [prompts[i] for i in asked]
    limits = [min(sampling.max_new_tokens, room(model) - len(prompt)) for prompt in some]
    choice = Choice(sampling, model.generation_config.repetition_penalty, some)
    places = int(free_memory(model) * SHARE_OF_MEMORY / place_bytes(model))
    for i, ids in decode(model, some, limits, template.stop_ids, choice, batch_size or ROWS, virtual_now(model), places):
        yield asked[i], ids


def _generated(model, template, prompts, asked: list[int], sampling: Sampling, batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """The way of transformers, which is also the judge of the other."""
    for batch in batches_of([len(prompts[i]) for i in asked], batch_size, alike=padding_shows(model)):
        batch = [asked[k] for k in batch]
        yield from zip(batch, _generate(model, template, [prompts[i] for i in batch], sampling), strict=True)


class Choice:
    """Logits -> the next id of each row: the likeliest, or one that is drawn.

    Each prompt draws from a sequence of its own, so that an answer does not depend on what is answered beside it.
    """

    def __init__(self, sampling: Sampling, penalty: float | None, prompts: Sequence[np.ndarray]):
        from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

        self.prompts = prompts
        self.penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty not in (None, 1.0) else None
        self.draws = sampling.temperature > 0
        if self.draws:
            self.warp = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
            if sampling.top_p < 1:
                self.warp.append(TopPLogitsWarper(sampling.top_p))
            self.seed = int(torch.randint(1 << 62, ()))
            self.sources: dict[int, torch.Generator] = {}

    def __call__(self, logits: torch.Tensor, rows: Sequence[int], said: Sequence[list[int]]) -> list[int]:
        """logits [rows, vocabulary]; rows: which prompts; said: their answers so far."""
        logits = logits.float()
        if self.penalty:
            for k, row in enumerate(rows):
                ids = torch.from_numpy(np.concatenate([self.prompts[row], said[k]]).astype(np.int64)).to(logits.device)
                logits[k : k + 1] = self.penalty(ids[None], logits[k : k + 1])
        if not self.draws:
            return logits.argmax(dim=-1).tolist()
        likely = self.warp(None, logits).softmax(dim=-1)
        return [int(torch.multinomial(likely[k], 1, generator=self._source(row, logits.device))) for k, row in enumerate(rows)]

    def _source(self, row: int, device: torch.device) -> torch.Generator:
        if row not in self.sources:
            self.sources[row] = torch.Generator(device).manual_seed((self.seed + row) % (1 << 63))
        return self.sources[row]


def no_decoding(model, layout: str = "trie") -> str | None:
    """Why this model's prompts are answered by transformers' generate, or None."""
    inner = causal_lm(model)
    if layout == "padded":
        return "its rows are padded"
    if not getattr(inner, "learns_on_tries", False):
        return "it was not taught tries"
    if obstacle := trie_obstacle(inner):
        return obstacle
    told = model.generation_config.to_diff_dict().keys() - PLAIN_GENERATION
    return f"its generation_config asks for {', '.join(sorted(told))}" if told else None


def virtual_now(model) -> int:
    """Virtual tokens before every row, if they are on."""
    virtual = getattr(causal_lm(model), "virtual", None)
    return virtual_places(model) if virtual is not None and virtual.on else 0


def place_bytes(model) -> int:
    """What one token's keys and values take in all layers."""
    heads, d = kv_shape(causal_lm(model))
    kind, on_cpu = causal_lm(model).get_input_embeddings().weight.dtype, device_of(model).type == "cpu"
    if torch.is_autocast_enabled(device_of(model).type):
        kind = torch.get_autocast_dtype(device_of(model).type)
    size = 4 if on_cpu and not tails.computes(kind, d) else kind.itemsize
    return 2 * causal_lm(model).config.get_text_config().num_hidden_layers * heads * d * size


def free_memory(model) -> int:
    """Bytes, where the model is."""
    device = device_of(model)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


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
    device = device_of(model)
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
