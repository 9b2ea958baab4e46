"""Do tokenizer and model fit each other: the token that ends an answer, the pad token, ids and rows of the embedding?"""

from __future__ import annotations

from weitiao.data.findings import Kind
from weitiao.train.fitness.fit import ASKED, SAID, Check, Facts, Fit, listed


def _stop_splits(fit: Fit) -> Facts | None:
    """The stop token is learned by its id, but earlier answers of a chat bring it as the template writes it."""
    tokenizer, stop = fit.tokenizer, fit.template.stop_id
    text = tokenizer.convert_ids_to_tokens(stop)
    chat = fit.written(ASKED, SAID, ("user", "2"), answer_next=True)
    if chat is None or text not in chat or stop in fit.template.encode_prompts([chat])[0]:
        return None
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return {"text": text, "id": stop, "count": len(ids), "pieces": ", ".join(repr(tokenizer.decode([i])) for i in ids[:6])}


def _no_eos(fit: Fit) -> Facts | None:
    if fit.tokenizer.eos_token_id is not None:
        return None
    return {"stop": fit.tokenizer.convert_ids_to_tokens(fit.template.stop_id)}


def _stop_is_not_eos(fit: Fit) -> Facts | None:
    eos, stop = fit.tokenizer.eos_token_id, fit.template.stop_id
    if eos is None or eos == stop:
        return None
    return {"stop": fit.tokenizer.convert_ids_to_tokens(stop), "id": stop, "eos": fit.tokenizer.eos_token}


def _pad_is_eos(fit: Fit) -> Facts | None:
    tokenizer = fit.tokenizer
    same = tokenizer.pad_token_id is not None and tokenizer.pad_token_id in (tokenizer.eos_token_id, fit.template.stop_id)
    return {"token": tokenizer.pad_token} if same else None


def _pad_outside(fit: Fit) -> Facts | None:
    pad = fit.tokenizer.pad_token_id
    return {"token": fit.tokenizer.pad_token, "id": pad, "rows": f"{fit.vocabulary:,}"} if pad is not None and pad >= fit.vocabulary else None


def _ids_outside(fit: Fit) -> Facts | None:
    """Tokens without a row; those that `tokens.add` names get one."""
    if len(fit.tokenizer) <= fit.vocabulary:
        return None
    vocabulary, added = fit.tokenizer.get_vocab(), fit.settings.tokens.add
    outside = sorted((i, token) for token, i in vocabulary.items() if i >= fit.vocabulary and token not in added)
    if not outside:
        return None
    named = listed([repr(token) for _, token in outside], 4)
    return {"tokens": f"{outside[-1][0] + 1:,}", "rows": f"{fit.vocabulary:,}", "outside": named}


def _rows_grow(fit: Fit) -> Facts | None:
    """`tokens.add` fills rows that are to spare first."""
    vocabulary = fit.tokenizer.get_vocab()
    new = [name for name in fit.settings.tokens.add if name not in vocabulary]
    last = max([len(fit.tokenizer) + len(new), *(vocabulary[n] + 1 for n in fit.settings.tokens.add if n in vocabulary)], default=0)
    if not fit.settings.tokens.add or last <= fit.vocabulary:
        return None
    return {"rows": f"{fit.vocabulary:,}", "more": f"{last:,}"}


CHECKS: dict[str, Check] = {
    "stop_splits": Check(Kind(
        "warning", "The tokenizer reads {text!r}, which ends an answer (id {id}), as {count} other tokens: {pieces}. "
        "The answer that is learned ends by id and is right; earlier answers of a chat bring it as text, and do not end for the model.",
        "Make it a special token: in tokenizer_config.json, \"added_tokens_decoder\": {{\"{id}\": {{\"content\": \"{text}\", \"special\": true}}}}, "
        "and no \"split_special_tokens\": true beside it."), _stop_splits),
    "no_eos": Check(Kind(
        "warning", "The tokenizer has no EOS token; answers end with the template's {stop!r}.",
        "Other programs would not know where to stop: set \"eos_token\": \"{stop}\" in tokenizer_config.json."), _no_eos),
    "stop_is_not_eos": Check(Kind(
        "note", "Answers end with {stop!r} (id {id}), which the template writes, and not with the tokenizer's EOS {eos!r}.",
        "weitiao stops at either. Where another program serves the model, let it stop at {stop!r} too (eos_token_id in generation_config.json)."),
        _stop_is_not_eos),
    "pad_is_eos": Check(Kind(
        "note", "The pad token is the one that ends answers, {token!r}. weitiao tells padding by its place, so ends are learned here.",
        "Nothing to do. A collator of another program that masks every pad token would never learn to stop."), _pad_is_eos),
    "pad_outside": Check(Kind(
        "warning", "The pad token {token!r} has the id {id}, and the embedding has {rows} rows. weitiao pads with the stop token instead.",
        "Other programs fail on a padded batch: name a pad token within the embedding in tokenizer_config.json."), _pad_outside),
    "ids_outside": Check(Kind(
        "warning", "The tokenizer goes to {tokens} tokens, the embedding has {rows} rows: {outside} have none. A row that holds one is refused.",
        "Use the tokenizer that belongs to the model; or take these tokens out of it and name those that you need: tokens.add='[…]'."), _ids_outside),
    "rows_grow": Check(Kind(
        "note", "tokens.add makes the embedding grow from {rows} rows to {more}.",
        "Whoever loads the adapter needs a base with as many; `weitiao merge` writes one."), _rows_grow),
}
