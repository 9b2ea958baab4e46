"""Settings that stand for others: training.memory for a set of them, model.stream for checkpointing.

Plain values enter, as they were given, and leave with what these imply spelled out; what was given besides wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weitiao.settings.methods import method_name, method_or_lora

# training.memory: what it sets, where nothing else is said.
MEMORY: dict[str, dict[str, dict[str, Any]]] = {
    "full": {
        "fast": {"training.checkpointing": False},
        "balanced": {"model.dtype": "bfloat16", "training.rounding": "stochastic", "training.optimizer": "adamw_bnb_8bit"},
        "thrifty": {"model.dtype": "bfloat16", "training.rounding": "stochastic", "training.optimizer": "paged_adamw_8bit",
                    "training.step_in_backward": True, "training.checkpointing": True},
    },
    "other": {"fast": {"training.checkpointing": False}, "balanced": {}, "thrifty": {"training.checkpointing": True}},
}


def with_stream(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with the checkpointing that model.stream sets."""
    model, training = values.get("model"), values.get("training", {})
    if not (isinstance(model, Mapping) and model.get("stream") is True and isinstance(training, Mapping)):
        return values
    return {**values, "training": {**training, "checkpointing": True if training.get("checkpointing") is None else training["checkpointing"]}}


def with_memory(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with what training.memory sets spelled out. Weights held in another type than bfloat16 are not rounded."""
    training = values.get("training")
    asked = training.get("memory") if isinstance(training, Mapping) else None
    if not isinstance(asked, str) or asked not in MEMORY["other"]:
        return values
    method = method_name({"method": method_or_lora(values.get("method", "lora"))})
    values = dict(values)
    model = values["model"] if isinstance(values.get("model"), Mapping) else {"name": values["model"]} if "model" in values else {}
    groups = {"model": dict(model), "training": dict(training)}
    rounded = groups["model"].get("dtype", "bfloat16") == "bfloat16"
    for name, value in MEMORY["full" if method == "full" else "other"][asked].items():
        group, _, leaf = name.partition(".")
        if leaf != "rounding" or rounded:
            groups[group].setdefault(leaf, value)
    return values | {group: found for group, found in groups.items() if found}
