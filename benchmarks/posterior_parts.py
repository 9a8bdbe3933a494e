"""What the scorecard of posterior samplers measures: distances, coverage, and how errors fall as particles grow."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import posterior_tasks as tasks
import torch
from posterior_methods import Method, draw
from posterior_tasks import Case
from torch import Tensor

from sdekit.posterior import posterior_sample

Row = dict[str, Any]
REFERENCES = 4  # sets of exact draws that each method is compared with; the floor is among them
PROJECTIONS, EXACT = 8, 64  # of coverage: directions, and exact draws of a posterior that stand in for its x_0


def compare(name: str, std: float, cases: Iterable[Case], methods: Sequence[Method], n: int, power: int) -> list[Row]:
    """A row for each method and case: its distance to exact draws, and theirs among themselves, as many of each."""
    found = []
    for k, case in enumerate(cases):
        posterior = case.posterior()
        exact = [posterior.sample(n, seed=seed, dtype=torch.float64) for seed in range(1, REFERENCES + 1)]
        floor = np.mean([tasks.sliced(a, b, power) for a, b in combinations(exact, 2)])
        least = np.mean([tasks.mode_error(posterior, x) for x in exact])
        for method in methods:
            out = draw(method, case, n, seed=k)
            distance = modes = np.nan
            if out.x is not None:
                distance = np.mean([tasks.sliced(x, out.x, power) for x in exact])
                modes = tasks.mode_error(posterior, out.x)
            found.append({
                "task": name, "std": std, "observation": k, "samples": n, "method": method.name,
                "sampler": method.sampler, "distance": distance, "floor": floor, "modes": modes, "modes floor": least,
                "ess": out.ess, "evaluations": out.evaluations, "seconds": out.seconds,
            })  # fmt: skip
            print(f"{name}, {std:g}, y {k}, {method.name}, {method.sampler}: {distance:.3f} over {floor:.3f}, modes "
                  f"{modes:.2f}, {out.evaluations:.0f} evaluations, {out.seconds:.1f} s", flush=True)  # fmt: skip
    return found


def digits(lines: Iterable[tuple[str, float]], methods: Sequence[Method], observations: int, n: int) -> list[Row]:
    """The tasks on digits."""
    found = []
    for task, std in lines:
        case = tasks.digits(task, std)
        seen = [tasks.observed(case, 0, k)[0] for k in range(observations)]
        found += compare(task, std, seen, methods, n, power=2)
    return found


def lattices(methods: Sequence[Method], observations: int, sizes: dict[int, int], more: Sequence[Method]) -> list[Row]:
    """MCGDiff's 25 Gaussians, another A for each y; ``sizes``: draws by dimension; ``more`` in the fewest alone."""
    found = []
    for d, entries in tasks.LATTICES:
        seen = [tasks.observed(tasks.lattice(d, entries, k), 0, k)[0] for k in range(observations)]
        here = [*methods, *(more if d == min(sizes) else ())]
        found += compare(f"d = {d}, d_y = {entries}", tasks.LATTICE_STD, seen, here, sizes[d], power=1)
    return found


def coverage(case: Case, methods: Sequence[Method], observations: int, draws: int) -> list[Row]:
    """How often 90 % regions of draws hold the x_0 that was observed; the first row is of exact draws.

    With M draws the rank of f(x_0) among f of them is uniform on 0 ... M for exact draws, whatever f: so a region of
    ranks has its coverage exactly, for M + 1 a multiple of 20. f is the exact log p(x|y), whose lowest tenth of ranks
    is left out (highest density), or a projection, with a twentieth left out at either end.
    """
    many, x_0 = tasks.observed(case, observations, 0)
    posteriors = [replace(case, y=y).posterior() for y in many.y]
    truth = torch.stack([
        torch.cat([x[None], p.sample(EXACT, seed=1000 + k, dtype=torch.float64)])
        for k, (x, p) in enumerate(zip(x_0, posteriors, strict=True))  # numbers of its own for each y
    ])  # fmt: skip
    control = torch.stack([p.sample(draws, seed=k, dtype=torch.float64) for k, p in enumerate(posteriors)])
    found = [_covered("exact draws", "", truth, control, posteriors)]
    each = replace(many, y=many.y.repeat_interleave(draws, 0))
    for method in methods:
        if method.common:  # one y after the other
            runs = [draw(method, replace(case, y=y), draws, seed=k).x for k, y in enumerate(many.y)]
            x = torch.stack([run for run in runs if run is not None]) if all(run is not None for run in runs) else None
        else:
            drawn = draw(method, each, observations * draws, seed=0).x
            x = None if drawn is None else drawn.reshape(observations, draws, -1)
        found.append(_covered(method.name, method.sampler, truth, x, posteriors))
        print(f"coverage, {method.name}, {method.sampler}: {found[-1]}", flush=True)
    return found


def _covered(name: str, sampler: str, truth: Tensor, x: Tensor | None, posteriors: list[Any]) -> Row:
    """truth (observations, 1 + EXACT, d), the x_0 first; x (observations, M, d), or None of a method that diverged."""
    row: Row = {"method": name, "sampler": sampler, "observations": len(truth), "draws": 0}
    if x is None:
        return {**row, **dict.fromkeys(("density", "density expected", "projections", "projections expected"), np.nan)}
    m = x.shape[1]
    dense = torch.stack([
        _ranks(p.log_prob(at)[:, None], p.log_prob(drawn)[:, None])
        for at, drawn, p in zip(truth, x, posteriors, strict=True)
    ])  # fmt: skip
    u = tasks.directions(truth.shape[-1])[:, :PROJECTIONS]
    along = torch.stack([_ranks(at @ u, drawn @ u) for at, drawn in zip(truth, x, strict=True)])
    tail = (m + 1) // 20
    held = (dense >= 2 * tail).double()[..., 0], ((along >= tail) & (along <= m - tail)).double().mean(-1)
    row["draws"] = m
    for key, inside in zip(("density", "projections"), held, strict=True):
        row[key], row[f"{key} expected"] = float(inside[:, 0].mean()), float(inside[:, 1:].mean())
    return row


def _ranks(at: Tensor, drawn: Tensor) -> Tensor:
    """How many of drawn (M, f) lie below each of at (n, f)."""
    return (drawn < at[:, None]).sum(1)


def growing(case: Case, counts: Sequence[int], runs: int, sampler: str, steps: int) -> list[Row]:
    """What one run of k particles errs in mode weights and in log p(y), root mean squares over runs.

    Mode weights are those of the run's weighted particles, and their error the root of the sum of squares over modes;
    "exact": what k exact draws err, on an average. Few particles are often all in one mode, which no weight mends.
    """
    posterior, found = case.posterior(), []
    evidence = case.log_evidence()
    spread = float(tasks.shares(posterior, posterior.sample(4096, seed=1, dtype=torch.float64)).var(0).sum().sqrt())
    for k in counts:
        out = posterior_sample(
            case.sde, case.score, case.observation, (runs, case.d), particles=k, sampler=sampler, steps=steps,
            seed=0, dtype=torch.float64,
        )  # fmt: skip
        parts = tasks.shares(posterior, out.particles.reshape(runs * k, -1)).reshape(runs, k, -1)
        off = (out.weights[..., None] * parts).sum(1) - posterior.weights
        found.append({
            "particles": k, "runs": runs, "sampler": f"{sampler} {steps}",
            "modes": _rms(off.norm(dim=1)), "exact": spread / k**0.5,
            "log evidence": _rms(out.log_evidence - evidence), "ess": float(out.ess.mean()),
            "evaluations": out.rows / runs,
        })  # fmt: skip
        print(f"{k} particles: {found[-1]}", flush=True)
    return found


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def slope(found: list[Row], key: str) -> float:
    """Of the logarithm of an error against that of the particles."""
    return float(np.polyfit(np.log([r["particles"] for r in found]), np.log([r[key] for r in found]), 1)[0])
