"""The settings, as config.Settings and its groups in weitiao.settings have them -> the table that `weitiao train --help` ends with."""

from __future__ import annotations

import textwrap
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from weitiao.config import every_setting
from weitiao.settings.data import Sources
from weitiao.settings.methods import METHODS, Method


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
    """A type as a user would say it: `whole number >= 1`, `auto|fp32|bf16`."""
    return "|".join(m.model_fields["name"].default for m in METHODS) if name == "method" else _type_words(info.annotation) + _bounds(info)


def _bounds(info: FieldInfo) -> str:
    signs = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}
    kinds = [(type(bound).__name__, bound) for bound in info.metadata]
    return "".join(f" {signs[kind]} {getattr(bound, kind.lower()):g}" for kind, bound in kinds if kind in signs)


def _type_words(annotation: Any) -> str:
    args = get_args(annotation)
    if annotation is Sources or annotation is Method:
        return "list" if annotation is Sources else "name"
    if str(annotation).startswith("typing.Literal"):
        return "|".join(str(a) for a in args)
    if isinstance(annotation, type) and not args:
        return {"str": "text", "bool": "true|false", "float": "number", "int": "whole number"}.get(annotation.__name__, annotation.__name__)
    if str(annotation).startswith(("list", "dict")):
        return "list" if str(annotation).startswith("list") else "map"
    if str(annotation).startswith("typing.Annotated"):
        return _type_words(args[0]) + "".join(_bounds(more) for more in args[1:] if isinstance(more, FieldInfo))
    return "|".join(_type_words(a) for a in args if a is not type(None)) or str(annotation)


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
