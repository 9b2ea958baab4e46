"""All that makes a run: `Settings`, how its groups go together, and how it is read and written.

Every setting is born once: name, type, default, bounds, unit, meaning. Those of a group stand in weitiao.settings, task, output
and what decides between groups in `Settings`. YAML, the command line (`method.rank=16`) and the help text are all read from
there; nothing else in weitiao has a default for any of them.
Unknown names are refused with the nearest known one. A setting keeps its name from YAML to the place that uses it.

    model: smollm2-135m          is short for   model: {name: smollm2-135m}
    data: rows.jsonl             is short for   data: {train: [{path: rows.jsonl}]}
    method: lora                 is short for   method: {name: lora}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, ValidationError, model_validator
from pydantic.fields import FieldInfo

from weitiao.errors import SettingError, SourceError, nearest
from weitiao.settings.data import DataSettings, Source
from weitiao.settings.group import Group, name_alone, setting
from weitiao.settings.implied import with_memory, with_stream
from weitiao.settings.methods import METHODS, FullSettings, LoraSettings, Method, PrefixSettings, TokensSettings
from weitiao.settings.mistakes import explain
from weitiao.settings.model import ModelSettings
from weitiao.settings.results import EvaluationSettings, SamplesSettings, SavingSettings
from weitiao.settings.training import OTHER_RATES, TrainingSettings, first_rate

NO_ROWS = "none"  # data.train where none are named
LEAST_HALF_EPSILON = 1e-4  # 1e-6 still makes every weight NaN in a step or two; tiny Bloom and Llama, all weights trained


class Settings(Group):
    """All that makes a run."""

    model: Annotated[ModelSettings, BeforeValidator(name_alone)] = ModelSettings()
    data: DataSettings
    task: Literal["auto", "answer", "classify"] = setting("auto", "answer: texts are learned; classify: one of a few labels is, and told by comparing them alone; auto: classify if all rows are text and label")
    method: Method = LoraSettings()
    tokens: TokensSettings = TokensSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    saving: SavingSettings = SavingSettings()
    samples: SamplesSettings = SamplesSettings()
    output: str | None = setting(None, "the run folder; default: runs/<data>-<method>-<model>, numbered")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        values = with_stream(with_memory(values)) if isinstance(values, Mapping) else values
        data = values.get("data") if isinstance(values, Mapping) else None
        if isinstance(data, (str, list)):
            return {**values, "data": {"train": data}}
        if isinstance(data, Mapping) and "path" in data and "train" not in data:  # the one source's settings and data's in one
            source = {k: v for k, v in data.items() if k in Source.model_fields}
            return {**values, "data": {"train": source} | {k: v for k, v in data.items() if k not in source}}
        return values

    @model_validator(mode="after")
    def _shares_for_all_or_none(self) -> Settings:
        for name, sources in (("data.train", self.data.train), ("data.eval", self.data.eval)):
            given = [source.share is not None for source in sources]
            if any(given) and not all(given):
                raise ValueError(f"{name}: give every file a share, or none")
        self._can_stream()
        self._weights_can_learn()
        self._weights_can_be_streamed()
        if self.training.rounding != "auto" and not (isinstance(self.method, FullSettings) and self.model.dtype == "bfloat16"):
            raise ValueError("training.rounding goes with method=full and model.dtype=bfloat16, and would do nothing here")
        self._one_rate_for_all()
        self._rate_is_known()
        if self.evaluation.metric != "loss" and not self.data.eval and not self.data.eval_share:
            raise ValueError(f"evaluation.metric={self.evaluation.metric} needs rows to measure on: give data.eval=FILE or data.eval_share=0.1, "
                             "or leave it at loss")
        return self

    def _can_stream(self) -> None:
        """What wants all rows before the first step does not go with data.streaming."""
        if not self.data.streaming:
            return
        if self.training.steps is None:
            raise ValueError("data.streaming=true needs training.steps: how many rows an epoch has is not known before all are read. "
                             f"Rows x epochs / {self.training.batch_size} (training.batch_size) are as many steps as training.epochs would give")
        if self.data.eval_share:
            raise ValueError("data.streaming=true cannot set data.eval_share of the rows aside: they are drawn from all rows, which are not read yet. "
                             "Give rows to measure on in a file of their own: data.eval=FILE")
        if any(source.share is not None for source in self.data.train):
            raise ValueError("data.streaming=true reads one file after the other, and data.train gives them shares of a mix of all rows. "
                             "Leave the shares out, or data.streaming")

    def _one_rate_for_all(self) -> None:
        """L-BFGS takes one step for all weights together."""
        method = self.method
        two = ("method.plus_ratio" if isinstance(method, LoraSettings) and method.plus_ratio != 1 else
               f"tokens.add beside method={method.name}" if self.tokens.add and not isinstance(method, (LoraSettings, FullSettings)) else "")
        if two and self.training.optimizer == "lbfgs":
            raise ValueError(f"training.optimizer=lbfgs has one learning rate for all weights, and {two} wants two. "
                             "Leave that out, or choose another optimizer")

    def _rate_is_known(self) -> None:
        optimizer = self.training.optimizer
        if optimizer in OTHER_RATES and self.training.learning_rate is None:
            raise ValueError(
                f"training.optimizer={optimizer} needs training.learning_rate: the default of method={self.method.name} was found for Adam, and "
                f"{OTHER_RATES[optimizer]}. A first value that learned: training.learning_rate={first_rate(optimizer, self.method):g}"
            )

    def _weights_can_learn(self) -> None:
        """Full tuning changes the weights themselves, so they must be able to take a small step."""
        if not isinstance(self.method, FullSettings):
            return
        if self.model.quantize != "none":
            raise ValueError(f"method=full trains weights of the base, but model.quantize={self.model.quantize}: a step is far below what "
                             "8 or 4 bits can tell apart. Choose method=lora, or model.quantize=none")
        precision, epsilon = self.training.precision, self.training.adam_epsilon
        if self.model.dtype == "float16" and precision not in ("auto", "fp16"):
            raise ValueError(f"model.dtype=float16 trains weights in float16, and training.precision={precision} computes in another type. "
                             "Leave model.dtype out: trained weights are float32")
        if self.model.dtype == "float16" and "adam" in self.training.optimizer and epsilon < LEAST_HALF_EPSILON:
            raise ValueError(
                f"model.dtype=float16 trains weights in float16, with training.adam_epsilon={epsilon:g}. In float16 the squares of "
                f"gradients below 0.0002 are 0, and {epsilon:g} is {0 if epsilon < 3e-8 else epsilon:g}: Adam divides by next to nothing, "
                "and weights become NaN. training.adam_epsilon=1e-4 works; so does model.dtype=float32, at twice the memory, which learns better")

    def _weights_can_be_streamed(self) -> None:
        if not self.model.stream:
            return
        if isinstance(self.method, (FullSettings, PrefixSettings)):
            why = "trains the weights themselves" if isinstance(self.method, FullSettings) else "hands each layer keys and values that learn"
            raise ValueError(f"model.stream=true brings frozen layers one at a time, and method={self.method.name} {why}. Choose method=lora")
        if not self.training.checkpointing:
            raise ValueError("model.stream=true computes each layer again in the backward pass, and training.checkpointing=false says not to. "
                             "Leave that out")

    @property
    def learning_rate(self) -> float:
        return self.training.learning_rate or self.method.learning_rate

    @property
    def proves_frugally(self) -> bool:
        """Is the proof to hold little memory: short rows, and sketches of gradients?"""
        return self.training.step_in_backward or self.model.stream


# ---------------------------------------------------------------------------------------------- reading settings


def read(file: str | None = None, overrides: Sequence[str] = (), **given: Any) -> Settings:
    """Settings from a YAML file, then `given` (dotted names by keyword), then overrides such as `method.rank=16`.

    Raises:
        SourceError: the file is missing.
        SettingError: it is no YAML, or a setting is unknown or out of bounds.
    """
    return parse(gather(file, overrides, **given))


def gather(file: str | None = None, overrides: Sequence[str] = (), **given: Any) -> dict[str, Any]:
    """What `read` makes settings of, not looked at yet."""
    values = _read_yaml(file) if file else {}
    for name, value in given.items():
        if value is not None:
            _put(values, name, value)
    for override in overrides:
        name, equals, text = override.removeprefix("--").partition("=")
        if not equals or not name:
            raise SettingError(
                f"Found {override!r} among the settings.", "Expected name=value, such as method.rank=16.",
                "`weitiao train --help` lists every setting.",
            )
        try:
            value = read_scalar(text)
        except yaml.YAMLError as error:
            raise SettingError(f"The value of {name} cannot be read: {text!r}.", str(error).splitlines()[0]) from None
        _put(values, name.replace("-", "_"), value)
    return values


def names_rows(values: Mapping[str, Any]) -> bool:
    """Do these settings say what to learn from?"""
    data = values.get("data")
    return bool(data) and (not isinstance(data, Mapping) or bool({"train", "path"} & set(data)))


def without_rows(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings about no rows in particular."""
    data = values.get("data")
    others = {k: v for k, v in data.items() if k in DataSettings.model_fields or k not in Source.model_fields} if isinstance(data, Mapping) else {}
    return {**values, "data": others | {"train": NO_ROWS}}


def read_columns(words: Sequence[str], file: str | None, option: str) -> dict[str, str]:
    """data.columns of the file that an option names, for a command whose other settings are a run's own.

    Raises:
        SettingError: the words say something else, or no file is named.
    """
    for word in words:
        if not word.startswith("data.columns="):
            raise SettingError(f"Found {word!r}.", "Expected nothing beside the run, its options and data.columns='{output: answer}', in quotes: all else is as it was trained.",
                               "A file is named by --data (evaluate) or --file (generate), a prompt by --prompt." if "=" not in word else "")
    if words and not file:
        raise SettingError("data.columns says which columns of a file are which, and no file is named.", f"Expected {option} beside it.")
    return parse(without_rows(gather(None, words))).data.columns


def parse(values: Mapping[str, Any]) -> Settings:
    """Settings from plain values; every mistake in them is told in one message."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise explain(error, values, [(name, method) for name, _, method in every_setting()]) from None


def to_yaml(settings: Settings) -> str:
    return yaml.safe_dump(settings.model_dump(mode="json"), allow_unicode=True, sort_keys=False)


def read_scalar(text: str) -> Any:
    """A value as YAML reads it, but for 1e-4, which YAML 1.1 takes for a text."""
    value = yaml.safe_load(text) if text.strip() else text or None
    if isinstance(value, str) and value == text.strip():  # not in quotes
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _read_yaml(file: str) -> dict[str, Any]:
    path = Path(file)
    if (path / "config.yaml").is_file():
        raise SourceError(f"{file} is a folder.", "Expected a YAML file of settings.", f"Such as {path / 'config.yaml'}")
    if path.is_dir():
        inside = sorted(path.glob("*.y*ml"))
        raise SourceError(f"{file} is a folder, and no run.", "Expected a YAML file of settings, or a run folder.",
                          f"It holds {', '.join(str(p) for p in inside[:4])}." if inside else "")
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise SourceError(f"There is no file {file}.", "Expected a YAML file of settings, or a run folder.", nearest(str(path), [str(path.parent / s) for s in siblings]))
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{file} is not readable as YAML.", str(error), "Check indentation and colons.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise SettingError(f"{file} holds a {type(values).__name__}.", "Expected settings such as `data: rows.jsonl`.")
    return values


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `method.rank` in nested values; a short form on the way (`method: lora`) is spelled out first."""
    *groups, leaf = dotted.split(".")
    here = values
    for i, group in enumerate(groups):
        inner = here.get(group)
        if i == 0 and group == "data" and isinstance(inner, (str, list)):
            inner = {"train": inner}
        elif i == 0 and group in ("model", "method") and isinstance(inner, str):
            inner = {"name": inner}
        if not isinstance(inner, (Mapping, type(None))):
            name = ".".join(groups[: i + 1])
            raise SettingError(
                f"{dotted} cannot be set: {name} is {inner!r}.", f"Expected {name} to be a group of settings.",
                f"Give it as a whole, such as {name}='[{{path: a.jsonl, share: 2}}, {{path: b.jsonl, share: 1}}]'."
                if name in ("data.train", "data.eval") else "`weitiao train --help` lists every setting.",
            )
        here[group] = here = dict(inner or {})
    here[leaf] = value


# -------------------------------------------------------------------------------------------- listing settings


def every_setting() -> Iterator[tuple[str, FieldInfo, str]]:
    """(dotted name, field, note) of every setting; the note says which method a method's setting belongs to.

    `data.train[].share` is a setting of each source in the list.
    """
    for name, info in Settings.model_fields.items():
        if name == "method":
            yield name, info, ""
            for method in METHODS:
                for leaf, leaf_info in method.model_fields.items():
                    if leaf != "name":
                        yield f"method.{leaf}", leaf_info, method.model_fields["name"].default
        elif name in ("task", "output"):
            yield name, info, ""
        else:
            for leaf, leaf_info in _group(info).model_fields.items():
                yield f"{name}.{leaf}", leaf_info, ""
                if leaf == "train":
                    yield from ((f"{name}.{leaf}[].{part}", part_info, "") for part, part_info in Source.model_fields.items())


def _group(info: FieldInfo) -> type[Group]:
    annotation = info.annotation
    return annotation if isinstance(annotation, type) else get_args(annotation)[0]
