"""A data set of a hub, or a folder of save_to_disk, loaded by its own library; whatever a hub's client raises is one message."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from weitiao.data.rows.files import no_such_split
from weitiao.data.rows.packages import first_line, require_package
from weitiao.data.rows.readers import suffix
from weitiao.data.rows.row import Row
from weitiao.errors import SourceError

# Written like a hub's id. Whatever is not (., ~ or / in front, a drive letter, a backslash, two slashes) is a path.
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")


def load_data_set(path: str, split: str, name: str | None) -> Any | None:
    """The loaded data set (iterable, with features), if `path` names one of a hub or of save_to_disk; else None."""
    prefix = next((prefix for prefix in HUBS if path.startswith(prefix)), None)
    if prefix:
        return HUBS[prefix](path, path.removeprefix(prefix), split, name)
    if is_saved(Path(path).expanduser()):
        return _load_saved(path, split)
    if is_hub_id(path):
        return _load_hub(path, path, split, name)
    return None


def is_hub_id(path: str) -> bool:
    # A path that is missing must be reported as missing, not looked up on the internet under the same name.
    is_local = Path(path).exists() or Path(path.split("/")[0]).exists()
    return bool(HUB_ID.fullmatch(path)) and not suffix(path) and not is_local


def is_saved(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json"))


def rows_of(path: str, data_set: Any) -> Iterator[Row]:
    # A saved data set may remember set_format("torch"), and would then give tensors in place of its own values.
    plain = data_set.with_format(None) if hasattr(data_set, "with_format") else data_set
    return (Row(dict(fields), path, number) for number, fields in enumerate(plain, start=1))


def _load_saved(path: str, split: str) -> Any:
    datasets = require_package("datasets", "datasets")
    try:
        saved = datasets.load_from_disk(str(Path(path).expanduser()))
    except Exception as error:
        raise SourceError(
            f"{path} cannot be read: {first_line(error)}",
            "Expected a whole folder written by save_to_disk, by this version of datasets or an older one.",
            "Upgrade datasets (pip install -U datasets), or write the folder again.",
        ) from error
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise no_such_split(path, split, list(saved))
    return saved[split]


def _load_hub(path: str, set_id: str, split: str, name: str | None) -> Any:
    datasets = require_package("datasets", "datasets")
    with _hub_errors(path, set_id), _cache_only_if_unreachable(datasets, set_id):
        return datasets.load_dataset(set_id, name, split=split)


def _load_modelscope(path: str, set_id: str, split: str, name: str | None) -> Any:
    modelscope = require_package("modelscope.msdatasets", "modelscope,datasets")
    with _hub_errors(path, set_id):
        loaded = modelscope.MsDataset.load(set_id, subset_name=name, split=split)
    # Its own wrapper holds the data set that knows its features; newer versions hand that over directly.
    return getattr(loaded, "ds_instance", loaded)


HUBS: dict[str, Callable[[str, str, str, str | None], Any]] = {"hub:": _load_hub, "modelscope:": _load_modelscope}


@contextlib.contextmanager
def _cache_only_if_unreachable(datasets: Any, set_id: str) -> Iterator[None]:
    """Ask the hub once. Out of its reach, datasets would retry for half a minute before it looks into its cache."""
    unreachable = _why_unreachable(set_id)
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or bool(unreachable)
    try:
        yield
    except ConnectionError as error:
        # datasets would say that the offline mode is on, which is our doing.
        raise ConnectionError(unreachable or first_line(error)) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _why_unreachable(set_id: str) -> str:
    """What keeps the hub from answering; empty if it answers."""
    hub = importlib.import_module("huggingface_hub")
    try:
        hub.HfApi().dataset_info(set_id, timeout=10)
    except hub.errors.HfHubHTTPError:  # an answer, if an unwelcome one: load_dataset tells what it means
        return ""
    except Exception as error:
        return f"the hub cannot be reached ({first_line(error)})"
    return ""


@contextlib.contextmanager
def _hub_errors(path: str, set_id: str) -> Iterator[None]:
    """Whatever a hub's client raises (every version its own kinds) -> one SourceError."""
    try:
        yield
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        expected, next_step = next(cure for kind, cure in HUB_CURES.items() if kind in kinds)
        taken = " No file or folder here has this name, so it was taken for a data set on the hub." * (path == set_id)
        raise SourceError(
            f"{path} cannot be loaded: {type(error).__name__}: {first_line(error)}",
            expected + taken,
            next_step.format(set_id=set_id),
        ) from error


_FETCH = (
    "Download it where there is a network (hf download --repo-type dataset {set_id} --local-dir rows) and give that "
    "folder; or set HF_ENDPOINT to a mirror; or take modelscope:owner/name."
)
# The first kind that the error is one of. The names are those of datasets, which need not be installed.
HUB_CURES = {
    "DatasetNotFoundError": (
        "Expected a public data set, or one that your account may read.",
        "Check the spelling; for a private or gated one, ask for access on its page and run: hf auth login",
    ),
    "ValueError": (
        "Expected a split and a configuration that the data set has.",
        "Name one of those in the message.",
    ),
    "Exception": ("Expected a hub that answers, or a data set that was fetched before.", _FETCH),
}
