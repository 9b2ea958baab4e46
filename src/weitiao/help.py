"""config.py -> the table of settings that `weitiao train --help` ends with."""

from __future__ import annotations

import textwrap

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from weitiao.config import METHODS, describe_type, every_setting


def settings_text(width: int = 80) -> str:
    """Every setting with type, unit, default and meaning, wrapped to `width` columns."""
    lines = ["", "Settings, in YAML or as name=value:"]
    group = None
    for name, info, method in every_setting():
        head = method or name.split(".")[0]
        if head != group:
            group = head
            lines += ["", *_about(method, width)]
        facts = f"{_type(name, info)}{f' ({_unit(info)})' if _unit(info) else ''}, {_default(name, info)}"
        lines.append(f"  {name}  [{facts}]")
        lines += textwrap.wrap(_meaning(name, info), width - 6, initial_indent="      ", subsequent_indent="      ")
    return "\n".join([*lines, ""])


def _about(method: str, width: int) -> list[str]:
    """The head of a method's own settings: what it is, by whom, and its learning rate."""
    if not method:
        return []
    settings = next(m for m in METHODS if m.model_fields["name"].default == method)
    about = " ".join((settings.__doc__ or "").split("\n\n")[0].split())
    return textwrap.wrap(f"method={method}: {about} Its learning rate is {settings().learning_rate:g}.", width, subsequent_indent="  ")


def _type(name: str, info: FieldInfo) -> str:
    return "|".join(m.model_fields["name"].default for m in METHODS) if name == "method" else describe_type(info)


def _unit(info: FieldInfo) -> str:
    return (info.json_schema_extra or {}).get("unit", "") if isinstance(info.json_schema_extra, dict) else ""


def _default(name: str, info: FieldInfo) -> str:
    if name == "method":
        return "default lora"
    if info.default is PydanticUndefined:
        return "required"
    if info.default is None:
        return "default below" if "default: " in _meaning(name, info) else "default none"
    return f"default {str(info.default).lower() if isinstance(info.default, bool) else info.default if info.default != '' else 'none'}"


def _meaning(name: str, info: FieldInfo) -> str:
    return "how to tune" if name == "method" else info.description or ""
