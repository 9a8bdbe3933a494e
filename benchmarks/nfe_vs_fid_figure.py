"""The figure of nfe_vs_fid.py: distance by evaluations, and what the samples look like."""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

matplotlib.use("Agg")


class Entry(NamedTuple):
    """Mean and standard deviation over the seeds (NaN of one seed), and the evaluations that were made."""

    mean: float
    spread: float
    nfe: float

    def __str__(self) -> str:
        return f"{self.mean:.3g}" if math.isnan(self.spread) else f"{self.mean:.3g} ± {self.spread:.2g}"


Table = dict[str, dict[int, Entry]]  # sampler -> budget -> entry; "real" is the floor

# Okabe and Ito's colours, told apart by colour-blind readers too; the markers tell them apart in print.
STYLES = {
    "calibrated": ("#D55E00", "o", "-"),
    "flow_3m": ("#0072B2", "s", "-"),
    "ipndm": ("#009E73", "^", "-"),
    "dpmpp_2m": ("#56B4E9", "v", "-"),
    "ddim": ("#E69F00", "<", "-"),
    "sa_solver": ("#CC79A7", "D", "--"),
    "ancestral": ("#8C6BB1", "P", "--"),
    "pc": ("#555555", "X", "--"),
    "rk45": ("#000000", "*", "-"),
    "adams": ("#882255", "*", "-"),
}
OTHERS = ("#bbbbbb", ".", "-")  # all rows that have no style of their own: thin, behind, and one label for all


def draw(
    path: Path, table: Table, metric: str,
    options: argparse.Namespace, best: str, pictures: dict[str, Tensor],
) -> None:  # fmt: skip
    """Write the PNG."""
    figure = Figure(figsize=(13, 5.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    floor = table["real"][0]
    spread = 0.0 if math.isnan(floor.spread) else floor.spread
    left.axhspan(max(floor.mean - spread, 0.5 * floor.mean), floor.mean + spread, color="#999999", alpha=0.25, lw=0)
    left.axhline(floor.mean, color="#777777", lw=1)
    samplers = {name: row for name, row in table.items() if name != "real"}
    for name, row in samplers.items():
        own = name in STYLES
        colour, marker, line = STYLES.get(name, OTHERS)
        entries = [row[budget] for budget in sorted(row) if not math.isnan(row[budget].mean)]
        if not entries:
            continue
        x, y = [e.nfe for e in entries], [e.mean for e in entries]
        up = [0.0 if math.isnan(e.spread) else e.spread for e in entries]
        down = [min(u, 0.9 * v) for v, u in zip(y, up, strict=True)]  # a bar below 0 has no place on a log axis
        if not own:
            left.plot(x, y, color=colour, marker=marker, ls=line, ms=4, lw=0.8, zorder=1)
            continue
        size, width = (13, 1.8) if marker == "*" else (9, 3) if name == "calibrated" else (6, 1.8)
        left.errorbar(x, y, yerr=[down, up], color=colour, marker=marker, ls=line, ms=size, lw=width, capsize=2.5,
                      elinewidth=1, zorder=3, label=name, markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    if set(samplers) - set(STYLES):
        left.plot([], [], color=OTHERS[0], marker=OTHERS[1], lw=0.8, label="other rows, clipped ones")
    left.set_xscale("log")
    left.set_yscale("log")
    columns = sorted({budget for row in samplers.values() for budget in row})
    spread_out = [nfe for i, nfe in enumerate(columns) if i == 0 or nfe >= 1.25 * columns[i - 1]]
    left.xaxis.set_major_locator(FixedLocator(spread_out))
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xticklabels([str(nfe) for nfe in spread_out])
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _keep_in_view(left, samplers, floor.mean)
    label = {"ha": "right", "va": "top", "color": "#444444", "fontsize": 9}  # few markers are there
    left.text(left.get_xlim()[1], floor.mean, "real against real images  ", **label)
    left.set_xlabel("network evaluations (the final denoising counted)")
    left.set_ylabel(metric)
    left.set_title(
        f"{options.dataset}: {options.samples} images each, mean ± s.d. of {options.seeds} seeds", fontsize=11
    )
    left.grid(True, which="major", color="#dddddd", lw=0.6)
    left.set_axisbelow(True)
    if left.get_legend_handles_labels()[0]:  # not where every sampler failed
        left.legend(frameon=False, ncols=2, fontsize=9, loc="upper right")
    for side in ("top", "right"):
        left.spines[side].set_visible(False)
    _images(right, pictures, best)
    figure.savefig(path)


def _keep_in_view(axes: matplotlib.axes.Axes, samplers: Table, floor: float) -> None:
    """Cut the axis at 60 times the floor, and say which points lie above it."""
    top = 60 * floor
    above = {
        name: [f"{row[budget].nfe:g}: {row[budget].mean:.2g}" for budget in sorted(row) if row[budget].mean > top]
        for name, row in samplers.items()
        if name in STYLES
    }
    lines = [f"{name} lies above the axis ({', '.join(points)})" for name, points in above.items() if points]
    if lines:
        axes.set_ylim(top=top)
        axes.text(0.02, 0.02, "\n".join(lines), transform=axes.transAxes, fontsize=8, color="#444444", va="bottom")


def _images(axes: matplotlib.axes.Axes, pictures: dict[str, Tensor], best: str) -> None:
    """A row of images per entry, one starting noise per column."""
    size = next(iter(pictures.values())).shape[-1]
    gap = max(1, size // 8)
    rows = []
    for images in pictures.values():
        padded = torch.nn.functional.pad(images[:, 0].clamp(-1, 1), (0, gap, 0, gap), value=-1.0)
        rows.append(torch.cat(list(padded), dim=1))
    axes.imshow(torch.cat(rows)[:-gap, :-gap].numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_yticks([(size + gap) * i + size / 2 - 0.5 for i in range(len(rows))], list(pictures), fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_title(f"{best}, one starting noise per column", fontsize=11)
    for spine in axes.spines.values():
        spine.set_visible(False)
