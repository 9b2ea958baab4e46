"""A model of a hub, the Hugging Face hub or ModelScope: the copy in the hub's own cache, else downloaded into it.

A copy that is here and whole is used without asking the network. A hub that does not answer is given up soon, and what it refuses
is told in one message with the other ways to the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from weitiao.errors import SourceError
from weitiao.model.source import pickled
from weitiao.model.source.cache import reason, trouble_with_storage
from weitiao.model.source.ready import is_ready, ready
from weitiao.model.source.request import ID, SMALL, Request
from weitiao.model.source.whole import CONVERT_ADVICE, WANTED, no_safetensors

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
        return ready(copy, repository, request)
    try:
        wanted = _ask_hub(repository, request)
        request.notify(f"Fetching {repository} from the hub…")
        folder = download(wanted)
    except SourceError:
        raise
    except Exception as error:
        raise _hub_refusal(repository, request.revision, error) from error
    return ready(folder, repository, request)


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
        return ready(copy, model, request)
    request.notify(f"Fetching {model} from ModelScope…")
    try:
        folder = download(WANTED)
        is_safe = any(folder.glob("*.safetensors"))
        if request.convert_pickle and not is_safe:  # pickle is asked for only now, or it would come beside safetensors
            folder = download([*WANTED, *pickled.WANTED])
    except Exception as error:
        raise trouble_with_storage(str(error), "MODELSCOPE_CACHE") or SourceError(
            f"{model} is not in ModelScope's local cache, and could not be fetched: {reason(error)}",
            "A model that ModelScope has, and a connection to it.",
            f"Check the spelling and the connection, copy the model's folder here and name it, or use "
            f"{SMALL!r}, which comes from PyPI.",
        ) from error
    if not is_safe and not request.convert_pickle:
        raise SourceError(f"{model} on ModelScope has no *.safetensors.", "config.json beside *.safetensors.",
                          f"If its page lists pytorch_model*.bin: {CONVERT_ADVICE}")
    return ready(folder, model, request)


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
    return folder if has_tokenizer and is_ready(folder, request.convert_pickle) else None


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
        raise no_safetensors(repository, files)
    return _patterns(with_pickle=not is_safe)


def _hub_refusal(repository: str, revision: str | None, error: Exception) -> SourceError:
    if trouble := trouble_with_storage(str(error), "HF_HOME"):
        return trouble
    for cls in type(error).__mro__:
        if cls.__name__ in REFUSALS:
            found, next_step = REFUSALS[cls.__name__]
            return SourceError(found.format(repository, revision), "", next_step)
    return SourceError(
        f"{repository} is not in the local cache, and the hub cannot be reached: {reason(error)}",
        "A copy here, or a connection to the hub.",
        f"Copy the model's folder here and name it, write 'modelscope:{repository}' if ModelScope has it, set HF_ENDPOINT to a "
        f"mirror, or use {SMALL!r}, which comes from PyPI.",
    )
