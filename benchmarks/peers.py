"""The same fine-tune by weitiao and by its peers, in turn, each in a process and with libraries of its own.

    python benchmarks/peers.py install                              an environment for each peer, named versions (--envs FOLDER: where)
    python benchmarks/peers.py tune  --data FOLDER                  which options are the quickest of each peer, on this machine
    python benchmarks/peers.py run   --data FOLDER                  the required grid, 3 alternations of 24 rows behind 12 that warm up
    python benchmarks/peers.py table                                what was stored, as a table

    python benchmarks/peers.py run --data FOLDER --jobs reviews/lora/fp32 resume/full/bf16 chats/lora/fp32/qwen-shape --peers trainer litgpt --rounds 1
    python benchmarks/peers.py run --data FOLDER --jobs resume/lora/bf16 --rounds 1 --rows 240 --measured 32 --evaluate-every 5 --until 0.5

FOLDER holds the rows' files (benchmarks/jobs.py). Same for all: the model's file, the rows, their ids and what is learned of them, which rows
make a step (12) and in which order, what is trained and where it begins, AdamW at a constant rate, gradients clipped to 1 (litgpt clips
nothing; Adam hardly sees it), threads, and large tensors on huge pages, as weitiao sets them for itself. A peer is run with the options that
were the quickest at `tune`; rows are sorted by length within a step, which spares it padding and leaves the step what it is. A job
whose losses differ from weitiao's by more than the precision allows (1e-3 in fp32, 5e-2 in bf16, relative, any step) is not counted.

Printed and stored (peers.jsonl, a line a run): rows/s and learned tokens/s over the steps behind the warm-up, peak resident memory of the
process tree (VmHWM; it includes the libraries and the loading), the loss of each step, versions, machine, command. With --until: the
seconds of training until the loss of rows set aside (--measured so many) is down there.

The grid (4 jobs x trainer, trl, trl-packing) takes 12 processes and 4 of weitiao a round. A process takes 3 steps and about 15 s to load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "peers.jsonl"
ENVIRONMENTS_AT = Path.home() / ".cache" / "weitiao" / "peers"
TORCH = "torch==2.13.0"
GRID = ["resume/lora/fp32", "resume/lora/bf16", "alpaca/lora/fp32", "alpaca/lora/bf16"]
GRID_PEERS = ["trainer", "trl", "trl-packing"]
LOSSES_WITHIN = {"fp32": 1e-3, "bf16": 5e-2}
GIB = 2**30

# ------------------------------------------------------------------------------------------------------- who is compared


@dataclass(frozen=True)
class Environment:
    """packages: what pip installs. bare: installed first and without what they ask for, where they ask for more than they use."""

    packages: tuple[str, ...]
    bare: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peer:
    """tries: options, the first is the usual one. last: tried where all others die for memory."""

    environment: str
    runner: str
    tries: tuple[dict[str, Any], ...]
    last: dict[str, Any] | None = None
    needs_gpu: bool = False


HUGGING_FACE = ("transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0")
ENVIRONMENTS = {
    "huggingface": Environment((*HUGGING_FACE, "trl==1.16.0")),
    # It asks for torchvision, torchaudio, a web server and more, none of which a text fine-tune imports.
    "llamafactory": Environment(
        ("transformers==5.6.0", "peft==0.18.1", "accelerate==1.11.0", "datasets==4.0.0", "trl==0.24.0", "einops", "fire", "omegaconf", "tyro<0.9",
         "matplotlib", "pandas", "protobuf", "scipy", "sentencepiece", "tiktoken", "hf-transfer", "pillow"),
        bare=("llamafactory==0.9.5",),
    ),
    "litgpt": Environment(("litgpt==0.5.13", "requests")),
    "liger": Environment((*HUGGING_FACE, "trl==1.16.0", "liger-kernel==0.8.5")),
    "unsloth": Environment(("unsloth==2026.10.9",)),
}
MICRO = tuple({"micro": n} for n in (4, 12, 2, 1))
BLOCKS = tuple({"blocks": n} for n in (3, 1, 6))
RECOMPUTED = {"micro": 1, "checkpointing": True}
PEERS = {
    "trainer": Peer("huggingface", "by_trainer.py", MICRO, RECOMPUTED),
    "trl": Peer("huggingface", "by_trl.py", MICRO, RECOMPUTED),
    "trl-packing": Peer("huggingface", "by_trl.py", BLOCKS, {"blocks": 12, "checkpointing": True}),
    "llamafactory": Peer("llamafactory", "by_llamafactory.py", MICRO, RECOMPUTED),
    "llamafactory-neat": Peer("llamafactory", "by_llamafactory.py", BLOCKS, {"blocks": 12, "checkpointing": True}),
    "litgpt": Peer("litgpt", "by_litgpt.py", ({"micro": 12}, {"micro": 4}, {"micro": 1})),
    "trl-liger": Peer("liger", "by_trl.py", tuple(one | {"liger": True} for one in MICRO), RECOMPUTED | {"liger": True}, needs_gpu=True),
    "unsloth": Peer("unsloth", "by_unsloth.py", MICRO, RECOMPUTED, needs_gpu=True),
}


def python_of(environments: Path, name: str) -> Path:
    return environments / name / "bin" / "python"


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# ------------------------------------------------------------------------------------------------------------- install


def install(options: argparse.Namespace) -> None:
    """torch once, in an environment that the others look into; a peer that cannot be installed is named with pip's reason."""
    options.envs.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in options.peers if fits_here(name)]
    reason = make("torch", Environment((TORCH,)), options, shared=None)
    if reason:
        sys.exit(f"torch cannot be installed: {reason}")
    for name in dict.fromkeys(PEERS[name].environment for name in chosen):
        reason = make(name, ENVIRONMENTS[name], options, shared="torch")
        print(f"{name}: " + (f"cannot be installed: {reason}" if reason else f"ready in {options.envs / name}"), flush=True)


def fits_here(peer: str) -> bool:
    if PEERS[peer].needs_gpu and not has_gpu():
        print(f"{peer}: skipped, it needs a GPU")
        return False
    return True


def make(name: str, environment: Environment, options: argparse.Namespace, shared: str | None) -> str | None:
    """The environment, unless it is there already. Why not, if not."""
    folder, marker = options.envs / name, options.envs / name / "ready"
    told = "\n".join((*environment.bare, *environment.packages))
    if marker.is_file() and marker.read_text("utf-8") == told:
        return None
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    constraints = options.envs / "constraints.txt"
    constraints.write_text(TORCH + "\n", "utf-8")
    if shared:
        (site_packages(folder) / "shared.pth").write_text(f"{site_packages(options.envs / shared)}\n", "utf-8")
    index = ["--index-url", options.torch_index] if options.torch_index and not shared else []
    for packages, more in ((environment.bare, ["--no-deps"]), (environment.packages, [])):
        if packages:
            done = subprocess.run(
                [python_of(options.envs, name), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--constraint", constraints, *index, *more, *packages],
                capture_output=True, text=True,
            )
            if done.returncode:
                return " ".join(line for line in done.stderr.splitlines() if line.startswith("ERROR"))[:400] or done.stderr[-400:]
    marker.write_text(told, "utf-8")
    return None


def site_packages(folder: Path) -> Path:
    return next((folder / "lib").glob("python3*")) / "site-packages"


# ----------------------------------------------------------------------------------------------------------- processes


def environment_of(options: argparse.Namespace) -> dict[str, str]:
    """OMP_NUM_THREADS for all alike; huge pages as weitiao sets them; nothing from a hub."""
    theirs = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return theirs | {"OMP_NUM_THREADS": str(options.threads), "THP_MEM_ALLOC_ENABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                     "DISABLE_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def watched(command: list[Any], environment: dict[str, str], options: argparse.Namespace) -> tuple[str | None, int]:
    """Runs a command; (why it did not end well or None, bytes of it and its children at their highest)."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([str(c) for c in command], env=environment, stdout=said, stderr=said, start_new_session=True)
        with contextlib.suppress(OSError):
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")  # where memory runs out, this goes and nothing else
        peak = 0
        began, reason = time.monotonic(), None
        try:
            while process.poll() is None and not reason:
                peak = max(peak, high_water(process.pid))
                if peak > options.memory * GIB:
                    reason = f"more than {options.memory:.0f} GiB"
                if time.monotonic() - began > options.timeout:
                    reason = f"more than {options.timeout} s"
                time.sleep(0.1)
        finally:  # also when we are stopped: it is in a session of its own
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode == -signal.SIGKILL and not reason:
            reason = "killed, as for memory"
        elif process.returncode and not reason:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            reason = f"exit code {process.returncode}: " + (lines[-1] if lines else "")
            if options.verbose:
                print("\n".join(lines[-40:]), file=sys.stderr)
    return reason, peak


def high_water(pid: int) -> int:
    """VmHWM of a process and of all alive below it, in bytes."""
    import psutil

    found = 0
    try:
        for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            for line in Path(f"/proc/{one.pid}/status").read_text("ascii", "replace").splitlines():
                if line.startswith("VmHWM:"):
                    found += int(line.split()[1]) * 1024
    except (psutil.NoSuchProcess, OSError):
        pass
    return found


class Bench:
    """A job folder that weitiao prepared, and the runs on it."""

    def __init__(self, job: str, steps: int, place: Path, options: argparse.Namespace):
        self.job, self.steps, self.options = job, steps, options
        self.folder = Path(tempfile.mkdtemp(prefix="job-", dir=place))
        asked = {"name": job, "data": str(options.data.resolve()), "place": str(place), "steps": steps, "measured": options.measured,
                 "evaluate_every": options.evaluate_every, "until": options.until}
        done = subprocess.run([sys.executable, HERE / "peers" / "by_weitiao.py", "--prepare", self.folder, json.dumps(asked)],
                              env=self.ours(), capture_output=True, text=True)
        self.reason = done.stderr.strip().splitlines()[-1] if done.returncode else None
        if not self.reason:
            rows = [json.loads(line)["labels"] for line in (self.folder / "rows.jsonl").read_text("utf-8").splitlines()]
            self.batch = len(rows) // steps
            self.learned = [sum(label >= 0 for row in rows[a : a + self.batch] for label in row[1:]) for a in range(0, len(rows), self.batch)]

    def ours(self) -> dict[str, str]:
        return environment_of(self.options) | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    def run(self, peer: str, tried: dict[str, Any], warm: int) -> dict[str, Any]:
        """One line of the results; with `error` where it did not end well."""
        sheet = self.folder / "sheet.json"
        sheet.unlink(missing_ok=True)
        if peer == "weitiao":
            python, runner, environment = Path(sys.executable), "by_weitiao.py", self.ours()
        else:
            python, runner, environment = python_of(self.options.envs, PEERS[peer].environment), PEERS[peer].runner, environment_of(self.options)
        line = {"job": self.job, "peer": peer, "options": tried, "warm": warm}
        reason, peak = watched([python, HERE / "peers" / runner, self.folder, sheet, json.dumps(tried)], environment, self.options)
        if reason:
            return line | {"error": reason}
        found = json.loads(sheet.read_text("utf-8"))
        if "skipped" in found:
            return line | {"error": found["skipped"]}
        seconds = sum(found["seconds"][warm:])
        counted = len(found["seconds"][warm:])
        reached = next((at for _, at, loss in found["evaluations"] if self.options.until is not None and loss <= self.options.until), None)
        return line | found | {
            "peak": max(peak, found["peak"]), "rows_a_second": self.batch * counted / seconds,
            "learned_a_second": sum(self.learned[warm : warm + counted]) / seconds, "seconds_to_loss": reached,
        }


def differ(found: dict[str, Any], ours: dict[str, Any]) -> float:
    """The largest relative difference of a step's loss; infinite where steps are missing."""
    if len(found["losses"]) != len(ours["losses"]) and not found["evaluations"]:
        return float("inf")
    return max((abs(a - b) / abs(b) for a, b in zip(found["losses"], ours["losses"])), default=float("inf"))


def allowed(job: str) -> float:
    return LOSSES_WITHIN[job.split("/")[2]]


def told(line: dict[str, Any], name: str = "") -> str:
    head = f"  {name or line['peer']:18} {json.dumps(line['options']):34}"
    if "error" in line:
        return f"{head} not run: {line['error']}"
    off = f", losses differ by {line['differ']:.1e}" + ("" if line["differ"] <= allowed(line["job"]) else " NOT COUNTED") if "differ" in line else ""
    until = f", {line['seconds_to_loss']:.0f} s to the loss" if line.get("seconds_to_loss") is not None else ""
    gpu = f" ({line['peak_gpu'] / GIB:.1f} GPU)" if line["peak_gpu"] else ""
    return (f"{head} {line['rows_a_second']:6.2f} rows/s {line['learned_a_second']:7.1f} learned tokens/s {line['peak'] / GIB:5.1f} GiB{gpu}, "
            f"losses {' '.join(f'{loss:.5f}' for loss in line['losses'][:4])}{off}{until}")


def machine() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] if Path("/proc/cpuinfo").is_file() else []
    import psutil

    gpu = ""
    if has_gpu():
        import torch

        gpu = f", {torch.cuda.get_device_name()}"
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / GIB:.0f} GiB{gpu}"


def store(line: dict[str, Any], **more: Any) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | more, ensure_ascii=False) + "\n")


def stored() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.is_file() else []


def usable(options: argparse.Namespace) -> list[str]:
    """The peers that are installed; the others are named."""
    found = []
    for peer in options.peers:
        if not fits_here(peer):
            continue
        if not (options.envs / PEERS[peer].environment / "ready").is_file():
            print(f"{peer}: skipped, its environment is not there. `python benchmarks/peers.py install --peers {peer}` makes it")
            continue
        found.append(peer)
    return found


def without_places(arguments: list[str]) -> list[str]:
    """The same, with FOLDER and ENVS where they name a place of this machine."""
    names = {"--data": "FOLDER", "--envs": "ENVS"}
    return [names.get(before, argument) for before, argument in zip(["", *arguments], arguments)]


def facts(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What is stored beside each line of this call."""
    return {"kind": kind, "call": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": machine(), "threads": options.threads,
            "command": "python " + shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *without_places(sys.argv[1:])])}


# ----------------------------------------------------------------------------------------------------------- tune, run


def tune(options: argparse.Namespace) -> None:
    """All options of each peer on the first steps of each job; the quickest whose losses agree is stored."""
    peers, beside = usable(options), facts(options, "tune")
    with tempfile.TemporaryDirectory() as place:
        for job in options.jobs:
            bench = Bench(job, options.steps, Path(place), options)
            print(f"{job}" + (f": skipped, {bench.reason}" if bench.reason else ""), flush=True)
            if bench.reason:
                continue
            ours = bench.run("weitiao", {}, options.steps - 1)
            print(told(ours), flush=True)
            for peer in peers if "error" not in ours else []:
                tries = []
                for tried in PEERS[peer].tries:
                    tries.append(attempt(bench, peer, tried, ours))
                valid = [line for line in tries if line.get("differ", float("inf")) <= allowed(job)]
                if not valid and PEERS[peer].last:
                    tries.append(attempt(bench, peer, PEERS[peer].last, ours))
                    valid = [line for line in tries if line.get("differ", float("inf")) <= allowed(job)]
                best = max(valid, key=lambda line: line["rows_a_second"], default=None)
                for line in tries:
                    store(line, chosen=line is best, **beside)
                print(f"  {peer}: " + (f"{json.dumps(best['options'])} is the quickest" if best else "no options are valid"), flush=True)


def attempt(bench: Bench, peer: str, tried: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    line = bench.run(peer, tried, bench.steps - 1)
    if "error" not in line:
        line["differ"] = differ(line, ours)
    print(told(line), flush=True)
    return line


def best_known(job: str, peer: str, here: str) -> dict[str, Any]:
    """The options that `tune` chose last on this machine; else the usual ones."""
    chosen = [line["options"] for line in stored()
              if line["kind"] == "tune" and line.get("chosen") and (line["job"], line["peer"], line["machine"]) == (job, peer, here)]
    return chosen[-1] if chosen else PEERS[peer].tries[0]


def run(options: argparse.Namespace) -> None:
    """The jobs by weitiao and by each peer in turn, so many rounds."""
    peers, beside = usable(options), facts(options, "run")
    with tempfile.TemporaryDirectory() as place:
        for job in options.jobs:
            from jobs import BATCH

            bench = Bench(job, options.warm + -(-options.rows // BATCH), Path(place), options)
            print(f"{job}" + (f": skipped, {bench.reason}" if bench.reason else ""), flush=True)
            given_up: set[str] = set()
            for number in range(options.rounds if not bench.reason else 0):
                ours = bench.run("weitiao", {}, options.warm)
                print(told(ours), flush=True)
                store(ours, round=number, **beside)
                for peer in peers:
                    if "error" in ours or peer in given_up:
                        continue
                    line = bench.run(peer, options.options or best_known(job, peer, beside["machine"]), options.warm)
                    if "error" in line:
                        given_up.add(peer)
                    else:
                        line["differ"] = differ(line, ours)
                    print(told(line), flush=True)
                    store(line, round=number, **beside)
    print(table(job_names=options.jobs, call=beside["call"]))


# --------------------------------------------------------------------------------------------------------------- table


def table(lines: list[dict[str, Any]] | None = None, job_names: list[str] | None = None, call: str | None = None) -> str:
    """Medians of the newest call for each job and peer, ratios round by round (smallest to largest); what is not counted is named."""
    head = ["job", "peer and its options", "weitiao rows/s", "peer rows/s", "times as fast", "learned tokens/s", "peak memory, GiB", "of the peer's peak",
            "losses differ by"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    newest: dict[tuple[str, str], list[dict[str, Any]]] = {}
    everything = [line for line in (stored() if lines is None else lines) if line["kind"] == "run" and (call is None or line["call"] == call)]
    for line in everything:
        if line["peer"] != "weitiao" and (not job_names or line["job"] in job_names):
            key = line["job"], line["peer"]
            newest[key] = [one for one in newest.get(key, []) if one["call"] == line["call"]] + [line]
    for (job, peer), runs in newest.items():
        errors = [line["error"] for line in runs if "error" in line]
        if errors:
            rows.append(f"| {job} | {peer} {described(runs[-1]['options'])} | | | not run: {errors[0].replace('|', '/')} | | | | |")
            continue
        ours = {line["round"]: line for line in everything if (line["job"], line["peer"], line["call"]) == (job, "weitiao", runs[0]["call"])}
        pairs = [(ours[line["round"]], line) for line in runs]
        worst = max(line["differ"] for line in runs)
        cells = [job, f"{peer} {described(runs[-1]['options'])}", spread([a["rows_a_second"] for a, _ in pairs]), spread([b["rows_a_second"] for _, b in pairs]),
                 spread([a["rows_a_second"] / b["rows_a_second"] for a, b in pairs]) if worst <= allowed(job) else "not counted",
                 " : ".join(f"{statistics.median(one['learned_a_second'] for one in side):.1f}" for side in zip(*pairs)),
                 " : ".join(f"{statistics.median(one['peak'] for one in side) / GIB:.1f}" for side in zip(*pairs)),
                 spread([a["peak"] / b["peak"] for a, b in pairs]), f"{worst:.1e}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def described(options: dict[str, Any]) -> str:
    return "(" + ", ".join(f"{k} {v}" for k, v in options.items()) + ")"


def spread(values: list[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}–{max(values):.2f})"


# ------------------------------------------------------------------------------------------------------------- command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made, tuned, ran, shown = (commands.add_parser(name) for name in ("install", "tune", "run", "table"))
    for one in (made, tuned, ran):
        one.add_argument("--envs", type=Path, default=ENVIRONMENTS_AT, help="folder of the peers' environments")
        one.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS) if one is made else GRID_PEERS)
    made.add_argument("--torch-index", default="", help="index to take torch from, such as that of its CPU builds")
    for one in (tuned, ran):
        one.add_argument("--data", type=Path, required=True, help="folder of the rows' files")
        one.add_argument("--jobs", nargs="+", default=GRID, help="rows/method/precision[/model]")
        one.add_argument("--threads", type=int, default=os.cpu_count())
        one.add_argument("--memory", type=float, default=free_memory(), help="GiB; a process that takes more is ended")
        one.add_argument("--timeout", type=int, default=3600, help="seconds a process")
        one.add_argument("--verbose", action="store_true", help="more of what a process said before it failed")
        one.set_defaults(measured=0, evaluate_every=0, until=None)
    tuned.add_argument("--steps", type=int, default=2, help="all but the last one warm up")
    ran.add_argument("--rounds", type=int, default=3)
    ran.add_argument("--rows", type=int, default=24, help="that are counted, in steps of 12")
    ran.add_argument("--warm", type=int, default=1, help="steps before them that are not; 0 counts all")
    ran.add_argument("--options", type=json.loads, help='of every peer, in the place of the tuned ones, such as \'{"micro": 4}\'')
    ran.add_argument("--measured", type=int, default=0, help="rows set aside for the evaluation loss")
    ran.add_argument("--evaluate-every", type=int, default=0, help="steps")
    ran.add_argument("--until", type=float, help="stop when the evaluation loss is down there")
    shown.add_argument("--jobs", nargs="+")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as Ctrl-C: what is running is ended with us
    if options.command == "table":
        return print(table(job_names=options.jobs))
    {"install": install, "tune": tune, "run": run}[options.command](options)


def free_memory() -> float:
    import psutil

    return round(psutil.virtual_memory().available / GIB * 0.95, 1)


if __name__ == "__main__":
    main()
