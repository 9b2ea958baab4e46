"""The settings of `method`, a class for each way to tune, with the learning rate that it learns well with; and `tokens`.

Which class a run has is told by its name: `Method` is any of them, `METHODS` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from weitiao.settings.group import Group, Names, name_alone, one_name, refuse_idle, setting

Targets = Annotated[Literal["all-linear"] | list[str], BeforeValidator(one_name)]
AutoTargets = Annotated[Literal["auto"] | list[str], BeforeValidator(one_name)]


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
        refuse_idle(self, "add_bias=true", self.add_bias, "targets")
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
        refuse_idle(self, "encoder=lstm", self.encoder == "lstm", "encoder_layers", "encoder_dropout")
        refuse_idle(self, "encoder_layers=2 or more", self.encoder_layers > 1, "encoder_dropout")
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
        refuse_idle(self, "projection=true", self.projection, "projection_hidden")
        return self

    @property
    def learning_rate(self) -> float:
        return 1e-3 if self.projection else 0.02


METHODS: tuple[type[Group], ...] = (
    LoraSettings, FullSettings, BitfitSettings, PromptSettings, PtuningSettings, PrefixSettings, Ia3Settings, AdapterSettings,
)


def method_or_lora(value: Any) -> Any:
    """The method is lora unless it is named."""
    value = name_alone(value)
    if not isinstance(value, Mapping):
        return value
    named = value.get("name", "lora")
    return {**value, "name": named.lower() if isinstance(named, str) else named}


def method_name(values: Mapping[str, Any]) -> Any:
    method = values.get("method")
    return method.get("name") if isinstance(method, Mapping) else method


Method = Annotated[
    Annotated[
        LoraSettings | FullSettings | BitfitSettings | PromptSettings | PtuningSettings | PrefixSettings | Ia3Settings | AdapterSettings,
        Field(discriminator="name"),
    ],
    BeforeValidator(method_or_lora),
]


class TokensSettings(Group):
    add: Names = setting([], "new tokens that the tokenizer shall take whole, such as <think>; their rows of the embedding are trained, whatever the method")
