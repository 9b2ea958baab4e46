"""What was learned, in the form that other programs read: a PEFT adapter beside a base that transformers knows.

    base          RUN/adapter is for                     exported
    ChatGLM3      the original's fused query_key_value   split onto transformers' Glm; with --base that Glm besides
    any other     the base as it is                      as it is; with --output, a copy with tokenizer and template

What was written is read back by PEFT and held against the model that was trained before it is kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError

from weitiao.config import Settings
from weitiao.errors import RunError, SettingError
from weitiao.model import families
from weitiao.model.load import load_model
from weitiao.model.methods import METHODS
from weitiao.model.methods.added import FILE as ROWS_FILE
from weitiao.model.methods.added import WithTokens, make_room
from weitiao.model.source import model_folder
from weitiao.screen import Screen, quiet_libraries
from weitiao.train.folder import RunFolder, open_run
from weitiao.use.merge import LIMITS, MergeProof, compare, logits_of, proof_rows
from weitiao.use.trained import Trained, open_trained, unquantized


def export(path: str, output: str | None, base: str | None) -> None:
    """Write RUN/export (or `output`): an adapter that PEFT reads without weitiao.

    base: a folder for the base that it is an adapter of, where that has to be converted too; used as it is if it is there.

    Raises:
        RunError: what was learned is no adapter of PEFT's, or what was written is not what was trained.
    """
    quiet_libraries()
    screen = Screen()
    run, weights = open_run(path)
    settings = run.settings()
    refuse_foreign(run, weights, settings)
    adapter = weights / METHODS[settings.method.name].FOLDER
    folder = model_folder(settings.model, notify=screen.tell)
    family = families.of_model(folder)
    converts = hasattr(family, "split_adapter")
    if base and not converts:
        raise SettingError(f"--base {base}: the base of this run needs no conversion.", "Expected a run on ChatGLM3.",
                           f"Leave it out; the adapter is for {folder} as it is.")
    if not converts and output is None:
        screen.tell(f"{adapter} is in PEFT's form already: PeftModel.from_pretrained(base, {str(adapter)!r}), "
                    f"base from {named_base(adapter)}.\nFor a copy with the tokenizer and the template in force: --output DIR.")
        return
    target, plain = Path(output) if output else run.path / "export", Path(base) if base else None
    refuse_taken(target, plain)
    with whole_or_none(target, plain) as (new_adapter, new_base):
        trained = open_trained(path, screen, "original")
        if converts:
            screen.tell("Writing what was learned under Glm's names …")
            its_base = str(plain.absolute()) if plain else named_base(adapter)
            family.split_adapter(adapter, new_adapter, trained.model.config, its_base)
            if new_base:
                write_base(family, folder, trained, new_base)
        else:
            shutil.copytree(adapter, new_adapter)
        if not needs_weitiao(trained):  # PEFT's Auto classes load a tokenizer that they find, or stop at it
            write_tokenizer(trained, new_adapter)
        proof = prove(trained, folder, new_base or (plain if converts else None), new_adapter)
        screen.tell(f"Proven on {proof.rows} rows, {proof.tokens:,} positions, read back by PEFT: logits differ by at most "
                    f"{proof.logit_max:.2g}, the likeliest token agrees at {proof.greedy_agreement:.2%}.")
        logit_limit, agreement_limit = LIMITS[torch.float32]
        if not (proof.logit_max <= logit_limit and proof.greedy_agreement >= agreement_limit):
            raise RunError("What was written is not what was trained; it is not kept.",
                           f"Expected logits within {logit_limit:g} and {agreement_limit:.1%} agreement.",
                           f"Does {plain} hold the Glm form of another model?" if plain and not new_base else "")
    for line in closing_lines(settings, target, plain, converts, trained):
        screen.tell(line)


def refuse_foreign(run: RunFolder, weights: Path, settings: Settings) -> None:
    """Told before anything is loaded, if what was learned has no form that PEFT reads."""
    method = METHODS[settings.method.name]
    folder = weights / method.FOLDER
    if not (folder / "adapter_config.json").is_file():
        raise RunError(
            f"method={settings.method.name} learns no adapter that PEFT knows; {folder} is read by weitiao alone.",
            "Expected a run of lora, ia3, prompt, ptuning or prefix.",
            method.HOW_LOADED or f"weitiao merge {run.path} writes plain weights, which other programs read.",
        )
    if (folder / ROWS_FILE).is_file():
        raise RunError(
            f"tokens.add beside method={settings.method.name} has its rows in {folder / ROWS_FILE}, which is read by weitiao alone.",
            "Expected tokens.add beside method=lora, whose adapter holds them.",
            method.HOW_LOADED or f"weitiao merge {run.path} writes plain weights, which other programs read.",
        )


def refuse_taken(target: Path, plain: Path | None) -> None:
    if target.exists():
        raise RunError(f"{target} exists already.", "Expected a new folder.", "Remove it, or choose another: --output NAME.")
    if plain and plain.exists() and model_type(plain) != "glm":
        raise RunError(f"{plain} exists already, and is no Glm model.", "Expected a new folder, or one that --base has made before.",
                       "Remove it, or choose another: --base DIR.")
    if plain and plain.absolute() == target.absolute():
        raise SettingError(f"--base and --output are both {target}.", "Expected a folder for each.")


def model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def named_base(adapter: Path) -> str:
    """What training wrote down as the adapter's base."""
    return json.loads((adapter / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]


@contextmanager
def whole_or_none(target: Path, plain: Path | None) -> Iterator[tuple[Path, Path | None]]:
    """(where to write the adapter, where to write the base or None if it is there): renamed after the block, or removed."""
    def beside(path: Path) -> Path:
        return path.with_name(f".{path.name}.part-{os.getpid()}")

    new = {beside(path): path for path in (plain, target) if path and not path.exists()}
    try:
        for path in new.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        yield beside(target), beside(plain) if plain and not plain.exists() else None
        for staging, path in new.items():
            os.replace(staging, path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{target} cannot be written: {error}.", "Nothing half-written is left.",
                       "Make room, or choose another: --output NAME.") from error
    finally:
        for staging in new:
            shutil.rmtree(staging, ignore_errors=True)


def write_base(family: ModuleType, folder: Path, trained: Trained, target: Path) -> None:
    from transformers import GenerationConfig

    family.write_plain(folder, target)
    GenerationConfig(eos_token_id=trained.template.stop_ids).save_pretrained(target)
    write_tokenizer(trained, target)


def write_tokenizer(trained: Trained, folder: Path) -> None:
    """The tokenizer, with the template that was trained with."""
    trained.template.tokenizer.chat_template = trained.template.source
    trained.template.tokenizer.save_pretrained(folder)


def needs_weitiao(trained: Trained) -> bool:
    """Is its tokenizer of a class that no other program knows?"""
    return getattr(trained.template.tokenizer, "needs_weitiao", False)


def prove(trained: Trained, folder: Path, plain: Path | None, adapter: Path) -> MergeProof:
    """Trained model against base and adapter as they were written, one after the other in memory; the trained model is used up.

    plain: the base in its converted form; None: what lies in `folder`, converted in memory where it has to be.
    """
    from peft import PeftModel

    rows, device = proof_rows(trained), trained.device
    before = logits_of(trained.model, rows)
    trained.model = None
    model: Any = load_model(plain or folder, unquantized(trained.settings.model), torch.float32)
    if hasattr(model, "to_glm"):
        model = model.to_glm()
    if isinstance(trained.method, WithTokens):
        make_room(model, trained.method.ids)
    read_back = PeftModel.from_pretrained(model.to(device), adapter)
    after = logits_of(read_back, rows)  # PEFT's virtual tokens have logits too, before those of the row
    return compare(before, [theirs[-len(ours):] for theirs, ours in zip(after, before, strict=True)])


def closing_lines(settings: Settings, target: Path, plain: Path | None, converts: bool, trained: Trained) -> Iterator[str]:
    if plain:
        yield (f"The base as plain Glm is in {plain}, the adapter in {target}: "
               f"PeftModel.from_pretrained(GlmForCausalLM.from_pretrained({str(plain)!r}), {str(target)!r}).")
    elif converts:
        yield f"The adapter in {target} is for the plain Glm form of {named_base(target)}, which --base DIR writes."
    else:
        yield f"The adapter is in {target}, its base is {named_base(target)}."
    if settings.model.quantize != "none":
        yield f"It has learned beside a base in {settings.model.quantize}; beside the same in other bits its answers differ a little."
    if needs_weitiao(trained):
        yield "Its tokenizer is read by weitiao alone; other programs take ids, or the original's own tokenizer."
