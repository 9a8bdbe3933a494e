"""What a check says: a line for everything that was looked at, with the number, the verdict and what to do."""

import datetime
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
import torch

from sdekit import _checks

Verdict = Literal["pass", "warn", "fail"]
VERDICTS: tuple[Verdict, ...] = ("pass", "warn", "fail")


@dataclass(frozen=True)
class Line:
    """One thing that was looked at: its name, the verdict, the number, in words what the number is, what to do."""

    name: str
    verdict: Verdict
    number: float
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        _checks.lookup(dict.fromkeys(VERDICTS), self.verdict, "verdict")

    def __str__(self) -> str:
        said = f"{self.verdict:4}  {self.name}: {self.text}"
        return f"{said}\n      -> {self.remedy}" if self.remedy else said


@dataclass(frozen=True)
class Figure:
    """Curves over one axis, as numbers: ``curves`` name -> (x, y). Drawn only where a page is."""

    title: str
    x: str
    y: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log: str = ""  # "x", "y" or "xy": the axes that are logarithmic


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

    def __str__(self) -> str:
        counts = ", ".join(f"{self.count(v)} {v}" for v in VERDICTS)
        head = [self.title, f"{'ok' if self.ok else 'NOT ok'}: {counts}"]
        return "\n".join([*head, *(f"  {line}".replace("\n", "\n  ") for line in self.lines)])

    def json(self) -> dict[str, Any]:
        """As JSON has it: title, ok, found, lines, settings (versions and date among them) and figures."""
        return {
            "title": self.title,
            "ok": self.ok,
            "found": self.found,
            "lines": [vars(line) for line in self.lines],
            "settings": {**made_with(), **self.settings},
            "figures": [{**vars(f), "curves": {k: [list(x), list(y)] for k, (x, y) in f.curves.items()}}
                        for f in self.figures],
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write it: one self-contained page for .html (needs matplotlib), its numbers for .json.

        Raises ValueError for another ending.
        """
        save([self], path)


def save(reports: Iterable[Report], path: str | Path) -> None:
    """Write reports as one file: a page for .html, a list of :meth:`Report.json` (or the one) for .json."""
    raise NotImplementedError


def made_with() -> dict[str, str]:
    """Versions, machine and date."""
    from sdekit import __version__

    return {
        "sdekit": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
