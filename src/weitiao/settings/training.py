"""The settings of `training`: how long, how much at once, by which optimizer and at which rate, in which precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from weitiao.settings.group import Group, refuse_idle, setting
from weitiao.settings.methods import FullSettings

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
    memory: Literal["thrifty", "balanced", "fast"] | None = setting(None, "a set of the settings that trade memory for time; what is given besides wins over it. method=full. fast: checkpointing=false. balanced: model.dtype=bfloat16, rounding=stochastic, optimizer=adamw_bnb_8bit, small passes. thrifty: model.dtype=bfloat16, rounding=stochastic, optimizer=paged_adamw_8bit, step_in_backward=true, checkpointing=true. Other methods. fast: checkpointing=false; balanced: small passes (448 tokens at once on a CPU, 4,096 on a GPU; in one process longer rows go through in pieces); thrifty: checkpointing=true")
    step_in_backward: bool = setting(False, "step each weight as soon as its gradient is there, and let the gradient go: the same result, without the memory of all gradients where a step is one pass (of several, they add up until the last). See clipping, or set max_grad_norm=0")
    rounding: Literal["auto", "nearest", "stochastic", "compensated"] = setting("auto", "how trained weights in bfloat16 take a step. stochastic: up or down at random, so that small steps count on the average; compensated: the 16 bits that bfloat16 leaves off are kept beside it, 2 bytes a weight, which is float32 to the bit; nearest: most steps round to nothing; auto: stochastic")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "in what is computed; auto: bf16 on a GPU whose hardware has it, fp16 on any other, fp32 on a CPU. Trained weights stay fp32")
    kernels: Literal["auto", "plain", "liger"] = setting("auto", "liger: its fused norms, rope and SwiGLU on a GPU; plain: PyTorch's; auto: liger where it is installed and proves itself on the first batch")
    checkpointing: bool | None = setting(None, "recompute activations in the backward pass: less memory, about a third more time; default: only if it does not fit without")
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
        refuse_idle(self, "checkpointing=true", bool(self.checkpointing), "offload_activations")
        is_adam = "ademamix" in self.optimizer or ("adam" in self.optimizer and not self.optimizer.startswith(("galore", "grok")))
        refuse_idle(self, "an optimizer of Adam's kind", is_adam or "lion" in self.optimizer, "adam_beta1", "adam_beta2")
        refuse_idle(self, "an optimizer of Adam's kind", is_adam, "adam_epsilon")
        refuse_idle(self, "max_grad_norm above 0", self.max_grad_norm > 0, "clipping")
        if (self.clipping in ("measured", "each")) and not self.step_in_backward:
            raise ValueError(f"clipping={self.clipping} goes with step_in_backward=true, and would do nothing here")
        if self.clipping == "whole" and self.step_in_backward:
            raise ValueError("clipping=whole wants all gradients at once, and step_in_backward=true lets each go. Expected measured or each")
        refuse_idle(self, "an optimizer that knows decay, unlike lbfgs and rprop", self.optimizer not in WITHOUT_DECAY, "weight_decay")
        refuse_idle(self, "an optimizer other than rprop, which takes the rate for its first step alone", self.optimizer != "rprop",
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
