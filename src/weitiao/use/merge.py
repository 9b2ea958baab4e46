"""Adapter + base -> a plain model folder, proven before it is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from weitiao.errors import RunError, SettingError
from weitiao.model.load import DTYPES, load_model
from weitiao.screen import Screen, quiet_libraries
from weitiao.use.trained import Trained, open_trained

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


def merge(path: str, output: str | None, dtype: str) -> None:
    """Write RUN/merged (or `output`): a model folder that needs neither PEFT nor weitiao."""
    quiet_libraries()
    screen = Screen()
    if dtype not in ("float32", "bfloat16"):
        raise SettingError(f"--dtype {dtype!r} is unknown.", "Expected float32 or bfloat16.")
    trained = open_trained(path, screen, torch.float32)
    target = Path(output) if output else trained.run.path / "merged"
    if target.exists():
        raise RunError(f"{target} exists already.", "Expected a new folder.", "Remove it, or choose another: --output NAME.")
    rows = proof_rows(trained, screen)
    before = logits_of(trained.model, rows)
    merged = trained.method.merge(trained.model).to(DTYPES[dtype])
    staging = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(merged, trained, staging)
        del merged
        # What was written is what is proven: it is read back from the disk.
        reloaded = load_model(staging, trained.settings.model, DTYPES[dtype])
        proof = compare(before, logits_of(reloaded, rows))
        measured = f"logits differ by at most {proof.logit_max:.2g}, the likeliest token agrees at {proof.greedy_agreement:.2%}"
        where = f"{proof.rows} rows, {proof.tokens:,} positions"
        screen.tell(f"Proven on {where}: {measured}." if dtype == "float32" else
                    f"Rounding every weight to bfloat16 has its price; on {where}, {measured}. In float32 nothing changes.")
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
    screen.tell(f"The merged model is in {target} ({dtype}); it loads with transformers, vLLM and others as it stands.")


def write(merged: torch.nn.Module, trained: Trained, folder: Path) -> None:
    """Weights, config, tokenizer, the template that was trained with, and the ids that stop it."""
    merged.generation_config.eos_token_id = trained.template.stop_ids
    merged.save_pretrained(folder)
    trained.template.tokenizer.chat_template = trained.template.source
    trained.template.tokenizer.save_pretrained(folder)


def proof_rows(trained: Trained, screen: Screen) -> list[np.ndarray]:
    """Ids of rows the run was trained or measured on."""
    from weitiao.data.dataset import load
    from weitiao.model.load import model_limit

    settings = trained.settings
    sources = settings.data.eval or settings.data.train
    data = load(
        sources, settings.data, trained.template, model_limit(trained.model.config),
        trained.model.config.get_text_config().vocab_size, settings.training.seed, settings.data.max_tokens,
    )
    return [row.examples[-1].ids for row in data.rows[:PROMPTS]]


def logits_of(model: torch.nn.Module, rows: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Logits [T, V] of each row alone, float32, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        return [
            model(input_ids=torch.from_numpy(ids.astype(np.int64))[None].to(device), use_cache=False).logits[0].float().cpu()
            for ids in rows
        ]


def compare(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> MergeProof:
    difference = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    agree = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(before, after, strict=True))
    tokens = sum(len(a) for a in before)
    return MergeProof(difference, agree / tokens, len(before), tokens)
