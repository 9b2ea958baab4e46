"""Model families that transformers has no class for: one module each, imported only where a folder asks for it.

A module registers its classes with transformers' Auto classes as it is imported, so that they win over Python code in
the folder, and offers `load_tokenizer(folder)` where transformers cannot read the tokenizer, or reads another. Weights
keep the names of the original checkpoint.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

# What config.json calls the model, and tokenizer_config.json the tokenizer -> the module.
MODELS = {"chatglm": "chatglm3", "yuan": "yuan2"}
TOKENIZERS = {"ChatGLMTokenizer": "chatglm3", "ChatGLM3Tokenizer": "chatglm3", "Yuan2Tokenizer": "yuan2"}


def of_model(folder: Path) -> ModuleType | None:
    """The family of the model in `folder`, its classes registered; None where transformers knows the model itself."""
    return named(_read(folder / "config.json").get("model_type"))


def named(model_type: str | None) -> ModuleType | None:
    """The family of the models that a config calls `model_type`, as `of_model`."""
    return _module(MODELS.get(model_type))


def of_tokenizer(folder: Path) -> ModuleType | None:
    """The family that reads the tokenizer in `folder`: the tokenizer's own word, else its model's; None: transformers does."""
    named = TOKENIZERS.get(_read(folder / "tokenizer_config.json").get("tokenizer_class"))
    family = _module(named) or of_model(folder)
    return family if hasattr(family, "load_tokenizer") else None


def _module(name: str | None) -> ModuleType | None:
    return importlib.import_module(f"{__name__}.{name}") if name else None


def _read(file: Path) -> dict:
    """The JSON of a file; nothing where it is missing or torn, which its reader will tell."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
