"""Messages -> text by a chat template that repeats what is said as it stands: rendered once for each row of roles.

    [user, assistant] -> "<|im_start|>user\\n" 0 "<|im_end|>\\n<|im_start|>assistant\\n" 1 "<|im_end|>\\n"

A template may look into what is said: strip it, cut a thought out of it, ask whether it holds a word. Whether it does is read
in its syntax tree: `content` may be written, alone or between other texts, and nothing else may be done with it or with a
message as a whole. Then what stands around the contents depends on the roles alone. Of any other template nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import nodes

Write = Callable[[list[dict[str, str]], bool, list[Any] | None], str]
MOST = 1_000  # rows of roles that are remembered
MARK = "\ufdd0{}\ufdd1"  # code points that no text has; a template that has them is not taken for one that repeats
WRITTEN = (nodes.Add, nodes.Concat, nodes.CondExpr)  # what a content may be part of on its way out
FILTERS = {"length", "upper", "lower", "capitalize", "trim"}
COUNTS = {"index", "index0", "revindex", "revindex0", "first", "last", "length"}  # what a loop tells of itself
HARMLESS = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.Name, nodes.Const, nodes.Getitem, nodes.Getattr,
    nodes.Slice, nodes.Filter, nodes.Test, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Add, nodes.Sub, nodes.Mod,
    nodes.Concat, nodes.CondExpr, nodes.Call, nodes.Neg,
)


class Skeletons:
    """write: (messages, answer next?, tools) -> text, by the template itself."""

    def __init__(self, write: Write):
        self.write = write
        self.known: dict[tuple[Any, ...], tuple[list[str], list[int]]] = {}

    def __call__(self, messages: list[dict[str, str]], answer_next: bool, tools: list[Any] | None) -> str:
        if tools or any(message.keys() != {"role", "content"} or type(message["content"]) is not str for message in messages):
            return self.write(messages, answer_next, tools)
        roles = (answer_next, *[message["role"] for message in messages])
        if roles not in self.known:
            if len(self.known) >= MOST:
                self.known.clear()
            self.known[roles] = self._skeleton(messages, answer_next)
        between, order = self.known[roles]
        text = [between[0]]
        for i, after in zip(order, between[1:], strict=True):
            text += (messages[i]["content"], after)
        return "".join(text)

    def _skeleton(self, messages: list[dict[str, str]], answer_next: bool) -> tuple[list[str], list[int]]:
        """(texts between contents, which message's content stands after each but the last)"""
        marked = [message | {"content": MARK.format(i)} for i, message in enumerate(messages)]
        first, *rest = self.write(marked, answer_next, None).split(MARK[0])
        pairs = [piece.split(MARK[-1]) for piece in rest]
        return [first, *(after for _, after in pairs)], [int(i) for i, _ in pairs]


def repeats_what_is_said(tree: nodes.Template) -> bool:
    """Is all that a template does with the contents of messages to write them?"""
    loops = list(tree.find_all(nodes.For))
    if any(not isinstance(loop.target, nodes.Name) or not _is_messages(loop.iter) or loop.recursive for loop in loops):
        return False
    ones = {loop.target.name for loop in loops}
    taken = {"messages", "loop", *ones}
    if "messages" in ones or any(not isinstance(one.target, nodes.Name) or one.target.name in taken for one in tree.find_all(nodes.Assign)):
        return False
    texts = [*(one.value for one in tree.find_all(nodes.Const)), *(one.data for one in tree.find_all(nodes.TemplateData))]
    return not any(mark in str(text) for text in texts for mark in (MARK[0], MARK[-1])) and _is_harmless(tree, False, ones)


def _is_messages(node: nodes.Node) -> bool:
    """`messages`, or some of them: messages[1:]."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_messages(node.node)
    return isinstance(node, nodes.Name) and node.name == "messages"


def _is_message(node: nodes.Node, ones: set[str]) -> bool:
    """`message` in a loop, or messages[0]."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, (nodes.Const, nodes.Neg)):
        return _is_messages(node.node)
    return isinstance(node, nodes.Name) and node.name in ones


def _is_harmless(node: nodes.Node, written: bool, ones: set[str]) -> bool:
    """written: whatever this expression is, it is written as it is."""
    if not isinstance(node, HARMLESS):
        return False
    if isinstance(node, nodes.Name):
        return node.ctx == "store" or node.name not in {"messages", "loop", *ones}  # a whole message, or a way to its neighbours
    if isinstance(node, (nodes.Getitem, nodes.Getattr)):
        name = node.attr if isinstance(node, nodes.Getattr) else node.arg.value if isinstance(node.arg, nodes.Const) else None
        if _is_message(node.node, ones):
            return name == "role" or (name == "content" and written)
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":
            return name in COUNTS
    if isinstance(node, nodes.Filter):
        if node.name == "length" and _is_messages(node.node):
            return True
        if node.name not in FILTERS:
            return False
    if isinstance(node, nodes.Call) and not (isinstance(node.node, nodes.Name) and node.node.name == "raise_exception"):
        return False
    return all(_is_part_harmless(node, part, written, ones) for part in node.iter_child_nodes())


def _is_part_harmless(node: nodes.Node, part: nodes.Node, written: bool, ones: set[str]) -> bool:
    if isinstance(node, nodes.For) and part is node.iter:
        return True  # seen to be messages
    is_asked = isinstance(node, (nodes.If, nodes.CondExpr)) and part is node.test or isinstance(node, (nodes.And, nodes.Or, nodes.Not))
    if is_asked and _is_messages(part):
        return True  # are there any?
    stays = isinstance(node, nodes.Output) or written and isinstance(node, WRITTEN)
    return _is_harmless(part, stays and not is_asked, ones)
