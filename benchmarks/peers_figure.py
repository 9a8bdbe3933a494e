"""The tables and the figure of peers.py."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

matplotlib.use("Agg")

# Okabe and Ito's colours, told apart by colour-blind readers too; the markers tell them apart in print.
OURS = (("#0072B2", "o"), ("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "^"), ("#56B4E9", "v"))
PEERS = (("#222222", "o"), ("#444444", "s"), ("#666666", "^"), ("#777777", "D"), ("#888888", "v"), ("#999999", "X"))
CALIBRATED = ("#D55E00", "*")
WORSE = 1.02  # two correct samplers of one name differ by less
WIDEST = 150  # adaptive methods beyond are left out of the figure; the lines below the table have them


@dataclass(frozen=True)
class Entry:
    """One result: ``side`` is "ours", "peers", "peers on our grids" or "calibrated"; ``budget`` 0: an adaptive method.

    ``nfe`` counts calls of the network; ``nfe_per_sample`` is less where a method leaves out samples that have arrived.
    """

    problem: str
    side: str
    sampler: str
    grid: str
    budget: int
    nfe: int
    nfe_per_sample: float
    error: float


def badness(entries: Iterable[Entry]) -> float:
    """Mean logarithm of the errors, which a breakdown makes infinite."""
    errors = [entry.error for entry in entries]
    return math.inf if not all(map(math.isfinite, errors)) else statistics.mean(map(math.log, errors))


def rows_of(entries: list[Entry], side: str) -> dict[str, list[Entry]]:
    """sampler -> its entries on its best grid, by budget; the best sampler first."""
    rows = {}
    for name in dict.fromkeys(e.sampler for e in entries if e.side == side and e.budget):
        every = [e for e in entries if e.sampler == name and e.side == side and e.budget]
        by_grid = [[e for e in every if e.grid == grid] for grid in dict.fromkeys(e.grid for e in every)]
        rows[name] = min(by_grid, key=badness)
    # Those that lack the first columns, where errors are large, would look too good among the others.
    return dict(sorted(rows.items(), key=lambda item: (-len(item[1]), badness(item[1]))))


def best_of(entries: list[Entry], *sides: str) -> dict[int, Entry]:
    """budget -> the entry of the smallest error among the sides' samplers and grids."""
    best: dict[int, Entry] = {}
    for e in entries:
        if e.side in sides and e.budget and not math.isnan(e.error):
            best[e.budget] = min(best.get(e.budget, e), e, key=lambda entry: entry.error)
    return best


def cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    return f"{entry.error:.3g}" + (f" ({entry.nfe})" if entry.nfe != entry.budget else "")


def reached(entry: Entry) -> str:
    """Error and evaluations of an adaptive method: calls of the network and, where fewer, the mean over samples."""
    fewer = round(entry.nfe_per_sample) < entry.nfe
    return f"{entry.error:.2g} @ {entry.nfe}" + (f" (mean {entry.nfe_per_sample:.0f})" if fewer else "")


def table(entries: list[Entry], columns: Iterable[int]) -> str:
    """The markdown table of a problem, and lines on what won each column and on adaptive methods."""
    columns = list(columns)
    lines = [f"| {entries[0].problem}, evaluations | grid | " + " | ".join(map(str, columns)) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for side, rows in {side: rows_of(entries, side) for side in ("ours", "peers")}.items():
        for name, row in rows.items():
            at = {e.budget: e for e in row}
            label = f"sdekit {name}" if side == "ours" else name
            lines.append(f"| {label} | {row[0].grid} | " + " | ".join(cell(at.get(n)) for n in columns) + " |")
    notes = []
    more = "peers on our grids"
    names = {
        "best of peers": ("peers",),
        "best of peers, on all four grids": ("peers", more) if any(e.side == more for e in entries) else (),
        "best of ours on fixed grids": ("ours",),
        "calibrated": ("calibrated",),
    }
    for label, sides in names.items():
        if best := best_of(entries, *sides):
            lines.append(f"| **{label}** | | " + " | ".join(cell(best.get(n)) for n in columns) + " |")
            if label != "calibrated":
                notes.append(f"{label}: " + "; ".join(f"{n}: {e.sampler} {e.grid}" for n, e in sorted(best.items())))
    if not any(e.side == "calibrated" for e in entries):
        notes.append("calibrated: not measured (no column of few evaluations)")
    for name in dict.fromkeys(e.sampler for e in entries if not e.budget):
        found = [e for e in entries if e.sampler == name and not e.budget]
        notes.append(f"adaptive, {name}: " + ", ".join(map(reached, found)))
    return "\n".join([*lines, "", *notes])


def same_name_table(
    entries: list[Entry], columns: Iterable[int], names: Iterable[tuple[str, str]], grids: Iterable[str]
) -> str:
    """Ratios of our error to that of the peer's sampler of the same name, at equal evaluations on one grid."""
    columns, grids = list(columns), list(grids)
    errors = {(e.sampler, e.grid, e.budget): e.error for e in entries}
    lines = ["| ours / same name | grid | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 2) + "|"]
    for mine, peer in names:
        for grid in grids:
            ratios = [errors.get((mine, grid, n), math.nan) / errors.get((peer, grid, n), math.nan) for n in columns]
            cells = ["" if math.isnan(r) else f"**{r:.3f}**" if r > WORSE else f"{r:.3f}" for r in ratios]
            lines.append(f"| {mine} / {peer} | {grid} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"bold: more than {WORSE:g}; our ipndm is of order 3, diffusers' IPNDM of order 4"])


def curve(row: list[Entry]) -> tuple[list[int], list[float]]:
    """Evaluations made and errors, without breakdowns."""
    points = sorted((e.nfe, e.error) for e in row if math.isfinite(e.error))
    return [n for n, _ in points], [error for _, error in points]


def draw(path: Path, problem: str, samples: int, entries: list[Entry]) -> None:
    """Write the PNG: ours in colour, the best peers in grey with open markers, the other peers as pale lines."""
    figure = Figure(figsize=(11, 6), dpi=150, layout="constrained")
    axes = figure.subplots()
    peers, ours = rows_of(entries, "peers"), rows_of(entries, "ours")
    pale = {"color": "#e6e6e6", "lw": 0.7, "zorder": 1}
    for i, row in enumerate(list(peers.values())[len(PEERS) :]):
        axes.plot(*curve(row), **pale, label="_" if i else "other peers")
    for i, row in enumerate(list(ours.values())[len(OURS) :]):
        axes.plot(*curve(row), color="#cfe2f0", lw=0.8, zorder=1.5, label="_" if i else "sdekit, its other samplers")
    for (colour, marker), (name, row) in zip(PEERS, peers.items(), strict=False):
        axes.plot(*curve(row), color=colour, marker=marker, mfc="white", ms=5, lw=0.9, zorder=2,
                  label=f"{name}, {row[0].grid}")  # fmt: skip
    for (colour, marker), (name, row) in zip(OURS, ours.items(), strict=False):
        axes.plot(*curve(row), color=colour, marker=marker, ms=6.5, lw=2, zorder=3, mec="white", mew=0.6,
                  label=f"sdekit {name}, {row[0].grid}")  # fmt: skip
    if any(e.side == "peers on our grids" for e in entries):
        best = best_of(entries, "peers", "peers on our grids")
        axes.plot(*curve(list(best.values())), color="#222222", ls=(0, (4, 2)), lw=1.3, zorder=2.5,
                  label="best of peers on all four grids")  # fmt: skip
    for row in rows_of(entries, "calibrated").values():
        axes.plot(*curve(row), color=CALIBRATED[0], marker=CALIBRATED[1], ms=13, lw=2.6, zorder=4, mec="white",
                  mew=0.8, label="sdekit calibrated")  # fmt: skip
    for side, colour, label in (
        ("peers", "#888888", "adaptive peers"),
        ("ours", "#000000", "sdekit adams and rk45, adaptive"),
    ):
        found = [e for e in entries if e.side == side and not e.budget and e.nfe <= WIDEST]
        axes.plot(*curve(found), color=colour, marker="x" if side == "peers" else "+", ms=7, mew=1.5, ls="", zorder=2,
                  label=label if found else "_")  # fmt: skip
    _axes(axes, [*list(ours.values())[: len(OURS)], *list(peers.values())[: len(PEERS)]], entries)
    axes.set_title(f"{problem}, {samples} samples: error against the exact flow, each on its best grid", fontsize=11)
    figure.legend(*_legend(axes), loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)


def _legend(axes: Axes) -> tuple[list, list]:
    """Ours first, then the peers."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (not labels[i].startswith("sdekit"), -handles[i].get_zorder()))
    return [handles[i] for i in order], [labels[i] for i in order]


def _axes(axes: Axes, named: list[list[Entry]], entries: list[Entry]) -> None:
    """Logarithmic, wide enough for every line that has a name, ticks at the columns."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    columns = sorted({e.budget for e in entries if e.budget})
    ticks = [n for i, n in enumerate(columns) if i == 0 or n >= 1.15 * columns[i - 1]]
    if any(not e.budget and columns[-1] < e.nfe <= WIDEST for e in entries):
        ticks += [n for n in (100, WIDEST) if n > 1.15 * columns[-1]]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(n) for n in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    largest = [max(curve(row)[1], default=math.nan) for row in named]
    largest = [value for value in largest if math.isfinite(value)]
    if largest:  # a breakdown of a nameless line must not squeeze the others
        axes.set_ylim(top=1.2 * max(largest))
    axes.set_xlim(0.94 * min(ticks), 1.05 * max(ticks))
    axes.set_xlabel("network evaluations (the final denoising counted)")
    axes.set_ylabel("error")
    axes.grid(True, which="major", color="#eeeeee", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
