"""After a check of all rows: the first ones, as a training of all would learn them.

    settings, Report of all -> the first 1,000 rows of each source, cut and labelled as all are -> the screen, a page
"""

from __future__ import annotations

from pathlib import Path

from weitiao.config import Settings
from weitiao.data.dataset import UNLIMITED, Dataset, load
from weitiao.data.templates import Template, load_template
from weitiao.errors import RowError
from weitiao.model import load as loading
from weitiao.model.methods import method_of
from weitiao.screen import Screen
from weitiao.train.check import Report, room_and_vocabulary
from weitiao.train.show import show
from weitiao.train.tree import folder_of

ON_A_PAGE = 20  # rows
LOOKED_AT = 1000  # first rows of each source, or as many as are to be shown


def show_first(
    settings: Settings, told: Report, count: int | None, screen: Screen, html: Path | None = None, ids: bool = False, most: int | None = None,
) -> None:
    """After a check: the first rows, or in a sentence why there are none.

    Args:
        told: what the check found. count: rows on the screen and on the page; None for a page alone.
        most: how many rows of each source were checked, if not all.
    """
    try:
        data, template = first_rows(settings, told, count or ON_A_PAGE, screen, most)
    except RowError as error:
        screen.tell(f"\nNo row can be shown. {error.found.splitlines()[0]}{' No page is written.' if html else ''}", style="yellow")
        return
    if count:
        screen.tell()
    show(data, template, count or ON_A_PAGE, screen, html, told.findings, ids, told.taught, on_screen=count is not None)


def first_rows(settings: Settings, told: Report, count: int, screen: Screen, most: int | None = None) -> tuple[Dataset, Template]:
    """The first rows of each source as a training of all would learn them, after a check of all. most: rows that were checked.

    Raises:
        RowError: nothing can be learned from these.
    """
    folder = folder_of(settings.model, screen)
    template = load_template(settings.data.template, loading.load_tokenizer(folder, settings.model))
    room, _ = room_and_vocabulary(settings, method_of(settings, template.tokenizer), template, loading.load_config(folder, settings.model))
    looked_at = max(LOOKED_AT, count)
    # What the check has told is no reason to show nothing: rows that cannot teach are passed over, however many.
    tolerant = settings.data.model_copy(update={"bad_rows": "skip", "bad_share": 1.0})
    in_order = [source.model_copy(update={"share": None}) for source in settings.data.train]
    data = load(in_order, tolerant, template, room, UNLIMITED, 0, told.max_tokens, task="classify" if told.labels else "answer",
                rows=min(looked_at, most or looked_at), words=() if settings.data.labels else sorted(told.labels))
    return data, template
