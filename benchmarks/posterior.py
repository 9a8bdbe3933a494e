"""How right are posterior samplers? Against exact posteriors of mixtures, beside azula's.

    pip install -e ".[peers]"                 # and azula, as a line of the output says
    python benchmarks/posterior.py            # all parts: an hour on one thread
    python benchmarks/posterior.py --quick    # does it run? two tasks, one y, 64 draws: two minutes
    python benchmarks/posterior.py --only digits figure

Protocol: y = A x_0 + std eps of an x_0 of a mixture, whose exact score every method gets; the exact posterior is a
mixture again (GaussianMixture.posterior). x_t = x_0 + t eps, Karras' levels, float64. y k is of seed k, and so are the
draws of a method for it.

digits: ten full-covariance Gaussians fitted to scikit-learn's 8 x 8 digits; three A, two std, three y each, 128 draws;
levels from 80 to .01. distance: sliced 2-Wasserstein to exact draws, as many, over 200 directions, the mean of four
sets; floor: that of these sets among themselves. modes: total variation between the mean responsibilities of the
mixture's ten posterior components in the draws and their exact weights; "modes floor": of exact draws. evaluations:
rows that the network is asked for, by the draw, all particles together; seconds: of all draws of a y, in this thread's
time, with vector-Jacobian products. "exact score" is the score of p(x_t | y) itself: what a sampler's steps cost. A
method whose draws are not finite, or a hundred times as large as data, diverges.
lattice: MCGDiff's 25 Gaussians of unit spread on a lattice of pitch 8 (Cardoso et al. 2024) in 8 dimensions with one
number seen (1,024 draws) and in 80 with two (128 draws), std .25, another A for each y; sliced 1-Wasserstein.
coverage: "16 pixels", std .3: 200 x_0, each with a y of its own, and 19 draws for each y, all with one sampler. A 90 %
region is one of ranks among the draws, of the exact log p(x | y) or of eight projections, so that exact draws have 90 %
whatever their number. The density is of 64 numbers, and tells a sampler's steps too ("exact score"). "expected" is of
64 exact draws of each posterior in x_0's place, which takes most of the chance out of it.
particles: the same task, y 0, which has two modes, 64 runs: what k particles of posterior_sample err.
figure: real digits whose upper half is seen, std .3.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import posterior_figure
import posterior_parts
import posterior_tasks
import torch
from overhead_measure import write
from peer_samplers import PACKAGES, available
from posterior_methods import (
    MANY,
    METHODS,
    PARTICLES,
    SCORES,
    WITH_PARTICLES,
    Method,
    with_particles,
    without_particles,
)
from tables import markdown

Row = dict[str, Any]
LINES = [(task, std) for task in ("upper half", "16 pixels", "2 x 2 means") for std in (0.05, 0.3)]
PARTS = ("digits", "lattice", "coverage", "particles", "figure")
# lines and y of the digits; draws there and on lattices, by dimension; x_0 of coverage; particles and their runs
FULL: Row = {
    "lines": LINES, "observations": 3, "draws": 128, "lattice": {8: 1024, 80: 128}, "coverage": 200,
    "counts": (4, 8, 16, 32, 64), "runs": 64,
}  # fmt: skip
QUICK: Row = {
    "lines": [("16 pixels", 0.3), ("2 x 2 means", 0.3)], "observations": 1, "draws": 64, "lattice": {8: 64, 80: 32},
    "coverage": 20, "counts": (2, 4, 8), "runs": 16,
}  # fmt: skip
COVERAGE = ("16 pixels", 0.3)
HEADLINE = with_particles(16).name
APPROXIMATE = tuple(name for name, *_ in SCORES)


def rows_to_run(quick: bool) -> list[Method]:
    """METHODS, without what is not installed; quick: one sampler for each, and few particles."""
    found = [m for m in METHODS if not m.package or available(m.package)]
    if quick:
        found = [m for m in found if m.sampler in ("sa_solver 30", "DDPM 100") or m.name == with_particles(4).name]
    return found


def for_coverage(methods: list[Method]) -> list[Method]:
    """Ours that take a y for each sample; scores by the sampler of the particles, which so differ in these alone."""
    scores = without_particles(*WITH_PARTICLES)
    known = {m.name for m in scores} | {few.name for few in map(with_particles, PARTICLES[:-1])}
    return [*scores, *(m for m in methods if not m.common and m.name not in known)]


def mean_rows(found: list[Row]) -> list[Row]:
    """Means over the observations; "ratio" is the mean distance over the mean floor."""
    groups: dict[tuple[str, str, str, float], list[Row]] = {}
    for row in found:
        groups.setdefault((row["method"], row["sampler"], row["task"], row["std"]), []).append(row)
    keys = ("distance", "floor", "modes", "modes floor", "ess", "evaluations", "seconds")
    means = []
    for (method, sampler, task, std), rows in groups.items():
        mean = {key: float(np.mean([row[key] for row in rows])) for key in keys}
        of = {"method": method, "sampler": sampler, "task": task, "std": std}
        means.append({**of, **mean, "ratio": mean["distance"] / mean["floor"]})
    return means


def table(found: list[Row]) -> str:
    """Markdown, distance over the floor's / modes, a column for each task and std."""
    means = mean_rows(found)
    lines = list(dict.fromkeys((r["task"], r["std"]) for r in means))
    of = {(r["method"], r["sampler"], r["task"], r["std"]): r for r in means}
    floors = [next(r for r in means if (r["task"], r["std"]) == line) for line in lines]
    exact = [
        "exact draws: distance / modes",
        "",
        *(f"{r['floor']:.3f} / {r['modes floor']:.2f}" for r in floors),
        "",
        "",
    ]
    body = [exact]
    names = list(dict.fromkeys(r["method"] for r in means))
    pairs = dict.fromkeys((r["method"], r["sampler"]) for r in means)
    for method, sampler in sorted(pairs, key=lambda pair: names.index(pair[0])):
        own = [of[method, sampler, *line] for line in lines if (method, sampler, *line) in of]
        cells = [cell(of.get((method, sampler, *line))) for line in lines]
        evaluations, seconds = (np.mean([r[key] for r in own]) for key in ("evaluations", "seconds"))
        body.append([method, sampler, *cells, f"{evaluations:.0f}", f"{seconds:.2g}"])
    header = ["distance over exact draws' / modes", "sampler", *(f"{task}, {std:g}" for task, std in lines)]
    return markdown([*header, "evaluations", "seconds"], body)


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    return "diverges" if np.isnan(row["distance"]) else f"{row['ratio']:.2f} / {row['modes']:.2f}"


def coverage_table(found: list[Row]) -> str:
    """Markdown, per cent; of the x_0 themselves with the binomial spread of as many at 90 %."""
    spread = 100 * (0.09 / found[0]["observations"]) ** 0.5

    def cells(row: Row) -> list[str]:
        if np.isnan(row["density"]):
            return ["diverges", "", "", ""]
        keys = ("density", "density expected", "projections", "projections expected")
        first, *rest = (f"{100 * row[key]:.1f}" for key in keys)
        return [f"{first} ± {spread:.1f}", *rest]

    header = ["% of x_0 in 90 % regions", "sampler", "highest density", "expected", "projections", "expected"]
    return markdown(header, [[row["method"], row["sampler"], *cells(row)] for row in found])


def particles_table(found: list[Row]) -> str:
    """Markdown, errors by particles and their slopes."""
    keys = {"modes": "mode weights", "exact": "of as many exact draws", "log evidence": "log p(y)"}
    lines = [[row["particles"], *(f"{row[key]:.3g}" for key in keys), f"{row['evaluations']:.0f}"] for row in found]
    slopes = [f"{posterior_parts.slope(found, key):.2f}" for key in keys]
    return markdown(["particles", *keys.values(), "evaluations"], [*lines, ["slope", *slopes, ""]])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tasks, one y, 64 draws, 4 particles, 30 steps")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--observations", type=int, default=0, help="y of each task (default 3; quick 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    size, methods = QUICK if options.quick else FULL, rows_to_run(options.quick)
    seen = options.observations or size["observations"]
    if not available("azula"):
        print(f"azula is not installed, its rows are missing: {PACKAGES['azula']}", flush=True)
    found: dict[str, list[Row]] = {}
    if "digits" in options.only:
        found["posterior"] = posterior_parts.digits(size["lines"], methods, seen, size["draws"])
    if "lattice" in options.only:
        more = [] if options.quick else [with_particles(MANY)]
        found["posterior_lattice"] = posterior_parts.lattices(methods, seen, size["lattice"], more)
    case = posterior_tasks.digits(*COVERAGE)
    if "coverage" in options.only:
        found["posterior_coverage"] = posterior_parts.coverage(case, for_coverage(methods), size["coverage"], 19)
    if "particles" in options.only:
        case = posterior_tasks.observed(case, 0, 0)[0]
        found["posterior_particles"] = posterior_parts.growing(case, size["counts"], size["runs"], *WITH_PARTICLES)
    show = dict(zip(("posterior", "posterior_lattice", "posterior_coverage", "posterior_particles"),
                    (table, table, coverage_table, particles_table), strict=True))  # fmt: skip
    for name, rows in found.items():
        print(f"\n{show[name](rows)}")
        write(options.out / f"{name}.csv", rows)
    if "figure" in options.only:
        posterior_figure.draw(
            options.out, options.quick, found.get("posterior", []), found.get("posterior_particles", [])
        )


if __name__ == "__main__":
    main()
