"""A folder that was found -> one that can be loaded: itself, or, if its weights are pickle and that is asked for, what is made of it."""

from __future__ import annotations

import re
from pathlib import Path

from weitiao.errors import SourceError
from weitiao.model.source import pickled
from weitiao.model.source.cache import converted, fingerprint_unread, plain, reason, trouble_with_storage
from weitiao.model.source.request import Notify, Request
from weitiao.model.source.whole import WANTED, flaw_of, whole


def ready(folder: Path, origin: str, request: Request) -> Path:
    """The folder, if it is whole; if its weights are pickle only, and that is asked for, the one that is made of it."""
    if request.convert_pickle and pickled.is_only(folder):
        return _from_pickle(folder, origin, request.notify)
    return whole(folder)


def is_ready(folder: Path, convert_pickle: bool) -> bool:
    """Is all there that `ready` needs?"""
    return not (pickled.flaw(folder) if convert_pickle and pickled.is_only(folder) else flaw_of(folder))


def _from_pickle(folder: Path, origin: str, notify: Notify) -> Path:
    """The folder of the cache that holds the weights of `folder`, which are pickle, as safetensors."""
    if flaw := pickled.flaw(folder):
        raise flaw
    parts, beside = pickled.files(folder), pickled.carried(folder, WANTED)
    # The hub's cache names its folders by commit; in any other a file may be changed in place.
    has_commit = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    version = folder.name if has_commit else fingerprint_unread([*beside, *parts])

    def make(staging: Path) -> Path:
        size = sum(part.stat().st_size for part in parts)
        notify(f"Converting {size / 1e9:.1f} GB of {origin} to safetensors (about {5 + round(size / 200e6)} s, once)…")
        made = staging / "model"
        try:
            pickled.convert(folder, made, beside)
        except SourceError:
            raise
        except Exception as error:
            raise trouble_with_storage(str(error)) or SourceError(
                f"The weights of {origin} cannot be converted: {reason(error)}",
                "pytorch_model*.bin, as transformers wrote them.",
                "Use a revision of the model that has *.safetensors.",
            ) from error
        (made / "README.md").write_text(f"The pickled weights of {origin}, converted by weitiao.\n", encoding="utf-8")
        return made

    return converted(f"pickle-{plain(origin)}-{version}", make, notify)
