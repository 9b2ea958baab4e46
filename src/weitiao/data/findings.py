"""What a check tells: a `Finding` for each kind of defect, with its count, where it stands, and its cure.

    detail of one row -> Tally -> Finding("warning", "3 of 200 answers …", ("rows.jsonl:4", …), "…")
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
MOST_PLACES = 3


@dataclass(frozen=True)
class Kind:
    """What there is to say about one kind of defect, however many rows have it.

    severity: error, where a run would be refused or teach the wrong thing; warning, where rows or quality are lost; note,
        where a person should know.
    what: a sentence with {count}, {rows} (how many were read), {share}, {noun} (row or rows) and {detail}, that of the first one.
    cure: what to do now, naming the setting if there is one.
    """

    severity: Severity
    what: str
    cure: str


@dataclass(frozen=True)
class Finding:
    """kind: its name in the table it comes from; where: the first places, `file:line`; count: how many rows, 0 for a setting."""

    kind: str
    severity: Severity
    what: str
    where: tuple[str, ...]
    cure: str
    count: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"where": list(self.where)}

    def text(self) -> str:
        """One paragraph: what, where, cure."""
        places = ", ".join(self.where) + (", …" if self.count > len(self.where) else "")
        return "\n".join(line for line in (self.what, f"({places})" if places else "", self.cure) if line)


@dataclass
class Tally:
    """How often a kind was met, and where first."""

    count: int = 0
    where: list[str] = field(default_factory=list)
    detail: str = ""

    def add(self, where: str, detail: str = "", times: int = 1) -> None:
        self.detail = self.detail or detail
        if len(self.where) < MOST_PLACES and where not in self.where:
            self.where.append(where)
        self.count += times

    def merge(self, other: Tally) -> None:
        """The same with what was met later."""
        self.detail = self.detail or other.detail
        self.where = (self.where + [place for place in other.where if place not in self.where])[:MOST_PLACES]
        self.count += other.count

    def finding(self, name: str, kind: Kind, rows: int) -> Finding:
        what = kind.what.format(
            count=f"{self.count:,}", rows=f"{rows:,}", share=f"{self.count / max(rows, 1):.1%}",
            noun="row" if self.count == 1 else "rows", detail=self.detail,
        )
        return Finding(name, kind.severity, what, tuple(self.where), kind.cure, self.count)


def worst_first(findings: list[Finding]) -> list[Finding]:
    """Errors before warnings before notes; of each, those of most rows first."""
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), -f.count))
