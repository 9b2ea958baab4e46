"""Virtual tokens: what prompt tuning, P-tuning and prefix tuning share.

PEFT's parameters, networks and files; the way through the model is ours (wiring.py).

Learned numbers are kept in units of a spread: a power of two near the standard deviation of what is replaced, so that one
learning rate suits models of any scale, and going to PEFT's file and back rounds nothing.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from weitiao.errors import SettingError
from weitiao.model.methods.method import Method
from weitiao.settings.methods import VirtualSettings
from weitiao.trie import Example

OTHERS = "Expected a model whose tokens go through its backbone as a Llama's do."
PLACES = 64  # virtual tokens, where nobody says how many; on a trie they are computed once a pass, not once a row
COMMON = 5_000  # ids that are drawn from: vocabularies are made with the frequent pieces first (Lester et al., section 3.2)


class VirtualTokens(nn.Module):
    """start + scale * encoder(): [places, width] float32, whatever the rest computes in.

    encoder: a module called without arguments, or a parameter table; scale: float32, broadcast over [places, width].
    """

    def __init__(self, encoder: nn.Module, scale: torch.Tensor, start: torch.Tensor | None = None):
        super().__init__()
        self.encoder = encoder
        self.on = True
        self.reached = False  # has a forward come by the wiring?
        self.register_buffer("scale", scale)
        self.register_buffer("start", start)
        self.register_parameter("finished", None)

    @property
    def is_table(self) -> bool:
        """Are the numbers themselves what is trained, and not a network that makes them?"""
        return isinstance(self.encoder, Table)

    def forward(self) -> torch.Tensor:
        if self.finished is not None:
            return self.finished
        with torch.autocast(self.scale.device.type, enabled=False):
            made = self.encoder() * self.scale
        return made if self.start is None else self.start + made

    @torch.no_grad()
    def take(self, finished: torch.Tensor) -> None:
        """Numbers read from a file in place of those that `forward` would make."""
        finished = finished.to(self.scale)
        if self.is_table:
            self.encoder.weight.copy_(finished / self.scale)
        else:
            self.finished = nn.Parameter(finished)


class Table(nn.Module):
    """[places, width] numbers, each trained by itself."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> torch.Tensor:
        return self.weight


class Network(nn.Module):
    """One of PEFT's prompt encoders, called on all its places; its last layer begins at 0, so that `start` is the start."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        last = [m for m in encoder.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self) -> torch.Tensor:
        places = self.encoder.embedding.num_embeddings
        return self.encoder(torch.arange(places, device=self.encoder.embedding.weight.device)[None])[0]


class VirtualMethod(Method):
    """attach, save and load of a method that puts virtual tokens before every row."""

    WHY_NOT_MERGED = "Virtual tokens change no weight of the base, so there is nothing to merge."
    HOW_LOADED = (
        "They are loaded beside the base: weitiao chat, generate and evaluate do so from the run folder; elsewhere, "
        "PeftModel.from_pretrained(base, 'RUN/adapter')."
    )

    def attach(self, model, settings: VirtualSettings, seed: int, tokenizer=None, examples=()):
        model.requires_grad_(False)
        torch.manual_seed(seed)
        places = self.virtual_tokens(settings, tokenizer)
        config = self.peft_config(model, settings, places)
        ids = None if settings.init == "random" else start_ids(settings, places, tokenizer, model, seed, examples)
        model.virtual_places = places
        model.virtual = self.make(model, settings, config, ids).to(model.get_input_embeddings().weight.device)
        model.virtual_config = config
        backbone = model.base_model
        backbone.forward = self.wire(model, backbone.forward)
        refuse_unreached(model)
        return model

    @abstractmethod
    def peft_config(self, model, settings, places: int) -> Any:
        """What PEFT wants to know of it: the adapter_config.json of its file."""

    @abstractmethod
    def make(self, model, settings, config: Any, ids: torch.Tensor | None) -> VirtualTokens:
        """The trained numbers, begun as the tokens `ids` (None: as noise)."""

    @abstractmethod
    def wire(self, model, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The backbone's forward with the virtual tokens in it."""

    def save(self, model, folder: Path, base: str) -> None:
        from safetensors.torch import save_file

        config = model.virtual_config
        config.base_model_name_or_path, config.inference_mode = base, True
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            save_file({"prompt_embeddings": model.virtual().contiguous()}, folder / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(folder)

    def load(self, model, folder: Path) -> None:
        from safetensors.torch import load_file

        finished = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        expected = tuple(model.virtual().shape)
        assert tuple(finished.shape) == expected, f"{folder} holds virtual tokens {tuple(finished.shape)}, not {expected}"
        model.virtual.take(finished)

    def encoder_state(self, model) -> dict[str, torch.Tensor]:
        return model.virtual.state_dict() if model.virtual.finished is None else {}

    def load_encoder_state(self, model, state: dict[str, torch.Tensor]) -> None:
        model.virtual.finished = None
        model.virtual.load_state_dict(state)

    @contextmanager
    def untuned(self, model):
        model.virtual.on = False
        try:
            yield
        finally:
            model.virtual.on = True

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """A network's matrices; numbers that are trained themselves begin elsewhere than at 0."""
        return super().decays(name, parameter) and not name.endswith("virtual.encoder.weight")

    def virtual_tokens(self, settings: VirtualSettings, tokenizer) -> int:
        if settings.virtual_tokens:
            return settings.virtual_tokens
        return len(text_ids(settings.text, tokenizer)) if settings.text is not None else PLACES


@torch.no_grad()
def refuse_unreached(model: nn.Module) -> None:
    """One token through the model: a causal LM that does not go by its backbone's forward would leave the virtual tokens out."""
    device = model.get_input_embeddings().weight.device
    if device.type != "meta":
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        if not model.virtual.reached:
            raise SettingError(f"{type(model).__name__} goes past the place where virtual tokens are put.", OTHERS,
                               "Choose method=lora.")


# ------------------------------------------------------------------------------------------------------ how they begin


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """The text's own tokens: no BOS, which the row brings itself."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise SettingError("method.text is empty.", "Expected a text for the virtual tokens to begin as.")
    return ids


def start_ids(
    settings: VirtualSettings, places: int, tokenizer: Any, model: nn.Module, seed: int, examples: Sequence[Example] = (),
) -> torch.Tensor:
    """int64 [places]: the text, or rows with their answers, last of all, next to the row; before them tokens drawn from the vocabulary.

    Raises:
        SettingError: the text has more tokens than there are places (PEFT would cut it without a word).
    """
    start = text_ids(settings.text, tokenizer) if settings.text is not None else []
    if len(start) > places:
        raise SettingError(f"method.text has {len(start)} tokens, method.virtual_tokens is {places}.", "Expected room for all of the text.",
                           f"Leave method.virtual_tokens out, or set it to {len(start)} or more.")
    if settings.init == "rows":
        start = demonstrations(examples, places, seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ordinary = torch.tensor([i for i in range(min(COMMON, vocabulary)) if i not in special], device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = ordinary[torch.randint(len(ordinary), (places - len(start),), generator=generator, device="cpu")]
    return torch.cat([drawn, torch.tensor(start, dtype=torch.long, device="cpu")])


def demonstrations(examples: Sequence[Example], places: int, seed: int) -> list[int]:
    """Ids of rows with their answers, at most `places`: in-context examples that are then trained on (context tuning, Lu et al. 2025,
    arXiv:2507.04221, of which we take the start and no masking).

    Whole rows, those with another answer than the ones before first; in the room that is left, the end of one more.
    """
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    chosen: dict[int, Example] = {}
    answers: set[bytes] = set()
    left = places
    for another in (True, False):
        for i in order:
            if not left or i in chosen:
                continue
            example = examples[i]
            answer = example.ids[example.weights > 0].tobytes()
            if len(example) <= left and not (another and answer in answers):
                chosen[i] = example
                answers.add(answer)
                left -= len(example)
    rest = next((i for i in order if i not in chosen), None)
    ends = [] if rest is None or left == 0 else examples[rest].ids[-left:].tolist()
    return ends + [int(i) for example in chosen.values() for i in example.ids]


def spread(values: torch.Tensor) -> float:
    """The power of two next to the standard deviation; 1 for values that are not there (the meta device)."""
    if values.is_meta:
        return 1.0
    deviation = float(values.float().std())
    return 2.0 ** round(math.log2(deviation)) if deviation > 0 else 1.0


def hidden_size(model: nn.Module) -> int:
    return model.config.get_text_config().hidden_size


def peft_sizes(model: nn.Module) -> dict[str, Any]:
    """Of every PEFT configuration of this kind."""
    config = model.config.get_text_config()
    return {
        "task_type": "CAUSAL_LM", "num_transformer_submodules": 1, "num_layers": config.num_hidden_layers,
        "token_dim": config.hidden_size, "num_attention_heads": config.num_attention_heads,
    }
