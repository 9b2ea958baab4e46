"""A small tokenizer of Yuan2's kind, under the files that its hub gives, and a row as tutorial 1 has them."""

from __future__ import annotations

import json
from pathlib import Path

TEXT = [
    "# 任务描述\n假设你是一个AI简历助手,能从简历中识别出所有的命名实体,并以json格式返回结果。",
    '# 样例\n输入:\n张三,男,中国籍,工程师\n输出:\n{"姓名": ["张三"], "国籍": ["中国"], "职位": ["工程师"]}',
    "高勇:男,中国国籍,无境外居留权,请参考样例,按照任务要求,识别出当前简历中所有的命名实体。",
    "What is the capital of France? Paris. x y z",
]
# Their makers put them behind the pieces of Llama, with a score of 0; no text makes them, for < is merged with nothing.
NAMED = ["<eod>", "<n>", "<sep>", "<pad>"]
LATER = ["<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>", "<commit_before>", "<commit_msg>", "<commit_after>"]
BEHIND = ["<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>"]
ROW = {
    "input": "# 任务描述\n识别出所有的命名实体,并以json格式返回结果。\n\n# 当前简历\n高勇:男,中国国籍,\n\n返回结果。",
    "output": '{"姓名": ["高勇"], "国籍": ["中国国籍"]}',
}


def write_tokenizer(folder: Path) -> Path:
    """A sentencepiece model of the kind, with pieces of equal score; and the files that come with the real one."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe", split_digits=True,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    model = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    for piece in [*NAMED, *LATER, "yz", "xy"]:  # x y z: sentencepiece takes xy, the leftmost of equals
        model.pieces.add(piece=piece, score=0.0)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    names = {name: {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
             for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True, "pad_token": None, "sp_model_kwargs": {}, **names}))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "config.json").write_text('{"model_type": "yuan"}')
    return folder
