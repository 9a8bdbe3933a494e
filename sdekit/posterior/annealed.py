"""Samples of p(x_0 | y) for any A, linear or not: a step of the likelihood and one of the prior in turn, at ever lower
noise. The model is asked for samples alone, never for a gradient, and A never meets it.
"""

import numbers
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.models.guided import each
from sdekit.noise.keyed import Noise
from sdekit.posterior.local import conjugate_gradients
from sdekit.posterior.observation import Observation
from sdekit.processes.law import require_white
from sdekit.processes.sde import SDE
from sdekit.sampling.grids import INNER, make_grid
from sdekit.sampling.samplers import Sampler, as_sampler
from sdekit.sampling.starts import state
from sdekit.solvers.solution import bar
from sdekit.solvers.solve import solve
from sdekit.solvers.steppers import StepRule
from sdekit.system import Score

_SAMPLERS = {"split_gibbs": "dpmpp_2m_sde", "daps": "unipc_2"}  # of each method's prior step
_HIGHEST, _LOWEST = 10.0, 0.02  # levels: far above data of unit size, and too low to be seen in them
_EXACT = 1e-3  # a residual of J v, in units of the observation's noise, is as good as none
_SHARES = (1.0, 0.25, 0.0, 1 / 16, 1 / 64, 1 / 256)  # of a Gauss-Newton step, in turn: one fits, however A bends

Map = Callable[[Tensor], Tensor]
Solver = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AnnealedSamples:
    """Draws, one for each requested sample.

    ``x`` (B, *event). ``acceptance`` (B,): the share of a sample's proposals that it took; 1 for a linear A, whose
    draws are exact. ``nfe``: network calls, each of all samples.
    """

    x: Tensor
    acceptance: Tensor
    nfe: int


def annealed_sample(
    sde: SDE,
    score: Score,
    observation: Observation,
    shape: Sequence[int],
    *,
    method: str = "split_gibbs",
    levels: int | Sequence[float] = 100,
    sampler: str | Sampler | StepRule | None = None,
    steps: int = 10,
    grid: str | Callable[[SDE, int], Tensor] = "karras",
    proposals: int = 24,
    seed: int | None = None,
    ids: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> AnnealedSamples:
    """Draws of p(x_0 | y) for y = A x_0 + std eps, A linear or not, by one of two methods, at each level r in turn:

    "split_gibbs"  z ~ N(y; A z, std^2) N(z; x, r^2),  x ~ p(x) N(z; x, r^2)   (PnP-DM: Wu et al. 2024, algorithm 1)
    "daps"         x = x_0 of the flow from z,  z ~ N(y; A z, std^2) N(z; x, r^2),  z += next r eps
                   (Zhang et al. 2024, algorithm 1, with r_t = sigma_t)

    The prior's step is the ``sampler``'s, ``steps`` of its ``grid`` from where sigma/alpha = r. x ~ p(x) N(z; x, r^2)
    is the reverse SDE from x_t = alpha z, so the first method needs one with noise ("dpmpp_2m_sde" unless given;
    "unipc_2" of the second). The likelihood's step is exact for a linear A. Else A must be differentiable, and it is
    ``proposals`` Metropolis steps: Langevin preconditioned by A's derivative at x, by Crank and Nicolson's rule (Cotter
    et al. 2013), which no std makes diverge, of 1 ... 1/256 of a Gauss-Newton step in turn, and draws of N(x, r^2).

    What law: while a level stays, the first method's draws tend to p(x) int N(y; A z, std^2) N(z; x, r^2) dz, exactly
    but for the sampler's steps; for a linear A that is the posterior with std^2 + r^2 A A' for std^2. So it is right
    with ever more levels down to 0; with few, draws stay in those modes of p(x) where a high level left them. The
    second approximates, however many levels: it takes p(x_0|x_t) for N(x, r^2), which is right for no data.
    A linear A and a model with a gradient are :func:`posterior_sample`'s, which gets modes right in fewer evaluations.

    ``levels``: sigma/alpha, none above the one before it; equal ones are sweeps at that level. Or how many, from 10 to
    .02 as Karras et al. 2022 space them (or from and to the process's own), in units of its ``unit_level``.
    ``seed``, ``ids``: sample i is keyed by ids[i] (default i), whatever the batch; y, std and conditions of a sample's
    own follow it. A level costs ``steps`` + 1 evaluations of a rule of one, and every proposal two solves by conjugate
    gradients of products with A's derivative, which are most of it where y has many entries and std is small.
    Raises ValueError or TypeError that names the argument, FloatingPointError for a score or an A that is not finite.
    """
    _checks.instance(sde)
    require_white(sde, "annealed_sample")
    if not isinstance(observation, Observation):
        raise TypeError(f"observation must be an Observation(y, A, std), got {type(observation).__name__}")
    usual, gibbs = _checks.lookup(_SAMPLERS, method, "method"), method == "split_gibbs"
    row = as_sampler(usual if sampler is None else sampler)
    if grid in INNER:
        raise ValueError(f"grid must go on from each level, and {grid!r} begins below it: take {grid[6:]!r}")
    if gibbs and not row.stochastic:
        raise ValueError(
            f"sampler must be one with noise for split_gibbs, such as sa_solver or ancestral: {sampler!r} draws none"
        )
    size, seed = _checks.event_shape(shape), secrets.randbits(63) if seed is None else seed
    steps, proposals = _checks.count(steps, "steps"), _checks.count(proposals, "proposals")
    times, rs = _levels(sde, levels)
    with torch.inference_mode(False), torch.no_grad():
        z = state(sde, score, size, times[0], seed, None, device, dtype, ids) / float(sde.alpha(times[0]))
        likelihood = _Likelihood(observation, z, proposals, seed, ids)
        x, nfe, noise = torch.zeros_like(z), 0, Noise(z, seed, ids, purpose="renoise")
        sweeps = list(zip(times, rs, strict=True))
        for k, (t, r) in enumerate(bar(sweeps, progress, len(sweeps)) if progress else sweeps):
            if gibbs:
                # Where the level stays, to go on from z keeps the law. At a new one x has seen more modes than z has.
                stays = k == 0 or r == rs[k - 1]
                z = likelihood.draw(k, x, z if stays else x, r)
            elif k:
                noise.enter(k, k)
                z = z + r * noise.normal()
            # equal levels have equal times, so each sweep's noise needs a name of its own
            solution = solve(
                sde.reverse(score, row.churn), float(sde.alpha(t)) * z, make_grid(sde, grid, steps, t), row.rule,
                noise=Noise(z, seed, ids, purpose=f"path {k}"), denoise=True,
            )  # fmt: skip
            x, nfe = solution.x, nfe + solution.nfe
            if not gibbs:
                z = likelihood.draw(k, x, x, r)
    return AnnealedSamples(x if gibbs else z, likelihood.acceptance(), nfe)


def _levels(sde: SDE, levels: Any) -> tuple[list[float], list[float]]:
    """The times and the levels."""
    low, high = (float(sde.sigma(t) / sde.alpha(t)) for t in (sde.t_min, sde.T))
    if isinstance(levels, numbers.Integral):
        ends = min(_HIGHEST * sde.unit_level, high), max(_LOWEST * sde.unit_level, 1.5 * low)
        first, last = torch.tensor(ends, dtype=torch.float64) ** (1 / 7)
        rs = (
            torch.lerp(
                first, last, torch.linspace(0, 1, _checks.count(levels, "levels", minimum=2), dtype=torch.float64)
            )
            ** 7
        )
        rs[0] = ends[0]  # exactly: it may be the process's highest
    else:
        try:
            rs = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"levels must be a whole number or numbers sigma/alpha, got {levels!r}") from None
    if rs.ndim != 1 or not len(rs) or not ((rs > low) & (rs <= high)).all() or (rs.diff() > 0).any():
        got = rs.tolist()[:8] if rs.ndim else levels
        raise ValueError(
            "levels must be a whole number, or numbers sigma/alpha that do not increase, within this process's own "
            f"({low:g}, {high:g}]; got {got}"
        )
    return sde.inverse_half_log_snr(-rs.log()).clamp_max(sde.T).tolist(), rs.tolist()


class _Place(NamedTuple):
    """A z, and what its Metropolis ratio is made of."""

    z: Tensor
    slope: Tensor  # of log pi
    step: Tensor  # P^-1 slope
    length: Tensor  # slope . P^-1 slope, (B,)
    misfit: Tensor  # |y - A z|^2/std^2, (B,)
    log_pi: Tensor  # (B,)


class _Likelihood:
    """Draws of  pi(z) ~ N(y; A z, std^2) N(z; x, r^2),  sample by sample; J is A' at x over std, P = 1/r^2 + J'J."""

    def __init__(self, observation: Observation, like: Tensor, proposals: int, seed: int, ids: Any) -> None:
        observation.check(like)
        self.observation, self.proposals = observation, proposals
        self.y, self.std = observation.values(like)
        draws = like, like.new_empty(len(like), observation.entries), like.new_empty(len(like), 1, dtype=torch.float64)
        self.noise = [Noise(y, seed, ids, purpose=f"likelihood {n}") for n, y in enumerate(draws)]
        self.taken, self.tried = like.new_zeros(len(like), dtype=torch.float64), 0

    def acceptance(self) -> Tensor:
        return self.taken / self.tried if self.tried else torch.ones_like(self.taken)

    def draw(self, k: int, x: Tensor, z: Tensor, r: float) -> Tensor:
        """z after the k-th step, from z: whatever that was for a linear A, a Markov chain else."""
        seen, back = self.derivative(x)
        many = min(1000, 2 * self.observation.entries)

        def solve(d: Tensor, off: Tensor) -> Tensor:
            """argmin |v - d|^2/r^2 + |J v - off|^2: of draws N(0, r^2) and N(0, 1) it is a draw of N(0, P^-1)."""
            b = off - seen(d)
            rtol = (_EXACT * self.observation.entries**0.5 / b.norm(dim=1)).clamp_min(10 * torch.finfo(b.dtype).eps)
            w = conjugate_gradients(lambda p: p + r**2 * seen(back(p)), b, many, rtol)
            return d + r**2 * back(w)

        if self.observation.linear:
            normal, other, _ = self.normals(k, 0)
            z = x + solve(r * normal, self.off(x) + other)
        else:
            z = self.chain(k, x, z, r, solve, back)
        if not _checks.finite(z):
            raise FloatingPointError(_INFINITE)
        return z

    def chain(self, k: int, x: Tensor, z: Tensor, r: float, solve: Solver, back: Map) -> Tensor:
        """v = h P^-1 slope + sqrt(h (2 - h)) N(0, P^-1), whose invariant law is pi itself if A is linear."""
        now = self.at(z, x, r, solve, back)
        if not _checks.finite(now.log_pi):
            raise FloatingPointError(_INFINITE)
        for j in range(self.proposals):
            normal, other, chance = self.normals(k, j)
            h = _SHARES[j % len(_SHARES)]
            if h:
                v = h * now.step + (h * (2 - h)) ** 0.5 * solve(r * normal, other)
                new = self.at(now.z + v, x, r, solve, back)
                # log q(v)/q(-v), of |v - h P^-1 slope|_P^2, is all but the first two
                moved = _dot(v, now.slope + new.slope) + h / 2 * (new.length - now.length)
                ratio = new.log_pi - now.log_pi - moved / (2 - h)
            else:  # a draw of N(x, r^2), which knows no modes
                new = self.at(x + r * normal, x, r, solve, back)
                ratio = 0.5 * (now.misfit - new.misfit)
            taken = torch.special.log_ndtr(chance[:, 0]) < ratio  # of not a number: not taken
            now = _Place(*(torch.where(each(taken, a), a, b) for a, b in zip(new, now, strict=True)))
            self.taken, self.tried = self.taken + taken, self.tried + 1
        return now.z

    def at(self, z: Tensor, x: Tensor, r: float, solve: Solver, back: Map) -> _Place:
        off = self.off(z)
        pull = self.observation.transpose(z)(off / self.std)
        slope = pull - (z - x) / r**2
        step = solve(x - z + r**2 * (pull - back(off)), off)  # P^-1 slope; apart from it large terms cancel
        misfit = _dot(off, off)
        return _Place(z, slope, step, _dot(slope, step), misfit, -0.5 * (misfit + _dot(z - x, z - x) / r**2))

    def off(self, z: Tensor) -> Tensor:
        return (self.y - self.observation.of(z)) / self.std

    def normals(self, k: int, j: int) -> list[Tensor]:
        for noise in self.noise:
            noise.enter(k, j)
        return [noise.normal() for noise in self.noise]

    def derivative(self, x: Tensor) -> tuple[Map, Map]:
        """v -> J v and u -> J' u."""
        seen = self.observation.change
        if self.observation.linear:
            pull = self.observation.transpose(x)
            return lambda v: seen(v) / self.std, lambda u: pull(u / self.std)
        pull = self.observation.transpose(x.clone().requires_grad_(), graph=True)

        def push(v: Tensor) -> Tensor:
            """J' u is linear in u, and its derivative is J."""
            u = v.new_zeros(len(v), self.observation.entries, requires_grad=True)
            with torch.enable_grad():
                back = pull(u / self.std)
                if not back.requires_grad:  # a derivative that is 0 throughout
                    return torch.zeros_like(u)
                (jv,) = torch.autograd.grad(back, u, v, retain_graph=True, allow_unused=True)
            return torch.zeros_like(u) if jv is None else jv

        return push, lambda u: pull(u / self.std).detach()


_INFINITE = "the step of the likelihood is not finite: A is not, or std is too small for x's dtype"


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).reshape(len(a), -1).sum(1)
