"""The command line: one short function a command. Settings are read by config.py, work from the commands' own files."""

from __future__ import annotations

import _thread
import gc
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weitiao.config import Settings
    from weitiao.errors import WeitiaoError
    from weitiao.settings.data import Source

app = typer.Typer(
    help="weitiao (微调): fine-tune Hugging Face causal language models. Start with `weitiao demo`.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _is_run(run: str) -> str:
    """Told before anything is imported that takes seconds."""
    from weitiao.train.folder import refuse_no_run

    refuse_no_run(Path(run))
    return run


Run = Annotated[str, typer.Argument(help="A run folder, or RUN/checkpoints/N.", metavar="RUN", callback=_is_run)]
Columns = Annotated[list[str] | None, typer.Argument(
    help="Which columns of the file are which, where they are not the run's: data.columns='{output: answer}'.", metavar="[data.columns='{…}']", show_default=False)]
MaxNew = Annotated[int, typer.Option(help="Longest answer, in tokens; the prompt is not counted.", min=1)]
Temperature = Annotated[float, typer.Option(help="0: greedy, the same text each time; higher: more varied.", min=0)]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this probability.", min=0.01, max=1)]


class TrainCommand(typer.core.TyperCommand):
    """`train --help` ends with every setting; help.py makes the table when it is asked for."""

    def format_epilog(self, ctx, formatter) -> None:
        from weitiao.help import settings_text

        formatter.write(settings_text(formatter.width))


@app.command(cls=TrainCommand, context_settings={"ignore_unknown_options": True})
def train(
    what: Annotated[list[str] | None, typer.Argument(help="A YAML file of settings, or a run folder with --resume; then settings such as method.rank=16.", metavar="[FILE.yaml | RUN] [name=value]...")] = None,
    model: Annotated[str | None, typer.Option(help="Short for model.name=…  [default: smollm2-135m]", show_default=False)] = None,
    data: Annotated[list[str] | None, typer.Option(help="Short for data.train=…: the rows to learn from; may be given several times.")] = None,
    output: Annotated[str | None, typer.Option(help="The new run folder.  [default: runs/<data>-<method>-<model>]", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with RUN from its newest whole checkpoint.")] = False,
    show_model: Annotated[bool, typer.Option("--show-model", help="Print the model with its method attached, part by part, before the run; without --data that is all, and needs no weights.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train even if the plan says that memory will not be enough.")] = False,
) -> None:
    """Fine-tune a model on rows: --model NAME --data FILE is enough."""
    from weitiao import config
    from weitiao.errors import SettingError

    refuse_slips(what or [])
    words = join_options(what or [])
    first = words.pop(0) if words and "=" not in words[0] else None
    if resume:
        if first is None or words or model or data or output or show_model or force:
            raise SettingError("--resume takes a run folder and nothing else.", next_step=f"weitiao train {first or 'RUN'} --resume")
        from weitiao.screen import quiet_libraries
        from weitiao.train.folder import RunFolder

        RunFolder.open(Path(first))
        quiet_libraries()
        from weitiao.train import train as training

        training.resume(Path(first))
        return leave()
    if first and (Path(first) / "config.yaml").is_file():
        raise SettingError(f"{first} is a run folder.", next_step=f"Go on with it: weitiao train {first} --resume")
    given = {"model.name": model, "data.train": data or None, "output": output}
    values = config.gather(first, words, **given)
    without_rows = show_model and not config.names_rows(values)
    settings = config.parse(config.without_rows(values) if without_rows else values)
    refuse_at_a_glance(settings, [] if without_rows else [*settings.data.train, *settings.data.eval], read=True)
    from weitiao.screen import quiet_libraries
    from weitiao.train.folder import RunFolder

    if settings.output and not without_rows:  # again in training.train, for whoever calls that
        RunFolder.refuse_taken(Path(settings.output))
    quiet_libraries()
    if without_rows:
        from weitiao.train.tree import show_without_rows

        return show_without_rows(settings)
    from weitiao.train import train as training

    training.train(settings, show_model=show_model, force=force)
    leave()


@app.command(cls=TrainCommand, context_settings={"ignore_unknown_options": True})
def check(
    what: Annotated[list[str] | None, typer.Argument(help="Files of rows, or a YAML file of settings; then settings such as data.max_tokens=512.", metavar="[FILE]... [name=value]...")] = None,
    model: Annotated[str | None, typer.Option(help="Short for model.name=…; its tokenizer and config.json are enough.  [default: smollm2-135m]", show_default=False)] = None,
    data: Annotated[list[str] | None, typer.Option(help="Short for data.train=…: the rows to check; may be given several times.")] = None,
    rows: Annotated[int | None, typer.Option(help="Look at the first so many rows of each file.  [default: all]", min=1, show_default=False)] = None,
    show: Annotated[int | None, typer.Option("--show", help="Then print the first N rows as the model sees them, token by token.", metavar="N", min=1)] = None,
    html: Annotated[str | None, typer.Option("--html", help="Write such rows as a page, with the findings; 20 rows without --show.", metavar="FILE")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="With --show: each token with its id.")] = False,
    json: Annotated[str | None, typer.Option("--json", help="Write the findings here, as JSON.", metavar="FILE")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 2 on a warning too, not on errors only.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that read.  [default: one a core, 8 at most]", min=1, show_default=False)] = None,
) -> None:
    """Tell what is wrong with rows and settings before a run, without loading the model."""
    from weitiao import config
    from weitiao.errors import SettingError

    files, words = rows_first(what or [])
    refuse_slips(words)
    words = join_options(words)
    first = words.pop(0) if words and "=" not in words[0] else None
    settings = config.read(first, words, **{"model.name": model, "data.train": [*files, *(data or [])] or None})
    refuse_at_a_glance(settings, [*settings.data.train, *settings.data.eval])
    if ids and not show:
        raise SettingError("--ids says how rows are shown, and none are.", "Expected --show N beside it.", "On a page (--html), a box shows the ids.")
    from weitiao.screen import Screen, quiet_libraries

    quiet_libraries()
    gc.set_threshold(100_000)  # what is imported stays; looking through it for garbage takes a tenth of the start
    from weitiao.train import check as checking
    from weitiao.train import folder

    for file, such_as in ((json, "check.json"), (html, "rows.html")):
        if file:
            folder.refuse_unwritable(Path(file), such_as)
    screen = Screen()
    report = checking.check(settings, screen, rows, workers)
    checking.show(report, screen)
    if json:
        checking.write(report, Path(json))
    if show or html:
        from weitiao.train.first_rows import show_first

        show_first(settings, report, show, screen, Path(html) if html else None, ids, rows)
    raise typer.Exit(checking.exit_code(report, strict))


@app.command(context_settings={"ignore_unknown_options": True})
def plan(
    what: Annotated[list[str] | None, typer.Argument(help="A YAML file of settings; then settings such as method=full.", metavar="[FILE.yaml] [name=value]...")] = None,
    model: Annotated[str | None, typer.Option(help="Short for model.name=…; a config.json, or the id of a well-known model, is enough.  [default: smollm2-135m]", show_default=False)] = None,
    data: Annotated[list[str] | None, typer.Option(help="Short for data.train=…: the rows to learn from.  [default: made-up ones]", show_default=False)] = None,
    tokens: Annotated[int | None, typer.Option(help="Of made-up rows, in the place of a YAML file's: how long each is.  [default: 512]", min=8, show_default=False)] = None,
    rows: Annotated[int | None, typer.Option(help="Of made-up rows: how many.  [default: 1,000]", min=1, show_default=False)] = None,
    gpu: Annotated[str | None, typer.Option(help="For a GPU by name (4090, a100-40, …) or size (24GB).  [default: what is here]", show_default=False)] = None,
    memory: Annotated[str | None, typer.Option(help="So much is there, such as 8GB: list what fits, best first.", show_default=False)] = None,
    json: Annotated[str | None, typer.Option("--json", help="Write the plan here, as JSON.", metavar="FILE")] = None,
) -> None:
    """Tell what a run will need, memory term by term, time and disk; without loading the model."""
    from weitiao import config
    from weitiao.errors import SettingError

    in_front, words = rows_first(what or [])
    refuse_slips(words)
    words = join_options(words)
    first = words.pop(0) if words and "=" not in words[0] else None
    values = config.gather(first, words, **{"model.name": model, "data.train": [*in_front, *(data or [])] or None})
    made_up = bool(tokens or rows)  # in the place of a YAML file's, which need not be here
    if made_up and (in_front or data or any(word.startswith("data.train=") for word in words)):
        raise SettingError("--tokens and --rows make rows up, and rows are named too.", "Expected the one or the other.",
                           "Leave --tokens and --rows out, or the rows.")
    if made_up or not config.names_rows(values):
        values = config.without_rows(values)
    settings = config.parse(values)
    refuse_at_a_glance(settings, [source for source in settings.data.train if source.path != config.NO_ROWS], any_model=True)
    from weitiao.screen import Screen, quiet_libraries

    quiet_libraries()
    from weitiao.train import folder

    if json:
        folder.refuse_unwritable(Path(json), "plan.json")
    from weitiao.train import plan as planning

    planned = planning.plan(settings, Screen(), tokens, rows, gpu, memory, json)
    raise typer.Exit(0 if planned.fits else 2)


def refuse_at_a_glance(settings: Settings, sources: Sequence[Source], read: bool = False, any_model: bool = False) -> None:
    """What can be told before torch is imported, which takes seconds: a name that is none, rows that are not there.

    read: few rows whole. any_model: one that is well known will do, under any of its names.
    """
    from weitiao.data.glance import glance
    from weitiao.model.source import refuse_missing_path, refuse_unknown

    for source in sources:
        glance(source, settings.data, read)
    (refuse_missing_path if any_model else refuse_unknown)(settings.model.name)


def leave() -> None:
    """End one of several processes at once: gloo's threads, torn down with the interpreter, now and then abort it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        os._exit(0)


def refuse_slips(words: list[str]) -> None:
    """The commonest slips, told by their cure."""
    from weitiao.errors import SettingError

    if words and words[-1].endswith("=") and words[-1] != "=":
        raise SettingError(f"{words[-1]} has no value.", "Expected name=value.", "Leave it out for the default.")
    if "=" in words or any(word.endswith("=") or word.startswith("=") for word in words):
        raise SettingError(f"Found {' '.join(words)!r} among the settings.", "Expected name=value without spaces around the =.")
    if words and "=" not in words[0] and words[0].endswith((".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz")):
        raise SettingError(f"{words[0]} is a file of rows, not of settings.", next_step=f"weitiao train --data {words[0]}")


def rows_first(words: list[str]) -> tuple[list[str], list[str]]:
    """(rows in front, the other words): for a check, rows need no option. What is in front and no YAML file is taken for rows."""
    from weitiao.data.rows.readers import READERS

    def names_rows(n: int, word: str) -> bool:
        if "=" in word or word.startswith("-") or word.lower().endswith((".yaml", ".yml")) or (Path(word) / "config.yaml").is_file():
            return False
        return n == 0 or word.lower().endswith(tuple(READERS)) or Path(word).exists()

    number = next((n for n, word in enumerate(words) if not names_rows(n, word)), len(words))
    return words[:number], words[number:]


def join_options(words: list[str]) -> list[str]:
    """`--method.rank 16` and `--method.rank=16` are method.rank=16; so a mistyped option is told as a setting is."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return [word.removeprefix("--") + ("=" if word.startswith("--") and "=" not in word else "") for word in joined]


@app.command()
def chat(
    run: Run,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    system: Annotated[str | None, typer.Option(help="System text of the conversation.")] = None,
) -> None:
    """Talk to what a run has learned. /reset begins anew, /exit leaves."""
    from weitiao.use.chat import chat as talk

    talk(run, max_new_tokens, temperature, top_p, system)


@app.command()
def generate(
    run: Run,
    columns: Columns = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    file: Annotated[str | None, typer.Option(help="Prompts: a text file with one a line, or rows in any format weitiao reads.")] = None,
    output: Annotated[str | None, typer.Option(help="Write {prompt, answer} lines here, as JSON lines.")] = None,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    system: Annotated[str | None, typer.Option(help="System text before each prompt.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts answered at once.  [default: 64, or fewer where memory is short]", min=1, show_default=False)] = None,
) -> None:
    """Answer one prompt, or a file of them."""
    from weitiao import config

    named = config.read_columns(columns or [], file, "--file")
    from weitiao.use.chat import generate as answer

    answer(run, prompt or [], file, output, max_new_tokens, temperature, top_p, system, batch_size, named)


@app.command()
def evaluate(
    run: Run,
    columns: Columns = None,
    data: Annotated[str | None, typer.Option(help="Rows to measure on.  [default: the run's own data.eval]", show_default=False)] = None,
    rows: Annotated[int | None, typer.Option(help="Answer this many of them.  [default: all]", min=1, show_default=False)] = None,
    base: Annotated[bool, typer.Option("--base", help="Measure the untuned model beside it.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.  [default: a half more than the longest reference]", min=1, show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows answered at once.  [default: 64, or fewer where memory is short]", min=1, show_default=False)] = None,
) -> None:
    """Loss, perplexity, exact match, field F1 where the answers are JSON; accuracy and confusion of labels."""
    from weitiao import config

    named = config.read_columns(columns or [], data, "--data")
    from weitiao.use.evaluate import evaluate as measure

    measure(run, data, rows, base, max_new_tokens, batch_size, named)


@app.command()
def merge(
    run: Run,
    output: Annotated[str | None, typer.Option(help="The new model folder.  [default: RUN/merged]", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="In what the merged weights are written: float32 or bfloat16.")] = "float32",
    base: Annotated[str | None, typer.Option(help="After training on 8 or 4 bits, what to merge into: the original weights, or those taken out of their packing.  [default: dequantized for 4 bits, original for 8]", show_default=False, metavar="original|dequantized")] = None,
) -> None:
    """Merge what was learned into plain weights, proven before they are written."""
    from weitiao.use.merge import merge as merge_run

    merge_run(run, output, dtype, base)


@app.command()
def export(
    run: Run,
    output: Annotated[str | None, typer.Option(help="The new adapter folder.  [default: RUN/export, where the adapter has to be converted]", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="ChatGLM3: write its plain Glm form here too, once, for the adapter to name as its base.", show_default=False, metavar="DIR")] = None,
) -> None:
    """Write the adapter as PEFT and other programs read it, proven before it is kept."""
    from weitiao.use.export import export as export_run

    export_run(run, output, base)


@app.command()
def prove(
    run: Run,
    batches: Annotated[int, typer.Option(help="Batches of 8 rows to prove the trie on.", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="Steps to repeat and compare with the run's record; 0: none.", min=0)] = 2,
) -> None:
    """Prove a run at length: trie against plain rows, and its recorded steps against the same steps made again."""
    from weitiao.use.prove import prove as prove_run

    prove_run(run, batches, steps)


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="The new run folder.")] = "runs/demo",
) -> None:
    """Fine-tune the embedded model on the bundled rows, and show it before and after. A few minutes on two cores."""
    from weitiao.use.demo import demo as run_demo

    run_demo(output)


@app.callback(invoke_without_command=True)
def every_command(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from weitiao import __version__

        typer.echo(__version__)
        raise typer.Exit()


# What torch reads with its first tensor and its first product; see benchmarks/results.md for both.
TORCH_READS = {
    "THP_MEM_ALLOC_ENABLE": "1",  # large tensors on huge pages, where Linux has them: a quarter less time and memory on a CPU
    # Of products in bf16, and in float32 by oneDNN, 0.8 MiB of code is kept for each shape, and every size of pass brings new ones: 16 a pass in full tuning, 26 with LoRA.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32",
}


def ask_again(lost: sys.UnraisableHookArgs) -> None:
    """What a signal raises while some object is being deleted, Python prints and forgets: it is sent once more, a moment later."""
    from weitiao.errors import Terminated

    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    again = threading.Timer(0.02, _thread.interrupt_main, [signal.SIGTERM if issubclass(lost.exc_type, Terminated) else signal.SIGINT])
    again.daemon = True
    again.start()


def main() -> None:
    """Run a command; a user's mistake ends in one message and exit code 2, a signal in the shell's own code for it."""
    from weitiao.errors import OutOfMemory, Terminated, WeitiaoError

    terminated = []

    def terminate(number: int, frame: object) -> None:
        terminated.append(number)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = ask_again
    for name, value in TORCH_READS.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # a byte or a character that the console lacks is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # typer ends so, in silence, on Ctrl-C
            typer.echo("\nStopped.", err=True)
            sys.exit(128 + terminated[0] if terminated else 130)
        raise
    except WeitiaoError as mistake:
        end_with(mistake)
    except (MemoryError, RuntimeError, OSError) as failure:
        if not (told := OutOfMemory.of(failure)):
            raise
        end_with(told)


def end_with(mistake: WeitiaoError) -> None:
    try:
        from weitiao.screen import error

        error(str(mistake))
    except (MemoryError, ImportError):  # where so little is left, without colours
        typer.echo(str(mistake), err=True)
    sys.exit(mistake.exit_code)


if __name__ == "__main__":
    main()
