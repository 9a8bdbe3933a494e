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
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from peers_figure import CALIBRATED, OURS, PEERS
from posterior_methods import METHODS, WITH_PARTICLES
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
SCORES = ("MMPS", "TMPD", "PiGDM", "DPS, true likelihood", "DPS, gamma 1")
PARTICLES = (CALIBRATED, ("#8C3B00", "*"))
RIGHT = 30  # of the dots' axis


def pictures(quick: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws by column, (truths, draws, 64), and the standard deviations of pixels, (truths, 1, 64)."""
    case = digits("upper half", STD)
    truth = torch.tensor(load_digits().images[list(TRUTHS)], dtype=torch.float64).reshape(-1, 64) / 8 - 1
    noise = torch.randn(len(truth), len(case.a), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = truth @ case.a.mT + STD * noise
    posteriors = [replace(case, y=one).posterior() for one in y]
    runs, steps, particles = (4, 10, 2) if quick else (RUNS, WITH_PARTICLES[1], 16)
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
        "± exact": torch.stack([deviation(one) for one in posteriors])[:, None],
        "± found": (w * (p - mean) ** 2).sum(1, keepdim=True).sqrt(),
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
    figure = Figure(figsize=(13, 8.6 if found else 3.6), dpi=120, layout="constrained")
    if not found:
        _tiles(figure, columns, unsure)
    else:
        above, below = figure.subfigures(2, 1, height_ratios=[3.4, 5.2])
        _tiles(above, columns, unsure)
        axes = below.subplots(1, 2 if growing else 1, width_ratios=[2.4, 1] if growing else None, squeeze=False)[0]
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
        tiles = padded.transpose(1, 2).reshape(10 * len(x), -1).numpy()
        spread = name in unsure
        low, high = (0.0, top) if spread else (-1.0, 1.0)
        axis.imshow(tiles, interpolation="nearest", cmap="magma" if spread else "gray_r", vmin=low, vmax=high)
        axis.set_facecolor(UNSEEN)
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, fontsize=10)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.suptitle(
        f"The upper half of a digit is seen, with noise of {STD:g}: what may it be? "
        f"On the right, how unsure a pixel is (0 to {top:.1f})",
        fontsize=11,
    )


def _dots(axes: Axes, found: list[Row]) -> None:
    """The distance over exact draws' for each line, each method at its best sampler."""
    lines = list(dict.fromkeys((r["task"], r["std"]) for r in found))
    every = dict.fromkeys(r["method"] for r in found)
    names = [m for m in every if m in SCORES] + [m for m in every if m.startswith("azula")]
    names = ["exact score", *names, *(m for m in every if m.startswith("posterior_sample"))]
    styles = dict(zip([m for m in names if m in SCORES], OURS, strict=False))
    styles |= dict(zip([m for m in names if m.startswith("azula")], (*PEERS, ("#AAAAAA", "P")), strict=False))
    styles |= dict(zip([m for m in names if m.startswith("posterior_sample")][::-1], PARTICLES, strict=False))
    for i, name in enumerate(names):
        colour, marker = styles.get(name, ("#000000", "|"))
        best = [_best(found, name, line) for line in lines]
        y = np.arange(len(lines)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
        size = {"*": 12, "|": 9}.get(marker, 6)
        axes.plot(best, -y, marker, ls="", color=colour, ms=size, label=name,
                  **({} if marker == "|" else {"markeredgecolor": "white", "markeredgewidth": 0.5}))  # fmt: skip
    axes.axvline(1, color="#444444", lw=0.8, zorder=0)
    for edge in np.arange(0.5, len(lines) - 1):
        axes.axhline(-edge, color="#dddddd", lw=0.6)
    axes.set_xscale("log")
    axes.set_xlim(right=min(axes.get_xlim()[1], RIGHT))
    axes.set_yticks([-k for k in range(len(lines))], [f"{task}, {std:g}" for task, std in lines])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(FixedLocator([0.7, 1, 1.5, 2, 3, 5, 10, 20]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("distance to exact draws over that of other exact draws (1 is right); what diverges has no dot")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for side in ("top", "right", "left"):
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
    axes.yaxis.set_major_locator(FixedLocator([0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5]))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(top=2.5 * axes.get_ylim()[1])
    axes.set_xlabel("particles of a run")
    axes.set_title("root mean square error", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
