"""A local folder -> model and tokenizer, with precision and attention settled.

Weights that are trained are held in float32 unless asked otherwise: transformers 5 keeps a checkpoint's own type, and in
bf16 or fp16 most steps of training round to nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weitiao.config import Settings
from weitiao.errors import OutOfMemory, SettingError, SourceError
from weitiao.model import attention, families, heap, offload, products, quantize
from weitiao.model.families import bloom
from weitiao.settings.model import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALVES = (torch.bfloat16, torch.float16)
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # model.device_map: over all devices, as accelerate does it
UNLIMITED = 1 << 20  # some tokenizers and configs say 1e30 where they mean "no limit"
TRIE_LAYERS = {"full_attention", "sliding_attention"}
ROPES_BY_LENGTH = {"dynamic", "longrope"}  # positions turn by an angle that depends on the longest row beside them


def load_tokenizer(folder: Path, settings: ModelSettings) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        if family := families.of_tokenizer(folder):
            return family.load_tokenizer(Path(folder))
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SourceError(f"{folder} has no tokenizer that can be read.", _first_line(error),
                          "Copy tokenizer.json and tokenizer_config.json of the model into it.") from error


def load_config(folder: Path, settings: ModelSettings) -> Any:
    from transformers import AutoConfig

    families.of_model(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SourceError(f"{folder}/config.json does not describe a model that transformers knows.", _first_line(error),
                          _remote_code_advice(error)) from error


def load_model(
    folder: Path, settings: ModelSettings, dtype: torch.dtype, compute: torch.dtype | None = None, device: Any = "cpu",
) -> PreTrainedModel:
    """The causal LM in `folder`, with the trie's attention where the family takes one.

    Args:
        dtype: in what weights that are not quantised are held, and those that are were held just before.
        compute: what 4-bit weights are multiplied in; default: dtype.
        device: where quantised weights go, unless model.device_map says otherwise. Others are left on the CPU.

    Raises:
        SourceError: it cannot be read, or the checkpoint lacks weights (transformers would make them up at random).
        SettingError: it does not fit on the devices of model.device_map.
    """
    from transformers import AutoModelForCausalLM

    families.of_model(folder)
    products.use()
    heap.use()
    bits = quantize.bits_config(settings, compute or dtype)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=settings.trust_remote_code, use_safetensors=True, output_loading_info=True,
            quantization_config=bits, device_map=settings.device_map or ({"": device} if bits else None),
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        if told := OutOfMemory.of(error):
            raise told from error
        raise SourceError(f"The model in {folder} cannot be loaded.", _first_line(error), _remote_code_advice(error)) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise SourceError(
            f"The checkpoint in {folder} lacks {len(missing)} weights, {missing[0]} among them.",
            "Expected every weight of the model; random ones in their place would be trained and saved without a word.",
            "Fetch the checkpoint again, or check that config.json belongs to it.",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SettingError(f"model.device_map={settings.device_map} leaves weights on the disk: they do not fit on the devices here.",
                           "Expected all of them in memory.", "Choose model.quantize=nf4, or a smaller model.")
    quantize.never_repack(model)
    if trie_obstacle(model) is None:
        learn_attention(model)
    return model


# Families whose attention is their own: what teaches it tries.
OWN_ATTENTION = {"bloom": bloom.learn_tries}


def learn_attention(model: PreTrainedModel) -> None:
    """The trie's attention: registered by name where the family takes one, else put into its own."""
    own = OWN_ATTENTION.get(model.config.get_text_config().model_type)
    if own:
        own(model)
    else:
        model.set_attn_implementation(attention.register())


def checkpoint_activations(model: torch.nn.Module, in_host: bool = False, streamed: bool = False) -> None:
    """Keep each layer's input only, in the host's memory if so asked, and compute the rest again in the backward pass.

    streamed: its layers do so by themselves (model/stream.py).
    """
    model = causal_lm(model)
    if in_host:
        offload.keep_in_host(model)
    if not streamed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()


def place(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """On `device`. Quantised and spread weights are where they belong already; what a method added to them may not be."""
    inner = causal_lm(model)
    if not (quantize.is_quantized(inner) or getattr(inner, "hf_device_map", None)):
        model.to(device)
        heap.trim()  # of what moved to a GPU
        return model
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != device.type:
            tensor.data = tensor.data.to(device)
    return model


def device_of(model: torch.nn.Module) -> torch.device:
    """Where it computes; its weights may lie elsewhere (model/stream.py)."""
    return getattr(causal_lm(model), "runs_on", None) or next(model.parameters()).device


def home(settings: ModelSettings) -> torch.device:
    """Where batches go: the device that model.device_map names, else a GPU, else the CPU.

    Raises:
        SettingError: no such device is here.
    """
    name = settings.device_map
    if name is None or name in SPREADS:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"model.device_map={name} is no device of this machine.",
                           f"Expected {', '.join(SPREADS)}, or a device such as cpu or cuda:0.", _first_line(error)) from error


def trie_obstacle(model: PreTrainedModel) -> str | None:
    """Why this model's rows cannot share prefixes, or None. The proof on the first batch has the last word."""
    config = model.config.get_text_config()
    if config.model_type == "bloom":
        return "its slow_but_exact product is asked for" if config.pretraining_tp > 1 and config.slow_but_exact else None
    if not getattr(model, "_supports_attention_backend", False):
        return f"{config.model_type} does not take its attention from outside"
    if config._attn_implementation not in ("sdpa", attention.NAME):
        return f"its attention is {config._attn_implementation}, not sdpa"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ROPES_BY_LENGTH:
        return f"its rope is {config.rope_parameters['rope_type']}, which depends on the batch's length"
    strange = set(getattr(config, "layer_types", None) or []) - TRIE_LAYERS
    if strange:
        return f"it has layers of the kind {', '.join(sorted(strange))}"
    if getattr(config, "output_router_logits", False):
        return "its router loss depends on how rows are batched"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over several devices"
    return None


def model_limit(config: Any) -> int:
    """The longest row the model takes, in tokens."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or UNLIMITED
    return int(min(limit, UNLIMITED))


def virtual_places(model: torch.nn.Module) -> int:
    """How many places before every row virtual tokens take."""
    return getattr(causal_lm(model), "virtual_places", 0)


def compute_dtype(precision: str) -> torch.dtype:
    """What `training.precision` computes in; auto: bf16 on a GPU whose hardware has it, fp16 on any other, fp32 on a CPU."""
    if precision != "auto":
        return PRECISIONS[precision]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def trains_in_half(settings: ModelSettings, trains_all: bool, precision: str) -> bool:
    """Are float16 weights themselves trained? Then they are computed in as they are: no autocast, and no loss scaling,
    which would need gradients in float32."""
    return trains_all and settings.dtype == "float16" and precision in ("auto", "fp16")


def run_dtype(settings: Settings, trains_all: bool) -> torch.dtype:
    """What a run computes in."""
    precision = settings.training.precision
    return torch.float16 if trains_in_half(settings.model, trains_all, precision) else compute_dtype(precision)


def is_mixed(model: torch.nn.Module, compute: torch.dtype) -> bool:
    """Does it compute in half precision beside weights in float32 (autocast), or in what the weights are held in?"""
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    return compute in HALVES and trained != {torch.float16}


def weight_dtype(dtype: str, trains_all: bool, compute: torch.dtype) -> torch.dtype:
    """In what the base is held: as asked; else float32 where it is trained, and as it is computed where it is frozen."""
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.float32 if trains_all else compute


def causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    """The causal LM inside whatever wraps it (PEFT)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _remote_code_advice(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "It brings its own Python code. Run that only from authors you trust: model.trust_remote_code=true."
    return ""
