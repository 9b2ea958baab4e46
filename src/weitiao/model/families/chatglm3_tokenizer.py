"""ChatGLM3's tokenizer: a sentencepiece model, nine ids behind its pieces, and texts that are encoded one by one.

    [gMASK] sop <|user|> enc("\\n") enc("你好") <|assistant|> enc("\\n") enc("你好！") </s>

Each enc is a text of its own, with sentencepiece's "▁" before it; what stands between is put in by id, and no text makes it.
A chat template writes text, though, where both look alike. So `apply_chat_template` marks what the template itself wrote,
with noncharacters of Unicode, which no text holds for interchange and which are dropped from what was said:

    <|user|> U+FDD1    the id of <|user|>, in the place of a text
    U+FDD2             here a text ends and the next begins; a template writes it as <|text|>

Without the marks everything is text, as in the original (its encode_special_tokens is off).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer

EXTRA = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
STOPS = ("<|user|>", "<|observation|>")  # beside the EOS: the turn is someone else's
QUOTED, TOKEN, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
BREAK_NAME = "<|text|>"

# As they stand in a template; sop is a word's middle otherwise.
WRITTEN = re.compile(r"\[gMASK\] ?sop|" + "|".join(map(re.escape, [*(t for t in EXTRA if t not in ("sop", "eop")), "<s>", "</s>"])))
SAID = re.compile(f"{WRITTEN.pattern}|sop|{re.escape(BREAK_NAME)}")
MARKED = re.compile(f"({'|'.join(map(re.escape, [*EXTRA, '<s>', '</s>']))}){TOKEN}|{BREAK}")
MARKS = re.compile(f"[{QUOTED}{TOKEN}{BREAK}]")

# The official layout, each message as role, metadata, line break and content; one EOS behind the last answer.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first -%}{{ '[gMASK]sop' }}"
    "{%- if tools and message['role'] != 'system' -%}"
    r"{{ '<|system|>\n<|text|>Answer the following questions as best as you can. You have access to the following tools:\n' }}"
    "{{ tools | tojson(indent=4) }}{%- endif -%}{%- endif -%}"
    r"{{ '<|' + ('observation' if message['role'] == 'tool' else message['role']) + '|>' + (message['metadata'] or '') }}"
    r"{{ '\n<|text|>' + message['content'] }}"
    r"{%- if tools and loop.first and message['role'] == 'system' -%}{{ '\n' + tools | tojson(indent=4) }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}"
    "{%- elif messages[-1]['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}"
)


class ChatGLM3Tokenizer(PreTrainedTokenizer):
    # Saved under a name of our own: from a tokenizer.model transformers would make another tokenizer, without a word.
    vocab_files_names = {"vocab_file": "tokenizer.model", "saved_file": "chatglm3.model"}
    model_input_names = ["input_ids", "attention_mask"]
    needs_weitiao = True  # no other program knows it

    def __init__(self, vocab_file: str | None = None, saved_file: str | None = None, **options: Any):
        self.vocab_file = str(saved_file or vocab_file)
        self.pieces = SentencePieceProcessor(model_file=self.vocab_file)
        # [MASK], [gMASK], … -> the ids behind the pieces
        self.extra = {token: len(self.pieces) + i for i, token in enumerate(EXTRA)}
        for name, piece in (("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<unk>")):
            options[name] = options.get(name) or piece
        options["extra_special_tokens"] = list(dict.fromkeys([*(options.get("extra_special_tokens") or []), *EXTRA]))
        options.pop("auto_map", None)  # the original's code, which is not used
        options.setdefault("padding_side", "left")
        options.setdefault("chat_template", CHAT_TEMPLATE)
        options.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces) + len(EXTRA)

    @property
    def stop_ids(self) -> list[int]:
        """What ends an answer beside the EOS."""
        return [self.extra[token] for token in STOPS]

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.pieces.id_to_piece(i): i for i in range(len(self.pieces))}
        return pieces | self.extra | self.added_tokens_encoder

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        file = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}chatglm3.model"
        file.write_bytes(self.pieces.serialized_model_proto())
        return (str(file),)

    # ------------------------------------------------------------------------------------------------- text -> ids

    def tokenize(self, text: str, **_: Any) -> list[str]:
        return [token for part in self._parts(text) for token in part]

    def _parts(self, text: str) -> Iterator[list[str]]:
        start = 0
        for mark in MARKED.finditer(text):
            yield self._encode_text(text[start : mark.start()])
            if mark[1]:
                yield [mark[1]]
            start = mark.end()
        yield self._encode_text(text[start:])

    def _encode_text(self, text: str) -> list[str]:
        """One text as pieces; tokens that were added to the tokenizer are taken whole, as everywhere."""
        own = {*self.extra, *self._own_special()}
        added = sorted((t for t in self.added_tokens_encoder if t not in own), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, added))})", MARKS.sub("", text)) if added else [MARKS.sub("", text)]
        return [token for i, part in enumerate(parts) if part
                for token in ([part] if i % 2 else self.pieces.encode(part, out_type=str))]

    def _own_special(self) -> list[str]:
        return [str(t) for t in (self.unk_token, self.bos_token, self.eos_token, self.pad_token) if t is not None]

    def _convert_token_to_id(self, token: str) -> int:
        return self.extra[token] if token in self.extra else self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if index < len(self.pieces):
            return self.pieces.id_to_piece(index)
        return EXTRA[index - len(self.pieces)] if index < self.vocab_size else self.unk_token

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        return [self.extra["[gMASK]"], self.extra["sop"], *token_ids_0, *(token_ids_1 or [])]

    # ------------------------------------------------------------------------------------------------- ids -> text

    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """The text. Without special tokens it is an answer, whose first line holds metadata: where that is empty, it goes."""
        ids = [int(i) for i in ([token_ids] if isinstance(token_ids, int) else token_ids)]
        special = set(self.all_special_ids)
        if skip_special_tokens:
            ids = [i for i in ids if i not in special]
            blank = self.pieces.encode("\n")
            ids = ids[len(blank) :] if ids[: len(blank)] == blank else ids
        known = special | set(self.added_tokens_decoder) | set(self.extra.values())
        return "".join(
            "".join(self.convert_ids_to_tokens(i) for i in run) if apart else self.pieces.decode([i for i in run if i < len(self.pieces)])
            for apart, run in groupby(ids, key=known.__contains__)
        )

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(tokens))

    # -------------------------------------------------------------------------------------------------- chat -> text

    def apply_chat_template(
        self, conversation, tools=None, documents=None, tokenize=True, return_dict=True, padding=False, truncation=False,
        max_length=None, return_tensors=None, tokenizer_kwargs=None, **options,
    ):
        written = super().apply_chat_template(
            _quoted(conversation), tools=_quoted(tools), documents=_quoted(documents), tokenize=False, **options,
        )
        text = _marked(written) if isinstance(written, str) else [_marked(one) for one in written]
        if not tokenize:
            return text
        encoded = self(text, add_special_tokens=False, padding=padding, truncation=truncation, max_length=max_length,
                       return_tensors=return_tensors, **(tokenizer_kwargs or {}))
        return encoded if return_dict else encoded["input_ids"]


def _quoted(value: Any) -> Any:
    """What was said, so written that nothing in it looks like a token of the template's."""
    if isinstance(value, str):
        return SAID.sub(lambda found: found[0][0] + QUOTED + found[0][1:], MARKS.sub("", value))
    if isinstance(value, dict):
        return {key: item if key == "role" else _quoted(item) for key, item in value.items()}
    return [_quoted(item) for item in value] if isinstance(value, (list, tuple)) else value


def _marked(text: str) -> str:
    """The template's own tokens marked, [gMASK] sop before it if it does not write them; what was said as it was said."""
    text = text if text.startswith("[gMASK]") else "[gMASK]sop" + text
    text = WRITTEN.sub(lambda found: re.sub(r"\] ?sop", f"]{TOKEN}sop", found[0]) + TOKEN, text)
    return text.replace(BREAK_NAME, BREAK).replace(QUOTED, "")
