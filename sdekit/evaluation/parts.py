"""What reports and pages are made of: lines with a number, a verdict and what to do; figures; sections."""

import datetime
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
class Section:
    """What a page has of one check or comparison: a summary, lines, a table, figures and the settings, where given."""

    title: str
    summary: str = ""
    ok: bool | None = None  # colours the summary
    lines: tuple[Line, ...] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    figures: tuple[Figure, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def made_with() -> dict[str, str]:
    """Versions, machine and date."""
    return {
        "sdekit": sys.modules["sdekit"].__version__,  # looked up, not imported: the package stands above its rooms
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
