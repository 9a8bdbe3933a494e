"""The rows of the scorecard of posterior samplers: one table, METHODS. A new row is a line of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import posterior_peers
import torch
from posterior_tasks import Case
from torch import Tensor

from sdekit import sample
from sdekit.posterior import PosteriorSamples, annealed_sample, posterior_sample, posterior_score

Draw = Callable[[Case, int, int], Tensor | PosteriorSamples]

SAMPLERS = (("ancestral", 100), ("sa_solver", 30), ("dpmpp_2m", 20))
SCORES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("MMPS", "mmps", {}),
    ("TMPD", "tmpd", {}),
    ("PiGDM", "pigdm", {"data_std": None}),  # the data's, which a case knows
    ("DPS, true likelihood", "dps", {}),
    ("DPS, gamma 1", "dps", {"gamma": 1.0}),
)
WITH_PARTICLES = ("sa_solver", 40)
PARTICLES = (4, 16)
MANY = 128  # where the network is small enough


@dataclass(frozen=True)
class Method:
    """``draw(case, n, seed)`` gives n draws; what is asked of ``case.score`` is counted.

    ``common``: only where all samples have one y. ``package``: what must be installed.
    """

    name: str
    sampler: str
    draw: Draw
    common: bool = False
    package: str = ""


@dataclass(frozen=True)
class Drawn:
    """Draws, None where the method diverged; evaluations a draw; seconds of this thread; mean effective particles."""

    x: Tensor | None
    evaluations: float
    seconds: float
    ess: float


class Counted:
    """A model that counts the rows that it is asked for."""

    def __init__(self, inside: Any) -> None:
        self.inside, self.rows = inside, 0
        self.predicts, self.sde, self.network_calls = inside.predicts, inside.sde, 1

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        """The score."""
        self.rows += len(x)
        return self.inside(x, t)

    def prepare(self, times: Sequence[float], x: Tensor) -> Sequence[Any]:
        """What it makes of times."""
        return self.inside.prepare(times, x)

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What it says."""
        self.rows += len(x)
        return self.inside.output(x, time, ready)


def approximate(
    method: str, options: dict[str, Any], sampler: str, steps: int, case: Case, n: int, seed: int
) -> Tensor:
    """Draws by a score of p(x_t | y)."""
    told = {key: case.spread if value is None else value for key, value in options.items()}
    reach = 5 * max(1.0, case.spread)  # of the lattice, which is wider than data are to be
    score = posterior_score(case.sde, case.score, case.observation, method, reach=reach, **told)
    return sample(case.sde, score, (n, case.d), sampler, steps=steps, grid="karras", seed=seed, dtype=torch.float64)


def exact(sampler: str, steps: int, case: Case, n: int, seed: int) -> Tensor:
    """Draws by the exact score of p(x_t | y): what the sampler's own steps cost."""
    score = Counted(case.posterior().score(case.sde))
    x = sample(case.sde, score, (n, case.d), sampler, steps=steps, grid="karras", seed=seed, dtype=torch.float64)
    case.score.rows += score.rows
    return x


def particles(sampler: str, steps: int, k: int, case: Case, n: int, seed: int) -> PosteriorSamples:
    """Draws by k particles each."""
    return posterior_sample(
        case.sde, case.score, case.observation, (n, case.d), particles=k, sampler=sampler, steps=steps, seed=seed,
        dtype=torch.float64, reach=5 * max(1.0, case.spread),
    )  # fmt: skip


def annealed(method: str, case: Case, n: int, seed: int) -> Tensor:
    """Draws by split Gibbs or DAPS, a hundred levels of ten steps."""
    return annealed_sample(
        case.sde, case.score, case.observation, (n, case.d), method=method, seed=seed, dtype=torch.float64
    ).x


def without_particles(sampler: str, steps: int) -> list[Method]:
    """The rows of the exact score and of the scores of SCORES, by this sampler."""
    first = Method("exact score", f"{sampler} {steps}", partial(exact, sampler, steps), common=True)
    return [first, *(
        Method(name, f"{sampler} {steps}", partial(approximate, method, options, sampler, steps))
        for name, method, options in SCORES
    )]  # fmt: skip


def with_particles(k: int) -> Method:
    """The row of posterior_sample with so many."""
    sampler, steps = WITH_PARTICLES
    return Method(f"posterior_sample, {k} particles", f"{sampler} {steps}", partial(particles, sampler, steps, k))


METHODS: tuple[Method, ...] = (
    *(method for row in SAMPLERS for method in without_particles(*row)),
    *map(with_particles, PARTICLES),
    Method("split Gibbs (PnP-DM)", "dpmpp_2m_sde 10", partial(annealed, "split_gibbs")),
    Method("DAPS", "unipc_2 10", partial(annealed, "daps")),
    *(
        Method(f"azula {name}", "DDPM 100", partial(posterior_peers.draw, name, 100), common=True, package="azula")
        for name in posterior_peers.MAKE
    ),
)


def draw(method: Method, case: Case, n: int, seed: int) -> Drawn:
    """n draws of p(x_0 | y), counted and timed; None for draws that are not finite or beyond ten times the data."""
    score, ess = Counted(case.score), np.nan
    start = time.thread_time()
    try:
        found = method.draw(replace(case, score=score), n, seed)
    except FloatingPointError:
        found = None
    seconds = time.thread_time() - start
    if isinstance(found, PosteriorSamples):
        found, ess = found.x, float(found.ess.mean())
    if found is not None and not bool((found.abs() < 100 * case.spread).all()):
        found = None
    return Drawn(found, score.rows / n, seconds, ess)
