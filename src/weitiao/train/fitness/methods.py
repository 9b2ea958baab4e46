"""Does the method fit the model: are there layers of these names, is there room for a rank, for virtual tokens, for rows?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from weitiao.data.findings import Kind
from weitiao.errors import SettingError, nearest
from weitiao.model import load as loading
from weitiao.model.methods import METHODS
from weitiao.model.methods.layers import is_linear, linear_names, linears
from weitiao.train.fitness.fit import Check, Facts, Fit, listed

SCALES = (0.1, 8.0)  # what LoRA's update is usually multiplied by


def _adaptable(fit: Fit) -> dict[str, torch.nn.Module]:
    """Name -> what LoRA can adapt."""
    kinds = (torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {name: m for name, m in fit.model.named_modules() if is_linear(m) or isinstance(m, kinds)}


def _matched(names: Sequence[str], known: Sequence[str]) -> dict[str, list[str]]:
    """Target -> the modules that it names, by the end of their names as PEFT reads them."""
    return {name: [full for full in known if full == name or full.endswith("." + name)] for name in names}


def _lora_targets(fit: Fit) -> dict[str, list[str]]:
    method = fit.settings.method
    if method.name != "lora" or method.targets == "all-linear":
        return {}
    return _matched(method.targets, list(_adaptable(fit)))


def _targets_match_nothing(fit: Fit) -> Facts | None:
    matched = _lora_targets(fit)
    if not matched or any(matched.values()):
        return None
    there = linear_names(fit.model)
    hints = [hint for name in matched if (hint := nearest(name, there))]
    return {"targets": listed(list(matched)), "there": listed(there), "hint": (" " + hints[0]) if hints else ""}


def _targets_match_in_part(fit: Fit) -> Facts | None:
    matched = _lora_targets(fit)
    missing = [name for name, found in matched.items() if not found]
    if not missing or len(missing) == len(matched):
        return None
    there = linear_names(fit.model)
    hints = [hint for name in missing if (hint := nearest(name, there))]
    return {"missing": listed(missing), "there": listed(there), "hint": (" " + hints[0]) if hints else ""}


def _rank_too_large(fit: Fit) -> Facts | None:
    method = fit.settings.method
    if method.name != "lora":
        return None
    if method.targets == "all-linear":
        adapted = linears(fit.model)
    else:
        known = _adaptable(fit)
        adapted = {full: known[full] for found in _lora_targets(fit).values() for full in found}
    sides = {name: tuple(m.weight.shape) for name, m in adapted.items() if m.weight.ndim == 2}
    small = {name: shape for name, shape in sides.items() if method.rank > min(shape)}
    if not small:
        return None
    name, shape = min(small.items(), key=lambda item: min(item[1]))
    return {"rank": method.rank, "name": name, "shape": " x ".join(map(str, shape)), "side": min(shape), "count": len(small), "all": len(sides)}


def _odd_scale(fit: Fit) -> Facts | None:
    method = fit.settings.method
    if method.name != "lora":
        return None
    scale = method.alpha / (math.sqrt(method.rank) if method.rslora else method.rank)
    if SCALES[0] <= scale <= SCALES[1]:
        return None
    usual = 2 * (math.sqrt(method.rank) if method.rslora else method.rank)
    rank = f"sqrt({method.rank})" if method.rslora else str(method.rank)
    return {"alpha": f"{method.alpha:g}", "rank": rank, "scale": f"{scale:.3g}", "usual": f"{usual:.4g}"}


def _wide_bottleneck(fit: Fit) -> Facts | None:
    method = fit.settings.method
    hidden = getattr(fit.config.get_text_config(), "hidden_size", None)
    if method.name != "adapter" or hidden is None or method.bottleneck <= hidden:
        return None
    return {"bottleneck": method.bottleneck, "hidden": hidden}


def _places(fit: Fit) -> tuple[int, int]:
    """(virtual tokens, the model's places)"""
    method = METHODS[fit.settings.method.name]
    return method.virtual_tokens(fit.settings.method, fit.tokenizer), loading.model_limit(fit.config)


def _no_room(fit: Fit) -> Facts | None:
    virtual, limit = _places(fit)
    return {"virtual": virtual, "limit": limit, "left": max(limit - virtual, 0)} if virtual and limit - virtual < 8 else None


def _little_room(fit: Fit) -> Facts | None:
    virtual, limit = _places(fit)
    wanted = fit.settings.data.max_tokens or limit // 2
    left = limit - virtual
    return {"virtual": virtual, "limit": limit, "left": left} if virtual and 8 <= left < min(wanted, limit) else None


def _rows_cut(fit: Fit) -> Facts | None:
    limit, asked = loading.model_limit(fit.config), fit.settings.data.max_tokens
    return {"asked": f"{asked:,}", "limit": f"{limit:,}"} if asked and asked > limit else None


def _refused(fit: Fit) -> Facts | None:
    """The method's own say: it is attached to the model without weights. LoRA says less than its targets do, and is slow to ask."""
    from weitiao.train.loss import learn_on_tries

    chosen = fit.settings.method
    if chosen.name == "lora":
        return None
    try:
        with torch.device("meta"):
            learn_on_tries(fit.model)
            METHODS[chosen.name].attach(fit.model, chosen, fit.settings.training.seed, fit.tokenizer)
    except SettingError as refusal:
        return {"found": f"{refusal.found} {refusal.expected}".strip(), "next": refusal.next_step or "Mend that setting, or choose method=lora."}
    return None


CHECKS: dict[str, Check] = {
    "targets_match_nothing": Check(Kind(
        "error", "method.targets {targets} names no layer of the model.{hint}",
        "Its linear layers are {there}; or leave method.targets at all-linear."), _targets_match_nothing),
    "targets_match_in_part": Check(Kind(
        "warning", "method.targets names {missing}, and no layer of the model is called so; the other names are adapted.{hint}",
        "Its linear layers are {there}. Take out what is not there, or write it as the model does."), _targets_match_in_part),
    "rank_too_large": Check(Kind(
        "warning", "method.rank={rank} is more than {count} of {all} adapted layers can have, such as {name} ({shape}).",
        "Above {side} a rank adds weights and no freedom: method.rank={side} or less; or method=full."), _rank_too_large),
    "odd_scale": Check(Kind(
        "note", "LoRA's update is multiplied by method.alpha / rank = {alpha} / {rank} = {scale}; usual is 1 to 2.",
        "method.alpha={usual} makes it 2. A learning rate that suits one scale does not suit another."), _odd_scale),
    "wide_bottleneck": Check(Kind(
        "note", "method.bottleneck={bottleneck} is wider than the model's stream of {hidden}.",
        "An adapter is meant to be narrow: 16 to 256."), _wide_bottleneck),
    "no_room": Check(Kind(
        "error", "{virtual} virtual tokens leave {left} of the model's {limit} places for a row.",
        "Lower method.virtual_tokens, or shorten method.text."), _no_room),
    "little_room": Check(Kind(
        "warning", "{virtual} virtual tokens leave {left} of the model's {limit} places for a row; longer rows are cut.",
        "Lower method.virtual_tokens, or shorten method.text."), _little_room),
    "rows_cut": Check(Kind(
        "note", "data.max_tokens={asked}, and the model takes {limit} tokens: rows are cut there.",
        "Set data.max_tokens={limit} or less, or split long rows."), _rows_cut),
}

# Last of all checks, since it changes the model that others look at.
ATTACHED: dict[str, Check] = {
    "method_refused": Check(Kind("error", "{found}", "{next}"), _refused),
}
