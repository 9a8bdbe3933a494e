"""What a comparison of samplers found: tables, the best of each budget, work-precision figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sdekit import _checks
from sdekit.evaluation.page import draw
from sdekit.evaluation.parts import Figure, Section, made_with
from sdekit.evaluation.report import plain, save

_SHOWN = 7  # rows in the figure


class Entry(NamedTuple):
    """A sampler at a budget, or an adaptive method at a tolerance.

    ``evaluations``: of the network, counted, a sample. ``error``: to the model's own flow from the same noise, the root
    mean square over a sample's entries, its mean over samples, and ``spread`` the standard error of that mean; NaN
    where the row draws noise. ``distance``: of the law to that of the flow's samples from other noises.
    """

    sampler: str
    nfe: int | None
    tolerance: float | None
    evaluations: float
    error: float
    spread: float
    distance: float


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` measured. ``print`` it for the tables.

    ``floor``: the distance of the flow's own samples from two sets of noises: less than that means nothing.
    ``reference``: how far the flow in half as many steps is from where it was taken to lead; errors below mean nothing.
    ``prices``: nfe -> (evaluations of samples, seconds here) that :func:`sdekit.calibrate` takes, about.
    ``refused``: what a sampler said that does not take this process or model; ``left_out``: for what time was short.
    """

    entries: tuple[Entry, ...]
    floor: float
    reference: float
    prices: Mapping[int, tuple[int, float]]
    refused: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def best(self, nfe: int, noise: bool = False) -> str:
        """The sampler of least error in at most ``nfe`` evaluations of a fixed grid; with ``noise`` that of least
        distance among those that draw noise.

        Raises ValueError where nothing was measured within that budget.
        """
        within = [e for e in self.entries if e.nfe is not None and e.nfe <= nfe and math.isnan(e.error) == noise]
        measured = [e for e in within if math.isfinite(e.distance if noise else e.error)]
        if not measured:
            budgets = sorted({e.nfe for e in self.entries if e.nfe is not None})
            raise ValueError(f"nothing was measured within nfe = {nfe}{' with noise' * noise}; budgets are {budgets}")
        return min(measured, key=lambda e: e.distance if noise else e.error).sampler

    def table(self) -> str:
        """Markdown: a line for each sampler, the one of least error first; those that draw noise by their distance."""
        return "\n\n".join(
            "\n".join(["| " + " | ".join(header) + " |", "|---" * len(header) + "|",
                       *("| " + " | ".join(row) + " |" for row in rows)])
            for header, rows in self._tables("**")
        )  # fmt: skip

    def _tables(self, mark: str) -> list[tuple[list[str], list[list[str]]]]:
        fixed = [e for e in self.entries if e.nfe is not None]
        budgets = sorted({e.nfe for e in fixed if e.nfe is not None})
        tables = []
        for noise, head in ((False, "error at evaluations"), (True, "distance at evaluations, with noise")):
            value = {
                (e.sampler, e.nfe): e.distance if noise else e.error for e in fixed if math.isnan(e.error) == noise
            }
            names = list(dict.fromkeys(name for name, _ in value))
            least = {n: min((v for (_, m), v in value.items() if m == n), default=math.nan) for n in budgets}
            names.sort(
                key=lambda name: _mean_log([value.get((name, n), math.nan) / max(least[n], 1e-300) for n in budgets])
            )
            rows = [[name, *(_cell(value.get((name, n)), least[n], mark) for n in budgets)] for name in names]
            if rows:
                tables.append(([head, *map(str, budgets)], rows))
        found = [e for e in self.entries if e.nfe is None]
        rows = [[e.sampler, f"{e.tolerance:g}", f"{e.evaluations:.1f}", f"{e.error:.3g}"] for e in found]
        return [*tables, (["adaptive", "tolerance", "evaluations", "error"], rows)] if rows else tables

    def notes(self) -> list[str]:
        """In words: the best of each budget, what numbers mean nothing, what a calibration costs, what is missing."""
        budgets = sorted({e.nfe for e in self.entries if e.nfe is not None and math.isfinite(e.error)})
        said = ["best: " + ", ".join(f"{self.best(n)} in {n}" for n in budgets)] if budgets else []
        floor = "" if math.isnan(self.floor) else f", nor do distances below {self.floor:.2g}"
        said.append(f"errors below {self.reference:.2g} mean nothing{floor}")
        said += [
            f"calibrate(..., nfe={n}) takes some {work / 1000:.0f},000 evaluations of samples, {seconds:.0f} s here"
            for n, (work, seconds) in self.prices.items()
        ]
        said += [f"{name} is left out: {why}" for name, why in self.refused.items()]
        return [*said, f"no time for {', '.join(self.left_out)}: raise seconds="] if self.left_out else said

    def __str__(self) -> str:
        return "\n\n".join([self.table(), "\n".join(self.notes())])

    def figures(self) -> tuple[Figure, ...]:
        """Work and precision: error, and distance of those with noise, against evaluations, of the best rows."""
        made = []
        for noise, title, y in (
            (False, "Error to the model's own flow", "root mean square a number"),
            (True, "Distance of laws, with noise on the way", str(self.settings.get("distance", "distance"))),
        ):
            curves: dict[str, tuple[list[float], list[float]]] = {}
            for e in self.entries:
                value = e.distance if noise else e.error
                if math.isnan(e.error) == noise and math.isfinite(value):
                    x, ys = curves.setdefault(e.sampler, ([], []))
                    x.append(e.evaluations)
                    ys.append(value)
            some = sorted(curves, key=lambda name: _mean_log(curves[name][1]))[:_SHOWN]
            if curves:
                shown = {name: curves[name] for name in some}
                if noise:
                    ends = [f(x for xs, _ in shown.values() for x in xs) for f in (min, max)]
                    shown["two sets of the flow's"] = (ends, [self.floor] * 2)
                made.append(Figure(title, "network evaluations a sample", y, shown, "xy"))
        return tuple(made)

    def figure(self, path: str | Path) -> None:
        """The first of :meth:`figures` as a picture, .png or .svg. Raises ImportError without matplotlib."""
        path, figures = Path(path), self.figures()
        _checks.lookup(dict.fromkeys((".png", ".svg")), path.suffix, "ending of the figure's path")
        if not figures:
            raise ValueError("there is no figure where nothing was measured: give compare more seconds=")
        path.write_bytes(draw(figures[0], path.suffix[1:]))

    def json(self) -> dict[str, Any]:
        """As JSON has it, with versions and date in the settings."""
        known: dict[str, Any] = plain({
            **asdict(self), "entries": [e._asdict() for e in self.entries],
            "settings": {**made_with(), **self.settings},
        })  # fmt: skip
        return known

    def save(self, path: str | Path) -> None:
        """Write it: one self-contained page for .html (needs matplotlib), its numbers for .json."""
        save([self], path)

    def section(self) -> Section:
        """As a page has it."""
        header, rows = next(iter(self._tables("")), ([], []))
        return Section(
            "compare: samplers on this model", "; ".join(self.notes()), header=header, rows=rows,
            figures=self.figures(), settings=self.settings,
        )  # fmt: skip


def _mean_log(values: Sequence[float]) -> float:
    known = [math.log(max(v, 1e-300)) for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.inf


def _cell(value: float | None, least: float, mark: str) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{mark}{value:.3g}{mark}" if value == least else f"{value:.3g}"
