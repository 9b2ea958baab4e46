"""Do settings, tokenizer and model fit each other? Told from config.json and the tokenizer alone, before rows are read.

    settings, template (with its tokenizer), config -> Findings

Each check is a line of a table: what it says, and a function that answers with the facts to say it with, or None where
nothing is wrong. What needs the model's structure looks at one without weights, on the meta device, made when first asked
for. What `weitiao.config` refuses by itself is not looked for again.
"""

from __future__ import annotations

from typing import Any

from weitiao.config import Settings
from weitiao.data.findings import Finding
from weitiao.data.templates import Template
from weitiao.train.fitness import methods, pace, precision, templates, tokens
from weitiao.train.fitness.fit import Check, Fit

CHECKS: dict[str, Check] = tokens.CHECKS | templates.CHECKS | methods.CHECKS | precision.CHECKS | pace.CHECKS | methods.ATTACHED


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
