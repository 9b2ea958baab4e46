"""Rows as the model sees them, token by token, as one page: no other file, nothing fetched, any browser.

    a token         <b class="l" title="id 260 · position 17 · weight 1 · stored Ġis">·is</b>
    shared tokens   <details class="shared"> that open
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from weitiao.data.stored import TrainingRow
from weitiao.data.findings import Finding
from weitiao.data.spelling import MARKS, Piece, Spelling, seen, visible
from weitiao.data.templates import Template
from weitiao.train.paths import Path, Stretch, paths_of, row_header, seen_place, shared_note, turn_header

MOST_TOKENS = 400  # of a stretch in sight; what is beyond opens
MOST_WRITTEN = 4000  # of what opens: a page of many long rows has to load
LEAST_FOLDED = 8

CSS = """
:root { color-scheme: light dark; --paper: #fdfdfc; --card: #fff; --ink: #1d2125; --soft: #68717b; --line: #dfe2e5;
  --given: #eef0f2; --given2: #e2e5e9; --learned: #cdeed4; --learned2: #b4e3bf; --learned-ink: #0b4a1d;
  --stop: #14652c; --stop-ink: #fff; --special: #e9dcf6; --special-ink: #5a2590; --note: #8a5a00;
  --error: #b3261e; --warning: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --card: #1c2024; --ink: #e4e7ea; --soft: #98a2ac; --line: #343a40;
  --given: #272c31; --given2: #32383f; --learned: #17432a; --learned2: #1f5637; --learned-ink: #bdf0cb;
  --stop: #7fdc98; --stop-ink: #06230f; --special: #3d2a54; --special-ink: #dcc3f7; --note: #e5b455;
  --error: #ff8a80; --warning: #e5b455; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem 1rem 4.5rem; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC",
  "Source Han Sans SC", "WenQuanYi Micro Hei", sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
h2 { font-size: 1rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h3 { font-size: .9rem; margin: .9rem 0 .3rem; color: var(--soft); font-weight: 600; }
h2 small { font-weight: normal; color: var(--soft); font-size: .9rem; }
a { color: inherit; }
.row, .findings, .legend { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; margin: 1rem 0; }
.legend { line-height: 2; }
.legend span { margin-right: 1.1rem; white-space: nowrap; }
.path { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
.path b, .legend b { font-weight: normal; }
.g, .s, .l, .p, .q, .t { border-radius: .2rem; padding: .12em .1em; background: var(--given); }
.g.o { background: var(--given2); }
.s, .shared .p { opacity: .6; }
.s.o { background: var(--given2); }
.l { background: var(--learned); color: var(--learned-ink); }
.l.o { background: var(--learned2); }
.p { background: var(--special); color: var(--special-ink); }
.q { background: var(--learned2); color: var(--special-ink); }
.t { background: var(--stop); color: var(--stop-ink); }
.path b.t { font-weight: 600; }
.path b.k { white-space: pre; }
.path b:hover { outline: 2px solid currentColor; }
i { font-style: normal; opacity: .5; }
sub { font-size: .65em; line-height: 0; color: var(--note); }
.w { color: var(--note); font-size: .8em; }
details > summary { cursor: pointer; color: var(--soft); font-size: .9rem; font-style: italic; }
details[open] > summary { margin-bottom: .2rem; }
.shared:not([open]):hover summary { color: var(--ink); }
.findings p { margin: .35rem 0; overflow-wrap: anywhere; white-space: pre-line; }
.error strong { color: var(--error); } .warning strong { color: var(--warning); }
.ids { display: block; position: sticky; top: 0; background: var(--paper); padding: .3rem 0; color: var(--soft); font-size: .9rem; z-index: 1; }
body:has(#ids:checked) .path b::after { content: attr(data-id); font-size: .62em; opacity: .75; margin-left: .15em; vertical-align: sub; }
#told { position: fixed; inset: auto 0 0 0; background: var(--ink); color: var(--paper); padding: .6rem 1rem; overflow-wrap: anywhere; }
#told:empty { display: none; }
@media print { .ids, #told { display: none; } }
"""

# Where there is no mouse to rest on a token, a tap tells the same.
SCRIPT = """
document.addEventListener("click", function (event) {
  var token = event.target.closest(".path b");
  document.getElementById("told").textContent = token ? token.title : "";
});
"""

LEGEND = (
    '<b class="l">learned</b>', '<b class="t">stop, learned</b>', '<b class="g">given</b>', '<b class="p">&lt;special&gt;</b>',
    '<b class="s">shared, computed once</b>', "<i>·</i> space", "<i>⏎</i> line break", "<i>→</i> tab", "字<sub>3</sub> a character in 3 tokens",
)


def html_page(rows: Sequence[TrainingRow], template: Template, title: str, findings: Sequence[Finding] = ()) -> str:
    by_row, totals = paths_of(rows)
    places = {id(paths[0].row): f"row-{number}" for number, paths in enumerate(by_row, 1)}
    writer = Writer(Spelling(template.tokenizer), template.stop_id, places)
    return "\n".join([
        "<!DOCTYPE html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>",
        f"<style>{CSS}</style></head>",
        "<body>",
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(totals.text())} Every token tells its id, its position and its weight where the pointer rests on it, or by a tap.</p>",
        *_findings(findings),
        f'<p class="legend" lang="zh-Hans">{" ".join(f"<span>{part}</span>" for part in LEGEND)}</p>',
        '<label class="ids"><input type="checkbox" id="ids"> Show the ids</label>',
        *(part for paths in by_row for part in writer.row(paths)),
        '<div id="told" role="status"></div>',
        f"<script>{SCRIPT}</script>",
        "</body>",
        "</html>",
    ]) + "\n"


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    if findings:
        yield '<section class="findings"><h2>Found</h2>'
        for finding in findings:
            yield f'<p class="{_text(finding.severity)}"><strong>{_text(finding.severity)}</strong> {_text(finding.text())}</p>'
        yield "</section>"


class Writer:
    """Paths -> elements. places: the anchor of each row shown."""

    def __init__(self, spelling: Spelling, stop_id: int, places: dict[int, str]):
        self.spelling, self.stop_id, self.places = spelling, stop_id, places

    def row(self, paths: Sequence[Path]) -> Iterator[str]:
        where, _, facts = row_header(paths, self.spelling, self.stop_id).partition(" · ")
        yield f'<section class="row" id="{self.places[id(paths[0].row)]}"><h2>{_text(where)} <small>{_text(facts)}</small></h2>'
        for path in paths:
            if path.turns > 1:
                yield f"<h3>{_text(turn_header(path))}</h3>"
            yield f'<div class="path" lang="zh-Hans">{"".join(self.stretch(path, stretch) for stretch in path.stretches(self.spelling))}</div>'
        yield "</section>"

    def stretch(self, path: Path, stretch: Stretch) -> str:
        if stretch.kind == "shared" and len(stretch) >= LEAST_FOLDED:
            return f'<details class="shared"><summary>{self._shared(path, stretch)}</summary>{self.limited(stretch, stretch.pieces)}</details>'
        first, hidden, last = stretch.folded(MOST_TOKENS)
        weight = f'<span class="w">×{stretch.weight:.3g} </span>' if stretch.weight not in (0.0, 1.0) else ""
        between = ""
        if hidden:
            middle = stretch.pieces[len(first) : len(stretch.pieces) - len(last)]
            between = f'<details class="more"><summary>… {hidden:,} more tokens …</summary>{self.limited(stretch, middle)}</details>'
        return weight + self.tokens(stretch, first) + between + self.tokens(stretch, last)

    def _shared(self, path: Path, stretch: Stretch) -> str:
        note, owner = shared_note(path, stretch), path.owner
        if owner is None or owner.row is path.row:
            return _text(note)
        name = owner.name_for(path)
        return f'{_text(note.removesuffix(name))}<a href="#{self.places[id(owner.row)]}">{_text(name)}</a>'

    def limited(self, stretch: Stretch, pieces: Sequence[Piece]) -> str:
        part = Stretch(stretch.kind, tuple(pieces), stretch.weight)
        first, hidden, last = part.folded(MOST_WRITTEN)
        note = f"<p>… {hidden:,} more tokens, not on this page …</p>" if hidden else ""
        return self.tokens(stretch, first) + note + self.tokens(stretch, last)

    def tokens(self, stretch: Stretch, pieces: Sequence[Piece]) -> str:
        return "<wbr>".join(self.token(stretch, piece, place) for place, piece in enumerate(pieces))

    def token(self, stretch: Stretch, piece: Piece, place: int) -> str:
        kind = self._kind(stretch, piece)
        odd = " o" if place % 2 and kind in ("g", "s", "l") else ""
        several, count = (" k", f"<sub>{len(piece.ids)}</sub>") if len(piece.ids) > 1 else ("", "")
        shown = _shown(piece.text)
        text, end = (shown[:-1], "\n") if shown.endswith("\n") else (shown, "")  # its id is told before the line ends
        return f'<b class="{kind}{odd}{several}" data-id="{_joined(piece.ids)}" title="{_told(stretch, piece)}">{text}{count}</b>{end}'

    def _kind(self, stretch: Stretch, piece: Piece) -> str:
        """g, s, l: given, shared, learned. p, q, t: special and given, special and learned, the stop token learned."""
        if not piece.special:
            return stretch.kind[0]
        if stretch.kind != "learned":
            return "p"
        return "t" if piece.ids[0] == self.stop_id else "q"


def _told(stretch: Stretch, piece: Piece) -> str:
    """`id 260 · position 17 · weight 1 · stored Ġis`"""
    if len(piece.ids) == 1:
        named = f"id {piece.ids[0]} · position {piece.start}"
    else:
        named = f"{len(piece.ids)} tokens · ids {_joined(piece.ids)} · positions {piece.start} to {piece.stop - 1}"
    return _text(f"{named} · weight {stretch.weight:.3g} · stored {' '.join(seen(stored) for stored in piece.stored)}")


def _shown(text: str) -> str:
    """A line breaks where the text does, behind its mark."""
    signs = []
    for character, sign in zip(text, visible(text), strict=True):
        marked = f"<i>{sign}</i>" if character in MARKS or sign != character else escape(sign)
        signs.append(marked + ("\n" if character == "\n" else ""))
    return "".join(signs)


def _joined(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def _text(text: str) -> str:
    """Escaped; what a page may not hold, such as a NUL, as it can be seen."""
    return escape("\n".join(seen_place(line) for line in text.split("\n")))
