"""Samples of p(x_0 | y) by sequential Monte Carlo: right as the particles grow, whatever the approximation inside."""

import math
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import samples
from sdekit.models.derived import Chunked
from sdekit.noise.keyed import Noise
from sdekit.posterior.observation import Observation
from sdekit.posterior.scores import DENSE, PosteriorScore, posterior_score
from sdekit.processes.counted import ask, counting
from sdekit.processes.sde import SDE
from sdekit.sampling.fixed import Plan, plan
from sdekit.sampling.grids import Grid
from sdekit.sampling.samplers import Sampler, as_sampler
from sdekit.sampling.starts import bridge, state
from sdekit.solvers.solution import bar
from sdekit.solvers.steppers import StepRule
from sdekit.system import Score

# In the products of the particles that go through a network together: on a CPU what its cache holds (at half the time
# of larger ones), on a device what keeps it busy.
_NUMBERS = {"cpu": 2**17}
_MANY, _LEAST = 2**24, 16


@dataclass(frozen=True)
class PosteriorSamples:
    """Draws of p(x_0 | y), one for each requested sample.

    ``x`` (B, *event). ``ess`` (B,): of a sample's particles, how many the last weights leave, 1 ... particles.
    ``log_evidence`` (B,): an estimate of log p(y) in nats, whose exponential is unbiased for the sampler's chain.
    ``particles`` (B, K, *event) and ``weights`` (B, K), which sum to 1: all that the draws were chosen from.
    ``nfe``: network calls; ``rows``: particles in them, all together.
    """

    x: Tensor
    ess: Tensor
    log_evidence: Tensor
    particles: Tensor
    weights: Tensor
    nfe: int
    rows: int


def posterior_sample(
    sde: SDE,
    score: Score,
    observation: Observation,
    shape: Sequence[int],
    *,
    particles: int = 8,
    method: str = "mmps",
    sampler: str | Sampler | StepRule = "sa_solver",
    steps: int | None = None,
    grid: Grid = "karras",
    resample: float = 0.5,
    seed: int | None = None,
    ids: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = False,
    **options: Any,
) -> PosteriorSamples:
    """Draws of p(x_0 | y) for y = A x_0 + std eps by twisted sequential Monte Carlo  (Wu et al. 2023, algorithm 1).

    Each of the B requested samples has ``particles`` of its own, so that none depends on the batch. A step of the
    ``sampler``, any with noise, is a function of x_t and standard normal z; the particles' z is moved by
    delta = alpha_s sqrt(1 - r^2)/sigma_s (E[x_0|x_t, y] - E[x_0|x_t]),  r = alpha_t sigma_s/(alpha_s sigma_t),
    which moves x_s as the posterior mean would (in a large step by as much of it as the step's own noise reaches:
    :meth:`sdekit.posterior.local.Local.reached`), and their weights make up for it:

        log w += log p~(y|x_s) - log p~(y|x_t) - z . delta - |delta|^2/2

    (Girsanov's formula; with "ancestral" it is p(x_s|x_t)/q(x_s|x_t) of the two Gaussian kernels). Means and p~ are
    ``method``'s (:func:`posterior_score`, with its ``options``); p~(y|x_0) is exact, in the last weights. Where the
    weights leave fewer than ``resample`` x particles of a sample, these are drawn anew from them (systematically).
    So for a growing number of particles the draws are the sampler's own, given y: what is left is the error of its
    steps, and that of the network. Where the particles of a sample come down to few (``ess``), take more. What a
    network that predicts eps says of V near T is worth nothing: ``reach`` bounds the moves there, draws are as good as
    with any other, and only the estimate of log p(y) is too low.

    ``steps`` (100 unless the grid is a tensor) and ``grid`` as in :func:`sdekit.sample`; x_0 = E[x_0|x] at the last
    time. ``chunk``: particles that go through the network together, as memory and its caches suggest unless given;
    with up to 128 entries of y p~ has its determinant, which costs as many vector-Jacobian products, with more it is
    left out (right in the limit, but with more particles). An evaluation costs one network call a chunk.
    ``seed``, ``ids``: sample i is keyed by ids[i] (default i), whatever the batch.
    Raises ValueError or TypeError that names the argument, FloatingPointError for a score that is not finite.
    """
    size, k = _checks.event_shape(shape), _checks.count(particles, "particles")
    if k == 1:
        raise ValueError(
            "particles must be at least 2: one has no other to be weighed against; for samples of an approximation "
            "take sample(sde, posterior_score(sde, score, observation), shape)"
        )
    if not 0 <= _checks.positive(resample, "resample", zero=True) <= 1:
        raise ValueError(f"resample must lie in [0, 1], got {resample:g}")
    made = posterior_score(sde, score, observation, method, **options)
    if not as_sampler(sampler).stochastic:
        named = repr(sampler) if isinstance(sampler, str) else f"this {type(sampler).__name__}"
        raise ValueError(f"sampler must be one with noise, such as ancestral or sa_solver: {named} draws none")
    given = not isinstance(grid, str) and not callable(grid)
    steps = 100 if steps is None and not given else steps
    way = plan(sde, sampler, steps, None, grid, denoise=True, start=None, x_T=None)
    b = size[0]
    ids = range(b) if ids is None else [_checks.count(i, "ids", minimum=0) for i in ids]
    if len(ids) != b:
        raise ValueError(f"ids must hold one number per sample: got {len(ids)} for a batch of {b}")
    with torch.no_grad(), samples(torch.arange(b).repeat_interleave(k), b):
        own = [i * k + j for i in ids for j in range(k)]
        x = state(sde, score, (b * k, *size[1:]), way.top, seed, None, device, dtype, own)
        run = _Run(made, way.row, x, k, seed, ids, own, resample, _checks.count(chunk, "chunk") if chunk else None)
        return run.through(sde, score, way, x, progress)


class _Run:
    """Particles, (B K, *event), sample by sample, and their weights since they were last drawn anew, (B, K)."""

    def __init__(
        self,
        made: PosteriorScore,
        row: Sampler,
        like: Tensor,
        k: int,
        seed: int | None,
        ids: Sequence[int],
        own: Sequence[int],
        resample: float,
        chunk: int | None,
    ) -> None:
        self.made, self.row, self.k, self.least = made, row, k, resample * k
        seed = secrets.randbits(63) if seed is None else seed  # one for all that is drawn
        self.noise = Moved(like, seed, own)
        self.choose = Noise(torch.empty(len(ids), 1, dtype=torch.float64), seed, ids, purpose="resample")
        self.log_w = torch.zeros(len(ids), k, dtype=torch.float64, device=like.device)
        self.log_z = self.log_w[:, 0].clone()
        self.chunk = chunk

    def through(self, sde: SDE, score: Score, way: Plan, x: Tensor, progress: bool) -> PosteriorSamples:
        score = Chunked(score, sde, self.chunk) if self.chunk else score
        system, rule, times = sde.reverse(score, self.row.churn), self.row.rule, way.times.tolist()
        rule.check(system)
        if way.top > times[0]:
            x = bridge(system, x, way.top, times[0], noisy=True)
        system.prepare(times + [t + c * (s - t) for t, s in pairwise(times) for c in rule.nodes], x)
        past, ready = rule.begin(system, times, x), self.made.prepare(times, x)
        levels = system.levels(torch.tensor(times, dtype=torch.float64))
        before = torch.zeros_like(self.log_w)
        with counting() as made:
            steps = list(zip(pairwise(times), ready, strict=False))
            for n, ((t, s), known) in enumerate(bar(steps, progress, len(steps)) if progress else steps):
                self.noise.enter(t, s)
                self.choose.enter(t, s)
                output, shift, twist = self.evaluate(
                    x, t, known, float(torch.exp(-2 * levels.lam[n + 1])), bool(levels.alpha[n] == 0)
                )
                self.weigh(twist - before)
                anew = self.anew()
                if anew is not None:
                    x, output, shift, past = (_of(anew, y) for y in (x, output, shift, past))
                    twist = twist.reshape(-1)[anew].reshape(twist.shape)
                system.model.tell(x, t, output)
                r = levels.alpha[n] * levels.sigma[n + 1] / (levels.alpha[n + 1] * levels.sigma[n])
                gain = float(levels.alpha[n + 1] / levels.sigma[n + 1] * ((1 - r) * (1 + r)).sqrt())
                self.noise.move(shift * gain)
                x, past = rule.step(system, x, t, s, self.noise, past)
                self.weigh(self.noise.ratio.reshape(self.log_w.shape))
                before = twist
        self.choose.enter(times[-1], 0.0)
        x = rule.finish(system, x, times[-1], past)
        system.settle()
        self.weigh(self.likelihood(x) - before)
        self.log_z += self.log_w.logsumexp(1) - math.log(self.k) + self.constant(x)
        weights = self.log_w.softmax(1)
        chosen = torch.searchsorted(weights.cumsum(1), self.uniform()).clamp_max(self.k - 1)
        y = x.reshape(len(weights), self.k, *x.shape[1:])
        return PosteriorSamples(
            x=y[torch.arange(len(y), device=y.device), chosen[:, 0]],
            ess=1 / weights.square().sum(1),
            log_evidence=self.log_z,
            particles=y,
            weights=weights,
            nfe=system.nfe + made[0],
            rows=system.model.rows + made[1],
        )

    def evaluate(self, x: Tensor, t: float, ready: Any, ahead: float, blind: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What the model says at x, E[x_0|x_t, y] - E[x_0|x_t], and log p~(y|x_t) (B, K).

        ``blind``: alpha = 0, where x_t says nothing of y: any p~ is right, so it is 1.
        """
        time = torch.tensor(t, dtype=torch.float64)
        entries = self.made.observation.entries
        width = x[0].numel() * (entries if entries <= DENSE else 8)
        many = self.chunk or max(_LEAST, _NUMBERS.get(x.device.type, _MANY) // width)
        parts = []
        for rows in torch.arange(len(x)).split(many):
            part = x[rows[0] : rows[-1] + 1]
            with samples(rows, len(x)):
                if blind:
                    nothing = torch.zeros_like(part), part.new_zeros(len(part))
                    parts.append((ask(self.made.inside, part, time, ready[0]), *nothing))
                else:
                    parts.append(self.made.pull(part, time, ready, ahead))
        output, shift, twist = (torch.cat(column) for column in zip(*parts, strict=True))
        return output, shift, twist.reshape(self.log_w.shape).to(self.log_w)

    def weigh(self, log_ratio: Tensor) -> None:
        if not bool(torch.isfinite(log_ratio).all()):
            raise FloatingPointError("weights are not finite: the score or A is not, or std is too small for x's dtype")
        self.log_w = self.log_w + log_ratio

    def likelihood(self, x: Tensor) -> Tensor:
        """log N(y; A x_0, std^2) as p~ has it, without what is the same for all x."""
        y, std = self.made.observation.values(x)
        off = (y - self.made.observation.of(x)) / std
        return -0.5 * off.double().square().sum(1).reshape(self.log_w.shape)

    def constant(self, x: Tensor) -> Tensor:
        """What is left out there, (B,)."""
        _, std = self.made.observation.values(x)
        each = (std.double().log() + 0.5 * math.log(2 * math.pi)).sum(1)
        return -each.expand(len(x))[:: self.k].to(self.log_w)

    def uniform(self) -> Tensor:
        """A number in (0, 1) for each sample, (B, 1)."""
        u = 0.5 * (1 + torch.erf(self.choose.normal() / math.sqrt(2)))
        return u.to(self.log_w)

    def anew(self) -> Tensor | None:
        """Where each particle now is from, (B K,), if any sample's are drawn anew: systematic resampling."""
        weights = self.log_w.softmax(1)
        few = 1 / weights.square().sum(1) < self.least
        if not bool(few.any()):
            return None
        b, k = weights.shape
        places = (torch.arange(k, device=weights.device) + self.uniform()) / k
        drawn = torch.searchsorted(weights.cumsum(1), places).clamp_max(k - 1)
        rows = torch.where(few[:, None], drawn, torch.arange(k, device=drawn.device))
        self.log_z = torch.where(few, self.log_z + self.log_w.logsumexp(1) - math.log(k), self.log_z)
        self.log_w = torch.where(few[:, None], 0.0, self.log_w)
        return (rows + k * torch.arange(b, device=rows.device)[:, None]).reshape(-1)


class Moved(Noise):
    """Noise whose first draw of a step is moved; ``ratio`` (n,): log of how much more likely it was unmoved."""

    _by: Tensor | None = None
    ratio: Tensor = torch.zeros(0)

    def move(self, by: Tensor) -> None:
        """By this, like the noise, the next draw."""
        self._by, self.ratio = by, by.new_zeros(len(by), dtype=torch.float64)

    def normal(self) -> Tensor:
        """As :meth:`Noise.normal`, moved if it is the first since :meth:`move`."""
        z, by, self._by = super().normal(), self._by, None
        if by is None:
            return z
        flat, d = z.double().reshape(len(z), -1), by.double().reshape(len(z), -1)
        self.ratio = -(flat * d).sum(1) - 0.5 * d.square().sum(1)
        return z + by


def _of(rows: Tensor, past: Any) -> Any:
    """A rule's state, or a tensor, of the particles ``rows``: tensors of all particles, also in containers."""
    if isinstance(past, Tensor):
        return past[rows] if past.ndim and len(past) == len(rows) else past
    if isinstance(past, deque):
        return deque((_of(rows, y) for y in past), past.maxlen)
    if isinstance(past, tuple):
        parts = [_of(rows, y) for y in past]
        return type(past)(*parts) if hasattr(past, "_fields") else tuple(parts)
    if isinstance(past, list):  # a tuple in a list is a row of a table, the same for all
        return [y if isinstance(y, tuple) else _of(rows, y) for y in past]
    if isinstance(past, dict):
        return {key: _of(rows, y) for key, y in past.items()}
    if is_dataclass(past) and not isinstance(past, type):
        return replace(past, **{f.name: _of(rows, getattr(past, f.name)) for f in fields(past) if f.init})
    return past
