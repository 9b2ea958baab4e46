"""The ways to tune a model: one file a method, each answering the same few verbs, chosen by a table.

    attach(model, settings, seed) -> model   add what is trained, freeze the rest
    save(model, folder, base)                write what was trained (base: what a reader should load under it)
    load(model, folder)                      put it back into a model that attach has prepared
    merge(model) -> model                    a plain causal LM that computes the same
    FOLDER                                   where a run keeps it: adapter/ or model/
    TRAINS_ALL                               does it train the base itself?
"""

from __future__ import annotations

from types import ModuleType

from weitiao.model.methods import full, lora

METHODS: dict[str, ModuleType] = {"lora": lora, "full": full}


def trainable_summary(trainable: int, total: int) -> str:
    """`9,043,968 || all params: 2,097,768,448 || trainable%: 0.4311`, as PEFT and the tutorials print it."""
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"


def count_parameters(model) -> tuple[int, int]:
    """(trainable, all), each shared weight once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
