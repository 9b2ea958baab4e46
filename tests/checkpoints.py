"""A tiny random checkpoint of each tutorial's model, in the files in which the original is published, made on the spot.

    bloom(folder)       Langboat/bloom-800m-zh, bloom-1b4-zh   tutorials 0 and 2
    yuan2(folder)       IEITYuan/Yuan2-2B-Mars-hf              tutorial 1
    llama2(folder)      meta-llama/Llama-2-7b-hf               tutorial 2
    gpt2(folder)        gpt2                                   tutorial 3
    chatglm3(folder)    THUDM/chatglm3-6b                      tutorial 4

Names of weights, which of them are tied, their type, config.json and the tokenizer's files are the original's; widths, layers and
vocabulary are small. Seeds are fixed: the same call writes the same weights and the same ids. Each returns the folder.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import chatglm3 as original_chatglm3
import torch

Shapes = dict[str, tuple[int, ...]]

SENTENCES = [
    *original_chatglm3.TEXT,
    "如何写好一个简历？把下面的数字从小到大排列。写出下面词语的反义词。把日期改写成数字格式，月和日都写两位。列出三种水果：苹果、香蕉、葡萄。",
    "假设你是一个AI简历助手，能从简历中识别出所有的命名实体，并以json格式返回结果。实体的类别包括：姓名、国籍、种族、职位、教育背景、专业、组织名、地名。",
    "Human: Assistant: neg pos The script is sharp, and the acting is anything but dull. I would watch it again tomorrow.",
]
LAYERS = 2
# Code that a checkpoint brings: nothing of it may be run.
REMOTE_CODE = 'raise RuntimeError("the code that comes with a checkpoint was run")\n'


# --------------------------------------------------------------------------------------------------------------- bloom

BLOOM = dict(
    apply_residual_connection_post_layernorm=False, architectures=["BloomForCausalLM"], attention_dropout=0.0,
    attention_softmax_in_fp32=True, bias_dropout_fusion=True, bos_token_id=1, eos_token_id=2, hidden_dropout=0.0, hidden_size=32,
    initializer_range=0.02, layer_norm_epsilon=1e-5, masked_softmax_fusion=True, model_type="bloom", n_head=4, n_inner=None,
    n_layer=LAYERS, offset_alibi=100, pad_token_id=3, pretraining_tp=1, seq_length=2048, skip_bias_add=True, skip_bias_add_qkv=False,
    slow_but_exact=False, torch_dtype="float16", transformers_version="4.20.0", unk_token_id=0, use_cache=True,
)
PARENTS_NAMES = {"hidden_size": "n_embed", "n_head": "num_attention_heads"}


def bloom(folder: Path, prefix: str = "", parents_names: bool = False) -> Path:
    """prefix: "" as in BLOOM's files on the hub, "transformer." as save_pretrained of a causal LM writes it.

    parents_names: config.json in the words of the BLOOM models that Langboat's were cut from.
    """
    vocabulary = write_bloom_tokenizer(folder)
    config = BLOOM | {"vocab_size": vocabulary}
    if parents_names:
        config = {PARENTS_NAMES.get(name, name): value for name, value in config.items()}
    return write_model(folder, config, bloom_shapes(BLOOM["hidden_size"], vocabulary), prefix=prefix)


def bloom_shapes(h: int, vocabulary: int) -> Shapes:
    """There is no head of its own."""
    parts = {"word_embeddings": (vocabulary, h), "word_embeddings_layernorm": (h,), "ln_f": (h,)}
    for layer in (f"h.{i}." for i in range(LAYERS)):
        parts |= {
            layer + "input_layernorm": (h,), layer + "post_attention_layernorm": (h,),
            layer + "self_attention.query_key_value": (3 * h, h), layer + "self_attention.dense": (h, h),
            layer + "mlp.dense_h_to_4h": (4 * h, h), layer + "mlp.dense_4h_to_h": (h, 4 * h),
        }
    biases = {f"{name}.bias": shape[:1] for name, shape in parts.items() if name != "word_embeddings"}
    return {f"{name}.weight": shape for name, shape in parts.items()} | biases


def write_bloom_tokenizer(folder: Path) -> int:
    """A byte-level BPE behind <unk> 0, <s> 1, </s> 2, <pad> 3, that puts no BOS before a text; how many ids it has."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, use_regex=False)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer.train_from_iterator(SENTENCES * 4, trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special.values()), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    ))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {
        "add_prefix_space": False, "name_or_path": "bigscience/tokenizer", "padding_side": "left", "special_tokens_map_file": None,
        "tokenizer_class": "BloomTokenizerFast",
    })
    return tokenizer.get_vocab_size()


# -------------------------------------------------------------------------------------------------------------- llama 2

LLAMA2 = dict(
    _name_or_path="meta-llama/Llama-2-7b-hf", architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu",
    hidden_size=32, initializer_range=0.02, intermediate_size=48, max_position_embeddings=4096, model_type="llama",
    num_attention_heads=4, num_hidden_layers=LAYERS, num_key_value_heads=4, pretraining_tp=1, rms_norm_eps=1e-5, rope_scaling=None,
    tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.31.0.dev0", use_cache=True,
)


def llama2(folder: Path) -> Path:
    vocabulary = write_llama_tokenizer(folder, legacy=False, padding_side="right")
    write_json(folder / "generation_config.json", {
        "bos_token_id": 1, "do_sample": True, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0, "temperature": 0.6,
        "top_p": 0.9, "transformers_version": "4.31.0.dev0",
    })
    h, inner = LLAMA2["hidden_size"], LLAMA2["intermediate_size"]
    shapes = llama_shapes(h, inner, vocabulary) | {"lm_head.weight": (vocabulary, h)}
    return write_model(folder, LLAMA2 | {"vocab_size": vocabulary}, shapes, buffers=rotary_buffers(h // LLAMA2["num_attention_heads"]))


def llama_shapes(h: int, inner: int, vocabulary: int) -> Shapes:
    shapes = {"model.embed_tokens.weight": (vocabulary, h), "model.norm.weight": (h,)}
    for layer in (f"model.layers.{i}." for i in range(LAYERS)):
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (h, h) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (inner, h) for name in ("gate", "up")}
        shapes |= {layer + "mlp.down_proj.weight": (h, inner), layer + "input_layernorm.weight": (h,),
                   layer + "post_attention_layernorm.weight": (h,)}
    return shapes


def rotary_buffers(head: int) -> dict[str, torch.Tensor]:
    """Which older checkpoints hold, and nobody reads."""
    speeds = 10_000.0 ** (-torch.arange(0, head, 2) / head)
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": speeds.clone() for i in range(LAYERS)}


def write_llama_tokenizer(folder: Path, more: Iterable[str] = (), **changes: object) -> int:
    """sentencepiece: <unk> 0, <s> 1, </s> 2, the 256 bytes, BPE, then `more`; no pad token. How many ids it has.

    more: pieces with the score 0 that no merging of others reaches: sentencepiece alone splits them, as it does the original's.
    changes: to tokenizer_config.json.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, vocab_size=520, model_type="bpe", byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, num_threads=1,
    )
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for piece in more:
        pieces.pieces.add(piece=piece, score=0.0)
    (folder / "tokenizer.model").write_bytes(pieces.SerializeToString(deterministic=True))
    special = {name: {"content": piece, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
               for name, piece in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {
        **{name: {"__type": "AddedToken", **token} for name, token in special.items()},
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656, "pad_token": None, "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer", **changes,
    })
    return len(pieces.pieces)


# --------------------------------------------------------------------------------------------------------------- yuan 2

YUAN2 = dict(
    _from_model_config=True, _name_or_path="yuan_model_2b", architectures=["YuanForCausalLM"], attn_dropout=0, causal_mask=True,
    auto_map={"AutoConfig": "configuration_yuan.YuanConfig", "AutoModelForCausalLM": "yuan_hf_model.YuanForCausalLM"},
    dropout=0.1, hidden_act="silu", hidden_size=32, initializer_range=0.02, intermediate_size=48, max_position_embeddings=8192,
    model_max_length=8192, model_type="yuan", num_attention_heads=4, num_hidden_layers=LAYERS, reset_attention_mask=True,
    reset_position_ids=True, rms_norm_eps=1e-6, tie_word_embeddings=True, tokenizer_class="YuanTokenizer", torch_dtype="bfloat16",
    transformers_version="4.30.0.dev0", use_cache=True, use_flash_attention=False, use_loss_mask=False,
)
YUAN2_PIECES = (
    "<eod>", "<n>", "<sep>", "<pad>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>",
    "<commit_before>", "<commit_msg>", "<commit_after>",
)
YUAN2_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
ROOM = 128  # rows of the embedding beyond the tokenizer's, for <mask>, <predict>, …; the original has 87


def yuan2(folder: Path, tokenizer: Path | None = None) -> Path:
    """tokenizer: a folder of the original's files; without, a small one that has the same tokens."""
    import sentencepiece

    if tokenizer is None:
        write_llama_tokenizer(folder, YUAN2_PIECES, add_eos_token=True)
    else:
        copy_files(tokenizer, YUAN2_FILES, folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    eod, sep = pieces.piece_to_id("<eod>"), pieces.piece_to_id("<sep>")
    config = YUAN2 | {"vocab_size": pieces.get_piece_size() + ROOM, "eod_token": eod, "sep_token": sep}
    config |= {f"{name}_token_id": eod for name in ("bos", "eos", "pad", "mask", "eod", "sep")}
    write_json(folder / "generation_config.json", {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod})
    for name in ("configuration_yuan.py", "yuan_hf_model.py"):
        (folder / name).write_text(REMOTE_CODE, "utf-8")
    h = config["hidden_size"]
    shapes = llama_shapes(h, config["intermediate_size"], config["vocab_size"])
    for gate in (f"model.layers.{i}.self_attn.lf_gate." for i in range(LAYERS)):
        shapes |= {gate + "conv1.weight": (h // 2, h, 2, 1), gate + "conv1.bias": (h // 2,), gate + "conv2.weight": (h, h // 2, 2, 1),
                   gate + "conv2.bias": (h,), gate + "output_layernorm.weight": (h,)}
    return write_model(folder, config, shapes, buffers=rotary_buffers(h // config["num_attention_heads"]))


# ---------------------------------------------------------------------------------------------------------------- gpt-2

GPT2 = dict(
    activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, embd_pdrop=0.1, initializer_range=0.02,
    layer_norm_epsilon=1e-5, model_type="gpt2", n_ctx=256, n_embd=32, n_head=4, n_layer=LAYERS, n_positions=256, resid_pdrop=0.1,
    summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
    task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
)
GPT2_FILES = ("vocab.json", "merges.txt")
END_OF_TEXT = "<|endoftext|>"


def gpt2(folder: Path, tokenizer: Path | None = None) -> Path:
    """tokenizer: a folder of the original's vocab.json and merges.txt; without, a small one where neg and pos are a token each."""
    if tokenizer is None:
        write_gpt2_tokenizer(folder)
    else:
        copy_files(tokenizer, GPT2_FILES, folder)
    write_json(folder / "tokenizer_config.json", {"model_max_length": GPT2["n_positions"]})
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    ends = {"bos_token_id": vocabulary[END_OF_TEXT], "eos_token_id": vocabulary[END_OF_TEXT]}
    write_json(folder / "generation_config.json", ends)
    places = GPT2["n_positions"]
    causal = torch.ones(places, places).tril()[None, None]
    return write_model(
        folder, GPT2 | ends | {"vocab_size": len(vocabulary)}, gpt2_shapes(GPT2["n_embd"], len(vocabulary)), dtype=torch.float32,
        buffers={f"h.{i}.attn.bias": causal.clone() for i in range(LAYERS)},
    )


def gpt2_shapes(h: int, vocabulary: int) -> Shapes:
    """Matrices are stored [in, out]; there is no head of its own."""
    shapes = {"wte.weight": (vocabulary, h), "wpe.weight": (GPT2["n_positions"], h), "ln_f.weight": (h,), "ln_f.bias": (h,)}
    for layer in (f"h.{i}." for i in range(LAYERS)):
        for name, into, out in (("attn.c_attn", h, 3 * h), ("attn.c_proj", h, h), ("mlp.c_fc", h, 4 * h), ("mlp.c_proj", 4 * h, h)):
            shapes |= {f"{layer}{name}.weight": (into, out), f"{layer}{name}.bias": (out,)}
        shapes |= {f"{layer}{norm}.{part}": (h,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return shapes


def write_gpt2_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt of a byte-level BPE; <|endoftext|> is the last id."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(SENTENCES * 4 + ["neg", "pos"] * 40, trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    ))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {END_OF_TEXT: len(vocabulary)}, ensure_ascii=False), "utf-8")


# ------------------------------------------------------------------------------------------------------------- chatglm 3


def chatglm3(folder: Path) -> Path:
    """Weights and tokenizer of tests/chatglm3.py in one folder, the weights in float16."""
    original_chatglm3.write_tokenizer(folder)
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"):
        (folder / name).write_text(REMOTE_CODE, "utf-8")
    weights = {name: weight.half() for name, weight in original_chatglm3.random_weights().items()}
    return original_chatglm3.write_checkpoint(folder, weights)


# ------------------------------------------------------------------------------------------------------------ all alike


def write_model(
    folder: Path, config: Mapping[str, object], shapes: Shapes, *, dtype: torch.dtype | None = None, prefix: str = "",
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """config.json and model.safetensors; weights in `dtype`, by default the config's torch_dtype, norms away from 1."""
    from safetensors.torch import save_file

    dtype = dtype or getattr(torch, str(config["torch_dtype"]))
    draw = torch.Generator().manual_seed(0)
    weights = {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    weights = {name: w + 1 if is_norm(name) else w for name, w in weights.items()}
    weights = {prefix + name: w.to(dtype) for name, w in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    weights |= {prefix + name: buffer for name, buffer in (buffers or {}).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)
    return folder


def is_norm(name: str) -> bool:
    return name.endswith("weight") and any(part in name for part in ("norm", "ln_"))


def copy_files(source: Path, names: Iterable[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(source / name, folder / name)


def write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
