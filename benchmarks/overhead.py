"""What does a sampler's step cost beside its network?

    python benchmarks/overhead.py            # a table of ratios; about a minute on one thread

Protocol: the network is free (it returns a tensor it was given), one thread, float32, 300 steps (60 of the large
shape), the whole call counted (tables of coefficients, checks). Deterministic samplers are compared with the bare loop
y = a y + b d,  stochastic ones with the bare loop plus  c randn.  Bare loop and sampler take turns; the ratio of a turn
is that of its two neighbours, and the median over turns is printed, since absolute times depend on the machine and its
other guests. A rule of several evaluations a step does several steps' work in one, so compare those of one evaluation;
restart also goes back once a run, 12 evaluations more (a tenth of the work at the large shape), and draws noise only
then, which a loop that draws at every step flatters.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sdekit import SAMPLERS, VPSDE, Noise, solve
from sdekit.grids import make_grid

SHAPES = ((1, 64), (64, 3, 32, 32))


def bare(d: Tensor, steps: int, noisy: bool) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)

    def loop() -> Tensor:
        y = d
        for k in range(steps):
            y = 0.9 * y + (0.1 + k / steps) * d
            if noisy:
                y = y + 0.1 * torch.randn(d.shape, generator=generator)
        return y

    return loop


def ours(name: str, d: Tensor, steps: int) -> Callable[[], object]:
    sde, row = VPSDE(), SAMPLERS[name]
    grid = make_grid(sde, "uniform", steps)

    def loop() -> object:
        return solve(sde.reverse(lambda x, t: d, row.churn), d, grid, row.rule, noise=Noise(d, 0))

    return loop


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
    rows = []
    print(f"torch {torch.__version__}, one thread, {options.turns} turns, median ratio to the bare loop per step")
    print(f"{'':20}{'evaluations':>12}" + "".join(f"{shape!s:>26}" for shape in SHAPES))
    for name, sampler in SAMPLERS.items():
        noise = sampler.stochastic
        row: dict[str, object] = {"sampler": name, "evaluations": sampler.rule.evaluations, "noise": noise}
        cells = ""
        for shape in SHAPES:
            steps = 300 if shape[0] == 1 else 60
            d = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            times, took = ratio(bare(d, steps, noise), ours(name, d, steps), options.turns)
            each = 1e6 * took / steps
            row[f"ratio {shape}"], row[f"microseconds {shape}"] = round(times, 2), round(each, 1)
            cells += f"{times:>15.2f} x {each:>6.0f} us"
        rows.append(row)
        print(f"{name:20}{row['evaluations']:>12}{cells}" + ("   (bare loop with randn)" if noise else ""))
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "overhead.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
