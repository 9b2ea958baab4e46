"""A local folder -> model and tokenizer, with precision and attention settled.

Weights that are trained are held in float32 unless asked otherwise: transformers 5 keeps a checkpoint's own type, and in
bf16 or fp16 most steps of training round to nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weitiao.config import ModelSettings
from weitiao.errors import SourceError
from weitiao.model import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}
UNLIMITED = 1 << 20  # some tokenizers and configs say 1e30 where they mean "no limit"
TRIE_LAYERS = {"full_attention", "sliding_attention"}
ROPES_BY_LENGTH = {"dynamic", "longrope"}  # positions turn by an angle that depends on the longest row beside them


def load_tokenizer(folder: Path, settings: ModelSettings) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SourceError(f"{folder} has no tokenizer that can be read.", _first_line(error),
                          "Copy tokenizer.json and tokenizer_config.json of the model into it.") from error


def load_config(folder: Path, settings: ModelSettings) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SourceError(f"{folder}/config.json does not describe a model that transformers knows.", _first_line(error),
                          _remote_code_advice(error)) from error


def load_model(folder: Path, settings: ModelSettings, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM in `folder`, in `dtype`, with the trie's attention where the family takes one.

    Raises:
        SourceError: it cannot be read, or the checkpoint lacks weights (transformers would make them up at random).
    """
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=settings.trust_remote_code, use_safetensors=True, output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise SourceError(f"The model in {folder} cannot be loaded.", _first_line(error), _remote_code_advice(error)) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise SourceError(
            f"The checkpoint in {folder} lacks {len(missing)} weights, {missing[0]} among them.",
            "Expected every weight of the model; random ones in their place would be trained and saved without a word.",
            "Fetch the checkpoint again, or check that config.json belongs to it.",
        )
    if trie_obstacle(model) is None:
        model.set_attn_implementation(attention.register())
    return model


def trie_obstacle(model: PreTrainedModel) -> str | None:
    """Why this model's rows cannot share prefixes, or None. The proof on the first batch has the last word."""
    config = model.config.get_text_config()
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
    return None


def model_limit(config: Any) -> int:
    """The longest row the model takes, in tokens."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or UNLIMITED
    return int(min(limit, UNLIMITED))


def compute_dtype(precision: str) -> torch.dtype:
    """What `training.precision` computes in; auto: bf16 on a GPU whose hardware has it, else fp32."""
    if precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return DTYPES[precision]


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
