"""Is there enough time to learn in: the learning rate, its warmup, the number of steps?"""

from __future__ import annotations

from weitiao.config import Settings
from weitiao.data.findings import Kind
from weitiao.settings.training import OTHER_RATES
from weitiao.train.fitness.fit import Check, Facts, Fit
from weitiao.train.optimizer import warmup_steps

FAR = 20  # times a method's own learning rate
FEW_STEPS = 10


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


CHECKS: dict[str, Check] = {
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
}
