"""What is asked for: a model by its name, how names are written, and whom to tell when there is something to wait for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # owner/name, as on a hub
SMALL = "smollm2-135m"  # the embedded model, which needs no hub
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    name: str
    revision: str | None
    convert_pickle: bool
    notify: Notify
