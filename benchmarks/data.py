"""Rows on disk -> ids -> tries: weitiao beside datasets.map as other programs use it; time, memory, and how both grow.

    python benchmarks/data.py --alpaca alpaca_zh.json alpaca_en.json     all cells; adds lines to benchmarks/data.jsonl
    python benchmarks/data.py --only short                               cells whose name holds this
    python benchmarks/data.py --table                                    benchmarks/data.jsonl as a table

Two kinds of rows, made here: alpaca rows repeated with a word of prompt and answer changed, so that no row comes twice, and short
ones ("What is 81 plus 7?"). Each cell is a process of its own, with the embedded model's tokenizer and its ChatML template:

    first     weitiao with an empty cache: read, encode (prompt, answer, stop), check for defects, cut, write the cache
    stream    weitiao with data.streaming and an empty cache: up to the passes of the first step
    streamed  the same, and on until all rows are encoded and in the cache; nothing learns meanwhile
    again     weitiao with the same rows a second time: find them, and build the passes of the first step
    tries     weitiao: the tries of a whole epoch, 16 rows a step, in one thread
    map 1, 2  datasets: from_json, then map(batched=True, num_proc=1 or 2): apply_chat_template for prompts and for whole rows,
              the tokenizer called once a batch for each, labels of -100 before the answer (as TRL and LLaMA-Factory do);
              its cache is empty. No checks.

Processor time is that of the process and its children, user and system: it can be compared where others use the machine too;
seconds are by the clock. Memory is the largest sum of PSS over the process and its children, seen every fifth of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "data.jsonl"
STEP = 16  # rows
# kind of rows, how many, what is measured
CELLS = [
    *(("alpaca", n, what) for n in (5_000, 15_000, 50_000) for what in ("first", "again", "tries", "map 1", "map 2")),
    *(("short", n, what) for n in (10_000, 100_000) for what in ("first", "again", "tries", "stream", "streamed", "map 1", "map 2")),
    *(("short", 1_000_000, what) for what in ("first", "again", "tries", "stream", "streamed", "map 2")),
]


# ------------------------------------------------------------------------------------------------ rows


def changed(text: str, draw: random.Random) -> str:
    """Another word in the place of one; two more characters, where there are no words."""
    words = text.split(" ")
    if len(words) > 8:
        words[draw.randrange(len(words))] = f"{draw.getrandbits(40):x}"
        return " ".join(words)
    at = draw.randrange(len(text) + 1)
    return text[:at] + "".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(2)) + text[at:]


def write_rows(kind: str, count: int, file: Path, alpaca: list[Path]) -> None:
    draw = random.Random(0)
    known = [row for source in alpaca for row in json.loads(source.read_text("utf-8"))] if kind == "alpaca" else []
    with file.open("w", encoding="utf-8") as out:
        for i in range(count):
            if kind == "short":
                a, b = draw.randrange(10**6), draw.randrange(10**6)
                row = {"instruction": f"What is {a} plus {b}?", "input": "", "output": f"It is {a + b}."}
            else:
                old = known[i % len(known)]
                row = {"instruction": changed(old["instruction"], draw), "input": old.get("input", ""), "output": changed(old["output"], draw)}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------ one cell, in a process of its own


def template_here():
    from weitiao.data.templates import load_template
    from weitiao.model.load import load_tokenizer
    from weitiao.model.source import model_folder
    from weitiao.settings.model import ModelSettings

    settings = ModelSettings()
    return load_template("auto", load_tokenizer(model_folder(settings), settings))


def read(template, file: Path, cache: Path):
    from weitiao.data.cache import Cache
    from weitiao.data.survey import Facts, Survey
    from weitiao.settings.data import DataSettings

    settings = DataSettings(train=str(file))
    survey = Survey(Facts.of(settings, template, 49152))
    return Cache(cache, 10**11, print).load(settings.train, settings, template, 8192, 49152, 0, survey=survey)


def step_of(rows, schedule, step: int) -> list:
    from weitiao.train.evaluation import make_passes

    examples = [example for i in schedule.rows_of(step) for example in rows[i].examples]
    return make_passes(examples, "trie", 1 << 40, 0, "cpu")


def measure_first(file: Path, folder: Path) -> dict:
    template = template_here()
    clock = Clock()
    data = read(template, file, folder / "cache")
    return clock.told() | {"tokens": data.tokens}


def measure_again(file: Path, folder: Path) -> dict:
    from weitiao.train.loop import Schedule

    template = template_here()
    clock = Clock()
    data = read(template, file, folder / "cache")
    step_of(data.rows, Schedule(len(data), STEP, 0, 1), 1)
    return clock.told()


def measure_tries(file: Path, folder: Path) -> dict:
    from weitiao.train.loop import Schedule

    data = read(template_here(), file, folder / "cache")
    schedule = Schedule(len(data), STEP, 0, 1)
    clock = Clock()
    nodes = sum(one["input_ids"].numel() for step in range(1, schedule.steps + 1) for one in step_of(data.rows, schedule, step))
    return clock.told() | {"nodes": nodes}


def measure_stream(file: Path, folder: Path, whole: bool) -> dict:
    from weitiao.data.cache import Cache
    from weitiao.data.streamed import begin
    from weitiao.data.survey import Facts, Survey
    from weitiao.settings.data import DataSettings
    from weitiao.train.loop import StreamedSchedule

    template = template_here()
    settings = DataSettings(train=str(file), streaming=True)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        clock = Clock()
        survey = Survey(Facts.of(settings, template, 49152))
        _, rows = begin(Cache(Path(cache), 10**11, print), settings.train, settings, template, 8192, 49152, 0, "auto", survey)
        with rows.encoding_beside(lambda text: None):
            step_of(rows, StreamedSchedule(rows, STEP, 0, 10**9), 1)
            seconds = clock.told()["seconds"]
            if whole:
                rows.wait(10**12)
                seconds = clock.told()["seconds"]
        return clock.told() | {"seconds": seconds, "encoded": rows.read}  # the processor's when the encoders have ended and are counted


def measure_map(file: Path, folder: Path, processes: int) -> dict:
    import datasets

    tokenizer = template_here().tokenizer
    datasets.disable_progress_bars()

    def encode(rows):
        asked = [[{"role": "user", "content": "\n".join(part for part in pair if part)}] for pair in zip(rows["instruction"], rows["input"], strict=True)]
        whole = [[*said, {"role": "assistant", "content": answer}] for said, answer in zip(asked, rows["output"], strict=True)]
        prompts = tokenizer([tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False) for said in asked], add_special_tokens=False)
        found = tokenizer([tokenizer.apply_chat_template(said, tokenize=False) for said in whole], add_special_tokens=False)
        found["labels"] = [[-100] * len(p) + ids[len(p) :] for p, ids in zip(prompts["input_ids"], found["input_ids"], strict=True)]
        return found

    clock = Clock()
    rows = datasets.Dataset.from_json(str(file), cache_dir=str(folder / f"datasets-{processes}"))
    made = rows.map(encode, batched=True, num_proc=processes if processes > 1 else None, remove_columns=rows.column_names)
    return clock.told() | {"tokens": sum(map(len, made[:1000]["input_ids"]))}


MEASURES = {
    "first": measure_first, "again": measure_again, "tries": measure_tries,
    "stream": lambda file, folder: measure_stream(file, folder, whole=False), "streamed": lambda file, folder: measure_stream(file, folder, whole=True),
    "map 1": lambda file, folder: measure_map(file, folder, 1), "map 2": lambda file, folder: measure_map(file, folder, 2),
}


class Clock:
    def __init__(self):
        self.begun, self.used = time.perf_counter(), self.processor()

    @staticmethod
    def processor() -> float:
        return sum(os.times()[:4])

    def told(self) -> dict:
        return {"seconds": round(time.perf_counter() - self.begun, 2), "processor": round(self.processor() - self.used, 2)}


# ------------------------------------------------------------------------------------------------ all cells


def run(kind: str, count: int, what: str, file: Path, folder: Path) -> dict:
    """A cell's line: its process is watched from here."""
    import psutil

    command = [sys.executable, __file__, "--cell", what, "--file", str(file), "--folder", str(folder)]
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        most = max(most, pss(process))
        time.sleep(0.2)
    out = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{kind} {count} {what} failed:\n{out}")
    return {"kind": kind, "rows": count, "what": what, **json.loads(out.splitlines()[-1]), "memory": most,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version()}


def pss(process) -> int:
    import psutil

    found = 0
    try:
        for one in (process, *process.children(recursive=True)):
            found += one.memory_full_info().pss
    except psutil.Error:
        pass
    return found


def table(lines: list[dict]) -> str:
    """The newest line of each cell."""
    newest = {(line["kind"], line["rows"], line["what"]): line for line in lines}
    out = ["| rows | | processor s | rows / processor s | s | peak memory, GB |", "|---|---|---|---|---|---|"]
    for (kind, rows, what), line in newest.items():
        speed = f"{rows / line['processor']:,.0f}" if what not in ("again", "stream") else "–"
        out.append(f"| {rows:,} {kind} | {what} | {line['processor']:.1f} | {speed} | {line['seconds']:.1f} | {line['memory'] / 1e9:.2f} |")
    return "\n".join(out)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--alpaca", nargs="*", type=Path, default=[], help="files of alpaca rows to repeat")
    asked.add_argument("--only", default="")
    asked.add_argument("--table", action="store_true")
    for hidden in ("--cell", "--file", "--folder"):
        asked.add_argument(hidden, help=argparse.SUPPRESS)
    told = asked.parse_args()
    if told.table:
        print(table([json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]))
        return
    if told.cell:
        print(json.dumps(MEASURES[told.cell](Path(told.file), Path(told.folder))))
        return
    with tempfile.TemporaryDirectory() as name:
        for kind, count, what in CELLS:
            cell = f"{kind} {count} {what}"
            if told.only not in cell:
                continue
            if kind == "alpaca" and not told.alpaca:
                print(f"{cell}: skipped, no --alpaca files")
                continue
            folder = Path(name) / f"{kind}-{count}"
            file = folder / "rows.jsonl"
            if not folder.exists():
                folder.mkdir()
                write_rows(kind, count, file, told.alpaca)
            line = run(kind, count, what, file, folder)
            print(json.dumps(line), flush=True)
            with RESULTS.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
