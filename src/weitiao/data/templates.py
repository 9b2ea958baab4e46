"""A `Conversation` -> pieces of text, each given or learned.

A turn is rendered as inference will meet it: the prompt is what the template makes of the messages before the answer,
with the generation prompt; the answer is what the template writes after that, up to its stop token. One template object
renders for training, evaluation and chat alike, so the two prompts cannot come apart.

Templates are chat templates of transformers: the tokenizer's own by default, or a named .jinja file in `templates/`,
rendered as the tokenizer's `apply_chat_template` does in either case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from weitiao.data.conversation import Conversation
from weitiao.data.pieces import Pieces
from weitiao.data.skeletons import Skeletons, Write, repeats_what_is_said
from weitiao.errors import TemplateError, nearest
from weitiao.trie import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).with_name("templates")
PROBE = "weitiao"  # an answer that no template writes of its own accord
WITHOUT_OWN = "human_assistant"  # for tokenizers that bring no chat template, such as GPT-2's


@dataclass(frozen=True)
class Turn:
    """One answer and the prompt that inference would send for it.

    prompt: text; answer: text without the stop token; weight: how much it is learned.
    """

    prompt: str
    answer: str
    weight: float


@dataclass(frozen=True, eq=False)
class Template:
    """How conversations are written for one tokenizer.

    name: "auto" for the tokenizer's own, else the named one. source: its jinja text. stop_id: the one id that ends an
    answer. begins_with_bos: does the tokenizer put a BOS before a plain text, and the template none of its own?
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    stop_id: int
    begins_with_bos: bool

    def __getstate__(self) -> dict[str, Any]:
        """What it is made of, for another process; what it has cached stays here."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def pad_id(self) -> int:
        """What fills padded rows, under a mask: a pad token of the tokenizer's may lie outside the embedding."""
        return self.stop_id

    @property
    def stop_ids(self) -> list[int]:
        """Where generation stops: the learned stop token, the tokenizer's EOS where that is another, and what else it names."""
        more = getattr(self.tokenizer, "stop_ids", ())
        return list(dict.fromkeys(i for i in (self.stop_id, self.tokenizer.eos_token_id, *more) if i is not None))

    @cached_property
    def ending(self) -> str:
        """What the template writes after an answer, such as `<|im_end|>\\n`; found by asking it.

        Raises:
            TemplateError: the template is no jinja.
        """
        try:
            written = self.render([{"role": "user", "content": "1"}, {"role": "assistant", "content": PROBE}], False)
        except TemplateError as refusal:
            if isinstance(refusal.__cause__, jinja2.TemplateSyntaxError):
                raise
            return ""  # a template that wants more than one exchange
        return written.rpartition(PROBE)[2] if PROBE in written else ""

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self.tokenizer)

    def render(self, messages: Sequence[dict[str, str]], answer_next: bool, tools: Sequence[Any] = ()) -> str:
        """Messages as text; with answer_next, up to where the assistant's answer begins.

        Raises:
            TemplateError: the template refuses these messages (roles that do not alternate, say).
        """
        try:
            return self._write(list(messages), answer_next, list(tools) or None)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"The template {self.name!r} is no jinja: line {error.lineno}: {error.message}.",
                                next_step="Mend it, or choose another (data.template).") from error
        except Exception as error:  # a template raises whatever its author chose
            raise TemplateError(f"The template {self.name!r} refuses the conversation: {error}") from error

    @cached_property
    def _write(self) -> Write:
        """(messages, answer next?, tools) -> text. transformers' own compiled template, without what it does around it
        for messages of other kinds: that takes longer than the rendering."""
        from transformers import PreTrainedTokenizerBase
        from transformers.utils import chat_template_utils

        tokenizer, compiled = self.tokenizer, getattr(chat_template_utils, "_compile_jinja_template", None)
        if compiled and type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template:
            template = compiled(self.source)

            def write(messages: list[dict[str, str]], answer_next: bool, tools: list[Any] | None) -> str:
                return template.render(
                    messages=messages, tools=tools, documents=None, add_generation_prompt=answer_next, **tokenizer.special_tokens_map,
                )

            return Skeletons(write) if repeats_what_is_said(template.environment.parse(self.source)) else write
        return lambda messages, answer_next, tools: tokenizer.apply_chat_template(
            messages, chat_template=self.source, add_generation_prompt=answer_next, tokenize=False, tools=tools,
        )

    def prompt_ids(self, messages: Sequence[dict[str, str]], tools: Sequence[Any] = ()) -> np.ndarray:
        """The ids that inference sends for these messages, int32 [T]."""
        return self.encode_prompts([self.render(messages, answer_next=True, tools=tools)])[0]

    def head(self, messages: Sequence[dict[str, str]], tools: Sequence[Any] = ()) -> int:
        """How many tokens of the prompt stand before what the user says first: a BOS, a system text, a role's name."""
        prompt = self.prompt_ids(messages, tools)
        said = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
        others = [[*messages[:said], messages[said] | {"content": probe}, *messages[said + 1 :]] for probe in ("0", "是")]
        return min(common_prefix(prompt, self.prompt_ids(other, tools)) for other in others)

    def encode_prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Texts that each begin a row, as ids with one BOS at most; several at once use several cores."""
        encoded = self._pieces.encode(texts)
        if not self.begins_with_bos:
            return encoded
        bos = np.array([self.tokenizer.bos_token_id], np.int32)
        return [ids if len(ids) and ids[0] == bos[0] else np.concatenate([bos, ids]) for ids in encoded]

    def encode(self, text: str) -> np.ndarray:
        """A text that goes on where others end, as ids without a BOS."""
        return np.asarray(self.tokenizer(text, add_special_tokens=False).input_ids, np.int32)

    def turns(self, conversation: Conversation) -> Iterator[Turn]:
        """Each learned turn of a conversation, with its prompt."""
        for i in conversation.turns():
            message = conversation.messages[i]
            prompt = self.render(conversation.as_dicts(i), True, conversation.tools)
            written = self.render(conversation.as_dicts(i + 1), False, conversation.tools)
            answer = message.content
            if written.startswith(prompt):
                answer = self._before_ending(written[len(prompt) :])
            yield Turn(prompt, answer, message.weight)

    def _before_ending(self, written: str) -> str:
        """What the template makes of an answer (it may strip it, or write around it), up to the stop token."""
        stop = self.tokenizer.decode([self.stop_id])
        ending = self.ending[self.ending.find(stop) :] if stop in self.ending else self.ending
        if ending and written.endswith(ending):
            return written.removesuffix(ending)
        return written.rpartition(stop)[0] if stop in written else written


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of a run: `auto`, a named one, or a .jinja file.

    Raises:
        TemplateError: there is none of that name, or no single id ends its answers.
    """
    source, own = _source(name, tokenizer)
    if name == "auto" and not own:
        name = WITHOUT_OWN
    adds_bos = not own and tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    template = Template(tokenizer, name, source, stop_id=-1, begins_with_bos=adds_bos)
    return Template(tokenizer, name, source, _stop_id(template), adds_bos)


def named_templates() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def _source(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """(jinja text, is it the tokenizer's own?)"""
    if name == "auto" and tokenizer.chat_template:
        return tokenizer.get_chat_template(), True
    if name.endswith(".jinja"):
        if not Path(name).is_file():
            siblings = [str(p) for p in Path(name).parent.glob("*.jinja")]
            raise TemplateError(f"There is no template file {name}.", nearest(name, siblings),
                                f"Give the path of a .jinja file, or one of {', '.join(['auto', *named_templates()])} (data.template).")
        return Path(name).read_text("utf-8"), False
    file = FOLDER / f"{WITHOUT_OWN if name == 'auto' else name}.jinja"
    if not file.is_file():
        known = ["auto", *named_templates()]
        raise TemplateError(f"There is no template {name!r}. {nearest(name, known)}".rstrip(),
                            f"Expected one of {', '.join(known)}, or a .jinja file.")
    return file.read_text("utf-8"), False


def _stop_id(template: Template) -> int:
    """The id that ends an answer: the first special token that the template writes after one, else the EOS.

    Found in the template's ending, since it is <|im_end|> here, <|eot_id|> or <end_of_turn> there, and not always the EOS.
    """
    tokenizer = template.tokenizer
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for token in tokenizer(template.ending, add_special_tokens=False).input_ids:
        if token == tokenizer.eos_token_id or (token in special and token != tokenizer.unk_token_id):
            return token
    if tokenizer.eos_token_id is None:
        raise TemplateError(
            "The tokenizer has no EOS token, and the template writes none after an answer: the model would never stop.",
            next_step="Choose a template that ends its answers (data.template), or set eos_token in tokenizer_config.json.",
        )
    return tokenizer.eos_token_id

