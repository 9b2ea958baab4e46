"""A conversation in the terminal, and answers to prompts from the command line or a file."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from weitiao.data.conversation import Conversation, Message
from weitiao.data.formats import CannotTeach, convert, detect, rename, with_answer
from weitiao.data.rows import read_rows
from weitiao.data.rows.row import Row
from weitiao.data.rows.utf8 import read_lines
from weitiao.errors import RowError, SettingError, SourceError
from weitiao.model.generate import Answer, Sampling, answers_to, room, stream
from weitiao.screen import Screen, quiet_libraries
from weitiao.settings.data import DataSettings
from weitiao.train.evaluation import classify
from weitiao.train.folder import open_run, write_text
from weitiao.use.trained import Trained, open_trained

Messages = list[dict[str, str]]


def chat(run: str, max_new_tokens: int, temperature: float, top_p: float, system: str | None) -> None:
    """Read a line, stream an answer, remember both; /reset begins anew, /exit or the end of input leaves."""
    quiet_libraries()
    screen = Screen()
    trained = open_trained(run, screen)
    sampling = Sampling(max_new_tokens, temperature, top_p)
    opening: Messages = [{"role": "system", "content": s}] if (s := system or trained.settings.data.system) else []
    messages = list(opening)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # editing and history of the line, where Python has them
            import readline  # noqa: F401
        screen.tell(f"{run}. /reset begins anew, /exit leaves.")
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if said in ("/exit", "/quit"):
            return
        if said == "/reset":
            messages = list(opening)
            screen.tell("(begun anew)")
        elif said.startswith("/"):
            screen.tell("/reset begins anew, /exit leaves.")
        elif said:
            messages = answer(trained, [*messages, {"role": "user", "content": said}], sampling, screen)


def answer(trained: Trained, messages: Messages, sampling: Sampling, screen: Screen) -> Messages:
    """Stream one answer; the messages with it, or without the question where the answer was broken off."""
    prompt = trained.prompt_ids(messages)
    limit = room(trained.model)
    answer_room = trained.labels.longest if trained.labels else 1
    if trained.labels and len(prompt) + answer_room <= limit:
        ((label,), (share,)) = classify(trained.label_nll([prompt]), trained.labels)
        print(f"{label} ({share:.1%})", flush=True)
        return messages[:-1]  # each text is told by itself
    if len(prompt) + answer_room > limit:
        screen.tell(f"The conversation has {len(prompt)} tokens; the model takes {limit}. /reset begins anew.", style="yellow")
        return messages[:-1]
    pieces: list[str] = []
    whole: list[Answer] = []
    try:
        for piece in stream(trained.model, trained.template, prompt, sampling, trained.autocast, whole.append):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print("\n(broken off)")
        return messages[:-1]
    print(flush=True)
    if whole[0].cut:
        screen.tell(whole[0].note, style="yellow")
    return [*messages, {"role": "assistant", "content": "".join(pieces)}]


def generate(
    run: str, prompts: list[str], file: str | None, output: str | None, max_new_tokens: int, temperature: float,
    top_p: float, system: str | None, batch_size: int | None, columns: Mapping[str, str] | None = None,
) -> None:
    """Answer prompts; print them, or write {prompt, answer} lines to `output`. columns: which are which in `file`, where they are not the run's."""
    if not file and not any(prompt.strip() for prompt in prompts):
        raise SettingError("There is nothing to answer.", "Expected --prompt TEXT or --file FILE.")
    if output:
        refuse_target(Path(output))
    asked = [Conversation((Message("user", p),)) for p in prompts]
    if columns and file.endswith(".txt"):
        raise SettingError(f"{file} has a prompt a line, and no columns.", "Expected rows (.jsonl, .json, .csv, …) beside data.columns.")
    if file:  # before the model is loaded: it may not be there
        asked += read_prompts(file, open_run(run)[0].settings().data.with_columns(columns))
    quiet_libraries()
    screen = Screen()
    trained = open_trained(run, screen)
    opening = system or trained.settings.data.system
    asked = [c if c.messages[0].role == "system" or not opening else c.opened_by(opening) for c in asked]
    ids = [trained.prompt_ids(c.as_dicts(), c.tools) for c in asked]
    limit = room(trained.model)
    answer_room = trained.labels.longest if trained.labels else 1
    for number, prompt in enumerate(ids, 1):
        if len(prompt) + answer_room > limit:
            raise RowError(f"Prompt {number} has {len(prompt)} tokens.", f"The model takes {limit}, the answer counted.", "Shorten it.")
    answers = replies(trained, ids, Sampling(max_new_tokens, temperature, top_p), batch_size, screen)
    lines = [{"prompt": c.messages[-1].content, **answer} for c, answer in zip(asked, answers, strict=True)]
    if output:
        write_text(Path(output), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        screen.tell(f"{len(lines)} answers are in {output}.")
    elif len(lines) == 1:
        print(lines[0]["answer"] + (f" ({share:.1%})" if (share := lines[0].get("probability")) is not None else ""))
    else:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))


def replies(
    trained: Trained, prompts: Sequence[np.ndarray], sampling: Sampling, batch_size: int | None, screen: Screen,
) -> list[dict[str, object]]:
    """{answer} a prompt, or {answer, probability} where the run classifies."""
    if trained.labels:
        found = zip(*classify(trained.label_nll(prompts, screen.progress), trained.labels), strict=True)
        return [{"answer": label, "probability": round(float(share), 6)} for label, share in found]
    with trained.autocast():
        answers = answers_to(trained.model, trained.template, prompts, sampling, batch_size, screen.progress, trained.settings.training.layout)
    for number, answer in enumerate(answers, 1):
        if answer.cut:
            more = "; --max-new-tokens allows more" if answer.tokens == sampling.max_new_tokens else ""
            print(f"Answer {number} was cut at {answer.tokens} tokens{more}.", file=sys.stderr)
    return [{"answer": answer.text} for answer in answers]


def refuse_target(path: Path) -> None:
    """Told before anything is answered."""
    if path.exists():
        raise SettingError(f"{path} exists already.", "Expected a new file.", "Remove it, or choose another: --output NAME.")
    if not path.parent.is_dir():
        raise SettingError(f"There is no folder {path.parent} to write {path.name} into.")


def read_prompts(file: str, settings: DataSettings) -> list[Conversation]:
    """A line a prompt from .txt; otherwise rows as in training, with or without their answers."""
    if file.endswith(".txt"):
        if not Path(file).is_file():
            raise SourceError(f"There is no file {file}.", "Expected a prompt a line, or a file of rows.", "Check the path.")
        lines = [text.rstrip("\r\n") for _, text in read_lines(file) if text.strip()]
        if not lines:
            raise RowError(f"{file} holds no prompts.", "Expected one a line.")
        return [Conversation((Message("user", line),)) for line in lines]
    rows = list(read_rows(file))
    if absent := [theirs for theirs in settings.columns.values() if not any(theirs in row.fields for row in rows)]:
        raise RowError(f"data.columns names {', '.join(map(repr, absent))}, which no row of {file} has.", f"Its columns are {', '.join(map(str, rows[0].fields))}.")
    found = [Row(with_answer(rename(row.fields, settings.columns), settings), row.file, row.line) for row in rows]
    # The columns bear our names by now.
    settings = settings.model_copy(update={"columns": {}})
    format = detect(found, settings)
    asked = []
    for row in found:
        try:
            conversation = convert(row, format, settings)
        except CannotTeach as reason:
            raise RowError(f"{row.where} holds no prompt: {reason}.") from None
        asked.append(replace(conversation, messages=conversation.messages[: conversation.turns()[-1]]))
    return asked
