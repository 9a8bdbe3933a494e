"""Error after N network evaluations, and the overhead of a step: these samplers and other libraries', side by side.

    pip install -e ".[peers]"
    python benchmarks/peers.py            # both problems and the overhead: half an hour on one thread
    python benchmarks/peers.py --quick    # 64 samples, three columns: under a minute

Protocol: the process is  x = x0 + sigma eps  and the data a Gaussian mixture whose denoiser is a closed form, so that
every difference is the sampler's. All start from one  x_T = 80 randn  in float64 and run to t = 0; the final denoising
counts. The error is that against the exact flow from x_T (root mean square over dimensions, mean over samples).
Evaluations are counted at the network; an entry that took fewer than its column says how many, in brackets. Fixed
grids run from sigma 80 to 0.002, one row per sampler on its best grid (least mean logarithm of the error over columns);
the rows of the best take every column's best. Peers run on the two grids in common use, ours also on the two of DDIM's
kind; one more row says what the peers come to on these too. The second table is of samplers of one name on one grid.
A peer's settings are in peer_samplers.py. All peers see the same closed form as ours.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import overhead
import peer_loops
import peer_samplers
from overhead_measure import write
from peers_figure import Entry, draw, same_name_table, table

from sdekit import SAMPLERS, GaussianMixture, HeatODE, SolverError, calibrate, ode_sample, sample
from sdekit.sampling.grids import make_grid
from tests import oracle

SIZES = {"digits64": 512, "grid2": 1024}
COLUMNS = (5, 6, 8, 10, 12, 15, 20, 30, 50)
GRIDS = ("karras", "log_snr", "vp_quadratic", "vp_cubic")
OUR_GRIDS = (*GRIDS, "inner_quadratic", "inner_cubic")  # these begin with a step that is ours
PEER_GRIDS = GRIDS[:2]
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)  # of adaptive methods, which choose their evaluations themselves
CALIBRATED_UP_TO = 20  # a grid is worth calibrating where evaluations are few
SAME_NAME = {
    "ddim": "diffusers DDIM",
    "heun": "diffusers Heun",
    "dpmpp_2m": "diffusers DPM++ 2M",
    "dpmpp_3m": "diffusers DPM++ 3M",
    "unipc_2": "diffusers UniPC bh2 2",
    "unipc_3": "diffusers UniPC bh2 3",
    "deis": "diffusers DEIS 3",
    "ipndm": "diffusers IPNDM",  # ours is of order 3, theirs of order 4
}


class Counted:
    """A score that counts its calls, and over how many samples they were."""

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.score, self.calls, self.rows = score, 0, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score, like x."""
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.score(x, t)


@dataclass(frozen=True)
class Problem:
    """A mixture, the noises to start from, and where the exact flow takes them."""

    name: str
    sde: HeatODE
    score: Callable[[Tensor, Tensor], Tensor]
    start: Tensor
    reference: np.ndarray


def make_problem(name: str, n: int) -> Problem:
    mixture = {"digits64": oracle.digits64, "grid2": oracle.grid25}[name]()
    sde = HeatODE()
    x_T = 80 * torch.randn(n, mixture.d, dtype=torch.float64, generator=torch.Generator().manual_seed(1234))
    reference = mixture.flow(x_T.numpy(), 80.0, 0.0, rtol=1e-10, atol=1e-11)
    return Problem(name, sde, GaussianMixture(mixture.m, mixture.covs, mixture.w).score(sde), x_T, reference)


def deterministic() -> list[str]:
    return [name for name, row in SAMPLERS.items() if not row.stochastic]


def counted_run(problem: Problem, side: str, sampler: str, grid: str, budget: int, draw: Callable) -> Entry:
    """The entry of ``draw(score)``: NaN where the sampler breaks down; beyond its budget the run stops."""
    score = Counted(problem.score)
    try:
        error = oracle.error(draw(score), problem.reference)
    except (FloatingPointError, SolverError):
        error = math.nan
    if budget and score.calls > budget:
        raise RuntimeError(f"{sampler} took {score.calls} evaluations in the column of {budget}")
    return Entry(problem.name, side, sampler, grid, budget, score.calls, score.rows / len(problem.start), error)


def ours(problem: Problem, name: str, grid: str, nfe: int) -> Entry | None:
    """One of our samplers; None where the budget is too small for a step of it."""

    def draw(score: Counted) -> Tensor:
        return sample(problem.sde, score, problem.start.shape, name, nfe=nfe, x_T=problem.start, grid=grid)

    try:
        return counted_run(problem, "ours", name, grid, nfe, draw)
    except ValueError as error:
        if "nfe" not in str(error):
            raise
        return None


def calibrated(problem: Problem, nfe: int) -> Entry | None:
    """Sampling by a calibration for this budget, which saw other noises (seed 0); None where evaluations are many."""
    if nfe > CALIBRATED_UP_TO:
        return None
    shape = problem.start.shape
    calibration = calibrate(problem.sde, problem.score, shape, nfe=nfe, seed=0)

    def draw(score: Counted) -> Tensor:
        return sample(problem.sde, score, shape, calibration, x_T=problem.start)

    return counted_run(problem, "calibrated", "calibrated", "calibrated", nfe, draw)


def denoiser(score: Counted) -> peer_samplers.Denoiser:
    """E[x0|y] at level s, of all samples or of each, for a peer; one evaluation of the score."""

    def denoise(y: Tensor, s: Tensor) -> Tensor:
        square = s.square() if s.ndim == 0 else s.square()[:, None]
        return y + square * score(y, s)

    return denoise


def driven(problem: Problem, run: Callable, levels: Tensor) -> Callable[[Counted], Tensor]:
    """A peer's run over the levels, as a function of the score that is counted."""
    return lambda score: run(denoiser(score), problem.start, levels)


@torch.no_grad()
def peer(problem: Problem, name: str, grid: str, nfe: int) -> Entry | None:
    """A peer's sampler on our grid's levels and then 0; None where the budget is too small for a step of it."""
    chosen = peer_samplers.FIXED[name]
    steps = (nfe - 1) // chosen.evaluations
    if steps < 1:
        return None
    levels = torch.cat([problem.sde.sigma(make_grid(problem.sde, grid, steps)), torch.zeros(1, dtype=torch.float64)])
    side = "peers" if grid in PEER_GRIDS else "peers on our grids"
    return counted_run(problem, side, name, grid, nfe, driven(problem, chosen.run, levels))


@torch.no_grad()
def adaptive(
    problem: Problem, methods: Iterable[str] = ("adams", "rk45"), tolerances: Iterable[float] = TOLERANCES
) -> list[Entry]:
    """Adaptive methods at several tolerances. Calls are counted: as many as the slowest sample needed."""
    levels = torch.tensor([80.0, problem.sde.t_min, 0.0], dtype=torch.float64)
    entries = []
    for tolerance in tolerances:
        at = f"tolerance {tolerance:g}"

        def draw(score: Counted, method: str, tolerance: float = tolerance) -> Tensor:
            settings = {"x_T": problem.start, "rtol": tolerance, "atol": tolerance}
            return ode_sample(problem.sde, score, problem.start.shape, method=method, **settings)

        for method in methods:
            side = "peers" if ":" in method else "ours"
            entries.append(counted_run(problem, side, method, at, 0, partial(draw, method=method)))
        for name, (package, make) in peer_samplers.ADAPTIVE.items():
            if peer_samplers.available(package):
                draw_peer = driven(problem, make(tolerance), levels)
                entries.append(counted_run(problem, "peers", name, at, 0, draw_peer))
    return entries


def measure(problem: Problem, columns: Iterable[int]) -> list[Entry]:
    """All entries of a problem."""
    names = [name for name, p in peer_samplers.FIXED.items() if peer_samplers.available(p.package)]
    entries: list[Entry | None] = []
    for nfe in columns:  # a peer that is not installed has its line in the output instead
        entries += [ours(problem, name, grid, nfe) for name in deterministic() for grid in OUR_GRIDS]
        entries += [peer(problem, name, grid, nfe) for name in names for grid in GRIDS]
        entries.append(calibrated(problem, nfe))
    return [entry for entry in entries if entry is not None] + adaptive(problem)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=(*SIZES, "both"), default="both")
    parser.add_argument("--nfe", type=int, nargs="+", help=f"columns (default {' '.join(map(str, COLUMNS))})")
    parser.add_argument("--quick", action="store_true", help="64 samples, columns 5 10 20, few turns of the overhead")
    overheads = parser.add_mutually_exclusive_group()
    overheads.add_argument("--no-overhead", action="store_true")
    overheads.add_argument("--only-overhead", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    options.nfe = sorted(set(options.nfe or ((5, 10, 20) if options.quick else COLUMNS)))
    if options.nfe[0] < 2:
        parser.error("--nfe must be at least 2, a step and the final denoising")
    return options


def errors(options: argparse.Namespace) -> None:
    written: list[Entry] = []
    for name in SIZES if options.problem == "both" else (options.problem,):
        problem = make_problem(name, 64 if options.quick else SIZES[name])
        entries = measure(problem, options.nfe)
        print(
            f"{name}, {len(problem.start)} samples, torch {torch.__version__}\n\n{table(entries, options.nfe)}\n",
            flush=True,
        )
        if names := [pair for pair in SAME_NAME.items() if peer_samplers.available(pair[1].split()[0])]:
            print(f"{same_name_table(entries, options.nfe, names, PEER_GRIDS)}\n", flush=True)
        draw(options.out / f"peers_{name}.png", name, len(problem.start), entries)
        written += entries
    write(options.out / "peers.csv", [asdict(entry) for entry in written])


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    print("\n".join([*peer_samplers.missing(), peer_samplers.EXCLUDED, ""]))
    if not options.only_overhead:
        errors(options)
    if not options.no_overhead:
        rows = peer_loops.overhead_rows(turns=2 if options.quick else 7, quick=options.quick)
        print(overhead.table(rows, peer_loops.COLUMNS))
        write(options.out / "peers_overhead.csv", rows)


if __name__ == "__main__":
    main()
