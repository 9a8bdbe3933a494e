"""What does a sampler's step cost beside its network?

    python benchmarks/overhead.py            # a table of ratios; about a minute on one thread

Protocol: the network is free (it returns a tensor it was given), one thread, float32, 300 steps (60 of the large
shape), the whole call counted (tables of coefficients, checks). The bare loop is  y = a y + b d,  for stochastic
samplers plus  c randn,  once for every evaluation that the sampler makes, so that the ratio is the cost of an
evaluation whatever the rule. Bare loop and sampler take turns; the ratio of a turn is that of its two neighbours, and
the median over turns is printed, since absolute times depend on the machine and its other guests.
A rule with a history has more to add up than the bare loop: the last rows are loops that do a multistep rule's sums and
nothing else (a prediction from y and d, then a y + the sum of the last two, three or four), the least that such a rule
costs in whole-tensor operations.
"""

import argparse
import csv
import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdekit import SAMPLERS, VPSDE, Noise, solve
from sdekit.grids import make_grid

SHAPES = ((1, 64), (64, 3, 32, 32))


def bare(d: Tensor, evaluations: int, noisy: bool) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)

    def loop() -> Tensor:
        y = d
        for k in range(evaluations):
            y = 0.9 * y + (0.1 + k / evaluations) * d
            if noisy:
                y = y + 0.1 * torch.randn(d.shape, generator=generator)
        return y

    return loop


def sums(terms: int, d: Tensor, steps: int) -> Callable[[], object]:
    """The sums of a multistep rule with so many predictions."""

    def loop() -> Tensor:
        y, history = d, deque(maxlen=terms)
        for k in range(steps):
            history.appendleft(torch.add(y, d, alpha=0.1 + k / steps))
            y = 0.9 * y
            for p in history:
                y.add_(p, alpha=0.1)
        return y

    return loop


def ours(name: str, d: Tensor, steps: int) -> Callable[[], object]:
    sde, row = VPSDE(), SAMPLERS[name]
    grid = make_grid(sde, "uniform", steps)

    def loop() -> object:
        return solve(sde.reverse(lambda x, t: d, row.churn), d, grid, row.rule, noise=Noise(d, 0))

    return loop


def rows() -> list[tuple[str, Callable[[int], int], bool, Callable[[Tensor, int], Callable[[], object]]]]:
    """(name, evaluations of so many steps, whether it draws noise, its loop)"""
    found = [
        (name, lambda n, rule=row.rule: n * rule.evaluations + rule.extra, row.stochastic, partial(ours, name))
        for name, row in SAMPLERS.items()
    ]
    return found + [(f"(sums of {k} predictions)", lambda n: n, False, partial(sums, k)) for k in (2, 3, 4)]


def measure(
    name: str, evaluations: Callable[[int], int], noisy: bool, make: Callable, turns: int, shorter: int = 1
) -> dict:
    """The row of one sampler: at each shape the ratio per evaluation, and its microseconds."""
    row: dict[str, object] = {"sampler": name, "evaluations a step": evaluations(2) - evaluations(1), "noise": noisy}
    for shape in SHAPES:
        steps = (300 if shape[0] == 1 else 60) // shorter
        d = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        times, took = ratio(bare(d, evaluations(steps), noisy), make(d, steps), turns)
        row[f"ratio {shape}"], row[f"microseconds {shape}"] = round(times, 2), round(1e6 * took / evaluations(steps), 1)
    return row


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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {options.turns} turns, median ratio to the bare loop per evaluation")
    print(f"{'':24}{'evaluations a step':>20}" + "".join(f"{shape!s:>26}" for shape in SHAPES))
    measured = []
    for name, evaluations, noisy, make in rows():
        row = measure(name, evaluations, noisy, make, options.turns)
        measured.append(row)
        cells = "".join(f"{row[f'ratio {s}']:>15.2f} x {row[f'microseconds {s}']:>6.0f} us" for s in SHAPES)
        print(f"{name:24}{row['evaluations a step']:>20}{cells}" + ("   (bare loop with randn)" if noisy else ""))
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "overhead.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, measured[0])
        writer.writeheader()
        writer.writerows(measured)


if __name__ == "__main__":
    main()
