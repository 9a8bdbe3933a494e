"""What a check says: its lines, with the settings they were made with; as text, as JSON, as a page."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sdekit import _checks
from sdekit.evaluation.page import page
from sdekit.evaluation.parts import VERDICTS, Figure, Line, Section, Verdict, made_with


class Saved(Protocol):
    """What :func:`save` takes: a Report, or whatever else has these two."""

    def json(self) -> dict[str, Any]:
        """As JSON has it."""

    def section(self) -> Section:
        """As a page has it."""


@dataclass(frozen=True)
class Report:
    """Lines, the settings that they were made with, and figures.

    ``ok``: no line fails. ``print(report)`` is a table; :meth:`json` has all of it; :meth:`save` writes a JSON file or
    a page that needs nothing beside itself. ``found``: what the check identified, in words, where it did.
    """

    title: str
    lines: tuple[Line, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    found: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing fails; warnings are allowed."""
        return all(line.verdict != "fail" for line in self.lines)

    def __getitem__(self, name: str) -> Line:
        """The line of that name. Raises ValueError for an unknown one."""
        return _checks.lookup({line.name: line for line in self.lines}, name, "line")

    def count(self, verdict: Verdict) -> int:
        """How many lines have this verdict."""
        return sum(line.verdict == verdict for line in self.lines)

    @property
    def summary(self) -> str:
        """How many lines of each verdict, and what was identified."""
        counts = ", ".join(f"{self.count(v)} {v}" for v in VERDICTS)
        return f"{counts}; {self.found}" if self.found else counts

    def __str__(self) -> str:
        head = [self.title, f"{'ok' if self.ok else 'NOT ok'}: {self.summary}"]
        return "\n".join([*head, *(f"  {line}".replace("\n", "\n  ") for line in self.lines)])

    def json(self) -> dict[str, Any]:
        """As JSON has it: title, ok, found, lines, settings (versions and date too) and figures; None for NaN."""
        known: dict[str, Any] = plain({
            "title": self.title,
            "ok": self.ok,
            "found": self.found,
            "lines": [vars(line) for line in self.lines],
            "settings": {**made_with(), **self.settings},
            "figures": [vars(figure) for figure in self.figures],
        })  # fmt: skip
        return known

    def section(self) -> Section:
        """As a page has it."""
        return Section(self.title, self.summary, self.ok, self.lines, figures=self.figures, settings=self.settings)

    def save(self, path: str | Path) -> None:
        """Write it: one self-contained page for .html (needs matplotlib), its numbers for .json.

        Raises ValueError for another ending.
        """
        save([self], path)


def save(reports: Iterable[Saved], path: str | Path) -> None:
    """Write reports as one file: a page for .html (needs matplotlib), for .json a list of their ``json()``, or the one.

    Raises ValueError for another ending.
    """
    path, reports = Path(path), list(reports)
    if path.suffix == ".html":
        text = page([report.section() for report in reports])
    elif path.suffix == ".json":
        made = [plain(report.json()) for report in reports]
        text = json.dumps(made[0] if len(made) == 1 else made, indent=1, allow_nan=False)
    else:
        raise ValueError(f"path must end in .html or .json, got {path.name!r}")
    path.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """What JSON has words for: lists for sequences, None for numbers that are not finite, text for all others."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
