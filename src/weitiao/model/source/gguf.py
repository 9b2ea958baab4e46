"""A GGUF file -> a plain folder, converted once: bf16 safetensors, config.json, and a tokenizer that splits as it was trained to."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from weitiao.errors import SourceError
from weitiao.model.source.cache import reason, trouble_with_storage
from weitiao.model.source.request import Notify


def from_gguf(gguf: Path, staging: Path, origin: str, notify: Notify) -> Path:
    notify(f"Converting to safetensors (about {_seconds(gguf)} s, once)…")
    folder = staging / "model"
    _convert(gguf, folder)
    (folder / "README.md").write_text(f"{gguf.name} of {origin}, converted by weitiao.\n", encoding="utf-8")
    return folder


def _seconds(gguf: Path) -> int:
    """A rough promise: 25 s for the libraries and the vocabulary, then some 50 MB/s."""
    return 25 + round(gguf.stat().st_size / 50e6)


def _convert(gguf: Path, folder: Path) -> None:
    try:
        convert_gguf(gguf, folder)
    except Exception as error:
        raise trouble_with_storage(str(error)) or SourceError(
            f"{gguf.name} cannot be converted: {reason(error)}",
            "A GGUF file of one piece, of an architecture that transformers reads from GGUF.",
            "Use the model's original folder or hub name.",
        ) from error


def convert_gguf(gguf: Path, folder: Path) -> None:
    """A GGUF file -> a plain folder: bf16 safetensors, config.json, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _silent_bars():
        tokenizer = AutoTokenizer.from_pretrained(**source)
        _split_as_trained(tokenizer, gguf)
        # Unpacked, or transformers keeps the blocks where it has a kernel for them, and a model of blocks cannot be saved.
        # On the CPU: a model that only goes from file to file need not fit a GPU.
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, device_map="cpu", quantization_config=unpacked
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _digits_apart():
    from tokenizers import pre_tokenizers

    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of_words])


# A GGUF file only names how text is split before merging. transformers knows most names, takes GPT-2's split for the others
# without a word, and doesn't know this one: "x =  5" came out with two single spaces where the model was trained on a double one.
SPLITS = {"smollm": _digits_apart}


def _split_as_trained(tokenizer, gguf: Path) -> None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    split = SPLITS.get(bytes(field.parts[field.data[0]]).decode()) if field else None
    if split:
        tokenizer.backend_tokenizer.pre_tokenizer = split()


@contextlib.contextmanager
def _silent_bars() -> Iterator[None]:
    """No progress bars: neither transformers' own, nor the plain tqdm with which it reads GGUF tensors."""
    from tqdm.auto import tqdm
    from transformers.utils import logging

    shown, start = logging.is_progress_bar_enabled(), tqdm.__init__
    logging.disable_progress_bar()
    tqdm.__init__ = functools.partialmethod(start, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = start
        if shown:
            logging.enable_progress_bar()
