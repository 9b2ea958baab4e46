"""Does every method learn with its defaults? Two small real tasks on the embedded model, an equal budget of rows for all.

    python benchmarks/methods.py run --task film --method prompt --films rotten_tomatoes [--seed 1] [--split tune] [--rate 0.1]
    python benchmarks/methods.py run --task records --method prompt --by peft
    python benchmarks/methods.py table

film      sentences about films (rotten_tomatoes/{train,validation}.jsonl: text, label 0 or 1), the label word behind the
          sentence and the end token, as a public GPT-2 tutorial lays them out; the last 30 tokens of a sentence. 1,200 rows,
          once, 8 a step. Measured: accuracy on 400 rows by the larger of the two label words' logits.
records   the bundled example: announcement -> JSON record. 360 rows (300 when tuning), once, 8 a step.
          Measured: loss of the answers, and field F1 of greedy answers, on 60 rows.

--split tune chooses rates: its training and measuring rows are not those of --split report. --by peft trains PEFT's own
defaults with transformers.Trainer at its default rate (5e-5, linear, no warm-up). A line a run goes to methods.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("methods.jsonl")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
LABELS = ["neg", "pos"]
PEFT_PROMPTS, PEFT_TOKENS = ("prompt", "ptuning", "prefix"), 20  # PEFT has no default number; 20 is its examples'
TOKENS, ROWS, MEASURED = 30, 1200, 400
# LLaMA-like models have no biases: BitFit is given some, as weitiao's refusal advises.
NEEDED = {"bitfit": ["method.add_bias=true"]}


def film(folder: Path, films: str, split: str, tokenizer) -> tuple[list[str], str]:
    """Writes the rows; (settings, file to measure)."""
    def rows(name: str, seed: int, first: int, count: int) -> list[dict]:
        lines = [json.loads(line) for line in Path(films, f"{name}.jsonl").open(encoding="utf-8")]
        random.Random(seed).shuffle(lines)
        cut = [{"text": tokenizer.decode(tokenizer(r["text"]).input_ids[-TOKENS:]), "label": r["label"]} for r in lines]
        return cut[first : first + count]

    train = rows("train", 0, 0 if split == "tune" else ROWS, ROWS)
    measured = rows("validation", 0, 0 if split == "tune" else MEASURED, MEASURED)
    for name, some in (("train", train), ("measured", measured)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some), "utf-8")
    (folder / "label.jinja").write_text(TEMPLATE)
    return [f"data.train={folder}/train.jsonl", "data.labels={0: neg, 1: pos}", f"data.template={folder}/label.jinja",
            "training.epochs=1"], str(folder / "measured.jsonl")


def records(folder: Path, films: str, split: str, tokenizer) -> tuple[list[str], str]:
    from weitiao import example

    here = Path(example.__file__).parent
    if split == "report":
        return [f"data.train={here}/train.jsonl", "training.epochs=1"], str(here / "heldout.jsonl")
    lines = (here / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (folder / "train.jsonl").write_text("".join(lines[60:]), "utf-8")
    (folder / "measured.jsonl").write_text("".join(lines[:60]), "utf-8")
    return [f"data.train={folder}/train.jsonl", "training.epochs=1"], str(folder / "measured.jsonl")


TASKS = {"film": film, "records": records}


class Watch:
    def on_step(self, line, seconds):
        if line["step"] % 25 == 0 or line["step"] == 1:
            print(f"  {line['step']} loss {line['loss']:.3f} norm {line['grad_norm']:.2g}", flush=True)

    def on_evaluation(self, line): ...
    def on_message(self, text): ...


def by_weitiao(settings):
    from weitiao.screen import Screen
    from weitiao.train import memory
    from weitiao.train.loop import Training
    from weitiao.train.train import prepare

    job = prepare(settings, Screen(quiet=True))
    Training(settings, None, job.model, job.method, "base", job.template, job.data.rows, [], job.accelerator, "trie",
             memory.MOST_NODES["cpu"], Watch()).fit()
    return job.model, job.template


def by_peft(settings, seed: int):
    """PEFT's defaults by transformers.Trainer; measured in our model, which reads PEFT's file."""
    import peft
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from weitiao.model.load import load_model
    from weitiao.model.methods import METHODS
    from weitiao.screen import Screen
    from weitiao.train.train import prepare

    kind = settings.method.name
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PEFT_TOKENS),
        "ptuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=PEFT_TOKENS),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PEFT_TOKENS),
        "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    }[kind]()
    job = prepare(settings, Screen(quiet=True))
    rows = [{"input_ids": e.ids.tolist(), "attention_mask": [1] * len(e),
             "labels": [t if w > 0 else -100 for t, w in zip(e.ids.tolist(), e.weights.tolist())]}
            for row in job.data.rows for e in row.examples]
    torch.manual_seed(seed)
    model = peft.get_peft_model(load_model(job.base, settings.model, torch.float32), config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=settings.training.batch_size, num_train_epochs=settings.training.epochs,
            save_strategy="no", report_to=[], use_cpu=True, bf16=settings.training.precision == "bf16", seed=seed, logging_steps=25, disable_tqdm=True,
        )
        collator = DataCollatorForSeq2Seq(job.template.tokenizer, padding=True, label_pad_token_id=-100)
        Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
        model.save_pretrained(folder)
        if kind not in PEFT_PROMPTS:
            return model, job.template
        METHODS[kind].load(job.model, Path(folder))
    return job.model, job.template


@torch.no_grad()
def measure_film(model, template, file: str) -> dict:
    tokenizer = template.tokenizer
    words = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in LABELS]
    rows = [json.loads(line) for line in Path(file).open(encoding="utf-8")]
    model.eval()
    right = nll = 0.0
    for first in range(0, len(rows), 40):
        some = rows[first : first + 40]
        prompts = [torch.from_numpy(template.prompt_ids([{"role": "user", "content": row["text"]}])).long() for row in some]
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=template.pad_id)
        mask = (torch.arange(ids.shape[1])[None] < torch.tensor([len(p) for p in prompts])[:, None]).long()
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        for row, prompt, scores in zip(some, prompts, logits):
            last = scores[len(prompt) - 1]
            right += float(int(last[words].argmax()) == row["label"])
            nll += float(torch.logsumexp(last, 0) - last[words[row["label"]]])
    return {"accuracy": right / len(rows), "loss": nll / len(rows)}


def measure_records(model, template, file: str, settings, answers: bool) -> dict:
    from contextlib import nullcontext

    from weitiao.data.dataset import load
    from weitiao.settings.data import Source
    from weitiao.settings.results import EvaluationSettings
    from weitiao.train.evaluation import answer_and_score, mean_loss, questions

    rows = load([Source(path=file)], settings.data, template, 8192, len(template.tokenizer), 0).rows
    found = {"loss": mean_loss(model, rows, "padded", 2048, template.pad_id, "cpu", nullcontext)}
    if answers:
        _, scores = answer_and_score(model, template, questions(rows), EvaluationSettings(batch_size=60))
        found["field_f1"] = scores.as_dict()["field_f1"]
    return found


def run(options) -> None:
    from weitiao import config
    from weitiao.model import load as loading
    from weitiao.model.source import resolve
    from weitiao.screen import quiet_libraries
    from weitiao.settings.model import ModelSettings

    quiet_libraries()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_settings = ModelSettings()
        tokenizer = loading.load_tokenizer(resolve(model_settings.name), model_settings)
        given, measured = TASKS[options.task](folder, options.films, options.split, tokenizer)
        words = [*given, f"method={options.method}", f"training.seed={options.seed}", "training.batch_size=8", "training.layout=trie",
                 f"training.precision={options.precision}", *NEEDED.get(options.method, []), *options.set]
        if options.by == "peft" and options.method in PEFT_PROMPTS:
            words.append(f"method.virtual_tokens={PEFT_TOKENS}")
        if options.rate:
            words.append(f"training.learning_rate={options.rate}")
        settings = config.read(None, words if options.method != "none" else [w for w in words if w != "method=none"])
        if options.method == "none":
            from weitiao.screen import Screen
            from weitiao.train.train import prepare

            job = prepare(settings, Screen(quiet=True))
            model, template = job.model, job.template  # LoRA begins as the untuned model
        else:
            model, template = by_weitiao(settings) if options.by == "weitiao" else by_peft(settings, options.seed)
        trained = time.perf_counter()
        scores = measure_film(model, template, measured) if options.task == "film" else \
            measure_records(model, template, measured, settings, options.answers or options.split == "report")
    line = {
        "task": options.task, "method": options.method, "by": options.by, "split": options.split, "seed": options.seed,
        "rate": 5e-5 if options.by == "peft" else settings.learning_rate, "set": options.set, "precision": options.precision, **scores,
        "train_seconds": round(trained - began), "date": time.strftime("%Y-%m-%d"),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def table(options) -> None:
    """The share of LoRA's gain over the untuned model: accuracy, loss and F1, mean over seeds."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    report = [line for line in lines if line["split"] == "report"]

    def mean(task: str, method: str, by: str, key: str) -> float | None:
        found = [r[key] for r in report if (r["task"], r["method"], r["by"]) == (task, method, by) and not r["set"] and key in r]
        return statistics.mean(found) if found else None

    keys = [("film", "accuracy"), ("film", "loss"), ("records", "loss"), ("records", "field_f1")]
    for by in ("weitiao", "peft"):
        for method in dict.fromkeys(r["method"] for r in report if r["by"] == by):
            cells = []
            for task, key in keys:
                none, best, here = mean(task, "none", "weitiao", key), mean(task, "lora", "weitiao", key), mean(task, method, by, key)
                if here is None or none is None or best in (None, none):
                    cells.append("–")
                else:
                    cells.append(f"{here:.3f} ({(here - none) / (best - none):.0%})")
            print(f"| {by} | {method} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("--task", choices=TASKS, required=True)
    one.add_argument("--method", required=True, help="a method of weitiao, or none: the untuned model")
    one.add_argument("--by", choices=["weitiao", "peft"], default="weitiao")
    one.add_argument("--films", default="rotten_tomatoes", help="folder of train.jsonl and validation.jsonl")
    one.add_argument("--split", choices=["tune", "report"], default="report")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--rate", type=float)
    one.add_argument("--set", nargs="*", default=[], help="further settings, such as method.virtual_tokens=50")
    one.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--answers", action="store_true", help="field F1 when tuning, too")
    commands.add_parser("table")
    options = parser.parse_args()
    {"run": run, "table": table}[options.command](options)


if __name__ == "__main__":
    main()
