"""What does a sampler cost beside its network?

    python benchmarks/overhead.py            # two tables; about ten minutes on one thread
    python benchmarks/overhead.py --quick    # does it run? under a minute; its numbers say little

Protocol: where users pay, through ``as_score``, float32, one thread, seed 0. The network is free: it returns a tensor
that it was given. Times are the thread's own CPU time, so that the machine's other guests cost no more than their share
of its caches. Memory once had is kept by the process (mallopt, where there is one): whether an allocation faults
depends on all that ran before, and in some runs cost more than the sums.

An evaluation (VPSDE, a uniform grid): the ratio to a bare loop that does  y = a y + b d  once for every evaluation that
the sampler makes, and  y + c randn  as often as the sampler draws noise. Each runs 512 and 128 steps (128 and 32 of the
large shape), and the difference is the cost of the steps. In a turn the bare loop and the loops of all predictions that
a network may make follow one another, each time from another on; medians over turns of the ratios are shown, and the
worst of the five. A rule with a history has more to add up than the bare loop: "sums alone" is what the sums of the
deterministic exponential rules come to for a network of eps, in a plain loop that does nothing else.

A call: milliseconds of ``sample(sde, score, (1, 64), sampler, nfe=10, seed=0)`` from the call to the result, the median
of first calls, each with a process of its own, and of later ones with the same process (eps).
peers.py has the first table with other libraries' loops, network_overhead.py a network that is not free.
"""

import argparse
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from overhead_calls import PROCESSES, called, calls, calls_table, loaded
from overhead_measure import Row, Run, bare, compare, keep_memory, write
from tables import markdown
from torch import Tensor

from sdekit import SAMPLERS, VPSDE, Noise, as_score, solve
from sdekit.processes.kinds import KINDS
from sdekit.sampling.grids import make_grid
from sdekit.solvers.steppers import RULES
from sdekit.solvers.steppers.table import State

SHAPES = ((1, 64), (64, 3, 32, 32))
WORST, SUMS = "worst", "sums alone"
COLUMNS = (*KINDS, WORST, SUMS)


def ours(name: str, d: Tensor, steps: int) -> dict[str, Run]:
    """A sampler's loops, for networks of every prediction; and its sums alone."""
    sde, row = VPSDE(), SAMPLERS[name]
    grid = make_grid(sde, "uniform", steps)

    def loop(predicts: str) -> Run:
        score = as_score(lambda x, t: d, sde, predicts)
        return lambda: solve(sde.reverse(score, row.churn), d, grid, row.rule, noise=Noise(d, 0))

    loops = {predicts: loop(predicts) for predicts in KINDS}
    planned = plan(name, steps)
    return {**loops, SUMS: sums(d, planned)} if planned else loops


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
    with_x: bool  # with x added to it
    over: bool  # the new x is made over the oldest prediction
    scaled: bool  # which, or else x, has a factor
    added: int  # so many tensors are added to it


def plan(name: str, steps: int) -> list[Sum]:
    """The sums, by the rule's own table. Empty for a rule that has none, or draws noise."""
    sde, row, d = VPSDE(), SAMPLERS[name], torch.zeros(1, 1)
    if row.stochastic:
        return []
    if row.rule is RULES["ddim"]:
        return [Sum(False, False, False, True, 1)] * steps
    system = sde.reverse(as_score(lambda x, t: d, sde, "eps"), 0.0)
    state = row.rule.begin(system, make_grid(sde, "uniform", steps).tolist(), d)
    if isinstance(state, State):
        return [
            Sum(True, not isinstance(r.reach, Tensor), r.spent, r.factor is not None, len(r.added))
            for r, _ in islice(state.rows, steps)
        ]
    stages = (stage for stages, _ in (state[0] if state else ()) for stage in stages)
    return [Sum(s.reach is not None or s.kept, s.reach is not None, False, True, len(s.weights)) for s in stages]


def sums(d: Tensor, evaluations: list[Sum]) -> Run:
    """The loop over a plan: the finite check's sum, the prediction, what is added up."""
    scale, total = torch.tensor(0.9), torch.zeros(())
    longest = max(e.added - e.over for e in evaluations)

    def loop() -> Tensor:
        x, past = d.clone(), deque(torch.zeros_like(d) for _ in range(longest))
        for stored, with_x, over, scaled, added in evaluations:
            torch.sum(d, None, out=total)
            if stored and not over:
                past.pop()
            if stored:
                past.appendleft(torch.add(x, d, alpha=1e-3) if with_x else d * scale)
            x_s = past.pop() if over else x * scale
            if over and scaled:
                x_s.mul_(scale)
            for p in islice((x, *past) if over else past, added):
                x_s.add_(p, alpha=1e-3)
            x = x_s
        return x

    return loop


class Loop(NamedTuple):
    """A row of the first table: ``counts(steps)`` are its evaluations and draws, ``runs(d, steps)`` its loops."""

    name: str
    counts: Callable[[int], tuple[int, int]]
    runs: Callable[[Tensor, int], dict[str, Run]]  # by column


def rows() -> list[Loop]:
    return [Loop(name, partial(counts, name), partial(ours, name)) for name in SAMPLERS]


@torch.no_grad()
def measure(row: Loop, turns: int, shorter: int = 1) -> Row:
    """Of one row, at each shape: its columns' ratios per evaluation, and microseconds of the worst."""
    keep_memory()
    (one, _), (two, _) = row.counts(20), row.counts(21)
    found: Row = {"sampler": row.name, "evaluations a step": two - one}
    for shape in SHAPES:
        long = (512 if shape[0] == 1 else 128) // shorter
        lengths = [(steps, *row.counts(steps)) for steps in (long // 4, long)]
        evaluations = [n for _, n, _ in lengths]
        found.setdefault("draws an evaluation", round(lengths[1][2] / evaluations[1], 2))
        d = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        base = [bare(d, n, draws) for _, n, draws in lengths]
        short, long = (row.runs(d, steps) for steps, *_ in lengths)
        pairs = [(short[name], long[name]) for name in short]
        costs = dict(zip(short, compare(base, pairs, evaluations, turns), strict=True))
        costs[WORST] = max((cost for name, cost in costs.items() if name != SUMS), key=lambda cost: cost.ratio)
        found |= {f"{name} {shape}": round(costs[name].ratio, 2) if name in costs else "" for name in COLUMNS}
        found[f"microseconds {shape}"] = round(1e6 * costs[WORST].seconds, 1)
    return found


def table(rows: list[Row], columns: Iterable[str] = COLUMNS) -> str:
    """Markdown of the first table, with those columns; also of the CSV's rows."""
    wanted = tuple(columns)
    shown = [key for key in rows[0] if key.partition(" (")[0] in wanted]
    lines = []
    for row in rows:
        ratios = ["" if row[key] == "" else f"{float(row[key]):.2f}" for key in shown]
        lines.append([row["sampler"], row["evaluations a step"], row["draws an evaluation"], *ratios])
    return markdown(["sampler", "evaluations a step", "draws an evaluation", *shown], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, two turns")
    parser.add_argument("--only", choices=("evaluations", "calls"), help="one table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, one thread\n")
    if options.only != "calls":
        found: list[Row] = []
        for row in rows():
            found.append(measure(row, 2 if options.quick else 7, shorter=10 if options.quick else 1))
            print(table(found).rpartition("\n")[2] if len(found) > 1 else table(found), flush=True)
        write(options.out / "overhead.csv", found)
    if options.only != "evaluations":
        fitted = {process: loaded(process) for process in PROCESSES}
        found = []
        for process, calibration in fitted.items():
            samplers = {name: name for name in called()} | {"a calibration": calibration}
            often = (1, 5) if options.quick else (7, 40)
            found += [calls(process, name, sampler, *often) for name, sampler in samplers.items()]
        print(f"\n{calls_table(found)}")
        write(options.out / "overhead_calls.csv", found)


if __name__ == "__main__":
    main()
