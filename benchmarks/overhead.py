"""What does an evaluation of a sampler cost beside its network?

    python benchmarks/overhead.py            # a table of ratios; a minute or two on one thread

Protocol: the network is free (it returns a tensor it was given), one thread, float32. The bare loop is  y = a y + b d
once for every evaluation that the sampler makes, and  y + c randn  as often as the sampler draws noise, so that the
ratio is the cost of an evaluation whatever the rule. Each runs 512 and 128 steps (128 and 32 of the large shape): the
difference is the cost of the steps, and what the shorter run has over its share of it is the set-up of a call (tables
of coefficients, checks), in evaluations of the bare loop. Bare loop and sampler take turns, a turn's ratio is that of
its two neighbours, and medians over turns are printed, since absolute times depend on the machine and its other guests.
Memory once had is kept by the process (mallopt, where there is one): whether an allocation faults depends on all that
ran before, and in some runs cost more than the sums.
A rule with a history has more to add up than the bare loop. What these sums alone come to, in a plain loop that does
nothing else, is in brackets for the deterministic exponential rules: the part that is arithmetic.
peers.py prints this table with other libraries' loops.
"""

import argparse
import csv
import ctypes
import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sdekit import SAMPLERS, VPSDE, Noise, solve
from sdekit.sampling.grids import make_grid
from sdekit.solvers.steppers import RULES
from sdekit.solvers.steppers.multistep import State

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


class Sum(NamedTuple):
    """What one evaluation adds up."""

    stored: bool  # the prediction is put in a new tensor
    over: bool  # the new x is made over the oldest prediction
    scaled: bool  # which, or else x, has a factor
    added: int  # so many tensors are added to it


def plan(name: str, steps: int) -> list[Sum]:
    """The sums, by the rule's own table. Empty for a rule that has none, or draws noise."""
    sde, row, d = VPSDE(), SAMPLERS[name], torch.zeros(1, 1)
    if row.stochastic:
        return []
    if row.rule is RULES["ddim"]:
        return [Sum(False, False, True, 1)] * steps
    state = row.rule.begin(sde.reverse(lambda x, t: d), make_grid(sde, "uniform", steps).tolist(), d)
    if isinstance(state, State):
        return [Sum(True, s.spent, s.factor is not None, len(s.added)) for s in islice(state.rows, steps)]
    return [Sum(s.kept or s.reach is not None, False, True, len(s.weights)) for stages in state or () for s in stages]


def sums(d: Tensor, evaluations: list[Sum]) -> Callable[[], object]:
    """The loop over a plan: the finite check's sum, the prediction, what is added up."""
    scale, total = torch.tensor(0.9), torch.zeros(())
    longest = max(e.added - e.over for e in evaluations)

    def loop() -> Tensor:
        x, past = d.clone(), deque(torch.zeros_like(d) for _ in range(longest))
        for stored, over, scaled, added in evaluations:
            torch.sum(d, None, out=total)
            if stored and not over:
                past.pop()
            if stored:
                past.appendleft(torch.add(x, d, alpha=1e-3) if scaled else d * scale)
            x_s = past.pop() if over else x * scale
            if over and scaled:
                x_s.mul_(scale)
            for p in islice((x, *past) if over else past, added):
                x_s.add_(p, alpha=1e-3)
            x = x_s
        return x

    return loop


class Loop(NamedTuple):
    """A row of the table: ``counts(steps)`` are its evaluations and draws, ``make(d, steps)`` the loop itself,
    ``plan(steps)`` what it adds up, where that is known.
    """

    name: str
    counts: Callable[[int], tuple[int, int]]
    make: Callable[[Tensor, int], Callable[[], object]]
    plan: Callable[[int], list[Sum]] = lambda steps: []


def rows() -> list[Loop]:
    return [Loop(name, partial(counts, name), partial(ours, name), partial(plan, name)) for name in SAMPLERS]


def measure(row: Loop, turns: int, shorter: int = 1) -> dict[str, object]:
    """Of one row, at each shape: the ratio per evaluation, set-up, microseconds, and the ratio of its sums alone."""
    keep_memory()
    (one, _), (two, _) = row.counts(20), row.counts(21)
    found: dict[str, object] = {"sampler": row.name, "evaluations a step": two - one}
    for shape in SHAPES:
        long = (512 if shape[0] == 1 else 128) // shorter
        lengths = [(steps, *row.counts(steps)) for steps in (long // 4, long)]
        evaluations = [n for _, n, _ in lengths]
        found.setdefault("draws an evaluation", round(lengths[1][2] / evaluations[1], 2))
        d = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        base = [bare(d, n, draws) for _, n, draws in lengths]
        cost = compare(base, [row.make(d, steps) for steps, *_ in lengths], evaluations, turns)
        found[f"ratio {shape}"], found[f"set-up {shape}"] = round(cost.ratio, 2), round(cost.set_up)
        found[f"microseconds {shape}"] = round(1e6 * cost.seconds, 1)
        plans = [row.plan(steps) for steps, *_ in lengths]
        alone = compare(base, [sums(d, p) for p in plans], evaluations, turns).ratio if plans[0] else None
        found[f"sums alone {shape}"] = "" if alone is None else round(alone, 2)
    return found


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def keep_memory() -> None:
    """glibc: give nothing back to the kernel, and take no tensor from it directly."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another allocator
        return
    for option, value in ((-1, 2**30), (-3, 2**30)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(option, value)


class Cost(NamedTuple):
    """Of an evaluation the ratio to the bare one, and seconds; of a call ``set_up``, in bare evaluations."""

    ratio: float
    set_up: float
    seconds: float


def compare(
    base: list[Callable[[], object]], runs: list[Callable[[], object]], evaluations: list[int], turns: int
) -> Cost:
    """Medians over turns of a short and a long run of each, after one of each unmeasured."""
    pairs = list(zip(base, runs, strict=True))
    found = []
    for turn in range(turns + 1):
        (a_short, b_short), (a_long, b_long) = ((seconds(a), seconds(b)) for a, b in pairs)
        more = evaluations[1] - evaluations[0]
        bare_one, one = (a_long - a_short) / more, (b_long - b_short) / more
        if turn:
            found.append(Cost(one / bare_one, (b_short - evaluations[0] * one) / bare_one, one))
    return Cost(*map(statistics.median, zip(*found, strict=True)))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {options.turns} turns, median ratio to the bare loop per evaluation")
    print(
        f"{'':24}{'evaluations a step':>20}{'draws each':>12}"
        + "".join(f"{shape!s:>21}{'set-up':>9}{'':9}" for shape in SHAPES)
    )
    measured = []
    for row in rows():
        found = measure(row, options.turns)
        measured.append(found)
        cells = "".join(
            f"{found[f'ratio {s}']:>10.2f} x {found[f'microseconds {s}']:>6.0f} us{found[f'set-up {s}']:>9}"
            + (f" ({found[f'sums alone {s}']:.2f} x)" if found[f"sums alone {s}"] else " " * 9)
            for s in SHAPES
        )
        print(f"{row.name:24}{found['evaluations a step']:>20}{found['draws an evaluation']:>12}{cells}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "overhead.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, measured[0])
        writer.writeheader()
        writer.writerows(measured)


if __name__ == "__main__":
    main()
