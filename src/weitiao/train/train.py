"""Settings -> a run folder, read from top to bottom. START HERE.

    model name -> folder -> tokenizer, template -> rows -> model with its method -> proof -> steps -> what was learned
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from weitiao import __version__
from weitiao.config import Settings
from weitiao.data.dataset import Dataset
from weitiao.data.packing import trie_passes
from weitiao.data.streamed import GivenUp, Streamed, begin
from weitiao.data.survey import Facts, Survey
from weitiao.data.templates import Template, load_template
from weitiao.errors import Interrupted, OutOfMemory, RunError, SettingError, SourceError, TrainingStopped
from weitiao.model import cpu, fused, kernels, offload, quantize, stream
from weitiao.model import load as loading
from weitiao.model.methods import METHODS, count_parameters, method_of, trainable_summary
from weitiao.model.methods.method import Method
from weitiao.model.source import model_folder
from weitiao.model.source.hub import hub_id
from weitiao.model.source.wheel import EMBEDDED
from weitiao.screen import Screen, StepLine, duration, format_bytes, times
from weitiao.settings.data import DataSettings, Source
from weitiao.train import memory, samples, stepping
from weitiao.train.needs import NoPlan, Plan, Subject, Target, needs
from weitiao.train.check import Report, cache_of, eval_settings, report, room_and_vocabulary, show_brief
from weitiao.train.fitness import setting_findings
from weitiao.train.folder import Checkpoint, RunFolder, free_name
from weitiao.train.loop import Schedule, StreamedSchedule, Training, schedule_for, takes_stems
from weitiao.train.loss import learn_on_tries
from weitiao.train.optimizer import refuse_unfit
from weitiao.train.proof import Proof, Size, compare, prove, size_for
from weitiao.train.tree import show_tree
from weitiao.trie import Example


NOTHING_KEPT = "Stopped before the first step was done; nothing is kept."
PRECISION_NAMES = {dtype: name for name, dtype in loading.PRECISIONS.items()}


@dataclass(eq=False)
class Job:
    """All that a run needs before its first step. streamed: all rows, where they are still being encoded; `data` is the first of them then."""

    settings: Settings
    base: Path
    template: Template
    data: Dataset
    eval_data: Dataset
    model: torch.nn.Module
    method: Method
    accelerator: Any
    compute: torch.dtype
    obstacle: str | None
    report: Report
    subject: Subject
    planned: Plan | None
    meter: memory.Meter
    liger: kernels.Fused | None = None
    streamed: Streamed | None = None

    @property
    def rows(self) -> Any:
        """Those that steps learn from, by number."""
        return self.streamed or self.data.rows

    @property
    def base_name(self) -> str:
        """What an adapter's file names as its base: the hub id, or where the folder is."""
        return hub_id(self.settings.model.name) or str(self.base)


def train(settings: Settings, screen: Screen | None = None, show_model: bool = False, force: bool = False) -> RunFolder:
    """A new run. show_model: print the model with its method attached, as torch prints it. force: also if it is not to fit.

    Raises:
        WeitiaoError: what a user can mend; before the first step, nothing is written.
        Interrupted: Ctrl-C or SIGTERM; the run can be resumed.
    """
    screen = screen or default_screen()
    if settings.output:
        RunFolder.refuse_taken(Path(settings.output))  # before the model is loaded; the folder is not made before all processes were here
    with contextlib.ExitStack() as beside:
        with nothing_kept(settings):
            job = prepare(settings, screen, force)
            path = Path(settings.output) if settings.output else free_name(Path("runs"), default_name(settings))
            if job.planned and not force:
                refuse_full_disk(job.planned, path)
            if show_model:
                show_tree(job.model, screen)
            beside.enter_context(encoding_beside(job, screen))
            show_job(job, screen)
            settled, proof = settle(job, screen)
            # What depends on this process (the free name, the free memory) is the first one's say for all.
            path, job.settings = broadcast_object_list([path, settled])
        with claim(job, path) as run:
            if job.accelerator.is_main_process:
                write_facts(run, job, proof)
                run.start(job.settings)
            job.accelerator.wait_for_everyone()
            return carry_out(job, run, None, screen)


@contextlib.contextmanager
def nothing_kept(settings: Settings) -> Iterator[None]:
    """Ctrl-C, or no more memory, before there is a run folder."""
    try:
        yield
    except KeyboardInterrupt as end:
        raise Interrupted(NOTHING_KEPT, end) from None
    except (MemoryError, RuntimeError, OSError) as failure:
        if told := OutOfMemory.of(failure, less_memory(settings)):
            raise told from failure
        raise


def less_memory(settings: Settings) -> str:
    ways = {"training.memory=balanced": settings.training.memory not in ("balanced", "thrifty"), "shorter rows (data.max_tokens)": True,
            "model.quantize=nf4": settings.model.quantize == "none" and not METHODS[settings.method.name].TRAINS_ALL, "a smaller model": True}
    return f"Less is needed with one of these: {', '.join(name for name, open_still in ways.items() if open_still)}."


def resume(path: Path, screen: Screen | None = None) -> RunFolder:
    """Go on with a run from its newest whole checkpoint, or from its beginning if it has none."""
    run = RunFolder.open(path)
    with run.locked() if is_first_process() else contextlib.nullcontext():
        screen = screen or default_screen()
        if is_first_process():
            run.clear_staging()
        checkpoint = run.newest_whole(lambda text: screen.tell(text, style="yellow"))
        if checkpoint and run.is_finished(checkpoint.step):
            screen.tell(f"{path} is finished: {checkpoint.step} of {checkpoint.step} steps are done.")
            return run
        job = prepare(run.settings(), screen)
        refuse_other_rows(run, job)
        schedule = schedule_of(job)  # its steps are known, however many rows are
        step = checkpoint.step if checkpoint else 0
        screen.tell(f"Going on with {path} from step {step} of {schedule.steps}.")
        if job.accelerator.is_main_process:
            run.cut_metrics(step)
            run.forget_after(step)
        job.accelerator.wait_for_everyone()
        try:
            with encoding_beside(job, screen):
                return carry_out(job, run, checkpoint, screen)
        except KeyboardInterrupt as end:
            raise Interrupted(f"Stopped at once. Go on: weitiao train {path} --resume", end) from None


def encoding_beside(job: Job, screen: Screen) -> contextlib.AbstractContextManager[None]:
    """In here the rest of a stream is encoded, while other things are done."""
    return job.streamed.encoding_beside(screen.tell) if job.streamed else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------- before the first step


def prepare(settings: Settings, screen: Screen, force: bool = True) -> Job:
    """Find the model, read the rows, plan, load the weights, attach the method. force: load even what is not to fit."""
    refuse_unfit(settings.training, loading.run_dtype(settings, METHODS[settings.method.name].TRAINS_ALL))
    method = METHODS[settings.method.name]
    accelerator = make_accelerator(settings)
    stepping.refuse_unfit(settings, loading.run_dtype(settings, method.TRAINS_ALL), accelerator.num_processes)
    if settings.data.streaming and accelerator.num_processes > 1:
        raise SettingError(f"data.streaming=true reads rows in one process, and there are {accelerator.num_processes}.", "Expected one process.",
                           "Leave data.streaming out: one process encodes all rows, and the others find them in the cache.")
    offload.refuse_unfit(settings, accelerator.device.type)
    stream.refuse_unfit(settings, accelerator.device.type, accelerator.num_processes)
    base = model_folder(settings.model, notify=screen.tell)
    model_config = loading.load_config(base, settings.model)
    quantize.refuse_unfit(settings.model, model_config, method.TRAINS_ALL, accelerator.num_processes)
    kernels.refuse_unfit(settings.training.kernels, model_config, accelerator.device)
    template = load_template(settings.data.template, loading.load_tokenizer(base, settings.model))
    method = method_of(settings, template.tokenizer)
    data, streamed, eval_data, checked = read_rows(settings, method, template, model_config, screen)
    compute = loading.run_dtype(settings, method.TRAINS_ALL)
    weights = loading.weight_dtype(settings.model.dtype, method.TRAINS_ALL, compute)
    subject = Subject(settings, model_config, data.rows.paths, template.tokenizer, method)
    screen.tell(f"Planning the memory of {settings.model.name} …")
    planned = plan_of(subject, accelerator, screen)
    if planned and not force:
        refuse_too_large(planned, subject, accelerator, screen)
    elif planned and not planned.fits:
        screen.tell(f"This run would need {format_bytes(planned.peak)}, and {format_bytes(planned.available)} are free. It goes on, since --force was given.", style="yellow")
    screen.tell(f"Loading {settings.model.name} …")
    if planned and planned.gives_back:
        memory.give_back_at_once()
    meter = memory.Meter(accelerator.device)
    with meter.part("load"):
        model = loading.load_model(base, settings.model, weights, compute, "cpu" if settings.model.stream else accelerator.device)
        obstacle = loading.trie_obstacle(model)
        refuse_unsound(model, base)
        liger = kernels.fuse(model, settings.training.kernels, accelerator.device)
        learn_on_tries(model)
        model = method.attach(model, settings.method, settings.training.seed, template.tokenizer, data.rows.examples)
        fused.fuse(model)
        if settings.model.stream:
            stream.keep_in_host(loading.causal_lm(model), accelerator.device)
        else:
            model = loading.place(model, accelerator.device)
    if settings.training.checkpointing:
        loading.checkpoint_activations(model, settings.training.offload_activations, settings.model.stream)
    return Job(settings, base, template, data, eval_data, model, method, accelerator, compute, obstacle, checked, subject, planned, meter, liger, streamed)


def plan_of(subject: Subject, accelerator: Any, screen: Screen, layout: str | None = None) -> Plan | None:
    """What the run will need here; None where that cannot be told. The first of several processes tells, so that all do the same."""
    if subject.settings.model.device_map in loading.SPREADS:
        return None  # over several devices, as accelerate sees fit
    planned: Plan | NoPlan | SettingError | OutOfMemory | None = None
    if accelerator.is_main_process:
        try:
            planned = needs(subject, Target.here(accelerator.device, accelerator.num_processes), layout)
        except (NoPlan, SettingError, OutOfMemory) as reason:
            planned = reason
    (planned,) = broadcast_object_list([planned])
    if isinstance(planned, SettingError | OutOfMemory):
        raise planned
    if isinstance(planned, NoPlan):
        screen.tell(f"No plan of the memory: {str(planned).rstrip('.')}.", style="yellow")
        return None
    return planned


def refuse_too_large(planned: Plan, subject: Subject, accelerator: Any, screen: Screen) -> None:
    """Told before the weights are loaded, with the nearest that fits."""
    if planned.fits:
        return
    from weitiao.train.plan import nearest_fit

    terms = ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(planned.terms.items(), key=lambda t: -t[1])[:4])
    screen.tell("It would not fit into the memory that is free. Looking for what does …")
    nearest = nearest_fit(subject, Target.here(accelerator.device, accelerator.num_processes))
    raise SettingError(
        f"This run would need {format_bytes(planned.peak)} ({terms}), and {format_bytes(planned.available)} are free.",
        f"The nearest that fits: {nearest}." if nearest else "Nothing that was tried fits: a smaller model, or shorter rows (data.max_tokens), would.",
        "`weitiao plan` with the same settings tells more; --force trains all the same.",
    )


def refuse_full_disk(planned: Plan, path: Path) -> None:
    """Told before the first step, not after the last: nothing could be saved."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    free, needed = shutil.disk_usage(there).free, planned.disk["a checkpoint"]
    if free < needed:
        raise SettingError(f"{there} has room for {format_bytes(free)}, and a checkpoint takes {format_bytes(needed)}.", "Expected room for what is learned.",
                           "Make room, or choose another place: --output NAME; --force trains all the same.")


def make_accelerator(settings: Settings) -> Any:
    home = loading.home(settings.model)
    if home.type == "cuda" and home.index is not None:
        torch.cuda.set_device(home)
    trains_all = METHODS[settings.method.name].TRAINS_ALL
    in_half = loading.trains_in_half(settings.model, trains_all, settings.training.precision)
    return accelerator_for(torch.float32 if in_half else loading.run_dtype(settings, trains_all), cpu=home.type == "cpu")


def accelerator_for(compute: torch.dtype, cpu: bool) -> Any:
    """An accelerator that computes in `compute` beside weights in float32: autocast for halves, loss scaling for fp16."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a second run in one process may compute in another precision
    accelerator = Accelerator(mixed_precision=PRECISION_NAMES[compute].replace("fp32", "no"), cpu=cpu)
    if compute is torch.float16 and accelerator.scaler is None:
        # On a CPU accelerate (1.15) takes fp16 and computes in fp32 without a word, though torch has both of these.
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler(accelerator.device.type)
    return accelerator


def read_rows(
    settings: Settings, method: Method, template: Template, model_config: Any, screen: Screen,
) -> tuple[Dataset, Streamed | None, Dataset, Report]:
    """(rows to learn from, or the first of a stream; the stream; rows to measure on; what is to be said of them and of the settings)"""
    room, vocabulary = room_and_vocabulary(settings, method, template, model_config)
    samples.refuse_too_long(settings, template, room)
    facts = (template, room, vocabulary, settings.training.seed)
    survey, measured = Survey(Facts.of(settings.data, template, vocabulary)), None
    cache, streamed = cache_of(settings.data, screen), None
    if settings.data.streaming:
        data, streamed = begin(cache, settings.data.train, settings.data, *facts, settings.task, survey)
    else:
        data = cache.load(settings.data.train, settings.data, *facts, progress=screen.progress, task=settings.task, survey=survey)
    refuse_idle(settings, data)
    if data.labels and settings.samples.prompts:
        raise SettingError("samples.prompts are answered in words, and this run tells labels: all its rows are text and label.",
                           "Expected no prompts (samples.prompts=[]), or task=answer.",
                           "Afterwards, `weitiao generate RUN --prompt TEXT` tells the label of any text.")
    eval_data = Dataset()
    if settings.data.eval:
        counted = eval_settings(settings.data)
        measured = Survey(Facts.of(counted, template, vocabulary))
        eval_data = cache.load(settings.data.eval, counted, *facts, max_tokens=data.max_tokens, progress=screen.progress,
                               task=task_of(data), labels=data.labels, survey=measured)
    checked = report(settings, survey, measured, template, room, setting_findings(settings, template, model_config, None if streamed else len(data)))
    if not settings.data.eval and settings.data.eval_share and len(data) > 1:
        data, eval_data = data.split(settings.data.eval_share, settings.training.seed)
    return data, streamed, eval_data, checked


def task_of(data: Dataset) -> str:
    return "classify" if data.labels else "answer"


def refuse_idle(settings: Settings, data: Dataset) -> None:
    """Settings that these rows leave nothing to do: some go with labels, others with answers in words."""
    kind = "labels" if data.labels else "answers in words"
    fit = ("accuracy", "macro_f1") if data.labels else ("exact_match", "field_f1")
    if settings.evaluation.metric not in ("loss", *fit):
        raise SettingError(f"evaluation.metric={settings.evaluation.metric} cannot be measured on rows with {kind}.",
                           f"Expected loss, {' or '.join(fit)}.")
    idle = {
        "data.label_scoring=sequence": not data.labels and settings.data.label_scoring == "sequence",
        "data.cut=front": not data.labels and settings.data.cut == "front",
        "evaluation.rows": data.labels and settings.evaluation.rows is not None,
        "evaluation.max_new_tokens": data.labels and settings.evaluation.max_new_tokens is not None,
    }
    for name in (name for name, found in idle.items() if found):
        raise SettingError(f"{name} would do nothing on rows with {kind}.", f"Expected task={'answer' if data.labels else 'classify'} beside it.",
                           "Leave it out.")


def refuse_unsound(model: torch.nn.Module, base: Path) -> None:
    if name := quantize.unsound(model):
        raise SourceError(f"The weight {name} in {base} holds numbers that are not finite.", "Expected finite weights.",
                          "Fetch the checkpoint again.")


def settle(job: Job, screen: Screen) -> tuple[Settings, Proof | None]:
    """Fill in what the settings left open, so that a run goes on elsewhere as it began here; prove the layout."""
    training = job.settings.training
    prove_kernels(job, screen)
    layout, proof = training.layout, None
    if layout != "padded":
        layout, proof = prove_layout(job, screen)
    if job.planned and job.planned.layout != layout:
        proven = job.planned.parts["proof"]
        job.planned = plan_of(job.subject, job.accelerator, screen, layout)
        if job.planned:
            job.planned = replace(job.planned, parts=job.planned.parts | {"proof": proven})
    checkpointing = settle_checkpointing(job, screen)
    budget = training.nodes_per_pass or (job.planned.budget if job.planned else guessed(job, checkpointing, layout))
    name = job.settings.model.name
    filled = job.settings.model_copy(update={
        "model": job.settings.model.model_copy(update={"name": name if name in EMBEDDED else _absolute(name)}),
        "data": found_from_anywhere(job.settings.data, job.data.max_tokens),
        "task": task_of(job.data),
        "training": training.model_copy(update={
            "layout": layout, "nodes_per_pass": budget, "checkpointing": checkpointing,
            "learning_rate": job.settings.learning_rate,
            "precision": PRECISION_NAMES[job.compute], "kernels": training.kernels if job.liger else "plain",
        }),
    })
    return filled, proof


def found_from_anywhere(data: DataSettings, max_tokens: int) -> DataSettings:
    """The same rows and template by absolute paths, and the longest row in force."""
    def absolute(sources: list[Source]) -> list[Source]:
        return [source.model_copy(update={"path": _absolute(source.path)}) for source in sources]

    template = _absolute(data.template) if data.template.endswith(".jinja") else data.template
    return data.model_copy(update={
        "train": absolute(data.train), "eval": absolute(data.eval), "max_tokens": max_tokens, "template": template,
    })


def guessed(job: Job, checkpointing: bool, layout: str) -> int:
    """Nodes of a pass without a plan."""
    model = loading.causal_lm(job.model)
    return memory.guess(model, job.compute, checkpointing, layout == "padded", job.accelerator.device, job.accelerator.num_processes,
                        job.settings.training.memory)


def settle_checkpointing(job: Job, screen: Screen) -> bool:
    """As asked; else on where the plan says that the run would not fit without."""
    asked = job.settings.training.checkpointing
    if asked is not None or not (job.planned and job.planned.checkpointing):
        return bool(asked)
    loading.checkpoint_activations(job.model)
    screen.tell("Activations are recomputed in the backward pass: this run would not fit otherwise.")
    return True


def prove_kernels(job: Job, screen: Screen) -> None:
    """Liger's kernels stay if they run, and give the gradients of PyTorch's on the first batch."""
    if not job.liger:
        return
    try:
        with job.meter.part("proof"):
            worst, same = compare(job.model, first_rows(job), job.compute, str(job.accelerator.device), job.liger.without,
                                  size_of_proof(job))
        wrong = "" if same else f"give other gradients than PyTorch's here (by {worst:.1g})"
    except Exception as error:  # the compiler's, or the driver's
        if OutOfMemory.of(error):
            raise
        wrong = f"do not run here ({type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]})"
    if wrong:
        job.liger.take_off()
        job.liger = None
        screen.tell(f"Liger's kernels {wrong}: they are taken off again.", style="yellow")
    else:
        screen.tell(f"Norms, rope and activations are Liger's fused kernels; gradients as PyTorch's, within {worst:.1g}.")


def first_rows(job: Job) -> list[Example]:
    return [e for i in schedule_of(job).rows_of(1) for e in job.rows[i].examples]


def size_of_proof(job: Job) -> Size:
    return size_for(job.subject.config, job.planned.budget, job.settings.proves_frugally) if job.planned else Size()


def prove_layout(job: Job, screen: Screen) -> tuple[str, Proof | None]:
    """trie if this model proves it on its first batch, else padded, and the run says so."""
    asked = job.settings.training.layout
    if job.obstacle:
        return _fall_back(asked, job.obstacle, screen), None
    first = first_rows(job)
    checkpointing = job.settings.training.checkpointing or (job.planned and job.planned.checkpointing)
    screen.tell("Proving on the first batch that the trie computes what plain rows compute …")
    with job.meter.part("proof"):
        proof = prove(job.model, first, job.compute, str(job.accelerator.device), size_of_proof(job),
                      frugal=job.settings.proves_frugally, stems=takes_stems(checkpointing, job.accelerator.num_processes))
    if proof.passed:
        how_far = "trie = plain rows" if proof.dtype == "float32" else f"trie = plain rows within the rounding of {proof.dtype}"
        screen.tell(
            f"Proven on {_count(proof.rows, 'row')} ({proof.dtype}): {how_far}. leak {proof.leak_max:.1g}, "
            f"nll {proof.nll_max:.1g}, gradients {proof.grad_rel:.1g} (of one tensor {proof.grad_rel_max:.1g})."
        )
        if job.accelerator.device.type == "cpu" and (reason := cpu.trouble(job.compute)):
            screen.tell(f"Attention goes by PyTorch's kernels, which take longer: {reason}", style="yellow")
        return "trie", proof
    return _fall_back(asked, proof.reason, screen), proof


def _fall_back(asked: str, reason: str, screen: Screen) -> str:
    if asked == "trie":
        raise SettingError("training.layout=trie cannot be kept: " + reason + ".", next_step="Leave it at auto, or choose padded.")
    screen.pair("warning", "yellow", f"rows are padded side by side, which is right but takes longer: shared prefixes are computed for each. Why: {reason}.")
    return "padded"


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def default_name(settings: Settings) -> str:
    """<data>-<method>-<model>, such as rows-lora-smollm2-135m."""
    def stem(name: str) -> str:
        path = Path(name.rstrip("/").split(":")[-1])
        own = path.name.split(".")[0]
        return path.parent.name if own in ("train", "data", "rows") and path.parent.name else own or "rows"

    model = Path(settings.model.name.rstrip("/").split(":")[-1]).name
    return "-".join([stem(settings.data.train[0].path), settings.method.name, model.removesuffix(".gguf")])


def schedule_of(job: Job) -> Schedule | StreamedSchedule:
    return schedule_for(job.rows, job.settings.training)


def is_first_process() -> bool:
    """The first of those that torchrun started, known before any of them has met another."""
    return int(os.environ.get("RANK", "0")) == 0


def default_screen() -> Screen:
    """Speaks in the first of several processes only."""
    return Screen(quiet=not is_first_process())


def show_job(job: Job, screen: Screen) -> None:
    """The short table before a run."""
    settings, schedule = job.settings, schedule_of(job)
    nodes, tokens, steps = sharing(job, schedule)
    trainable, total = count_parameters(job.model)
    held = loading.weight_dtype(settings.model.dtype, job.method.TRAINS_ALL, job.compute)
    # Half weights under fp32 have no autocast: they multiply as they are held.
    computed = held if job.compute is torch.float32 and settings.model.quantize == "none" else job.compute
    full = settings.training.batch_size
    batch = ("up to " if len(job.data) > full and len(job.data) % full and not job.streamed else "") + _count(min(full, len(job.data)), "row")
    rows: list[tuple[str, Any]] = [
        ("model", f"{settings.model.name}, weights in {quantize.describe(settings.model, held)}, computed in {str(computed)[6:]}"),
        ("method", f"{settings.method.name}, learning rate {settings.learning_rate:g}"),
        ("template", job.template.name if job.template.name != "auto" else "the tokenizer's own"),
        ("rows", f"{len(job.data):,} to learn from" + (f", {len(job.eval_data):,} to measure on" if len(job.eval_data) else "")),
        ("tokens", f"{job.data.tokens:,} an epoch, {job.data.learned_tokens / job.data.tokens:.1%} learned; "
                   f"rows of up to {job.data.max_tokens:,}"),
        ("token trie", f"{nodes:,} nodes in the place of {tokens:,} tokens, 1 / {tokens / nodes:.2f} (first {_count(steps, 'step')})"),
        ("steps", f"{schedule.steps:,}, each of {batch}" + ("" if job.streamed else f"; {times(schedule.steps / schedule.steps_per_epoch)} through all rows")),
    ]
    if job.data.labels:
        rows.insert(4, ("labels", class_shares(job.data)))
    if job.streamed:
        rows.append(("streaming", "rows and tokens are those of the first block; the others are encoded while these are learned. Findings, the longest row "
                                  "and the plan of the memory are told from it, too: weitiao check reads all rows"))
    if settings.tokens.add:
        rows.insert(2, ("new tokens", ", ".join(settings.tokens.add)))
    screen.table("", rows)
    show_brief(job.report, screen)
    screen.tell(f"\n{trainable_summary(trainable, total)}\n")
    for note in (*quantize.dtype_notes(job.model, job.compute), *([] if screen.quiet else tokenizer_notes(job))):
        screen.tell(note, style="yellow")


def class_shares(data: Dataset) -> str:
    """`neg 50.0%, pos 50.0%`"""
    found = Counter(example.ids[example.weights > 0].tobytes() for example in data.rows.examples)
    words = zip(data.labels.words, data.labels.ids, strict=True)
    return ", ".join(f"{word} {found[ids.tobytes()] / len(data):.1%}" for word, ids in words)


def tokenizer_notes(job: Job) -> list[str]:
    """Where other programs would read these rows as other tokens; told by tokenizers that know of such."""
    told = getattr(job.template.tokenizer, "conversion_note", None)
    if told is None:
        return []
    last_turns = ((row.where, list(job.template.turns(row.conversation))[-1]) for row in job.data.rows)
    note = told((where, turn.prompt, turn.answer) for where, turn in last_turns)
    return [note] if note else []


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def sharing(job: Job, schedule: Schedule | StreamedSchedule, most_steps: int = 10) -> tuple[int, int, int]:
    """(nodes, tokens, steps looked at): what the trie saves in the first steps."""
    steps = schedule.looked_at(most_steps)
    nodes = tokens = 0
    for step in range(1, steps + 1):
        examples = [e for i in schedule.rows_of(step) for e in job.rows[i].examples]
        nodes += sum(trie.computed for trie in trie_passes(examples, 1 << 40))
        tokens += sum(len(e) for e in examples)
    return nodes, tokens, steps


# ----------------------------------------------------------------------------------------------------- the run itself


@contextlib.contextmanager
def claim(job: Job, path: Path) -> Iterator[RunFolder]:
    """The new folder, locked by the main process; taken away again if the run ends with nothing in it to keep."""
    run = RunFolder(path)
    if not job.accelerator.is_main_process:
        try:
            yield run
        except KeyboardInterrupt as end:
            raise Interrupted("Stopped at once.", end) from None
        return
    with run.locked():
        RunFolder.refuse_taken(path)  # again, now that nobody else can take it
        try:
            yield run
        except BaseException as end:
            is_kept = run.is_worth_keeping
            if not is_kept:
                shutil.rmtree(path, ignore_errors=True)
                if path.parent == Path("runs"):
                    with contextlib.suppress(OSError):  # if it is empty now
                        path.parent.rmdir()
            if isinstance(end, KeyboardInterrupt):
                raise Interrupted(f"Stopped at once. Go on: weitiao train {path} --resume" if is_kept else NOTHING_KEPT, end) from None
            raise


def write_facts(run: RunFolder, job: Job, proof: Proof | None) -> None:
    """
    Raises:
        RunError: there is no room.
    """
    try:
        _write_facts(run, job, proof)
    except OSError as error:
        raise RunError(f"{run.path} cannot be written to: {error.strerror or error}.", "Expected room and the right to write there.",
                       "Make room, or choose another: --output NAME.") from error


def _write_facts(run: RunFolder, job: Job, proof: Proof | None) -> None:
    run.write_json("environment.json", environment(job))
    run.write_text("template.jinja", job.template.source)
    run.write_json("template.json", {"name": job.template.name, "sha256": job.template.hash, "stop_id": job.template.stop_id,
                                     "begins_with_bos": job.template.begins_with_bos})
    run.write_json("data.json", {
        "rows": len(job.data), "tokens": job.data.tokens, "learned_tokens": job.data.learned_tokens, "cut": job.data.cut,
        "fingerprint": job.data.fingerprint(), "eval_rows": len(job.eval_data),
        "eval_fingerprint": job.eval_data.fingerprint(),
        "labels": job.data.labels.as_dict() if job.data.labels else None,
        "skipped": skipped(job.data),
    })
    if job.planned:
        run.write_json("plan.json", {"predicted": job.planned.as_dict()})
    run.write_json("check.json", job.report.as_dict())
    run.write_json("proof.json", proof.as_dict() if proof else {"passed": None, "reason": job.obstacle or "training.layout=padded"})


def skipped(rows: Dataset | Streamed) -> list[dict[str, str]]:
    return [{"where": s.where, "reason": s.reason} for s in rows.skipped]


def environment(job: Job) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ["torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors"]
    packages += ["bitsandbytes"] if quantize.is_quantized(job.model) else []
    packages += ["liger-kernel"] if job.liger else []
    return {
        "weitiao": __version__, "python": platform.python_version(), "platform": platform.platform(),
        **{name: version(name) for name in packages}, "device": memory.device_name(job.accelerator.device),
        "threads": torch.get_num_threads(), "processes": job.accelerator.num_processes, "command": sys.argv,
    }


def refuse_other_rows(run: RunFolder, job: Job) -> None:
    """A run goes on only with the rows it began with."""
    known = run.read_json("data.json")
    for data, key, what in ((job.data, "fingerprint", "learned from"), (job.eval_data, "eval_fingerprint", "measured")):
        if data.fingerprint() != known[key]:
            raise RunError(f"The rows {what} are not those that {run.path} began with.",
                           "Expected the same files, unchanged, and the same tokenizer.",
                           "Bring them back, or begin a new run.")


def carry_out(job: Job, run: RunFolder, checkpoint: Checkpoint | None, screen: Screen) -> RunFolder:
    """The steps, and what is left behind when they are done."""
    settings = job.settings
    steps = schedule_of(job).steps
    line = StepLine(screen, steps, checkpoint.step if checkpoint else 0, lambda: memory.used(job.accelerator.device))
    try:
        with interruptible(screen, job.streamed.give_up if job.streamed else None) as signals, job.meter.part("steps"):
            training = Training(
                settings, run, job.model, job.method, job.base_name, job.template, job.rows, job.eval_data.rows,
                job.accelerator, settings.training.layout, settings.training.nodes_per_pass, line,
                stop_requested=lambda: bool(signals), labels=job.data.labels,
            )
            if checkpoint:
                restore(training, checkpoint, run, screen)
            if not training.fit():
                raise Interrupted(how_it_stopped(run, training), signals[0] if signals else signal.SIGINT)
            training.save(must=True)
            if job.accelerator.is_main_process:
                try:
                    finish(run, job, training, line)
                except OSError as error:
                    raise TrainingStopped(
                        f"All {steps} steps are done, but {run.path} cannot be finished: {error}.",
                        f"What was learned stands in {run.checkpoints_folder}.", f"Make room: weitiao train {run.path} --resume.",
                    ) from error
    except (MemoryError, RuntimeError) as failure:
        again = f"Where more is free: weitiao train {run.path} --resume. " if run.is_worth_keeping else ""
        if told := OutOfMemory.of(failure, again + less_memory(settings)):
            raise told from failure
        raise
    finally:
        line.close()
    if job.accelerator.is_main_process:
        show_end(run, job, training, line, screen)
    job.accelerator.wait_for_everyone()
    if settings.samples.prompts and job.accelerator.is_main_process:  # last: whatever happens to it, the run is finished
        samples.answer_prompts(job.model, job.method, settings, job.template, run, job.accelerator.autocast, screen)
    return run


def restore(training: Training, checkpoint: Checkpoint, run: RunFolder, screen: Screen) -> None:
    """As it was there; rows of a stream are waited for."""
    if isinstance(training.rows, Streamed) and not training.rows.whole:
        screen.tell("Encoding the rows that were learned from so far …")
    try:
        training.restore(checkpoint)
    except GivenUp:
        raise Interrupted(f"Stopped at step {checkpoint.step}, where it was to go on. Go on: weitiao train {run.path} --resume", signal.SIGINT) from None


def how_it_stopped(run: RunFolder, training: Training) -> str:
    if not training.step:
        return NOTHING_KEPT
    kept = "" if training.saved_step == training.step else ", which could not be saved; the checkpoint before it stands"
    return f"Stopped after step {training.step} of {training.schedule.steps}{kept}. Go on: weitiao train {run.path} --resume"


def finish(run: RunFolder, job: Job, training: Training, line: StepLine) -> None:
    """Publish the best checkpoint, draw the loss, sum up."""
    from weitiao.train.curve import draw

    best = training.best.get("step", training.step)
    saved = run.checkpoints()
    checkpoint = next((c for c in saved if c.step == best), saved[-1])  # the best one met a full disk, maybe
    folder = run.publish(checkpoint, job.method.FOLDER)
    job.template.tokenizer.save_pretrained(folder)
    metrics = run.read_metrics()
    run.write_json("summary.json", {
        "steps": training.step, "published_step": checkpoint.step, "best": training.best, "seconds": round(line.seconds, 1),
        "last_loss": next(m["loss"] for m in reversed(metrics) if "loss" in m),
        "speeds": {k: round(v, 2) for k, v in line.speeds().items()},
        "peak_memory_bytes": memory.peak(job.accelerator.device),
    })
    if job.streamed:
        run.write_json("data.json", run.read_json("data.json") | {"skipped": skipped(job.streamed), "streamed": {"read": job.streamed.read, "whole": job.streamed.whole}})
    if job.planned:
        run.write_json("plan.json", {"predicted": job.planned.as_dict(), "measured": measured(job, line)})
    draw(metrics, run.path / "loss.png")


def measured(job: Job, line: StepLine) -> dict[str, Any]:
    """What the plan is held against: bytes beside those that were there before the model came, and seconds."""
    job.meter.note()
    return {"parts": job.meter.peaks, "peak": job.meter.worst, "before": job.meter.before,
            "seconds_a_step": round(line.training / max(1, line.done - line.first_step), 3)}


def planned_and_measured(job: Job) -> str:
    """`2.3 GiB planned; 2.4 GiB measured (steps), beside 0.6 GiB that were taken before`"""
    part, found = max(job.meter.peaks.items(), key=lambda item: item[1])
    if not (planned := job.planned):
        return f"{format_bytes(found)} ({part})"
    expected = max(planned.parts.get(name, 0) for name in job.meter.peaks)  # a run that goes on proves nothing again
    kept = f" and up to {format_bytes(planned.kept)} that the allocator keeps" if planned.kept else ""
    before = f", beside {format_bytes(job.meter.before)} that were taken before" if job.meter.before else ""
    return f"{format_bytes(expected)} planned{kept}; {format_bytes(found)} measured ({part}){before}"


def show_end(run: RunFolder, job: Job, training: Training, line: StepLine, screen: Screen) -> None:
    speeds = line.speeds()
    losses = [m["loss"] for m in run.read_metrics() if "loss" in m]
    rows: list[tuple[str, Any]] = [
        ("loss", f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last"),
        ("time", f"{duration(line.seconds)}; {speeds['rows']:.2f} rows/s, {speeds['tokens']:,.0f} tokens/s ({speeds['nodes']:,.0f} computed)"),
        ("memory", planned_and_measured(job)),
    ]
    if training.best:
        rows.insert(1, ("best", f"step {training.best['step']} by {training.best['metric']}"))
    rows.append(("run folder", str(run.path)))
    screen.table("", rows)
    if job.streamed and not job.streamed.whole:
        screen.tell(job.streamed.told())
    rows_to_measure = "" if len(job.eval_data) else " --data OTHER_ROWS.jsonl"
    merge = "" if job.method.why_not_merged(job.model) else f"\nMerge it:     weitiao merge {run.path}"
    use = f"Try it:       weitiao generate {run.path} --prompt \"…\"" if job.data.labels else f"Talk to it:   weitiao chat {run.path}"
    screen.tell(f"\n{use}\nMeasure it:   weitiao evaluate {run.path}{rows_to_measure}{merge}")


@contextlib.contextmanager
def interruptible(screen: Screen, on_signal: Callable[[], None] | None = None) -> Iterator[list[int]]:
    """Signals met so far. The first asks the loop to stop in good order; a second Ctrl-C ends at once."""
    signals: list[int] = []

    def note(number: int, frame: Any) -> None:
        if signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.append(number)
        if on_signal:
            on_signal()
        screen.tell("\nStopping after this pass, or the evaluation that is under way, and saving. Ctrl-C again to stop at once.", style="yellow")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs us there stops us by other means
        yield signals
        return
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
