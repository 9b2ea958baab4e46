"""The settings of `data`: where rows come from, how one is read and written out, and which are left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from weitiao.settings.group import Group, one_or_many, setting


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, (str, Path)) else value


def _keys_as_text(value: Any) -> Any:
    """Labels are told by text in every format; a list names labels 0, 1, …"""
    value = dict(enumerate(value)) if isinstance(value, list) else value
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value


class Source(Group):
    path: str = setting(..., "a file, a folder, a data set id (owner/name, hub:name, modelscope:owner/name)")
    split: str = setting("train", "which split of a data set")
    subset: str | None = setting(None, "which configuration of a data set on a hub")
    share: float | None = setting(None, "its part of the mix, against the other files' shares; all files or none", gt=0)


Sources = Annotated[list[Annotated[Source, BeforeValidator(_path_alone)]], BeforeValidator(one_or_many)]


class DataSettings(Group):
    train: Sources = setting(..., "rows to learn from: one or several files or data sets, each a path or {path, split, subset, share}", min_length=1)
    eval: Sources = setting([], "rows to measure on, never learned from")
    eval_share: float = setting(0.0, "part of the training rows to set aside for measuring, if data.eval is empty", ge=0, lt=1)
    format: Literal["auto", "instruction", "completion", "messages", "sharegpt", "label"] = setting("auto", "how a row is laid out; auto: told from its columns")
    columns: dict[str, str] = setting({}, "other names of columns, such as {instruction: question, output: answer}")
    labels: Annotated[dict[str, str], BeforeValidator(_keys_as_text)] = setting({}, "text+label rows: the word that each label is answered with, such as {0: neg, 1: pos}; [neg, pos] is short for it")
    label_scoring: Literal["token", "sequence"] = setting("token", "classify: a label is told by its one token; or by all tokens of its word and the stop token")
    template: str = setting("auto", "auto: the tokenizer's own chat template; or a named one, or a .jinja file")
    system: str | None = setting(None, "system text put before rows that have none")
    weight_column: str | None = setting(None, "column that holds how much a row counts in the loss")
    max_tokens: int | None = setting(None, "longest row; default: the model's limit or the rows' 99th percentile, whichever is less", "tokens", ge=8)
    cut: Literal["auto", "end", "front"] = setting("auto", "what a row longer than that loses: the end of its answer, or, before a label, the front of what was said; auto: whichever fits")
    bad_rows: Literal["skip", "refuse"] = setting("skip", "rows that cannot teach: skip and name them, or stop")
    bad_share: float = setting(0.05, "stop in any case when more than this share of the rows cannot teach", ge=0, le=1)
    streaming: bool = setting(False, "begin to learn from the first rows while the rest is still being encoded; needs training.steps. Given up: the order is drawn in windows (4,096 rows, then 16,384, and so on by four), not over all rows, so rows sorted by topic are learned topic by topic; data.max_tokens and the findings before the run are told from the first 4,096 rows; a row that cannot be read stops the run where it stands. Kept: each row comes once before any comes twice, and the same settings take the same steps, however fast rows are encoded or wherever the run was interrupted")
    cache_gb: float = setting(20.0, "encoded rows that weitiao's cache keeps for the next run, at most; those not used for longest go first; 0: none", "GB", ge=0)

    def with_columns(self, columns: Mapping[str, str] | None) -> DataSettings:
        """For a file whose columns are others than these, its format told from them anew; the same if none are named."""
        return self.model_copy(update={"columns": dict(columns), "format": "auto"}) if columns else self
