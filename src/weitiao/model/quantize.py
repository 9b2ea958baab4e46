"""Frozen weights in 8 or 4 bits (bitsandbytes): what may be asked for, what they hold, how they become plain again.

    nf4, fp4   two weights a byte, a scale for each 64 of them; a product takes them back to the compute type first
    int8       a weight a byte, a scale a row. A CPU takes them back in training; a GPU, and a CPU that measures or
               answers, rounds what comes in to 8 bits too, token by token, and multiplies whole numbers

bitsandbytes is not needed to import this file.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from weitiao.errors import SettingError
from weitiao.settings.model import ModelSettings

FOUR_BITS = ("nf4", "fp4")
PACKED = ("Params4bit", "Int8Params")


# ------------------------------------------------------------------------------------------------- before it is loaded


def refuse_unfit(settings: ModelSettings, config: Any, trains_all: bool, processes: int = 1) -> None:
    """Told before rows are read and weights are loaded.

    config: the model's, as transformers reads it; it says whether the checkpoint is quantised by itself.
    trains_all: does the method train weights of the base?

    Raises:
        SettingError: the settings contradict each other, or a package is missing.
    """
    published = getattr(config, "quantization_config", None)
    if published and settings.quantize != "none":
        raise SettingError(f"model.quantize={settings.quantize}, but the checkpoint is quantised already.",
                           "Expected weights that are not.", "Leave model.quantize at none: it is loaded as it was published.")
    if trains_all and (published or settings.quantize != "none"):
        how = "the checkpoint is quantised" if published else f"model.quantize={settings.quantize}"
        raise SettingError(f"This method trains weights of the base, but {how}: 8 or 4 bits cannot tell one step from none.",
                           "Expected a method that leaves the base as it is.", "Choose method=lora, or a checkpoint that is not.")
    if settings.quantize != "none":
        _require_bitsandbytes(settings.quantize)
    if settings.device_map is not None and processes > 1:
        raise SettingError(f"model.device_map={settings.device_map} with {processes} processes.",
                           "Expected one process, which spreads the model over the devices, or one device a process.",
                           "Leave out model.device_map, or start one process.")


def _require_bitsandbytes(quantize: str) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # its library may be there and not fit the machine
        raise SettingError(f"model.quantize={quantize} needs bitsandbytes: {str(error).splitlines()[0]}.",
                           next_step="pip install 'weitiao[bitsandbytes]'") from error


def bits_config(settings: ModelSettings, compute: torch.dtype) -> Any:
    """transformers' BitsAndBytesConfig, or None. The head is left as it is: transformers finds it in any family."""
    if settings.quantize == "none":
        return None
    from transformers import BitsAndBytesConfig

    if settings.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=settings.int8_threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=settings.quantize, bnb_4bit_use_double_quant=settings.double_quantize,
        bnb_4bit_compute_dtype=compute,
    )


# -------------------------------------------------------------------------------------------------- what a model holds


def packed_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The layers whose own weight is packed; PEFT's around them bear the same class names and are not meant."""
    for name, module in model.named_modules():
        if type(module._parameters.get("weight")).__name__ in PACKED:
            yield name, module


def is_quantized(model: torch.nn.Module) -> bool:
    return any(True for _ in packed_layers(model))


def never_repack(model: torch.nn.Module) -> None:
    """Keep 4-bit weights in the one layout that has a backward pass.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) packs them anew, in place and for good, in the first forward in eval
    mode: from then on gradients are missing or wrong and dequantising gives garbage, without a message.
    """
    for _, module in packed_layers(model):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def true_numel(parameter: torch.nn.Parameter) -> int:
    """How many weights it stands for: a 4-bit tensor holds two a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def plain_weight(module: torch.nn.Module) -> torch.Tensor:
    """The weight that a packed layer multiplies with, float32 [out, in]."""
    import bitsandbytes.functional as bits

    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32  # else it is rounded to the type that the checkpoint was loaded in
        return bits.dequantize_4bit(weight.data, state)
    scale = weight.SCB if weight.SCB is not None else module.state.SCB  # the first forward moves it
    return bits.int8_vectorwise_dequant(weight.data, scale)


@contextmanager
def exact_products(model: torch.nn.Module) -> Iterator[None]:
    """8-bit layers multiply what comes in as it is, for the block, as they do when a CPU trains.

    On a GPU they round inputs to 8 bits, and columns that hold one above int8_threshold, found over the whole batch, go
    another way: whatever else is in the batch moves a token's result, in any layout. SmolLM2 with all other branches
    changed: 4 % of the largest hidden state. Beside that no mistake of a layout could be seen.
    """
    layers = [layer for _, layer in packed_layers(model) if type(layer.weight).__name__ == "Int8Params"]
    for layer in layers:
        layer.forward = partial(_exact, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _exact(layer: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
    return torch.nn.functional.linear(inputs, plain_weight(layer).to(inputs.dtype), bias)


def unsound(model: torch.nn.Module) -> str | None:
    """The name of a weight that is not finite, or None. In a packed one it shows only when it is taken out."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _is_finite(parameter):
            return name
    for name, module in packed_layers(model):
        if not _is_finite(plain_weight(module)):
            return f"{name}.weight"
    return None


def _is_finite(weight: torch.Tensor, part: int = 1 << 24) -> bool:
    """A part at a time: torch makes two more tensors of the size of what it looks at, 1.3 GB for the embedding of Bloom 560m."""
    return all(bool(torch.isfinite(some).all()) for some in weight.detach().flatten().split(part))


def describe(settings: ModelSettings, dtype: torch.dtype) -> str:
    """In what the weights are held: `float32`, `int8`, `nf4 (double quantised)`."""
    if settings.quantize in FOUR_BITS and settings.double_quantize:
        return f"{settings.quantize} (double quantised)"
    return _short(dtype) if settings.quantize == "none" else settings.quantize


def dtype_notes(model: torch.nn.Module, compute: torch.dtype) -> list[str]:
    """A line for each kind of product that is not made in `compute`: what is computed in what, and what it costs.

    float32 weights under bf16 or fp16 are no such kind: autocast turns them into the compute type, as it is meant to.
    """
    four, eight, plain = Counter(), 0, Counter()
    packed = {name for name, _ in packed_layers(model)}
    for name, module in model.named_modules():
        if name in packed:
            if type(module.weight).__name__ == "Int8Params":
                eight += 1
            elif module.compute_dtype not in (None, compute):
                four[module.compute_dtype] += 1
        elif isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            if module.weight.dtype not in (torch.float32, compute):
                plain[module.weight.dtype] += 1
    notes = [
        f"{count} 4-bit matrices multiply in {_short(dtype)}, as the checkpoint asks, not in {_short(compute)}: "
        f"{'slower' if dtype is torch.float32 else 'rounded to its precision'}, and every input is cast."
        for dtype, count in four.items()
    ]
    if eight:
        notes.append(f"{eight} 8-bit matrices: on a GPU, and on a CPU that measures or answers, their inputs are rounded to "
                     f"float16 and then to 8 bits, whatever the rest computes in ({_short(compute)}); which of them are spared "
                     "(model.int8_threshold) depends on the whole batch, so losses move a little with it.")
    for dtype, count in plain.items():
        if compute is torch.float32:
            notes.append(f"{count} matrices are held in {_short(dtype)} and multiply in it, not in float32: products are rounded "
                         f"to {_bits(dtype)} bits. model.dtype=float32 computes as asked, in twice the memory.")
        else:
            cost = "loses 3 bits of each weight" if compute is torch.bfloat16 else "overflows beyond 65,504"
            notes.append(f"{count} matrices are held in {_short(dtype)} and cast to {_short(compute)} for every product, which "
                         f"takes time and {cost}. "
                         f"model.dtype={_short(compute)} casts once.")
    return notes


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(dtype: torch.dtype) -> int:
    """Of a number's significand, the leading one counted."""
    return 11 if dtype is torch.float16 else 8


# ---------------------------------------------------------------------------------------------------- back to plain


def to_float32(model: torch.nn.Module) -> None:
    """All that is not packed is held, and 4-bit layers compute, in float32: what a merge is held against."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for _, module in packed_layers(model):
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32


def unpack_into(plain: torch.nn.Module, packed: torch.nn.Module) -> None:
    """Give `plain`, the same model loaded without quantising, the weights that `packed` computes with.

    GPT-2's Conv1D keeps [in, out], and its packed form [out, in].
    """
    layers = dict(packed_layers(packed))
    held = dict(packed.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            value = held[name] if layer is None else plain_weight(layer)
            if layer is not None and type(plain.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D":
                value = value.T
            parameter.copy_(value)
