"""Measured against claimed order of convergence, of our samplers and of other libraries' on the same levels.

    python benchmarks/order.py            # a minute or two on one thread; peers: pip install -e ".[peers]"

Protocol: the 64-dimensional digits mixture with its closed-form denoiser, float64, 16 samples; levels uniform in the
half log-SNR lambda from -4 to 3 (sigma e^4 to e^-3), N = 40, 80, 160, 320 steps, no final denoising. The reference is
the exact flow between the two levels; the error is the median over samples of the root mean square, since at few steps
a sample now and then falls to another mode; the order is minus the slope of its logarithm against log N. Ours claim
``SAMPLERS[name].rule.order``, a peer what its documentation says. Rows of ours that measure more than 0.1 below the
claim are marked, and so are peers', which nothing here depends on.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peer_samplers
from peers import Counted, denoiser, deterministic

from sdekit import SAMPLERS, GaussianMixture, HeatODE, solve
from tests import oracle

LAMBDAS = (-4.0, 3.0)
STEPS = (40, 80, 160, 320)
SLACK = 0.1


def measured(steps: tuple[int, ...], errors: list[float]) -> float:
    """Minus the slope of log error against log steps; NaN where a run broke down or the error is 0."""
    if not all(math.isfinite(e) and e > 0 for e in errors):
        return math.nan
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def typical(x: Tensor, reference: np.ndarray) -> float:
    """The median over samples, in NumPy's sense, as the tests take it."""
    return float(np.median(np.sqrt(((x.numpy() - reference) ** 2).mean(1))))


@torch.no_grad()
def rows(steps: tuple[int, ...], samples: int) -> list[dict[str, Any]]:
    """One row per sampler: claimed and measured order, and the errors."""
    mixture, sde = oracle.digits64(), HeatODE()
    score = GaussianMixture(mixture.m, mixture.covs, mixture.w).score(sde)
    start, end = (math.exp(-lam) for lam in LAMBDAS)
    y = start * np.random.default_rng(0).standard_normal((samples, 64))
    reference = mixture.flow(y, start, end, rtol=1e-11, atol=1e-12)
    x, denoise = torch.from_numpy(y), denoiser(Counted(score))
    levels = {n: torch.exp(-torch.linspace(*LAMBDAS, n + 1, dtype=torch.float64)) for n in steps}

    def ours(name: str) -> Callable[[int], Tensor]:
        system = sde.probability_flow(score)
        return lambda n: solve(system, x, levels[n], SAMPLERS[name].rule).x

    runs: list[tuple[str, int, Callable[[int], Tensor]]] = [
        (f"sdekit {name}", SAMPLERS[name].rule.order, ours(name)) for name in deterministic()
    ]
    for name, peer in peer_samplers.FIXED.items():
        if peer_samplers.available(peer.package):
            runs.append((name, peer.order, lambda n, peer=peer: peer.run(denoise, x, levels[n])))
    found = []
    for name, claimed, run in runs:
        errors = [typical(run(n), reference) for n in steps]
        order = measured(steps, errors)
        row = {"sampler": name, "claimed": claimed, "measured": round(order, 3), "below": not order >= claimed - SLACK}
        found.append(row | {f"error at {n}": error for n, error in zip(steps, errors, strict=True)})
    return found


def table(found: list[dict[str, Any]]) -> str:
    errors = [key for key in found[0] if key.startswith("error at ")]
    lines = ["| sampler | claimed | measured | | " + " | ".join(errors) + " |", "|---" * (4 + len(errors)) + "|"]
    for row in found:
        mark = f"below the claim by more than {SLACK:g}" if row["below"] else ""
        values = " | ".join(f"{row[key]:.2g}" for key in errors)
        lines.append(f"| {row['sampler']} | {row['claimed']} | {row['measured']:.2f} | {mark} | {values} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    steps = tuple(sorted(set(options.steps)))
    if len(steps) < 2 or steps[0] < 1:
        parser.error("--steps must be at least two numbers, each at least 1, for a slope")
    if options.samples < 1:
        parser.error("--samples must be at least 1")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    print("\n".join([*peer_samplers.missing(), peer_samplers.EXCLUDED, ""]))
    found = rows(steps, options.samples)
    print(f"digits64, {options.samples} samples, torch {torch.__version__}\n\n{table(found)}")
    with open(options.out / "order.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
