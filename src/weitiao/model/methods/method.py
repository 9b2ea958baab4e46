"""The contract: what every way to tune a model answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from weitiao.errors import RunError
from weitiao.trie import Example


class Method(ABC):
    """One way to tune a model: a final class, and a line in the table of `weitiao.model.methods`.

    FOLDER: where a run keeps what was learned, adapter/ or model/.
    TRAINS_ALL: does it train weights of the base itself? Those are then held in float32.
    WHY_NOT_MERGED, HOW_LOADED: sentences, where what was learned cannot be folded into plain weights.
    CARRIES_TOKENS: does its own file hold the rows of `model.added_token_indices`?
    """

    FOLDER = "adapter"
    TRAINS_ALL = False
    WHY_NOT_MERGED = ""
    HOW_LOADED = ""
    CARRIES_TOKENS = False

    @abstractmethod
    def attach(
        self, model: torch.nn.Module, settings: Any, seed: int, tokenizer: Any = None, examples: Sequence[Example] = (),
    ) -> torch.nn.Module:
        """Add what is trained, freeze the rest; new weights are float32 and come from `seed`.

        model: a causal LM of transformers that `learn_on_tries` has taught the keyword `trie`; it may be changed in place.
        examples: the rows that will be learned from, where a method begins as some of them; none where it is only used.
        Raises SettingError if the method does not suit the model.
        """

    @abstractmethod
    def save(self, model: torch.nn.Module, folder: Path, base: str) -> None:
        """Write what was learned; base is what a reader of the file should load under it."""

    @abstractmethod
    def load(self, model: torch.nn.Module, folder: Path) -> None:
        """Put it back into a model that `attach` has prepared."""

    @contextmanager
    def untuned(self, model: torch.nn.Module) -> Iterator[None]:
        """The model as it was before it was tuned, for the block."""
        with model.disable_adapter():
            yield

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        """A plain causal LM that computes the same. The base is held in plain weights, not quantised."""
        raise NotImplementedError(f"{type(self).__name__} has WHY_NOT_MERGED or a merge of its own")

    def why_not_merged(self, model: torch.nn.Module) -> str:
        """The sentence, where what this model has learned cannot be folded into plain weights; else empty."""
        return self.WHY_NOT_MERGED

    def refuse_merge(self) -> None:
        """Told before anything is loaded, if what was learned cannot be folded into plain weights."""
        if self.WHY_NOT_MERGED:
            raise RunError(self.WHY_NOT_MERGED, "Expected a run of lora, ia3, bitfit or full.", self.HOW_LOADED)

    def virtual_tokens(self, settings: Any, tokenizer: Any) -> int:
        """How many places before every row it takes."""
        return 0

    def rate_factor(self, name: str, settings: Any) -> float:
        """How many times as fast as the rest the weight `name` learns."""
        return 1.0

    def decays(self, name: str, parameter: torch.nn.Parameter) -> bool:
        """Does weight decay, which pulls towards 0, suit this weight? Matrices, but not what stands for a row of a table."""
        return parameter.ndim >= 2 and "trainable_tokens_delta" not in name

    def encoder_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What training needs to go on and use does not: it is kept in checkpoints beside FOLDER."""
        return {}

    def load_encoder_state(self, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Put it back, after `load`."""
