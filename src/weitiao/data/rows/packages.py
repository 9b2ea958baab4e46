"""Packages that only some sources need, and what their errors say."""

from __future__ import annotations

import importlib
from typing import Any

from weitiao.errors import SourceError


def require_package(module: str, extras: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SourceError(
            f"Reading this needs the package {package}, which cannot be imported ({error}).",
            "",
            f'Run: pip install "weitiao[{extras}]"',
        ) from error


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
