"""The figure of nfe_vs_fid.py: distance by evaluations, and what the samples look like."""

import argparse
import statistics
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

matplotlib.use("Agg")

# Okabe and Ito's colours, told apart by colour-blind readers too; the markers tell them apart in print.
STYLES = {
    "dpmpp_2m": ("#0072B2", "o", "-"),
    "ddim": ("#D55E00", "s", "-"),
    "heun": ("#009E73", "^", "-"),
    "ancestral": ("#CC79A7", "D", "--"),
    "euler_maruyama": ("#56B4E9", "P", "--"),
    "pc": ("#555555", "X", "--"),
    "rk45": ("#000000", "*", "-"),
}


def draw(
    path: Path, table: dict[str, dict[int, tuple[float, float]]], floors: list[float], metric: str,
    options: argparse.Namespace, best: str, pictures: dict[str, Tensor],
) -> None:  # fmt: skip
    """Write the PNG."""
    figure = Figure(figsize=(13, 5.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    low, high = min(floors), max(floors)
    left.axhspan(low, high, color="#999999", alpha=0.25, lw=0)
    left.axhline(statistics.mean(floors), color="#777777", lw=1)
    for name, row in table.items():
        colour, marker, line = STYLES[name]
        points = [(nfe, *row[nfe]) for nfe in sorted(row)]
        x, y, spread = zip(*points, strict=True)
        lower = [min(s, 0.9 * v) for v, s in zip(y, spread, strict=True)]  # a bar below 0 has no place on a log axis
        size = 13 if marker == "*" else 6
        left.errorbar(x, y, yerr=[lower, spread], color=colour, marker=marker, ls=line, ms=size, lw=1.8, capsize=2.5,
                      elinewidth=1, label=name, markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    left.set_xscale("log")
    left.set_yscale("log")
    columns = sorted({nfe for row in table.values() for nfe in row})
    spread_out = [nfe for i, nfe in enumerate(columns) if i == 0 or nfe >= 1.25 * columns[i - 1]]
    left.xaxis.set_major_locator(FixedLocator(spread_out))
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xticklabels([str(nfe) for nfe in spread_out])
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _keep_in_view(left, table, high)
    left.text(left.get_xlim()[0], low, "  real against real (disjoint)", va="bottom", color="#444444", fontsize=9)
    left.set_xlabel("network evaluations (the final denoising counted)")
    left.set_ylabel(metric)
    left.set_title(f"{options.dataset}: {options.samples} samples, mean ± s.d. of {options.seeds} seeds", fontsize=11)
    left.grid(True, which="major", color="#dddddd", lw=0.6)
    left.set_axisbelow(True)
    left.legend(frameon=False, ncols=2, fontsize=9, loc="upper right")
    for side in ("top", "right"):
        left.spines[side].set_visible(False)
    _images(right, pictures, best)
    figure.savefig(path)


def _keep_in_view(axes: matplotlib.axes.Axes, table: dict[str, dict[int, tuple[float, float]]], floor: float) -> None:
    """Cut the axis at 60 times the floor, and say which points lie above it."""
    top = 60 * floor
    if max(value for row in table.values() for value, _ in row.values()) <= top:
        return
    axes.set_ylim(top=top)
    above = []
    for name, row in table.items():
        out = [f"{nfe}: {row[nfe][0]:.2g}" for nfe in sorted(row) if row[nfe][0] > top]
        if out:
            above.append(f"{name} lies above the axis ({', '.join(out)})")
    axes.text(0.02, 0.02, "\n".join(above), transform=axes.transAxes, fontsize=8, color="#444444", va="bottom")


def _images(axes: matplotlib.axes.Axes, pictures: dict[str, Tensor], best: str) -> None:
    """A row of images per entry, one starting noise per column."""
    size = next(iter(pictures.values())).shape[-1]
    gap = max(1, size // 8)
    rows = []
    for images in pictures.values():
        padded = torch.nn.functional.pad(images[:, 0].clamp(-1, 1), (0, gap, 0, gap), value=-1.0)
        rows.append(torch.cat(list(padded), dim=1))
    axes.imshow(torch.cat(rows)[:-gap, :-gap], cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_yticks([(size + gap) * i + size / 2 - 0.5 for i in range(len(rows))], list(pictures), fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_title(f"{best}, one starting noise per column", fontsize=11)
    for spine in axes.spines.values():
        spine.set_visible(False)
