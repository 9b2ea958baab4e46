"""Do settings, tokenizer and model fit each other? Told from config.json and the tokenizer alone, before rows are read.

    settings, template (with its tokenizer), config -> Findings

Each check is a line of a table: what it says, and a function that answers with the facts to say it with, or None where
nothing is wrong. What needs the model's structure looks at one without weights, on the meta device, made when first asked
for. What `weitiao.config` refuses by itself is not looked for again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from weitiao.config import Settings
from weitiao.data.findings import Finding, Kind
from weitiao.data.templates import PROBE, WITHOUT_OWN, Template
from weitiao.errors import SettingError, TemplateError, nearest
from weitiao.model import load as loading
from weitiao.model.methods import METHODS, count_parameters
from weitiao.model.methods.layers import is_linear, linear_names, linears
from weitiao.settings.training import OTHER_RATES
from weitiao.train.loop import Schedule
from weitiao.train.optimizer import warmup_steps
from weitiao.train.stepping import rounding_in_force
from weitiao.train.tree import of_config

Facts = dict[str, Any]
ASKED, SAID = ("user", "1"), ("assistant", PROBE)
NO_TEXT = re.compile("[\ufdd0-\ufdef]")  # what a tokenizer's template marks its special tokens with
FAR = 20  # times a method's own learning rate
SCALES = (0.1, 8.0)  # what LoRA's update is usually multiplied by
TINY = 500_000_000  # weights, below which 8 and 4 bits save next to nothing


@dataclass(frozen=True)
class Check:
    """find: what is wrong, as the facts that the kind's sentences name; None if nothing is."""

    kind: Kind
    find: Callable[[Fit], Facts | None]


@dataclass(eq=False)
class Fit:
    """What is looked at. rows: how many there are to learn from, if that is known."""

    settings: Settings
    template: Template
    config: Any
    rows: int | None

    @property
    def tokenizer(self) -> Any:
        return self.template.tokenizer

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.config.get_text_config().vocab_size

    @property
    def trains_all(self) -> bool:
        return METHODS[self.settings.method.name].TRAINS_ALL

    @property
    def checkpoint_type(self) -> torch.dtype | None:
        """In what the checkpoint says that it holds its weights."""
        named = getattr(self.config, "dtype", None)
        return getattr(torch, named) if isinstance(named, str) else named

    @cached_property
    def model(self) -> torch.nn.Module:
        """On the meta device: names and shapes, no numbers. The method's `attach` may change it, so that check comes last."""
        with torch.device("meta"):
            return of_config(self.config, self.settings)

    @cached_property
    def schedule(self) -> Schedule | None:
        training = self.settings.training
        return Schedule(self.rows, training.batch_size, training.seed, training.epochs, training.steps) if self.rows else None

    def written(self, *messages: tuple[str, str], answer_next: bool = False) -> str | None:
        """What the template makes of (role, content) pairs; None where it refuses them."""
        try:
            return self.template.render([{"role": role, "content": content} for role, content in messages], answer_next)
        except TemplateError:
            return None


def setting_findings(settings: Settings, template: Template, config: Any, rows: int | None = None) -> list[Finding]:
    """What is wrong between settings, tokenizer and model.

    Args:
        template: of `load_template`, for the tokenizer of this run.
        config: the model's, of `load_config`.
        rows: how many rows there are to learn from; None where that is not known.
    """
    fit = Fit(settings, template, config, rows)
    found = []
    for name, check in CHECKS.items():
        try:
            facts = check.find(fit)
        except Exception as error:  # a model's own code on the meta device may raise anything, and that stops no training
            found.append(_not_judged(name, error))
            continue
        if facts is not None:
            kind = check.kind
            found.append(Finding(name, kind.severity, kind.what.format(**facts), (), kind.cure.format(**facts)))
    return found


def _not_judged(name: str, error: Exception) -> Finding:
    """A check that could not be made is told, else it would pass for one that found nothing."""
    reason = (str(error).strip().splitlines() or ["no message"])[0][:120]
    return Finding("not_judged", "note", f"{name} could not be judged without the weights: {type(error).__name__}: {reason}", (),
                   "A training finds out once the model is loaded.")


def _shown(text: str, most: int = 60) -> str:
    text = NO_TEXT.sub("", text)
    return repr(text if len(text) <= most else text[:most] + "…")


def _ended(text: str, most: int = 60) -> str:
    """Its end, where the marks are that an answer follows."""
    text = NO_TEXT.sub("", text)
    return repr(text if len(text) <= most else "…" + text[-most:])


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


# --------------------------------------------------------------------------------------------------- the tokens that end


def _stop_splits(fit: Fit) -> Facts | None:
    """The stop token is learned by its id, but earlier answers of a chat bring it as the template writes it."""
    tokenizer, stop = fit.tokenizer, fit.template.stop_id
    text = tokenizer.convert_ids_to_tokens(stop)
    chat = fit.written(ASKED, SAID, ("user", "2"), answer_next=True)
    if chat is None or text not in chat or stop in fit.template.encode_prompts([chat])[0]:
        return None
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return {"text": text, "id": stop, "count": len(ids), "pieces": ", ".join(repr(tokenizer.decode([i])) for i in ids[:6])}


def _no_eos(fit: Fit) -> Facts | None:
    if fit.tokenizer.eos_token_id is not None:
        return None
    return {"stop": fit.tokenizer.convert_ids_to_tokens(fit.template.stop_id)}


def _stop_is_not_eos(fit: Fit) -> Facts | None:
    eos, stop = fit.tokenizer.eos_token_id, fit.template.stop_id
    if eos is None or eos == stop:
        return None
    return {"stop": fit.tokenizer.convert_ids_to_tokens(stop), "id": stop, "eos": fit.tokenizer.eos_token}


def _pad_is_eos(fit: Fit) -> Facts | None:
    tokenizer = fit.tokenizer
    same = tokenizer.pad_token_id is not None and tokenizer.pad_token_id in (tokenizer.eos_token_id, fit.template.stop_id)
    return {"token": tokenizer.pad_token} if same else None


def _pad_outside(fit: Fit) -> Facts | None:
    pad = fit.tokenizer.pad_token_id
    return {"token": fit.tokenizer.pad_token, "id": pad, "rows": f"{fit.vocabulary:,}"} if pad is not None and pad >= fit.vocabulary else None


def _ids_outside(fit: Fit) -> Facts | None:
    """Tokens without a row; those that `tokens.add` names get one."""
    if len(fit.tokenizer) <= fit.vocabulary:
        return None
    vocabulary, added = fit.tokenizer.get_vocab(), fit.settings.tokens.add
    outside = sorted((i, token) for token, i in vocabulary.items() if i >= fit.vocabulary and token not in added)
    if not outside:
        return None
    named = _listed([repr(token) for _, token in outside], 4)
    return {"tokens": f"{outside[-1][0] + 1:,}", "rows": f"{fit.vocabulary:,}", "outside": named}


def _rows_grow(fit: Fit) -> Facts | None:
    """`tokens.add` fills rows that are to spare first."""
    vocabulary = fit.tokenizer.get_vocab()
    new = [name for name in fit.settings.tokens.add if name not in vocabulary]
    last = max([len(fit.tokenizer) + len(new), *(vocabulary[n] + 1 for n in fit.settings.tokens.add if n in vocabulary)], default=0)
    if not fit.settings.tokens.add or last <= fit.vocabulary:
        return None
    return {"rows": f"{fit.vocabulary:,}", "more": f"{last:,}"}


# ------------------------------------------------------------------------------------------------------------- templates

def _two_bos(fit: Fit) -> Facts | None:
    bos = fit.tokenizer.bos_token_id
    prompt = None if bos is None or fit.written(ASKED, answer_next=True) is None else fit.template.prompt_ids([{"role": "user", "content": "1"}])
    if prompt is None or list(prompt[:2]) != [bos, bos]:
        return None
    return {"bos": fit.tokenizer.bos_token, "template": fit.template.name}


def _no_bos(fit: Fit) -> Facts | None:
    """A tokenizer that puts a BOS before any text, and a template of its own that writes none."""
    bos = fit.tokenizer.bos_token_id
    if bos is None or fit.tokenizer("1").input_ids[:1] != [bos] or fit.written(ASKED, answer_next=True) is None:
        return None
    prompt = fit.template.prompt_ids([{"role": "user", "content": "1"}])
    return None if bos in prompt[:1] else {"bos": fit.tokenizer.bos_token, "template": fit.template.name}


def _forgets_prefix(fit: Fit) -> Facts | None:
    """Does the second question change how the first exchange is written?"""
    once, twice = fit.written(ASKED, SAID), fit.written(ASKED, SAID, ("user", "2"), ("assistant", "3"))
    if once is None or twice is None or twice.startswith(once.removesuffix(fit.template.ending)):
        return None
    return {"template": fit.template.name}


def _one_exchange(fit: Fit) -> Facts | None:
    refuses = fit.written(ASKED, SAID, ("user", "2"), ("assistant", "3")) is None and fit.written(ASKED, SAID) is not None
    return {"template": fit.template.name} if refuses else None


def _other_prompt(fit: Fit) -> Facts | None:
    """Is what inference sends not what stands before the answer in a conversation?"""
    prompt, whole = fit.written(ASKED, answer_next=True), fit.written(ASKED, SAID)
    if prompt is None or whole is None or whole.startswith(prompt):
        return None
    return {"template": fit.template.name, "sent": _ended(prompt, 30), "written": _ended(whole.partition(PROBE)[0], 30)}


def _header_in_answer(fit: Fit) -> Facts | None:
    prompt, whole = fit.written(ASKED, answer_next=True), fit.written(ASKED, SAID)
    header = whole[len(prompt) :].partition(PROBE)[0] if prompt is not None and whole and whole.startswith(prompt) and PROBE in whole else ""
    return {"template": fit.template.name, "header": _shown(header)} if NO_TEXT.sub("", header).strip() else None


def _other_template(fit: Fit) -> Facts | None:
    """Marks other than those of the tokenizer's own template, which the model was trained with. A system text of its own is no mark;
    `label` is for models that tell labels, and answer nothing."""
    name = fit.settings.data.template
    if name in ("auto", "label") or not fit.tokenizer.chat_template:
        return None
    own = Template(fit.tokenizer, "auto", fit.tokenizer.get_chat_template(), fit.template.stop_id, begins_with_bos=False)
    ours, its = fit.written(ASKED, answer_next=True), replace(fit, template=own).written(ASKED, answer_next=True)
    if ours is None or its is None or ours == its or (its.endswith(ours) and not ours.startswith("1")):
        return None
    return {"template": name, "ours": _ended(ours), "its": _ended(its)}


def _no_template(fit: Fit) -> Facts | None:
    lacks = fit.settings.data.template == "auto" and not fit.tokenizer.chat_template
    return {"template": WITHOUT_OWN, "model": fit.settings.model.name} if lacks else None


def _strips(fit: Fit) -> Facts | None:
    """White space around a text that is not there when the template is done."""
    lost = [
        who for who, messages in (("what is asked", [("user", f"  {PROBE}\n\n"), ("assistant", "1")]), ("answers", [("user", "1"), ("assistant", f"  {PROBE}\n\n")]))
        if (text := fit.written(*messages)) is not None and PROBE in text and f"  {PROBE}\n\n" not in text
    ]
    return {"template": fit.template.name, "lost": " and ".join(lost)} if lost else None


def _drops_system(fit: Fit) -> Facts | None:
    if fit.settings.data.system is None:
        return None
    text = fit.written(("system", fit.settings.data.system), ASKED, answer_next=True)
    if text is not None and fit.settings.data.system.strip() in text:
        return None
    return {"template": fit.template.name, "how": "refuses a system text" if text is None else "leaves the system text out"}


# --------------------------------------------------------------------------------------------------- method against model


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
    return {"targets": _listed(list(matched)), "there": _listed(there), "hint": (" " + hints[0]) if hints else ""}


def _targets_match_in_part(fit: Fit) -> Facts | None:
    matched = _lora_targets(fit)
    missing = [name for name, found in matched.items() if not found]
    if not missing or len(missing) == len(matched):
        return None
    there = linear_names(fit.model)
    hints = [hint for name in missing if (hint := nearest(name, there))]
    return {"missing": _listed(missing), "there": _listed(there), "hint": (" " + hints[0]) if hints else ""}


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


# -------------------------------------------------------------------------------------------------------------- precision


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


# ------------------------------------------------------------------------------------------------------------------- pace


def _of_adam(settings: Settings) -> bool:
    return "adam" in settings.training.optimizer and settings.training.optimizer not in OTHER_RATES


def _rate(fit: Fit) -> Facts:
    method = fit.settings.method
    return {"rate": f"{fit.settings.learning_rate:g}", "usual": f"{method.learning_rate:g}", "method": method.name,
            "times": f"{max(fit.settings.learning_rate / method.learning_rate, method.learning_rate / fit.settings.learning_rate):,.0f}"}


def _rate_too_high(fit: Fit) -> Facts | None:
    return _rate(fit) if _of_adam(fit.settings) and fit.settings.learning_rate > FAR * fit.settings.method.learning_rate else None


def _rate_too_low(fit: Fit) -> Facts | None:
    return _rate(fit) if _of_adam(fit.settings) and fit.settings.learning_rate * FAR < fit.settings.method.learning_rate else None


def _all_warmup(fit: Fit) -> Facts | None:
    steps = fit.schedule.steps if fit.schedule else fit.settings.training.steps
    warmup = fit.settings.training.warmup_in_force
    taken = warmup_steps(warmup, steps) if steps else 0
    return {"warmup": f"{warmup:g}", "taken": taken, "steps": steps} if steps and steps > 1 and 2 * taken >= steps else None


def _batch_of_all(fit: Fit) -> Facts | None:
    batch = fit.settings.training.batch_size
    if not fit.schedule or batch <= fit.rows:
        return None
    rows, are = (f"{fit.rows:,} rows", "are") if fit.rows > 1 else ("1 row", "is")
    return {"batch": batch, "rows": rows, "are": are, "steps": fit.schedule.steps}


FEW_STEPS = 10


def _few_steps(fit: Fit) -> Facts | None:
    training = fit.settings.training
    if not fit.schedule or training.steps or fit.schedule.steps >= FEW_STEPS or training.batch_size > fit.rows:
        return None
    return {"steps": fit.schedule.steps, "rows": f"{fit.rows:,}", "batch": training.batch_size, "epochs": f"{training.epochs:g}"}


def _never_due(fit: Fit) -> Facts | None:
    """Measuring or saving at steps that the run does not reach, but for its end."""
    steps = fit.schedule.steps if fit.schedule else fit.settings.training.steps
    measured = bool(fit.settings.data.eval or fit.settings.data.eval_share)
    every = {"saving.every": fit.settings.saving.every} | ({"evaluation.every": fit.settings.evaluation.every} if measured else {})
    late = [f"{name}={value}" for name, value in every.items() if steps and isinstance(value, int) and value > steps]
    return {"late": " and ".join(late), "steps": steps} if late else None


# -------------------------------------------------------------------------------------------------------------- the table

CHECKS: dict[str, Check] = {
    "stop_splits": Check(Kind(
        "warning", "The tokenizer reads {text!r}, which ends an answer (id {id}), as {count} other tokens: {pieces}. "
        "The answer that is learned ends by id and is right; earlier answers of a chat bring it as text, and do not end for the model.",
        "Make it a special token: in tokenizer_config.json, \"added_tokens_decoder\": {{\"{id}\": {{\"content\": \"{text}\", \"special\": true}}}}, "
        "and no \"split_special_tokens\": true beside it."), _stop_splits),
    "no_eos": Check(Kind(
        "warning", "The tokenizer has no EOS token; answers end with the template's {stop!r}.",
        "Other programs would not know where to stop: set \"eos_token\": \"{stop}\" in tokenizer_config.json."), _no_eos),
    "stop_is_not_eos": Check(Kind(
        "note", "Answers end with {stop!r} (id {id}), which the template writes, and not with the tokenizer's EOS {eos!r}.",
        "weitiao stops at either. Where another program serves the model, let it stop at {stop!r} too (eos_token_id in generation_config.json)."),
        _stop_is_not_eos),
    "pad_is_eos": Check(Kind(
        "note", "The pad token is the one that ends answers, {token!r}. weitiao tells padding by its place, so ends are learned here.",
        "Nothing to do. A collator of another program that masks every pad token would never learn to stop."), _pad_is_eos),
    "pad_outside": Check(Kind(
        "warning", "The pad token {token!r} has the id {id}, and the embedding has {rows} rows. weitiao pads with the stop token instead.",
        "Other programs fail on a padded batch: name a pad token within the embedding in tokenizer_config.json."), _pad_outside),
    "ids_outside": Check(Kind(
        "warning", "The tokenizer goes to {tokens} tokens, the embedding has {rows} rows: {outside} have none. A row that holds one is refused.",
        "Use the tokenizer that belongs to the model; or take these tokens out of it and name those that you need: tokens.add='[…]'."), _ids_outside),
    "rows_grow": Check(Kind(
        "note", "tokens.add makes the embedding grow from {rows} rows to {more}.",
        "Whoever loads the adapter needs a base with as many; `weitiao merge` writes one."), _rows_grow),
    "two_bos": Check(Kind(
        "warning", "Prompts begin with two {bos!r}: the template {template!r} writes one more than belongs there.",
        "Take {bos!r} or {{{{ bos_token }}}} out of the template: weitiao puts one where the tokenizer does."), _two_bos),
    "no_bos": Check(Kind(
        "note", "The tokenizer puts {bos!r} before a text, and the template {template!r} writes none: prompts begin without one.",
        "That is right if the model's makers chat so. If not, write {{{{ bos_token }}}} at the beginning of a .jinja file of yours (data.template)."), _no_bos),
    "forgets_prefix": Check(Kind(
        "note", "The template {template!r} writes an exchange in another way once more is said, as those do that drop earlier thoughts.",
        "Each answer is learned behind the prompt that it will meet, so nothing is wrong; but a chat's turns share little, and training takes longer."),
        _forgets_prefix),
    "one_exchange": Check(Kind(
        "note", "The template {template!r} takes one question and one answer; a chat of several turns is refused.",
        "If your rows are chats, choose another (data.template=chatml)."), _one_exchange),
    "other_prompt": Check(Kind(
        "warning", "With the template {template!r} a prompt ends in {sent}, and a whole conversation has {written} before the answer. "
        "weitiao trains on the prompt as it is sent; earlier answers of a chat stand behind the other.",
        "Make both the same in a .jinja file of yours (data.template): what add_generation_prompt writes is what stands before every answer."), _other_prompt),
    "header_in_answer": Check(Kind(
        "warning", "The template {template!r} writes {header} before an answer, and not at the end of a prompt: it is learned, and told, as part of each answer.",
        "Let the template write it where add_generation_prompt is set: {{% if add_generation_prompt %}}…{{% endif %}}, in a .jinja file of yours (data.template)."),
        _header_in_answer),
    "other_template": Check(Kind(
        "warning", "data.template={template} writes {ours}; the model was trained with its own chat template, {its}.",
        "Leave data.template out, unless the model is to forget its own: it knows these marks, and has to learn others from your rows."), _other_template),
    "no_template": Check(Kind(
        "note", "{model} brings no chat template, as base models do not: rows are written with {template}.",
        "Choose another by data.template (plain: rows as they stand); the run keeps it, and chat and serve use the same."), _no_template),
    "strips": Check(Kind(
        "note", "The template {template!r} takes spaces and line breaks away from the ends of {lost}.",
        "Nothing to do, unless they matter (code, forms to fill in): then take the trim out, in a .jinja file of yours (data.template)."), _strips),
    "drops_system": Check(Kind(
        "error", "data.system is set, and the template {template!r} {how}.",
        "Put that text at the beginning of each prompt, or choose a template that takes it (data.template)."), _drops_system),
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
    "rate_too_high": Check(Kind(
        "warning", "training.learning_rate={rate} is {times} times what method={method} learns well with, {usual}: the loss may grow, or the model forget what it knew.",
        "Leave training.learning_rate out, or set it near {usual}."), _rate_too_high),
    "rate_too_low": Check(Kind(
        "warning", "training.learning_rate={rate} is {times} times less than what method={method} learns well with, {usual}: hardly anything is learned.",
        "Leave training.learning_rate out, or set it near {usual}. What suits one method, such as 2e-5 for full, is too little for another."), _rate_too_low),
    "all_warmup": Check(Kind(
        "warning", "training.warmup={warmup} takes {taken} of {steps} steps, in which the learning rate is still rising.",
        "Leave training.warmup out (0.03 of the steps), or set it to a tenth of them at most."), _all_warmup),
    "batch_of_all": Check(Kind(
        "warning", "training.batch_size={batch} is more than the {rows} there {are}: an epoch is one step, and the run has {steps}.",
        "Lower training.batch_size, to 8 or less for so few rows, or raise training.epochs."), _batch_of_all),
    "few_steps": Check(Kind(
        "note", "{rows} rows in batches of {batch}, {epochs} epochs: the run has {steps} steps, which is little to learn in.",
        "Lower training.batch_size, or raise training.epochs."), _few_steps),
    "never_due": Check(Kind(
        "note", "{late} is more than the {steps} steps of the run: it comes at the end alone.",
        "Set it lower, or to epoch."), _never_due),
    # Last, since it changes the model that others look at.
    "method_refused": Check(Kind("error", "{found}", "{next}"), _refused),
}
