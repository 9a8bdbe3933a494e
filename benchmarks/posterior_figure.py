"""The figure of posterior.py: digits of which the upper half is seen, by method, beside exact draws."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import posterior_parts
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from peers_figure import OURS, PEERS
from posterior_methods import METHODS
from posterior_methods import draw as drawn
from posterior_tasks import Case, digits
from sklearn.datasets import load_digits
from torch import Tensor

from sdekit import GaussianMixture
from sdekit.posterior import PosteriorSamples, posterior_sample

matplotlib.use("Agg")

Row = dict[str, Any]
TRUTHS, DRAWS, RUNS, STD = (1, 5, 7, 13, 9), 4, 16, 0.3
SHOWN = (("MMPS", "ancestral 100"), ("TMPD", "ancestral 100"), ("DPS, true likelihood", "ancestral 100"))
UNSEEN = "#dfe7ef"
# method -> the name of its dots; each at its best sampler
DOTS = ("exact score", "posterior_sample, 16 particles", "posterior_sample, 4 particles", "MMPS", "TMPD", "PiGDM",
        "DPS, true likelihood")  # fmt: skip


def pictures(quick: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws by column, (truths, draws, 64), and the standard deviations of pixels, (truths, 1, 64)."""
    case = digits("upper half", STD)
    truth = torch.tensor(load_digits().images[list(TRUTHS)], dtype=torch.float64).reshape(-1, 64) / 8 - 1
    noise = torch.randn(len(truth), len(case.a), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = truth @ case.a.mT + STD * noise
    posteriors = [replace(case, y=one).posterior() for one in y]
    runs, steps, particles = (4, 15, 4) if quick else (RUNS, 60, 16)
    found = _particles(case, y, runs, steps, particles)
    p, w = found.particles.reshape(len(y), -1, 64), found.weights.reshape(len(y), -1, 1) / runs
    mean = (w * p).sum(1, keepdim=True)
    seen = torch.full((len(y), 1, 64), torch.nan, dtype=torch.float64)
    seen[..., :32] = y[:, None]
    columns = {
        "truth": truth[:, None],
        "seen": seen,
        "exact draws": torch.stack([one.sample(DRAWS, seed=3, dtype=torch.float64) for one in posteriors]),
        "posterior_sample": found.x.reshape(len(y), runs, 64)[:, :DRAWS],
    }
    each = replace(case, y=y.repeat_interleave(DRAWS, 0))
    for name, sampler in SHOWN:
        (method,) = (m for m in METHODS if (m.name, m.sampler) == (name, sampler))
        out = drawn(method, each, len(each.y), 0).x
        blank = torch.full((len(y), DRAWS, 64), torch.nan, dtype=torch.float64)
        columns[name.partition(",")[0]] = blank if out is None else out.reshape(len(y), DRAWS, 64)
    unsure = {
        "exact": torch.stack([deviation(one) for one in posteriors])[:, None],
        "estimated": (w * (p - mean) ** 2).sum(1, keepdim=True).sqrt(),
    }
    return columns, unsure


def _particles(case: Case, y: Tensor, runs: int, steps: int, particles: int) -> PosteriorSamples:
    each = replace(case, y=y.repeat_interleave(runs, 0))
    return posterior_sample(
        case.sde, case.score, each.observation, (len(each.y), 64), particles=particles, steps=steps, seed=0,
        dtype=torch.float64,
    )  # fmt: skip


def deviation(mixture: GaussianMixture) -> Tensor:
    """The standard deviation of each number of a mixture."""
    w, m = mixture.weights[:, None], mixture.means
    mean = (w * m).sum(0)
    return ((w * (mixture.covs.diagonal(dim1=1, dim2=2) + m**2)).sum(0) - mean**2).sqrt()


def draw(out: Path, quick: bool, found: list[Row], growing: list[Row]) -> None:
    """out/posterior.png; the lower panels are of the rows of posterior.csv and posterior_particles.csv, if any."""
    columns, unsure = pictures(quick)
    figure = Figure(figsize=(12, 9 if found else 4.6), dpi=120, layout="constrained")
    if not found:
        _tiles(figure, columns, unsure)
    else:
        above, below = figure.subfigures(2, 1, height_ratios=[1, 0.95])
        _tiles(above, columns, unsure)
        axes = below.subplots(1, 2 if growing else 1, width_ratios=[2, 1] if growing else None, squeeze=False)[0]
        _dots(axes[0], found)
        if growing:
            _slopes(axes[1], growing)
    figure.savefig(out / "posterior.png")


def _tiles(figure: Figure | SubFigure, columns: dict[str, Tensor], unsure: dict[str, Tensor]) -> None:
    every = {**columns, **unsure}
    widths = [x.shape[1] for x in every.values()]
    axes = figure.subplots(1, len(every), width_ratios=widths, squeeze=False)[0]
    top = max(float(x.max()) for x in unsure.values())
    for axis, (name, x) in zip(axes, every.items(), strict=True):
        padded = torch.nn.functional.pad(x.reshape(*x.shape[:2], 8, 8), (1, 1, 1, 1), value=torch.nan)
        tiles = padded.transpose(1, 2).reshape(10 * len(x), -1)
        colours = (
            {"cmap": "magma", "vmin": 0, "vmax": top} if name in unsure else {"cmap": "gray_r", "vmin": -1, "vmax": 1}
        )
        axis.imshow(tiles.numpy(), interpolation="nearest", **colours)
        axis.set_facecolor(UNSEEN)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"unsure,\n{name}" if name in unsure else name, fontsize=10)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.suptitle("The upper half of a digit is seen, with noise: what may it be?", fontsize=12)


def _dots(axes: Axes, found: list[Row]) -> None:
    """The distance over exact draws' for each line, each method at its best sampler."""
    lines = list(dict.fromkeys((r["task"], r["std"]) for r in found))
    names = [m for m in dict.fromkeys(r["method"] for r in found) if m in DOTS or m.startswith("azula")]
    for i, name in enumerate(names):
        mine = name == "exact score" or not name.startswith("azula")
        colour, marker = OURS[i % len(OURS)] if mine else PEERS[i % len(PEERS)]
        best = [_best(found, name, line) for line in lines]
        y = np.arange(len(lines)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
        axes.plot(best, -y, marker, ls="", color=colour, ms=6, label=name, markeredgecolor="white", markeredgewidth=0.5)
    axes.axvline(1, color="#444444", lw=0.8)
    for edge in np.arange(0.5, len(lines) - 1):
        axes.axhline(-edge, color="#dddddd", lw=0.6)
    axes.set_xscale("log")
    axes.set_yticks([-k for k in range(len(lines))], [f"{task}, {std:g}" for task, std in lines])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("sliced distance to exact draws, over that of other exact draws; each method's best sampler")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _best(found: list[Row], name: str, line: tuple[str, float]) -> float:
    by_sampler: dict[str, list[tuple[float, float]]] = {}
    for r in found:
        if r["method"] == name and (r["task"], r["std"]) == line:
            by_sampler.setdefault(r["sampler"], []).append((r["distance"], r["floor"]))
    ratios = [np.mean([d for d, _ in v]) / np.mean([f for _, f in v]) for v in by_sampler.values()]
    kept = [r for r in ratios if np.isfinite(r)]
    return min(kept, default=np.nan)


def _slopes(axes: Axes, growing: list[Row]) -> None:
    k = [r["particles"] for r in growing]
    for (key, label), (colour, marker) in zip(
        {"modes": "mode weights", "log evidence": "log p(y), nats", "exact": "mode weights, exact draws"}.items(),
        (*OURS[:2], PEERS[0]),
        strict=True,
    ):
        values = [r[key] for r in growing]
        label = f"{label}: slope {posterior_parts.slope(growing, key):.2f}"
        axes.plot(k, values, color=colour, marker=marker, ms=6, lw=1.5, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(k, [str(n) for n in k])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("particles of one run of posterior_sample")
    axes.set_ylabel("root mean square error")
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
