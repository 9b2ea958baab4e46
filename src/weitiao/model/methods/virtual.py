"""Virtual tokens: what prompt tuning, P-tuning and prefix tuning share, and how it reaches the model.

PEFT's parameters, networks and files; the way through the model is ours, because PEFT's drops positions, breaks under
checkpointing and takes no trie (peft 0.21). The backbone's forward is wrapped, so that the causal LM, its loss and
`generate` see the ordinary tokens only:

                 a trie                                     rows side by side, padded left or right
    prompt       V nodes are the root that every node       V embeddings stand right before the first token of each row
                 sees: [V + T] nodes go through, [T] return
    prefix       V keys and values are seen by every node   they lie in the cache of every layer before all rows

Positions of the ordinary tokens begin at V in all of them. Windows count virtual places as they count others.

Learned numbers are kept in units of a spread: a power of two near the standard deviation of what is replaced, so that one
learning rate suits models of any scale, and going to PEFT's file and back rounds nothing.
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from weitiao.config import VirtualSettings
from weitiao.errors import SettingError
from weitiao.model.methods.method import Method
from weitiao.trie import Example

PLACES = 64  # virtual tokens, where nobody says how many; on a trie they are computed once a pass, not once a row
COMMON = 5_000  # "vocabulary" draws from the first so many ids: vocabularies are made with the frequent pieces first (Lester et al., section 3.2)


class VirtualTokens(nn.Module):
    """start + scale * encoder(): [places, width] float32, whatever the rest computes in.

    encoder: a module called without arguments, or a parameter table; scale: float32, broadcast over [places, width].
    """

    def __init__(self, encoder: nn.Module, scale: torch.Tensor, start: torch.Tensor | None = None):
        super().__init__()
        self.encoder = encoder
        self.on = True
        self.register_buffer("scale", scale, persistent=False)
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
        virtual = model.virtual
        return {} if virtual.is_table or virtual.finished is not None else virtual.state_dict()

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

    def virtual_tokens(self, settings: VirtualSettings, tokenizer) -> int:
        if settings.virtual_tokens:
            return settings.virtual_tokens
        return len(text_ids(settings.text, tokenizer)) if settings.text is not None else PLACES


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
    """Ids of rows with their answers, at most `places`: examples to go by, as in-context learning has them, which are then trained on.

    Whole rows, those with another answer than the ones before first; in the room that is left, the end of one more.
    """
    order = [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))]
    chosen: list[Example] = []
    answers: set[bytes] = set()
    left = places
    for another in (True, False):
        for example in order:
            answer = example.ids[example.weights > 0].tobytes()
            if len(example) <= left and not (another and answer in answers) and not any(example is c for c in chosen):
                chosen.append(example)
                answers.add(answer)
                left -= len(example)
    rest = next((e for e in order if not any(e is c for c in chosen)), None)
    ends = [] if rest is None or left == 0 else rest.ids[-left:].tolist()
    return ends + [int(i) for example in chosen for i in example.ids]


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


# -------------------------------------------------------------------------------------------- embeddings before a row


def embed_first(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The backbone's forward with `model.virtual()` [V, hidden] embedded before every row; the hidden states of [T] return."""
    takes_positions = "position_ids" in inspect.signature(forward).parameters

    @functools.wraps(forward)
    def wrapped(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, trie=None, **more):
        virtual: VirtualTokens = model.virtual
        inputs = {"past_key_values": past_key_values, **({"trie": trie} if trie is not None else {}), **more}
        if not virtual.on:
            return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **inputs)
        places = model.virtual_places
        if past_key_values is not None and past_key_values.get_seq_length() > 0:  # they are in the cache already
            return forward(input_ids, attention_mask=with_places(attention_mask, places), inputs_embeds=inputs_embeds,
                           **_positions(position_ids, places, takes_positions), **inputs)
        embeds = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        made = virtual().to(embeds)[None].expand(len(embeds), -1, -1)
        width = embeds.shape[1]
        if trie is not None:
            inputs["trie"] = trie.under(places)
            positions, place, mask = inputs["trie"].depth[None], None, attention_mask
        else:
            place = first_tokens(attention_mask)
            mask = with_places(attention_mask, places)
            positions = None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)
        embeds = _insert(embeds, made, place)
        if takes_positions:
            inputs["position_ids"] = positions
        out = forward(inputs_embeds=embeds, attention_mask=mask, **inputs)
        out.last_hidden_state = _take_out(out.last_hidden_state, place, places, width)
        return out

    return wrapped


def first_tokens(mask: torch.Tensor | None) -> torch.Tensor | None:
    """int64 [B], where each row's first token is; None if that is the first place in all of them."""
    if mask is None:
        return None
    first = (mask != 0).long().argmax(dim=1)
    return first if bool(first.any()) else None


def with_places(mask: torch.Tensor | None, places: int) -> torch.Tensor | None:
    """[B, T] -> [B, places + T]: as many ones more in each row, its padding left where it is. None stays None."""
    if mask is None:
        return None
    left = (mask != 0).long().argmax(dim=1, keepdim=True)
    at = torch.arange(places + mask.shape[1], device=mask.device)[None]
    # Before the pads' end the mask itself; then ones; then the mask, moved by the places.
    source = torch.where(at < left, at, (at - places).clamp(min=0)).expand(len(mask), -1)
    return torch.where((at >= left) & (at < left + places), 1, mask.gather(1, source)).to(mask.dtype)


def _insert(embeds: torch.Tensor, made: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
    if place is None:
        return torch.cat([made, embeds], dim=1)
    return torch.stack([torch.cat([e[:p], m, e[p:]]) for e, m, p in zip(embeds, made, place.tolist(), strict=True)])


def _take_out(hidden: torch.Tensor, place: torch.Tensor | None, places: int, width: int) -> torch.Tensor:
    if place is None:
        return hidden[:, places:]
    return torch.stack([torch.cat([h[:p], h[p + places :]]) for h, p in zip(hidden, place.tolist(), strict=True)])


def _positions(position_ids: torch.Tensor | None, places: int, takes: bool) -> dict[str, Any]:
    return {"position_ids": position_ids + places} if takes and position_ids is not None else {}


# ------------------------------------------------------------------------------------- keys and values in every layer


class PrefixLayer(DynamicLayer):
    """The cache of one layer that holds a prefix and remembers nothing else, so that reading it twice (checkpointing) is once."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True  # [1, kv_heads, V, d]
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states, value_states, *args, **kwargs):
        return (torch.cat([_like(self.keys, key_states), key_states], dim=-2),
                torch.cat([_like(self.values, value_states), value_states], dim=-2))


def _like(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return prefix.to(states).expand(len(states), -1, -1, -1)


def cache_first(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The backbone's forward with the prefix `model.virtual()` in every layer's cache."""
    takes_positions = "position_ids" in inspect.signature(forward).parameters
    model.prefix_places = model.virtual_places
    for module in model.modules():
        if hasattr(module, "_can_checkpoint_with_cache"):  # ours is only read, so a recomputed layer may have it
            module._can_checkpoint_with_cache = True

    @functools.wraps(forward)
    def wrapped(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, trie=None, **more):
        virtual: VirtualTokens = model.virtual
        inputs = {**({"trie": trie} if trie is not None else {}), **more}
        if not virtual.on:
            return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values, **inputs)
        places = model.virtual_places
        if past_key_values is None:
            past_key_values = Cache(layers=[PrefixLayer(*pair) for pair in keys_and_values(model)])
        elif past_key_values.get_seq_length() == 0:  # generate's own: it is filled, and grows
            rows = len(input_ids if input_ids is not None else more["inputs_embeds"])
            for layer, pair in enumerate(keys_and_values(model)):
                past_key_values.update(*(t.to(_cache_dtype(model)).expand(rows, -1, -1, -1) for t in pair), layer)
        if trie is None and attention_mask is not None:
            ones = torch.ones_like(attention_mask[:, :1]).expand(-1, places)
            attention_mask = torch.cat([ones, attention_mask], dim=1)
            if position_ids is None:
                positions = (attention_mask.long().cumsum(-1) - 1)[:, places:]
                position_ids = positions[:, -_width(input_ids, more):] - places
        with _layers_alone_checkpoint(model.base_model):
            return forward(input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
                           **_positions(position_ids, places, takes_positions), **inputs)

    return wrapped


@contextmanager
def _layers_alone_checkpoint(backbone: nn.Module) -> Iterator[None]:
    """GPT-2's backbone hands its layers no cache while it is told that they checkpoint; they know it themselves."""
    told = getattr(backbone, "gradient_checkpointing", None)
    if told:
        backbone.gradient_checkpointing = False
    try:
        yield
    finally:
        if told:
            backbone.gradient_checkpointing = told


def _width(input_ids: torch.Tensor | None, more: dict[str, Any]) -> int:
    return (input_ids if input_ids is not None else more["inputs_embeds"]).shape[1]


def _cache_dtype(model: nn.Module) -> torch.dtype:
    """What the model's keys come in: as autocast computes, or as its norms hold them."""
    device = model.get_input_embeddings().weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.get_input_embeddings().weight.dtype


def keys_and_values(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[V, layers * 2 * kv_heads * d] -> a pair of [1, kv_heads, V, d] for each layer. The order is PEFT's."""
    heads, d = kv_shape(model)
    flat = model.virtual()
    parts = flat.view(len(flat), -1, heads, d).permute(1, 2, 0, 3)  # [layers * 2, kv_heads, V, d]
    return [(parts[i][None], parts[i + 1][None]) for i in range(0, len(parts), 2)]


def kv_shape(model: nn.Module) -> tuple[int, int]:
    """(key-value heads, width of a head)"""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, d


@torch.no_grad()
def real_keys_and_values(model: nn.Module, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """What the model itself makes of some tokens: [V, layers * 2 * kv_heads * d] float32, as the prefix is laid out."""
    embedding = model.get_input_embeddings().weight
    cache = Cache(layers=[DynamicLayer() for _ in range(model.config.get_text_config().num_hidden_layers)])
    training = model.training
    model.eval()
    model.base_model(input_ids=torch.as_tensor(ids, device=embedding.device)[None], past_key_values=cache, use_cache=True)
    model.train(training)
    parts = [t[0].float().transpose(0, 1) for layer in cache.layers for t in (layer.keys, layer.values)]  # [V, kv_heads, d]
    return torch.stack(parts, dim=1).flatten(1)
