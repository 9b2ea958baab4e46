"""`tokens.add`: special tokens that the tokenizer learns to know, and the model by their rows alone (PEFT's trainable tokens).

The rows of the embedding, and of the head where it is not the same table, are trained beside whatever the method trains.
LoRA keeps them in its own PEFT file; the other methods have `tokens.safetensors` beside theirs; full tuning has every row.
A new row begins as the mean of the old ones (Hewitt 2021, "Initializing new word embeddings"), so that at the start no
token becomes likelier by its being there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch

from weitiao.errors import SettingError
from weitiao.model.methods.method import Method
from weitiao.settings.methods import LoraSettings

ADAPTER = "added"
FILE = "tokens.safetensors"


def extend(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """The ids of `names`, which the tokenizer takes whole from now on.

    To the tokenizer they are not special: special ones are left out where answers are made text, and these are to be read.

    Raises:
        SettingError: one is empty, or there already: its row is not new, and would be changed for all rows that use it.
    """
    from transformers import AddedToken

    if not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise SettingError(f"tokens.add = {list(names)} holds an empty token, or one twice.", "Expected tokens such as '<think>'.",
                           "Leave it out.")
    vocabulary = tokenizer.get_vocab()
    if known := [name for name in names if name in vocabulary]:
        raise SettingError(f"tokens.add: the tokenizer has {', '.join(map(repr, known))} already.", "Expected tokens that are new.",
                           "Leave them out; they can be used as they are.")
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    return tokenizer.convert_tokens_to_ids(list(names))


@torch.no_grad()
def make_room(model: torch.nn.Module, ids: Sequence[int]) -> None:
    """A row for each of these ids, in each table: more of them, if there are none to spare; each begins as the mean."""
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for table in {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        table[list(ids)] = table[: min(rows, min(ids))].float().mean(dim=0).to(table)


@final
class WithTokens(Method):
    """A method, and the rows of added tokens beside it."""

    def __init__(self, method: Method, ids: Sequence[int]):
        self.method, self.ids = method, list(ids)
        self.FOLDER, self.TRAINS_ALL = method.FOLDER, method.TRAINS_ALL
        self.WHY_NOT_MERGED, self.HOW_LOADED = method.WHY_NOT_MERGED, method.HOW_LOADED
        self.virtual_tokens, self.decays = method.virtual_tokens, method.decays
        self.why_not_merged = method.why_not_merged
        self.encoder_state, self.load_encoder_state = method.encoder_state, method.load_encoder_state

    def attach(self, model, settings, seed: int, tokenizer=None, examples=()):
        make_room(model, self.ids)
        model.added_token_indices = token_indices(model, self.ids)
        whole = model
        model = self.method.attach(model, settings, seed, tokenizer, examples)
        if self.TRAINS_ALL:
            refuse_frozen(whole)
        if not self._carried:
            train_rows(whole)
        return model

    @contextmanager
    def untuned(self, model) -> Iterator[None]:
        layers = [m for m in model.modules() if hasattr(m, "trainable_tokens_delta")]
        with self.method.untuned(model):
            for layer in layers:
                layer.enable_adapters(False)
            try:
                yield
            finally:
                for layer in layers:
                    layer.enable_adapters(True)

    def save(self, model, folder: Path, base: str) -> None:
        self.method.save(model, folder, base)
        if not self._carried:
            from safetensors.torch import save_file

            save_file({name: p.detach().contiguous() for name, p in rows_of(model)}, folder / FILE, {"format": "pt"})

    def load(self, model, folder: Path) -> None:
        self.method.load(model, folder)
        if not self._carried:
            from safetensors.torch import load_file

            saved = load_file(folder / FILE)
            with torch.no_grad():
                for name, parameter in rows_of(model):
                    parameter.copy_(saved[name])

    def merge(self, model):
        model = self.method.merge(model)
        return model if self._carried else merge_rows(model)

    def rate_factor(self, name: str, settings) -> float:
        """Rows learn as fast as LoRA has them learn, whatever the unit of the method's own rate."""
        if "trainable_tokens_delta" in name:
            return LoraSettings().learning_rate / settings.learning_rate
        return self.method.rate_factor(name, settings)

    @property
    def _carried(self) -> bool:
        """Does the method train and save these rows by itself?"""
        return self.TRAINS_ALL or self.method.CARRIES_TOKENS


def token_indices(model: torch.nn.Module, ids: Sequence[int]) -> dict[str, list[int]]:
    """PEFT's trainable_token_indices: by the names of the tables, one or, where the head is its own, two."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {next(name for name, m in model.named_modules() if m is table).rsplit(".", 1)[-1]: list(ids) for table in tables}


def refuse_frozen(model: torch.nn.Module) -> None:
    """Partly frozen full tuning must train the tables that hold the new rows."""
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    frozen = [name for name, p in model.named_parameters() if any(p is t for t in tables) and not p.requires_grad]
    if frozen:
        raise SettingError(f"tokens.add: {' and '.join(frozen)}, which hold the new rows, are frozen.",
                           "Expected them among the trained weights.", f"Add them to method.train: {frozen}.")


def train_rows(model: torch.nn.Module) -> None:
    """Put PEFT's trainable tokens into the tables, in place; what trains besides goes on training."""
    from peft import TrainableTokensConfig, inject_adapter_in_model

    trained = [p for p in model.parameters() if p.requires_grad]
    indices = model.added_token_indices
    config = TrainableTokensConfig(token_indices=next(iter(indices.values())), target_modules=list(indices))
    with warnings.catch_warnings():  # of a second adapter, and of tied tables, which is what we want
        warnings.simplefilter("ignore", UserWarning)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for parameter in trained:  # PEFT freezes what is not its own
        parameter.requires_grad = True
    for _, parameter in rows_of(model):
        parameter.data = parameter.data.float()


def rows_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if name.endswith(f"trainable_tokens_delta.{ADAPTER}")]


def merge_rows(model: torch.nn.Module) -> torch.nn.Module:
    """The trained rows in the tables themselves."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "trainable_tokens_delta"):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    model.tie_weights()
    return model
