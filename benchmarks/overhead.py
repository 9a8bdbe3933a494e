"""What does an evaluation of a sampler cost beside its network?

    python benchmarks/overhead.py            # a table of ratios; a minute or two on one thread

Protocol: the network is free (it returns a tensor it was given), one thread, float32, 300 steps (60 of the large
shape), the whole call counted (tables of coefficients, checks). The bare loop is  y = a y + b d  once for every
evaluation that the sampler makes, and  y + c randn  as often as the sampler draws noise, so that the ratio is the cost
of an evaluation whatever the rule. Bare loop and sampler take turns; the ratio of a turn is that of its two neighbours,
and the median over turns is printed, since absolute times depend on the machine and its other guests.
A rule with a history has more to add up than the bare loop. peers.py prints this table with other libraries' loops.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sdekit import SAMPLERS, VPSDE, Noise, solve
from sdekit.grids import make_grid

SHAPES = ((1, 64), (64, 3, 32, 32))


def bare(d: Tensor, evaluations: int, draws: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    drawn = [(k + 1) * draws // evaluations - k * draws // evaluations for k in range(evaluations)]

    def loop() -> Tensor:
        y = d
        for k in range(evaluations):
            y = 0.9 * y + (0.1 + k / evaluations) * d
            for _ in range(drawn[k]):
                y = y + 0.1 * torch.randn(d.shape, generator=generator)
        return y

    return loop


def ours(name: str, d: Tensor, steps: int) -> Callable[[], object]:
    sde, row = VPSDE(), SAMPLERS[name]
    grid = make_grid(sde, "uniform", steps)

    def loop() -> object:
        return solve(sde.reverse(lambda x, t: d, row.churn), d, grid, row.rule, noise=Noise(d, 0))

    return loop


def counts(name: str, steps: int) -> tuple[int, int]:
    """The evaluations and the draws of one of our samplers in so many steps."""

    class Counted(Noise):
        draws = 0

        def normal(self) -> Tensor:
            self.draws += 1
            return super().normal()

    sde, row, d = VPSDE(), SAMPLERS[name], torch.zeros(1)
    noise = Counted(d, 0)
    system = sde.reverse(lambda x, t: d, row.churn)
    return solve(system, d, make_grid(sde, "uniform", steps), row.rule, noise=noise).nfe, noise.draws


class Loop(NamedTuple):
    """A row of the table: ``counts(steps)`` are its evaluations and draws, ``make(d, steps)`` the loop itself."""

    name: str
    counts: Callable[[int], tuple[int, int]]
    make: Callable[[Tensor, int], Callable[[], object]]


def rows() -> list[Loop]:
    return [Loop(name, partial(counts, name), partial(ours, name)) for name in SAMPLERS]


def measure(row: Loop, turns: int, shorter: int = 1) -> dict[str, object]:
    """Of one row, at each shape: the ratio per evaluation, and its microseconds."""
    (one, _), (two, _) = row.counts(20), row.counts(21)
    found: dict[str, object] = {"sampler": row.name, "evaluations a step": two - one}
    for shape in SHAPES:
        steps = (300 if shape[0] == 1 else 60) // shorter
        evaluations, draws = row.counts(steps)
        found.setdefault("draws an evaluation", round(draws / evaluations, 2))
        d = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        times, took = ratio(bare(d, evaluations, draws), row.make(d, steps), turns)
        found[f"ratio {shape}"], found[f"microseconds {shape}"] = round(times, 2), round(1e6 * took / evaluations, 1)
    return found


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(base: Callable[[], object], run: Callable[[], object], turns: int) -> tuple[float, float]:
    """The median over turns of the time of run over that of base, after one of each unmeasured; run's median time."""
    seconds(base), seconds(run)
    pairs = [(seconds(base), seconds(run)) for _ in range(turns)]
    return statistics.median(b / a for a, b in pairs), statistics.median(b for _, b in pairs)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {options.turns} turns, median ratio to the bare loop per evaluation")
    print(f"{'':24}{'evaluations a step':>20}{'draws each':>12}" + "".join(f"{shape!s:>26}" for shape in SHAPES))
    measured = []
    for row in rows():
        found = measure(row, options.turns)
        measured.append(found)
        cells = "".join(f"{found[f'ratio {s}']:>15.2f} x {found[f'microseconds {s}']:>6.0f} us" for s in SHAPES)
        print(f"{row.name:24}{found['evaluations a step']:>20}{found['draws an evaluation']:>12}{cells}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "overhead.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, measured[0])
        writer.writeheader()
        writer.writerows(measured)


if __name__ == "__main__":
    main()
