"""What there is to say of rows that were surveyed: why some are skipped, and what many are like together."""

from __future__ import annotations

from weitiao.data.findings import Kind


def _skipped(what: str, cure: str) -> Kind:
    return Kind("warning", "{count} of {rows} rows skipped: " + what, cure)


# How a reason begins -> what to say of all rows that have it.
SKIPS: dict[str, tuple[str, Kind]] = {
    "no answer with": ("unlearned", _skipped("{detail}.", "Give the answers to be learned a loss_weight above 0, or remove these rows.")),
    "no answer": ("no_answer", _skipped("no answer.", "Write the answers, or remove these rows; if they stand in another column: data.columns='{output: NAME}'.")),
    "no prompt": ("no_prompt", _skipped("an answer without a prompt.", "Write the prompts, or remove these rows; if they stand in another column, name it in data.columns.")),
    "no label": ("no_label", _skipped("no label.", "Label them, or remove them.")),
    "its label is none of": ("unknown_label", _skipped("a label that is not among those to be told; of the first one, {detail}.",
                             "Name every label in data.labels, or mend these rows.")),
    "no turns": ("no_turns", _skipped("a conversation without turns.", "Remove these rows.")),
    "ends on": ("wrong_end", _skipped("a conversation that does not end with the assistant's answer; the first one {detail}.",
                "Remove the last turn, or write its answer.")),
    "unknown speaker": ("unknown_speaker", _skipped("a turn of a role that is not known; in the first one, {detail}.",
                        "Rename it: system, user (or human), assistant (or gpt), tool.")),
    "its columns are": ("columns", _skipped("columns unlike the file's others; of the first one, {detail}.",
                        "Name the columns as in the other rows.")),
    "The template": ("refused_by_template", _skipped("refused by the chat template. {detail}.",
                     "Let the roles come as the template wants them, mostly user and assistant in turn, or choose another one (data.template).")),
}
# What a look at the row's fields has said better, with the row's place.
SAID_BY_DEFECTS = {
    "ends on": {"ends_on_human", "preference"}, "unknown speaker": {"unknown_speaker"}, "its columns are": {"foreign_columns", "preference"},
    "half of a surrogate": {"lone_surrogates"},
}
CANNOT_TEACH = ("cannot_teach", _skipped("{detail}.", "Mend or remove these rows."))

SURVEY: dict[str, Kind] = {
    "nothing_to_learn": Kind("error", "Nothing can be learned from any of the {rows} rows.", "The other findings say why."),
    "too_many_skipped": Kind("error", "{count} of {rows} rows ({share}) cannot teach, {detail}.", "Mend them, or allow them: data.bad_rows=skip with a larger data.bad_share."),
    "weight": Kind("error", "{count} of {rows} rows without a weight that can be read. {detail}", "Give each row a number of 0 or more in the column of data.weight_column."),
    "outside": Kind("error", "{count} of {rows} rows with a token outside the model's embedding: {detail}.",
                    "Use the tokenizer that came with the model, or leave out the tokens that were added to it."),
    "dropped": Kind("warning", "{count} of {rows} rows skipped: the prompt alone leaves no room for an answer within {detail}.", ""),
    "answer_cut": Kind("warning", "{count} of {rows} rows ({share}) lose the end of their answer, being longer than {detail}. "
                                  "The stop token is kept: the model learns to break off there.", ""),
    "chat_cut": Kind("warning", "{count} of {rows} chats ({share}) lose their last turns, being longer than {detail}. The turns before stay whole.", ""),
    "front_cut": Kind("warning", "{count} of {rows} rows ({share}) lose the front of their text, being longer than {detail}. Their label is kept.", ""),
    "weight_0": Kind("note", "{count} of {rows} rows have a weight of 0: nothing is learned of them.", "If that is not meant, mend the column of data.weight_column."),
    "little_learned": Kind("note", "{detail} of all tokens are learned: the prompts dwarf the answers.",
                           "Shorter prompts train faster; what prompts share, the token trie computes once."),
    "duplicates": Kind("warning", "{count} of {rows} rows ({share}) repeat an earlier one, prompt and answer: {detail}.",
                       "Remove them. If a row is to count more, say so in a column of weights (data.weight_column)."),
    "contradicting_labels": Kind("warning", "{count} of {rows} rows with the text of an earlier one, and another label: {detail}.", "Decide on one label for each text."),
    "several_answers": Kind("note", "{count} of {rows} rows ({share}) with the prompt of an earlier one, and another answer: {detail}.",
                            "Keep one answer a prompt, unless several are meant."),
    "near_duplicates": Kind("note", "{count} of {rows} rows ({share}) say nearly the same as an earlier one: {detail}.",
                            "Where they differ in nothing that matters, keep one."),
    "second_bos": Kind("warning", "{count} of {rows} rows begin with the beginning-of-sequence token twice.",
                       "Take it out of the rows' text, or out of the template (data.template)."),
    "stop_inside": Kind("warning", "{count} of {rows} rows with the stop token inside an answer: {detail}. The model learns to end there, and to go on.",
                        "Take the text of that token out of the answers."),
    "seam": Kind("note", "In {count} of {rows} rows ({share}) prompt and answer, encoded together, would merge across the seam. "
                         "The answer is encoded alone, as it will be generated.", "Nothing has to be done. A template whose prompts end in a line end avoids it."),
    "unbalanced": Kind("warning", "Labels out of balance: {detail}.",
                       "Add rows of the rare ones or let them count more (data.weight_column), and choose by evaluation.metric=macro_f1."),
    "label_blocks": Kind("note", "The rows stand in blocks of one label: {detail}.", "Nothing has to be done, weitiao shuffles. The first rows of the file would show one label only."),
    "eval_overlap": Kind("warning", "{count} of {rows} rows of data.eval ({share}) are also learned from: {detail}.", "Remove them from one of the two; scores would be too good."),
    "eval_prompts": Kind("warning", "{count} of {rows} rows of data.eval ({share}) have the prompt of a training row, and another answer: {detail}.",
                         "Remove them from one of the two, unless a prompt has several answers."),
    "eval_new_labels": Kind("warning", "{count} of {rows} rows of data.eval have a label that no training row has: {detail}.",
                            "Add training rows of it, or name the labels alike (data.labels)."),
}
