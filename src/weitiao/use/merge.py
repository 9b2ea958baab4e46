"""Adapter + base -> a plain model folder, proven before it is written.

A step of training is far below what 8 or 4 bits can tell apart, so nothing is ever merged into packed weights:

    trained on     merged into (--base)     the merged model is
    not quantised  the base                 the one that was trained
    nf4, fp4       dequantized (default)    the one that was trained: the base's packed weights, taken out in float32
                   original                 close to it: the adapter has learned beside other weights
    int8           original (default)       close to it: 8 bits are near the original
                   dequantized              as above; int8 rounds what comes in besides, which no plain model does
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from weitiao.config import Settings
from weitiao.data.stored import TrainingRow
from weitiao.errors import RunError, SettingError
from weitiao.model import quantize
from weitiao.model.load import DTYPES, load_model
from weitiao.model.methods import METHODS
from weitiao.screen import Screen, quiet_libraries
from weitiao.train import memory
from weitiao.train.evaluation import mean_loss
from weitiao.train.folder import open_run
from weitiao.use.trained import Trained, open_trained, unquantized

PROMPTS = 16  # real rows that the merged model is held against
# The largest difference of a logit and the least greedy agreement that a written model may show. In float32 a merge is a
# sum in another order; bfloat16 rounds every weight to 8 bits.
LIMITS = {torch.float32: (1e-2, 0.999), torch.bfloat16: (float("inf"), 0.9)}


@dataclass(frozen=True)
class MergeProof:
    """Merged against adapter on real rows: |logit difference|, and the share of positions whose likeliest token agrees."""

    logit_max: float
    greedy_agreement: float
    rows: int
    tokens: int


def merge(path: str, output: str | None, dtype: str, base: str | None = None) -> None:
    """Write RUN/merged (or `output`): a model folder that needs neither PEFT nor weitiao."""
    quiet_libraries()
    screen = Screen()
    if dtype not in ("float32", "bfloat16"):
        raise SettingError(f"--dtype {dtype!r} is unknown.", "Expected float32 or bfloat16.")
    run, weights = open_run(path)
    target = Path(output) if output else run.path / "merged"
    settings = run.settings()
    if target.exists():
        learned, made = weights / METHODS[settings.method.name].FOLDER, target / "config.json"
        older = made.is_file() and learned.exists() and made.stat().st_mtime < learned.stat().st_mtime
        raise RunError(f"{target} exists already{', and is older than what the run has learned by now' if older else ''}.", "Expected a new folder.",
                       "Remove it, or choose another: --output NAME.")
    METHODS[settings.method.name].refuse_merge()
    base = base_to_merge_into(settings, base)
    packed = as_trained(path, base, screen) if settings.model.quantize != "none" else None
    trained = open_trained(path, screen, base)
    refuse_packed(trained)
    rows, device = proof_rows(trained), trained.device
    before = packed.logits if packed and packed.logits else logits_of(trained.model, rows)
    merged = trained.method.merge(trained.model).to(DTYPES[dtype])
    staging = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(merged, trained, staging)
        del merged
        # What was written is what is proven: it is read back from the disk.
        reloaded = load_model(staging, unquantized(settings.model), DTYPES[dtype]).to(device)
        proof = compare(before, logits_of(reloaded, rows))
        measured = f"logits differ by at most {proof.logit_max:.2g}, the likeliest token agrees at {proof.greedy_agreement:.2%}"
        where = f"{proof.rows} rows, {proof.tokens:,} positions"
        screen.tell(f"Proven on {where}, against what was learned beside the {base} base: {measured}." if packed and dtype == "float32" else
                    f"Proven on {where}: {measured}." if dtype == "float32" else
                    f"Rounding every weight to bfloat16 has its price; on {where}, {measured}. In float32 nothing changes.")
        if packed:
            after = loss_of(reloaded, rows, trained.template.pad_id, nullcontext)
            screen.tell(f"Loss on these rows: {packed.loss:.4f} as it was trained ({settings.model.quantize}), {after:.4f} merged "
                        f"into the {base} base ({after - packed.loss:+.4f}).")
        logit_limit, agreement_limit = LIMITS[DTYPES[dtype]]
        if not (proof.logit_max <= logit_limit and proof.greedy_agreement >= agreement_limit):
            raise RunError("The merged model is not the one that was trained; it is not kept.",
                           f"Expected logits within {logit_limit:g} and {agreement_limit:.1%} agreement.",
                           "Merge in float32 (--dtype float32).")
        os.replace(staging, target)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{target} cannot be written: {error}.", "Nothing half-written is left.", "Make room, or choose another: --output NAME.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    screen.tell(f"The merged model is in {target} ({dtype}); {who_loads(reloaded, trained.template.tokenizer)}")


def who_loads(model: torch.nn.Module, tokenizer: Any) -> str:
    """model: as it was read back from what was written."""
    if type(model).__module__.startswith("weitiao."):
        return "it loads with weitiao. Its weights bear the original's names, for programs that run the original's code and tokenizer."
    if getattr(tokenizer, "needs_weitiao", False):
        return "its weights load with transformers, vLLM and others as they stand, its tokenizer with weitiao alone."
    return "it loads with transformers, vLLM and others as it stands."


def base_to_merge_into(settings: Settings, asked: str | None) -> str:
    """original or dequantized, as asked, else as the table above has it.

    Raises:
        SettingError: it is neither, or there is nothing to take out of its packing.
    """
    quantized = settings.model.quantize != "none"
    if asked not in (None, "original", "dequantized"):
        raise SettingError(f"--base {asked!r} is unknown.", "Expected original or dequantized.")
    if asked == "dequantized" and not quantized:
        raise SettingError("--base dequantized: this run's base was not quantised.", "Expected model.quantize to be int8, nf4 or fp4.",
                           "Leave the option out.")
    return asked or ("dequantized" if settings.model.quantize in quantize.FOUR_BITS else "original")


def refuse_packed(trained: Trained) -> None:
    if quantize.is_quantized(trained.model):
        raise RunError(f"{trained.settings.model.name} was published in packed weights; what was learned would round away in them.",
                       "Expected a base of which there are plain weights.",
                       "Use the run as it is (weitiao chat, generate, evaluate), or train on the plain model with model.quantize.")


@dataclass(frozen=True, eq=False)
class Packed:
    """What the quantised model that was trained says about the rows of the proof."""

    loss: float  # in the run's own precision
    logits: list[torch.Tensor] | None  # in float32, where a plain model can equal them


def as_trained(path: str, base: str, screen: Screen) -> Packed:
    trained = open_trained(path, screen)
    rows = proof_rows(trained)
    loss = loss_of(trained.model, rows, trained.template.pad_id, trained.autocast)
    if base == "original" or trained.settings.model.quantize not in quantize.FOUR_BITS:
        return Packed(loss, None)
    quantize.to_float32(trained.model)
    return Packed(loss, logits_of(trained.model, rows))


def write(merged: torch.nn.Module, trained: Trained, folder: Path) -> None:
    """Weights, config, tokenizer, the template that was trained with, and the ids that stop it."""
    merged.generation_config.eos_token_id = trained.template.stop_ids
    merged.save_pretrained(folder)
    trained.template.tokenizer.chat_template = trained.template.source
    trained.template.tokenizer.save_pretrained(folder)


def proof_rows(trained: Trained) -> list[TrainingRow]:
    """Rows the run was trained or measured on."""
    return trained.read(trained.settings.data.eval or trained.settings.data.train).rows[:PROMPTS]


def loss_of(model: torch.nn.Module, rows: Sequence[TrainingRow], pad_id: int, autocast: Callable[[], Any]) -> float:
    device = next(model.parameters()).device
    return mean_loss(model, rows, "padded", 2 * memory.LEAST_NODES, pad_id, device, autocast)


def logits_of(model: torch.nn.Module, rows: Sequence[TrainingRow]) -> list[torch.Tensor]:
    """Logits [T, V] of each row's last example alone, float32, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        return [
            model(input_ids=torch.from_numpy(row.examples[-1].ids.astype(np.int64))[None].to(device), use_cache=False).logits[0].float().cpu()
            for row in rows
        ]


def compare(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> MergeProof:
    difference = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    agree = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(before, after, strict=True))
    tokens = sum(len(a) for a in before)
    return MergeProof(difference, agree / tokens, len(before), tokens)
