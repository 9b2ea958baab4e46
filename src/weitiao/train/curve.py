"""metrics.jsonl -> loss.png."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss of each step, its running mean, and the loss on the rows set aside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [m["step"] for m in metrics if "loss" in m]
    losses = [m["loss"] for m in metrics if "loss" in m]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9ab8d8", linewidth=1, label="loss of a step", marker="." if len(steps) < 3 else None)
    axes.plot(steps, _smooth(losses), color="#1f5fa8", linewidth=2, label="smoothed")
    measured = [(m["step"], m["eval_loss"]) for m in metrics if "eval_loss" in m]
    if measured:
        axes.plot(*zip(*measured, strict=True), color="#d1495b", marker="o", linewidth=1.5, label="on rows set aside")
    axes.set(xlabel="optimizer step", ylabel="nll per learned token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    part = path.with_name(f".{path.name}.part")
    FigureCanvasAgg(figure).print_png(part)
    os.replace(part, path)


def _smooth(values: Sequence[float]) -> list[float]:
    """An exponential mean over about a twentieth of the run, corrected for its start (Kingma & Ba 2015, arXiv:1412.6980,
    section 3)."""
    keep = 1 - 1 / max(2, len(values) / 20)
    smoothed, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        smoothed.append(mean / (1 - keep**i))
    return smoothed
