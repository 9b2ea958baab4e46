"""The bundled example from end to end: the embedded model, before and after, on rows it has not seen."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weitiao import config, example
from weitiao.screen import Screen, duration, quiet_libraries
from weitiao.settings.results import EvaluationSettings
from weitiao.train import train as training
from weitiao.train.folder import RunFolder, free_name, write_text
from weitiao.use.evaluate import measure, rows_to_measure, show
from weitiao.use.trained import open_trained

ROWS = Path(example.__file__).parent
SETTINGS = (
    "training.epochs=1", "training.batch_size=16", "method.rank=16", "training.learning_rate=1e-3", "saving.every=end",
    "evaluation.every=end", "data.max_tokens=256",  # more than its longest row, so that all stay whole
)
ANSWERS_SHOWN = 3


def demo(output: str) -> None:
    """Train on the bundled rows, score the untuned and the tuned model on the held-out ones, show some answers."""
    quiet_libraries()
    screen = Screen()
    started = time.monotonic()
    path = Path(output)
    settings = config.read(None, SETTINGS, **{
        "data.train": str(ROWS / "train.jsonl"), "data.eval": str(ROWS / "heldout.jsonl"),
        "output": str(free_name(path.parent, path.name)),
    })
    screen.tell(
        "Teaching SmolLM2-135M to write staff records: 360 short announcements (some Chinese), each with its JSON record.\n"
        "It is then asked for 60 records of people and organisations that it has never seen.\n"
    )
    run = training.train(settings, screen)
    trained = open_trained(str(run.path), screen)
    rows = rows_to_measure(trained, None, screen).rows
    asked = EvaluationSettings()
    screen.tell("\nAnswering the 60 held-out rows, untuned and tuned …")
    with trained.method.untuned(trained.model):
        before, base_scores = measure(trained, rows, asked, screen)
    after, tuned_scores = measure(trained, rows, asked, screen)
    write_text(run.path / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in after))
    run.write_json("scores.json", {"data": "held-out rows of the demo", "base": base_scores, "tuned": tuned_scores})
    show({"base": base_scores, "tuned": tuned_scores}, len(rows), screen)
    side_by_side(before, after, screen)
    next_steps(run, base_scores, tuned_scores, time.monotonic() - started, screen)


def side_by_side(before: Sequence[dict[str, str]], after: Sequence[dict[str, str]], screen: Screen) -> None:
    """A few answers, untuned and tuned; the last one is from a Chinese passage."""
    chinese = [i for i, s in enumerate(after) if any("\u4e00" <= c <= "\u9fff" for c in s["prompt"])]
    shown = [*range(ANSWERS_SHOWN - 1), *chinese[:1]]
    rows = []
    for i in shown:
        passage = after[i]["prompt"].split("\n", 1)[-1]
        rows.append((passage, _short(before[i]["answer"]), after[i]["answer"]))
    screen.tell()
    screen.grid(["passage", "untuned", "tuned"], rows)


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[:most] + "…"


def next_steps(run: RunFolder, base: dict[str, Any], tuned: dict[str, Any], seconds: float, screen: Screen) -> None:
    screen.tell(
        f"\nField F1 on rows it has not seen: {base['field_f1']:.2f} before, {tuned['field_f1']:.2f} after. "
        f"{duration(seconds)} in all.\n\n"
        "What next:\n"
        f"  weitiao chat {run.path}                        talk to it\n"
        f"  weitiao generate {run.path} --prompt '…'       one answer\n"
        f"  weitiao merge {run.path}                       plain weights for any server\n"
        "  weitiao train --data your_rows.jsonl           your own rows\n"
        f"The curve is in {run.path / 'loss.png'}, the proof in {run.path / 'proof.json'}."
    )
