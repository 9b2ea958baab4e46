"""Does the template fit tokenizer and model: does it write a conversation as inference will, and lose nothing of it?"""

from __future__ import annotations

from dataclasses import replace

from weitiao.data.findings import Kind
from weitiao.data.templates import PROBE, WITHOUT_OWN, Template
from weitiao.train.fitness.fit import ASKED, NO_TEXT, SAID, Check, Facts, Fit, ended, shown


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
    return {"template": fit.template.name, "sent": ended(prompt, 30), "written": ended(whole.partition(PROBE)[0], 30)}


def _header_in_answer(fit: Fit) -> Facts | None:
    prompt, whole = fit.written(ASKED, answer_next=True), fit.written(ASKED, SAID)
    header = whole[len(prompt) :].partition(PROBE)[0] if prompt is not None and whole and whole.startswith(prompt) and PROBE in whole else ""
    return {"template": fit.template.name, "header": shown(header)} if NO_TEXT.sub("", header).strip() else None


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
    return {"template": name, "ours": ended(ours), "its": ended(its)}


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


CHECKS: dict[str, Check] = {
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
}
