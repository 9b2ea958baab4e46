"""Small things that tests share: a tokenizer and models made on the spot, no download."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from weitiao.trie import Example

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCABULARY = 300


@pytest.fixture(scope="session", autouse=True)
def quiet():
    from weitiao.screen import quiet_libraries

    quiet_libraries()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real rows and tokenizers, where they are."""
    if not SHARED.is_dir():
        pytest.skip("the folder of real data (../shared) is not here")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 300 ids with a chat template: ChatML, eos <|im_end|>, pad <|pad|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )
    inner.train_from_iterator(["What is the capital of France? Paris. user assistant system Human Assistant"] * 4, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<|endoftext|>",
    )
    made.chat_template = CHATML
    return made


def tiny_config(name: str = "llama", vocabulary: int = VOCABULARY, **more):
    """The config of a tiny model of an architecture, dropouts off."""
    import transformers as T

    from weitiao.model.families import yuan2

    llama = dict(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=2, pad_token_id=3,
    )
    gpt2 = dict(
        vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=None, eos_token_id=2, pad_token_id=3,
    )
    kinds = {
        "llama": (T.LlamaConfig, llama),
        "mistral": (T.MistralConfig, llama | {"sliding_window": 5}),
        "qwen2": (T.Qwen2Config, llama),
        "qwen3": (T.Qwen3Config, llama | {"head_dim": 8}),
        "gemma3": (T.Gemma3TextConfig, llama | {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 6,
                                                "final_logit_softcapping": 3.0}),
        "glm": (T.GlmConfig, llama | {"head_dim": 8}),
        "gpt2": (T.GPT2Config, gpt2),
        "cohere": (T.CohereConfig, llama | {"logit_scale": 0.3}),
        "granite": (T.GraniteConfig, llama | {"logits_scaling": 3.0}),
        "gptj": (T.GPTJConfig, dict(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4,
                                    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=2,
                                    pad_token_id=3, tie_word_embeddings=False)),
        "bloom": (T.BloomConfig, dict(vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4, bos_token_id=None,
                                      eos_token_id=2, pad_token_id=3)),
        "yuan": (yuan2.YuanConfig, {k: v for k, v in llama.items() if k != "num_key_value_heads"} | {"initializer_range": 0.1}),
    }
    kind, options = kinds[name]
    return kind(**(options | more))


def tiny_model(name: str = "llama", seed: int = 0, **more):
    """A tiny random model with the trie's attention, where its family takes one."""
    import torch
    from transformers import AutoModelForCausalLM

    from weitiao.model.load import learn_attention, trie_obstacle

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **more))
    with torch.no_grad():  # norms and biases away from their trivial starts, so that every gradient says something
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if trie_obstacle(model) is None:
        learn_attention(model)
    return model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    """A folder as a hub would give it: a tiny random Llama with the tokenizer above."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """24 rows, prompt and completion, that share a prefix."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"What is {a} and {a}?", "completion": f"It is {2 * a}."} for a in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def example(ids, learned_from: int, row: int = 0, weight: float = 1.0) -> Example:
    """Ids of which those from place `learned_from` on are learned."""
    ids = np.asarray(ids, np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[learned_from:] = weight
    return Example(ids, weights, row)


@pytest.fixture
def branching() -> list[Example]:
    """Rows that share nothing, a little, most, and all: duplicates, a branch inside an answer, a row that is a prefix."""
    rng = np.random.default_rng(0)
    shared, longer = rng.integers(4, 60, 9), rng.integers(4, 60, 5)
    answer = rng.integers(4, 60, 7)
    return [
        example([*shared, *rng.integers(4, 60, 6)], 9, 0),
        example([*shared, *longer, *answer], 14, 1),
        example([*shared, *longer, *answer], 14, 2),  # the same again
        example([*shared, *longer, *answer[:4], *rng.integers(4, 60, 3)], 14, 3),  # leaves inside the answer
        example([*shared, *longer, *answer[:5]], 12, 4, weight=0.5),  # ends inside it, and learned from earlier on
        example([*shared[:4], *rng.integers(4, 60, 8)], 4, 5, weight=2.0),
        example(rng.integers(4, 60, 8), 1, 6),
    ]


@pytest.fixture(autouse=True)
def transformers_turns_by_itself():
    """A fused model replaces a function of transformers; the next test's judge has its own again."""
    yield
    for name, module in list(sys.modules.items()):
        turned = vars(module).get("apply_rotary_pos_emb") if name.startswith("transformers.models.") else None
        if hasattr(turned, "by_weitiao"):
            module.apply_rotary_pos_emb = turned.__wrapped__
