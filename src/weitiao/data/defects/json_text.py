"""An answer that begins as JSON -> what keeps it from being JSON, if anything does."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from weitiao.data.defects.shown import AROUND, around, beginning, shown

JSON_BEGIN = re.compile(r"""\s*(?:\{\s*["']|\[\s*(?:\{\s*["']|["']))""")
PYTHON_BEGIN = re.compile(r"""\[?\s*[\[{]\s*'[^'"]*'\s*[:,\]]""")


class _Twice(ValueError):
    pass


def _unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _Twice(next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unlike)


def json_defects(answer: str) -> dict[str, str]:
    """Defect -> detail, of an answer that means to be JSON; empty if it is, or means something else."""
    if not JSON_BEGIN.match(answer):
        return {}
    text = answer.strip()
    try:
        end = _DECODER.raw_decode(text)[1]
    except _Twice as twice:
        return {"json_twice": f"{str(twice)!r} in {beginning(text)}"}
    except json.JSONDecodeError as error:
        if text.lstrip("[{ ")[:1] == "'":
            return {"json_python": beginning(text)} if PYTHON_BEGIN.match(text) else {}
        if error.pos >= len(text) or error.msg.startswith("Unterminated string") and not re.search(r"[}\]]\s*$", text):
            return {"json_cut": f"'…{shown(text[-2 * AROUND:])}'"}
        return {"json_broken": f"{error.msg} at character {error.pos + 1}: {around(text, error.pos, error.pos + 1)}"}
    except RecursionError:
        return {"json_broken": "nested too deeply"}
    except ValueError:  # a number of more digits than Python reads: JSON all the same
        return {}
    return {"json_and_more": around(text, end, end + 2 * AROUND)} if end < len(text) else {}
