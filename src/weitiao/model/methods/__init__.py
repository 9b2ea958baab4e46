"""The ways to tune a model: one file a method, each answering the verbs of `method.Method`, chosen by a table."""

from __future__ import annotations

from typing import Any

from weitiao.config import Settings
from weitiao.model.methods.adapter import Adapter
from weitiao.model.methods.added import WithTokens, extend
from weitiao.model.methods.bitfit import Bitfit
from weitiao.model.methods.full import Full
from weitiao.model.methods.ia3 import Ia3
from weitiao.model.methods.lora import Lora
from weitiao.model.methods.method import Method
from weitiao.model.methods.prefix import Prefix
from weitiao.model.methods.prompt import Prompt
from weitiao.model.methods.ptuning import Ptuning
from weitiao.model.quantize import true_numel

METHODS: dict[str, Method] = {
    "lora": Lora(), "full": Full(), "prompt": Prompt(), "ptuning": Ptuning(), "prefix": Prefix(),
    "bitfit": Bitfit(), "ia3": Ia3(), "adapter": Adapter(),
}


def method_of(settings: Settings, tokenizer: Any) -> Method:
    """The method of a run; with `tokens.add`, the rows of these tokens beside it, and the tokenizer taught to know them."""
    method = METHODS[settings.method.name]
    return WithTokens(method, extend(tokenizer, settings.tokens.add)) if settings.tokens.add else method


def trainable_summary(trainable: int, total: int) -> str:
    """`9,043,968 || all params: 2,097,768,448 || trainable%: 0.4311`, as PEFT and the tutorials print it."""
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"


def count_parameters(model) -> tuple[int, int]:
    """(trainable, all), each shared weight once, and packed ones as many as they stand for."""
    sizes = [(true_numel(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
