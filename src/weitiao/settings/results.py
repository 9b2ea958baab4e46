"""The settings of `evaluation`, `saving` and `samples`: what a run measures, what it keeps, and what it answers at its end."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from weitiao.settings.group import Group, Texts, refuse_idle, setting


class EvaluationSettings(Group):
    every: Literal["epoch", "end"] | Annotated[int, Field(ge=1)] = setting("epoch", "epoch, end, or a number of steps", "steps")
    metric: Literal["loss", "exact_match", "field_f1", "accuracy", "macro_f1"] = setting("loss", "what the best checkpoint is chosen by; exact_match and field_f1 need answers to be generated, accuracy and macro_f1 need labels")
    rows: int | None = setting(None, "how many rows to generate answers for; default: all", "rows", ge=1)
    max_new_tokens: int | None = setting(None, "longest answer; default: a half more than the longest reference", "tokens", ge=1)
    batch_size: int | None = setting(None, "rows that answers are generated for at once; default: 64, or fewer where memory is short (16 where a model's rows cannot be tries)", "rows", ge=1)


class SavingSettings(Group):
    every: Literal["epoch", "end"] | Annotated[int, Field(ge=1)] = setting("epoch", "epoch, end, or a number of steps", "steps")
    keep: int = setting(2, "how many checkpoints to keep; the best one is kept besides", "checkpoints", ge=2)


class SamplesSettings(Group):
    prompts: Texts = setting([], "texts that what was learned answers at the end of the run: on the screen, and in answers.jsonl")
    temperature: float = setting(0.0, "0: the same answer each time; higher: more varied, drawn by training.seed", ge=0)
    top_p: float = setting(1.0, "draw from the likeliest tokens that hold this probability", gt=0, le=1)
    max_new_tokens: int = setting(256, "longest answer; one that is cut there is said to be", "tokens", ge=1)

    @model_validator(mode="after")
    def _none_idle(self) -> SamplesSettings:
        if "prompts" not in self.model_fields_set:  # emptied by hand, the rest of a file's group may stay
            refuse_idle(self, "samples.prompts", bool(self.prompts), "temperature", "top_p", "max_new_tokens")
        refuse_idle(self, "a temperature above 0", self.temperature > 0, "top_p")
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("samples.prompts holds an empty text")
        return self
