"""The results that the pages are written from, read back as the benchmarks' own types."""

import csv
import math
from pathlib import Path
from typing import Any

import nfe_vs_fid
from nfe_vs_fid_figure import Table
from peers_figure import Entry

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def number(text: str) -> int | float | str:
    """The number that a cell is, or its text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a CSV in benchmarks/results, numbers as numbers."""
    with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        return [{key: number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def entries(name: str, problem: str | None = None) -> list[Entry]:
    """Those of peers.csv or adaptive.csv."""
    return [Entry(**row) for row in rows(name) if problem in (None, row["problem"])]


def distances(name: str = "nfe_vs_fid_digits") -> Table:
    """sampler -> budget (0, of an adaptive method, becomes what it took) -> mean and spread over seeds."""
    return nfe_vs_fid.summarise(rows(name))


def errors(problem: str) -> dict[tuple[str, str], dict[int, float]]:
    """(sampler, grid) of ours on fixed grids -> budget -> error on a mixture; breakdowns are left out."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for e in entries("peers", problem):
        if e.side == "ours" and e.budget and math.isfinite(e.error):
            found.setdefault((e.sampler, e.grid), {})[e.budget] = e.error
    return found
