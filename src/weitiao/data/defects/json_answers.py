"""Answers in JSON that whoever reads them as such will stumble over."""

from __future__ import annotations

from collections.abc import Callable

from weitiao.data.defects.read import SEVERAL, Family, Read
from weitiao.data.findings import Kind


def _json(defect: str) -> Callable[[Read], str | None]:
    return lambda read: read.broken_json.get(defect)


FAMILIES = (
    Family(lambda read: any(answer.lstrip()[:1] in ("{", "[") for _, answer in read.exchanges), {
        "json_broken": (Kind(
            "warning", f"{SEVERAL} have an answer that begins as JSON and cannot be read as such: {{detail}}.",
            "Mend these answers; json.dumps(value, ensure_ascii=False) writes JSON that can be read."), _json("json_broken")),
        "json_python": (Kind(
            "warning", f"{SEVERAL} are answered by a Python dict or list in single quotes, which is no JSON: {{detail}}.",
            "Write them with json.dumps(value, ensure_ascii=False); ast.literal_eval reads what is there."), _json("json_python")),
        "json_cut": (Kind(
            "warning", f"{SEVERAL} have an answer in JSON that breaks off: {{detail}}.",
            "Whoever wrote it met a limit of length. Take these rows out, or write their answers again."), _json("json_cut")),
        "json_and_more": (Kind(
            "warning", f"{SEVERAL} have an answer in JSON with text behind it: {{detail}}.",
            "Whoever reads the model's answers as JSON will meet the same. Take the text out, if answers are to be JSON alone."),
            _json("json_and_more")),
        "json_twice": (Kind(
            "warning", f"{SEVERAL} have an answer in JSON with the same name twice in one object, of which readers keep the last: {{detail}}.",
            "Collect the values in a list under one name."), _json("json_twice")),
    }),
)
