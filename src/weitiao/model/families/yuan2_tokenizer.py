"""Yuan2's tokenizer: its sentencepiece model as it is, and the tokens that its makers put around it.

    enc("问题")  <sep>  enc("回答")  <eod>

A text is parted at every token that is known by name; what lies between is encoded on its own, each with sentencepiece's
"▁" before it, as by the slow LlamaTokenizer that the model was trained with. Ten of these tokens are pieces of the model,
which no text makes by itself; five have ids behind the pieces. <n>, which stands between the turns of a chat, is none of
them: its makers write it as the three pieces <, n and >.

transformers 5 reads the same file as another tokenizer: it makes an order of merges of the pieces' scores, which 58,027
pieces share, and where sentencepiece takes the leftmost of equals it takes the same one everywhere (`conversion_note`).
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer

from weitiao.data.templates import FOLDER

EOD = "<eod>"
# In their makers' order, which gives ids to those that are no pieces.
ADDED = (
    "<sep>", "<pad>", "<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>", "<commit_before>", "<commit_msg>",
    "<commit_after>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>",
)
# The template in some releases ends a prompt, and has no end for an answer; ours writes the same prompts.
WITHOUT_AN_END = "if loop.last else '<n>'"
MOST_ROWS, MOST_CHARACTERS = 1000, 1_000_000  # that are compared with the conversion: 2 seconds' work at most


class Yuan2Tokenizer(PreTrainedTokenizer):
    # Saved under a name of our own: from a tokenizer.model transformers would make another tokenizer, without a word.
    vocab_files_names = {"vocab_file": "tokenizer.model", "saved_file": "yuan2.model"}
    model_input_names = ["input_ids", "attention_mask"]
    needs_weitiao = True  # no other program knows it

    def __init__(self, vocab_file: str | None = None, saved_file: str | None = None, **options: Any):
        self.vocab_file = str(saved_file or vocab_file)
        self.pieces = SentencePieceProcessor(model_file=self.vocab_file)
        # piece -> id
        self.ids = {self.pieces.id_to_piece(i): i for i in range(len(self.pieces))}
        self.unknown = self.pieces.unk_id()
        # The files name </s> as the end, and a BOS before each text; the model was trained with neither.
        options |= {"eos_token": EOD, "pad_token": EOD, "add_bos_token": False, "add_eos_token": False}
        options["extra_special_tokens"] = list(dict.fromkeys([*ADDED, *(options.get("extra_special_tokens") or [])]))
        options.setdefault("padding_side", "left")
        options.setdefault("clean_up_tokenization_spaces", False)
        own = options.get("chat_template")
        if not own or isinstance(own, str) and WITHOUT_AN_END in own:
            options["chat_template"] = (FOLDER / "yuan2.jinja").read_text("utf-8")
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return self.ids | self.added_tokens_encoder

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        file = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}yuan2.model"
        file.write_bytes(self.pieces.serialized_model_proto())
        return (str(file),)

    # ------------------------------------------------------------------------------------------------- text -> ids

    def tokenize(self, text: str, **_: Any) -> list[str]:
        parts = named_tokens(tuple(self._added_tokens_encoder)).split(text)  # text, token, text, token, …, text
        return [token for i, part in enumerate(parts) if part
                for token in ([part] if i % 2 else self.pieces.encode(part, out_type=str))]

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, self.unknown)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index) if index < len(self.pieces) else ""  # the embedding has more rows than there are tokens

    # ------------------------------------------------------------------------------- what others make of the same file

    def conversion_note(self, rows: Iterable[tuple[str, str, str]]) -> str:
        """What to know of rows (where each stands, its prompt, its answer) that transformers' conversion gives other ids."""
        seen, characters = [], 0
        for row in islice(rows, MOST_ROWS):
            seen.append(row)
            characters += len(row[1]) + len(row[2])
            if characters > MOST_CHARACTERS:
                break
        try:
            converted = self.converted()
        except Exception:  # tokenizers raises plain ones. What cannot be converted cannot send other ids, and a note stops no run
            return ""
        others = [where for where, *texts in seen if any(self._ids(text) != converted(text).input_ids for text in texts)]
        if not others:
            return ""
        return (f"Of {len(seen):,} rows looked at, {len(others):,} ({others[0]} the first) have other token ids in transformers' conversion of "
                "tokenizer.model, which orders pieces of equal score its own way. weitiao uses sentencepiece's own ids, as Yuan2 was "
                "trained with; a server that converts the tokenizer by itself sends the model other ids for such texts.")

    def converted(self) -> Any:
        """The file as a program reads it that follows its makers' page; 2 to 4 seconds."""
        from transformers import LlamaTokenizer

        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "tokenizer.model").write_bytes(self.pieces.serialized_model_proto())
            made = LlamaTokenizer.from_pretrained(folder, add_bos_token=False, add_eos_token=False, eos_token=EOD)
        made.add_tokens(list(ADDED), special_tokens=True)
        return made

    def _ids(self, text: str) -> list[int]:
        return self.convert_tokens_to_ids(self.tokenize(text))

    # ------------------------------------------------------------------------------------------------- ids -> text

    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """The text. The "▁" of the first stretch is dropped, that of a later one is a space: `…。<sep> {"姓名": …`."""
        ids = [int(i) for i in ([token_ids] if isinstance(token_ids, int) else token_ids)]
        if skip_special_tokens:
            special = set(self.all_special_ids)
            ids = [i for i in ids if i not in special]
        named = self._added_tokens_decoder
        parts: list[str] = []
        for apart, run in groupby(ids, key=named.__contains__):
            if apart:
                parts += [named[i].content for i in run]
            elif run := [i for i in run if i < len(self.pieces)]:
                begins_anew = bool(parts) and self.pieces.id_to_piece(run[0]).startswith("▁")
                parts.append(" " * begins_anew + self.pieces.decode(run))
        return "".join(parts)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(tokens))


@functools.lru_cache(maxsize=8)
def named_tokens(tokens: tuple[str, ...]) -> re.Pattern:
    """Any of them, the longest that fits; it parts a text."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})")
