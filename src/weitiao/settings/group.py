"""What a setting is, and the short forms in which people write values.

A group of settings is a class: `rank: int = setting(16, "rank of each update", ge=1)`. What enters are plain values, as YAML
reads them; what leaves is frozen. A name that the group does not have is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def setting(default: Any, meaning: str, unit: str = "", **bounds: Any) -> Any:
    """One setting: its default (… where there is none), what it means, its unit, its bounds (ge, gt, le, lt)."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit} if unit else None, **bounds)


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def refuse_idle(group: Group, needed: str, has_it: bool, *names: str) -> None:
    """A setting that would do nothing is refused, with what it goes with."""
    for name in names:
        if not has_it and getattr(group, name) != type(group).model_fields[name].default:
            raise ValueError(f"{name} goes with {needed}, and would do nothing here")  # the group's name stands before it


def name_alone(value: Any) -> Any:
    """`method: lora` is short for `method: {name: lora}`."""
    return {"name": value} if isinstance(value, str) else value


def one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path, Mapping)) else value


def one_name(value: Any) -> Any:
    return [value] if isinstance(value, str) and value not in ("all-linear", "auto") else value


Names = Annotated[list[str], BeforeValidator(one_name)]
Texts = Annotated[list[str], BeforeValidator(one_or_many)]
