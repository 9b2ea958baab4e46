"""What pydantic found wrong -> one SettingError that names each mistake as the user wrote it, and its cure.

An unknown setting is looked up among the names that peers have for ours, then among our own: the nearest is offered.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from weitiao.errors import SettingError, nearest
from weitiao.settings.methods import METHODS, method_name

# What peers call it, where a nearest match would not find it.
ELSEWHERE = {
    "gradient_accumulation_steps": "training.batch_size counts the rows of a whole optimizer step; training.nodes_per_pass says how much of it is computed at once.",
    "per_device_train_batch_size": "training.batch_size counts the rows of a whole optimizer step.",
    "num_train_epochs": "It is called training.epochs.",
    "max_steps": "It is called training.steps.",
    "lora_alpha": "It is called method.alpha.",
    "lora_rank": "It is called method.rank.",
    "lora_r": "It is called method.rank.",
    "torch_dtype": "It is called model.dtype.",
    "r": "It is called method.rank.",
    "lora_dropout": "It is called method.dropout.",
    "target_modules": "It is called method.targets.",
    "use_rslora": "It is called method.rslora.",
    "use_dora": "It is called method.dora.",
    "init_lora_weights": "It is called method.init.",
    "loraplus_lr_ratio": "It is called method.plus_ratio.",
    "num_virtual_tokens": "It is called method.virtual_tokens.",
    "pre_seq_len": "It is called method.virtual_tokens.",
    "prompt_tuning_init": "It is called method.init.",
    "prompt_tuning_init_text": "It is called method.text.",
    "prefix_projection": "It is called method.projection.",
    "encoder_hidden_size": "It is called method.encoder_hidden (ptuning) or method.projection_hidden (prefix).",
    "encoder_reparameterization_type": "It is called method.encoder.",
    "freeze_trainable_layers": "It is called method.last_layers (full).",
    "load_in_4bit": "It is called model.quantize=nf4.",
    "load_in_8bit": "It is called model.quantize=int8.",
    "quantization_bit": "It is called model.quantize=int8 or nf4.",
    "bnb_4bit_quant_type": "It is called model.quantize.",
    "bnb_4bit_use_double_quant": "It is called model.double_quantize.",
    "llm_int8_threshold": "It is called model.int8_threshold.",
    "new_special_tokens": "It is called tokens.add.",
    "add_special_tokens": "It is called tokens.add.",
    "fp16": "It is called training.precision=fp16.",
    "lr_scheduler_type": "It is called training.scheduler.",
    "warmup_ratio": "It is called training.warmup; below 1 it is a share.",
    "warmup_steps": "It is called training.warmup; from 1 on it is a number of steps.",
    "gradient_checkpointing": "It is called training.checkpointing.",
    "output_dir": "It is called output.",
    "save_steps": "It is called saving.every.",
    "eval_steps": "It is called evaluation.every.",
    "max_length": "It is called data.max_tokens.",
    "cutoff_len": "It is called data.max_tokens.",
    "val_size": "It is called data.eval_share.",
    "lr": "It is called training.learning_rate.",
    "bf16": "It is called training.precision=bf16.",
}

METHODS_ELSEWHERE = {
    "qlora": "It is method=lora with model.quantize=nf4.",
    "dora": "It is method=lora with method.dora=true.",
    "rslora": "It is method=lora with method.rslora=true.",
    "pissa": "It is method=lora with method.init=pissa.",
    "loraplus": "It is method=lora with method.plus_ratio=16.",
    "lora_plus": "It is method=lora with method.plus_ratio=16.",
    "freeze": "It is method=full with method.last_layers=N.",
    "prompt_tuning": "It is called prompt.",
    "p_tuning": "It is called ptuning.",
    "prefix_tuning": "It is called prefix.",
    "p_tuning_v2": "It is called prefix.",
    "ptuningv2": "It is called prefix.",
    "ptuning_v2": "It is called prefix.",
    "houlsby": "It is method=adapter with method.style=houlsby.",
    "pfeiffer": "It is method=adapter with method.style=pfeiffer.",
}


def explain(error: ValidationError, values: Mapping[str, Any], there_are: Sequence[tuple[str, str]]) -> SettingError:
    """All mistakes in `values` in one message; `there_are`: (dotted name, the method it belongs to or nothing) of every setting."""
    known = [name for name, _ in there_are]
    found, cures = [], []
    for item in error.errors():
        # pydantic puts the chosen kind of a union into the path: method.lora.rank is method.rank to a user.
        name = ".".join(str(part) for part in item["loc"] if _is_name(part))
        if item["type"] == "extra_forbidden":
            leaf = name.split(".")[-1]
            if name in known:  # a setting of another method
                owners = ", ".join(method for k, method in there_are if k == name)
                found.append(f"{name} belongs to {owners}; this run's method is {method_name(values) or 'lora'}.")
                continue
            found.append(f"There is no setting {name!r}.")
            cures.append(ELSEWHERE.get(leaf) or _nearest_setting(name, known))
        elif item["type"] == "missing":
            found.append(f"The setting {name} is missing." if name != "data" else "There are no rows to learn from.")
            cures.append("Give --data FILE, or data: FILE in the YAML." if name.startswith("data") else "")
        elif item["type"].startswith("union_tag"):
            asked, methods = str(method_name(values)), [m.model_fields["name"].default for m in METHODS]
            found.append(f"There is no method {asked!r}.")
            cures.append(METHODS_ELSEWHERE.get(asked.lower().replace("-", "_"))
                         or f"Methods: {', '.join(methods)}. {nearest(asked, methods)}".rstrip())
        else:
            shown = not isinstance(item["input"], Mapping)  # a whole group says nothing that its message does not
            label = f"{name} = {item['input']!r}: " if name and shown else f"{name}." if name and "goes with" in item["msg"] else ""
            found.append(f"{label}{item['msg'].removeprefix('Value error, ')}.")
            if name == "model.quantize":
                cures.append("8 bits are int8, 4 bits are nf4.")
            if item["type"] == "string_type" and isinstance(item["input"], (bool, int, float)):
                cures.append("YAML reads numbers, yes, no, on and off as such: put a text like that into quotes, '…'.")
    cures = [c for c in dict.fromkeys(cures) if c]
    return SettingError("\n".join(dict.fromkeys(found)), "\n".join(cures), "`weitiao train --help` lists every setting.")


def _nearest_setting(name: str, known: Sequence[str]) -> str:
    """The same leaf in another group, a like leaf in this one, a group of a like name, or a like leaf anywhere."""
    group, _, leaf = re.sub(r"\.\d+(?=\.)", "[]", name).rpartition(".")
    leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
    if leaf in leaves:
        return f"Did you mean {leaves[leaf]!r}?"
    if group:
        leaves = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group}
    else:
        leaves |= {g: g for g in (k.partition(".")[0] for k in known)}
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    return f"Did you mean {leaves[close[0]]!r}?" if close else ""


def _is_name(part: str | int) -> bool:
    tags = {m.model_fields["name"].default for m in METHODS} | {"constrained-int", "int", "float", "list[str]"}
    return part not in tags and not str(part).startswith(("literal[", "function-", "constrained-"))
