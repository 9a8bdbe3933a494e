"""How much an error of the model moves a sampler's result, from the sampler's own numbers."""

from typing import NamedTuple

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.models.network import as_score
from sdekit.processes.law import require_centred
from sdekit.processes.sde import SDE
from sdekit.sampling.calibration import Calibration
from sdekit.sampling.fixed import sample
from sdekit.sampling.grids import Grid
from sdekit.sampling.samplers import Sampler, as_sampler
from sdekit.solvers.steppers import StepRule


class Sensitivity(NamedTuple):
    """Derivatives to what the model says at each of K evaluations, float64."""

    result: Tensor  # (K,): of x_0, which the sampler returns
    states: Tensor  # (steps, K): of x after each step, in units of its size there, sqrt(alpha^2 + sigma^2)

    @property
    def worst(self) -> float:
        """The most that an error of one in a single evaluation moves a state, in units of it, or the result."""
        return float(torch.cat([self.states, self.result[None]]).abs().max())


def sensitivity(
    sde: SDE,
    sampler: str | Sampler | StepRule | Calibration = "unipc_2",
    *,
    nfe: int,
    predicts: str = "eps",
    grid: Grid | None = None,
) -> Sensitivity:
    """What an error of one in each evaluation of a model that ``predicts`` this does to x, and to the result.

    A deterministic sampler's x is a sum, with numbers of its grid alone, of x_T and what the model said before, each in
    every coordinate by itself. So one run with x_T = 0 and the k-th unit vector for the k-th thing said has them all.
    (What a model says of an x that was moved is left out: that is the model's.) A network errs by a few hundredths;
    where a state is moved by many times that, what follows is evaluated far from where the network was trained.

    Arguments as of :func:`sample`. Raises ValueError for a sampler that draws noise, whose x is no such sum.
    """
    if as_sampler(sampler).stochastic:
        raise ValueError(f"sampler must draw no noise, for its x to be a sum of what the model says; got {sampler!r}")
    require_centred(sde, "sensitivity")
    nfe = _checks.count(nfe, "nfe")
    units, states = iter(torch.eye(nfe, dtype=torch.float64)), []

    def keep(step: int, t: float, x: Tensor) -> None:
        time = torch.tensor(t, dtype=torch.float64)
        states.append(x[0] / torch.hypot(sde.alpha(time), sde.sigma(time)))

    score = as_score(lambda x, t: next(units).expand_as(x), sde, predicts)
    x_T = torch.zeros(1, nfe, dtype=torch.float64)
    result = sample(sde, score, x_T.shape, sampler, nfe=nfe, grid=grid, x_T=x_T, callback=keep)[0]
    evaluations = nfe - len(list(units))  # some budgets are not a whole number of steps
    return Sensitivity(result[:evaluations], torch.stack(states)[:, :evaluations])
