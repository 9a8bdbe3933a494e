"""How many evaluations does an adaptive method need for an error, per sample?

    pip install -e ".[peers]"
    python benchmarks/adaptive.py            # tables and a figure; several minutes on one thread
    python benchmarks/adaptive.py --quick    # 32 samples, three tolerances: under a minute

Protocol: that of peers.py on digits64 (x_T = 80 randn, float64, run to t = 0, the final denoising counted, error
against the exact flow), rtol = atol = the tolerance. "per sample" is the mean over samples of the evaluations that a
sample took part in; a method that steps for the whole batch, or that keeps samples which have arrived, has the batch's
number. Those of k-diffusion's dpm_adaptive are of an earlier run (commit 4601bf0): its modules import torchvision, and
that is never installed here. Evaluations at an error are read off the curve, log-linear between its points; "> n" lies
beyond.

The second table is of a batch of easy and hard samples (VP, data N(0, 0.05^2) in 16 dimensions; starts of 0.01 to 30
times the prior's): how many rows the network saw, and how many it would have seen with nobody leaving the batch.
"""

import argparse
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peer_samplers
from peers import adaptive, make_problem, write
from peers_figure import OURS, Entry

from sdekit import VPSDE, GaussianMixture, solve

ERRORS = (1e-2, 1e-3, 1e-4)
METHODS = ("adams", "flow_rk23", "flow_rk45", "rk45", "rk23", "scipy:RK45", "scipy:DOP853")
DPM_ADAPTIVE = "k-diffusion dpm_adaptive"
K_DIFFUSION = [
    Entry("digits64", "peers", DPM_ADAPTIVE, "", 0, n, n, e) for n, e in ((39, 0.0106), (54, 0.0023), (93, 1.1e-4))
]


def curves(entries: list[Entry]) -> dict[str, list[Entry]]:
    """method -> its entries, fewest evaluations first."""
    names = dict.fromkeys(entry.sampler for entry in entries)
    return {name: sorted((e for e in entries if e.sampler == name), key=lambda e: e.nfe_per_sample) for name in names}


def needed(curve: list[Entry], error: float) -> float:
    """The evaluations per sample where the curve first passes an error; infinite where it does not."""
    points = [(math.log(e.error), e.nfe_per_sample) for e in curve if math.isfinite(e.error)]
    for (high, n), (low, m) in pairwise(points):
        if high >= math.log(error) >= low:
            return float(np.interp(-math.log(error), [-high, -low], [n, m]))
    return points[0][1] if points and points[0][0] <= math.log(error) else math.inf


def table(found: dict[str, list[Entry]]) -> str:
    lines = ["| evaluations per sample at an error of | " + " | ".join(f"{e:g}" for e in ERRORS) + " |"]
    lines.append("|---" * (len(ERRORS) + 1) + "|")
    for name, curve in found.items():
        most = curve[-1].nfe_per_sample
        cells = [f"{n:.0f}" if math.isfinite(n := needed(curve, e)) else f"> {most:.0f}" for e in ERRORS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    peers = [curve for curve in found.values() if curve[0].side == "peers"]
    best = [min(needed(curve, e) for curve in peers) / needed(found["adams"], e) for e in ERRORS]
    lines.append("| **fewest of the peers / adams** | " + " | ".join(f"{ratio:.2f}" for ratio in best) + " |")
    return "\n".join(lines)


@torch.no_grad()
def mixed_batch(methods: tuple[str, ...] = ("adams", "rk45")) -> str:
    sde, n, d = VPSDE(), 64, 16
    data = GaussianMixture(torch.zeros(1, d), 0.05**2 * torch.eye(d).expand(1, d, d))
    size = torch.logspace(math.log10(0.01), math.log10(30), n, dtype=torch.float64).unsqueeze(1)
    x = size * sde.prior_sample((n, d), seed=0, dtype=torch.float64)
    lines = [
        "| mixed batch, tolerance 1e-6 | fewest | most | rows seen | without compaction | saved |",
        "|---" * 6 + "|",
    ]
    for method in methods:
        out = solve(sde.probability_flow(data.score(sde)), x, [sde.T, sde.t_min], method, rtol=1e-6, atol=1e-6)
        each = out.nfe_per_sample
        seen, whole = int(each.sum()), n * out.nfe
        cells = (method, int(each.min()), int(each.max()), seen, whole, f"{1 - seen / whole:.0%}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(path: Path, found: dict[str, list[Entry]], samples: int) -> None:
    """Error against evaluations per sample: ours in colour, the others in grey."""
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    colours, greys = iter(OURS), iter(("#222222", "#555555", "#777777", "#888888", "#999999", "#aaaaaa", "#bbbbbb"))
    markers = iter("xP*dv<>")
    for name, curve in found.items():
        xs, ys = [e.nfe_per_sample for e in curve], [e.error for e in curve]
        if curve[0].side == "ours":
            colour, marker = next(colours)
            axes.plot(xs, ys, color=colour, marker=marker, lw=2, ms=6, label=f"sdekit {name}", zorder=3)
        else:
            axes.plot(xs, ys, color=next(greys), marker=next(markers), lw=0.9, ms=6, label=name)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per sample", ylabel="error",
             title=f"digits64, {samples} samples: adaptive methods, error against the exact flow")  # fmt: skip
    ticks = (10, 20, 30, 50, 100, 200, 400)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(True, color="#eeeeee")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 samples, tolerances 1e-1, 1e-3 and 1e-5")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    print("\n".join([*peer_samplers.missing(), peer_samplers.EXCLUDED, ""]))
    samples = 32 if options.quick else 128
    exponents = (1, 3, 5) if options.quick else (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6)
    entries = adaptive(make_problem("digits64", samples), METHODS, [10**-k for k in exponents]) + K_DIFFUSION
    found = curves(entries)
    print(f"digits64, {samples} samples, torch {torch.__version__}\n\n{table(found)}\n", flush=True)
    print(mixed_batch())
    draw(options.out / "adaptive.png", found, samples)
    write(options.out / "adaptive.csv", [vars(entry) for entry in entries])


if __name__ == "__main__":
    main()
