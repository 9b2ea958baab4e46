"""Can the weights learn in the types that they are held and computed in?"""

from __future__ import annotations

import torch

from weitiao.data.findings import Kind
from weitiao.model import load as loading
from weitiao.model.methods import count_parameters
from weitiao.train.fitness.fit import Check, Facts, Fit
from weitiao.train.stepping import rounding_in_force

TINY = 500_000_000  # weights, below which 8 and 4 bits save next to nothing


def _pure_half(fit: Fit) -> Facts | None:
    settings = fit.settings
    trains = loading.trains_in_half(settings.model, fit.trains_all, settings.training.precision)
    return {} if trains else None


def _trained_in_bf16(fit: Fit) -> Facts | None:
    if not fit.trains_all or fit.settings.model.dtype != "bfloat16" or rounding_in_force(fit.settings) != "nearest":
        return None
    same = ", as the checkpoint holds them" if fit.checkpoint_type is torch.bfloat16 else ""
    return {"rate": f"{fit.settings.learning_rate:g}", "same": same}


def _held_in_float32(fit: Fit) -> Facts | None:
    if not fit.trains_all or fit.settings.model.dtype != "auto" or fit.checkpoint_type not in loading.HALVES:
        return None
    return {"dtype": str(fit.checkpoint_type).removeprefix("torch.")}


def _narrower_range(fit: Fit) -> Facts | None:
    """float16 ends at 65,504, where bfloat16 goes on to 3e38."""
    model, precision = fit.settings.model, fit.settings.training.precision
    asked = [name for name, on in (("model.dtype=float16", model.dtype == "float16"), ("training.precision=fp16", precision == "fp16")) if on]
    return {"asked": " and ".join(asked)} if asked and fit.checkpoint_type is torch.bfloat16 else None


def _quantised_tiny(fit: Fit) -> Facts | None:
    if fit.settings.model.quantize == "none":
        return None
    weights = count_parameters(fit.model)[1]
    return {"quantize": fit.settings.model.quantize, "weights": f"{weights / 1e6:,.0f} million"} if weights < TINY else None


CHECKS: dict[str, Check] = {
    "pure_half": Check(Kind(
        "warning", "All weights are trained in float16, without loss scaling: gradients below 6e-8 are 0, and a step below 1/2048 of a weight is none.",
        "Leave model.dtype out: weights are held in float32 and computed in fp16 or bf16 beside them, at twice the memory for weights."), _pure_half),
    "trained_in_bf16": Check(Kind(
        "warning", "training.rounding=nearest trains weights that are held in bfloat16{same}: a step below 1/512 of a weight rounds to nothing, "
        "which at a learning rate of {rate} most steps are.",
        "Leave training.rounding out, so that small steps count on the average; or model.dtype: trained weights are held in float32, and computed in bf16 (training.precision=bf16)."), _trained_in_bf16),
    "held_in_float32": Check(Kind(
        "note", "The checkpoint holds {dtype}; since all weights are trained, weitiao holds them in float32, at twice its memory.",
        "Nothing to do. If memory is short: method=lora, or method.last_layers."), _held_in_float32),
    "narrower_range": Check(Kind(
        "warning", "The checkpoint was made in bfloat16, and {asked} ends at 65,504: activations that were larger overflow.",
        "training.precision=bf16 where the hardware has it, else fp32."), _narrower_range),
    "quantised_tiny": Check(Kind(
        "note", "model.quantize={quantize} on {weights} weights saves next to no memory and makes training slower: about half as fast as bf16 on a CPU.",
        "model.quantize=none."), _quantised_tiny),
}
