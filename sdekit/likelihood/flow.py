"""Log-likelihood through the probability flow (instantaneous change of variables), with its error budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

from sdekit import _checks
from sdekit.batch import Padding, entries, padded, real_state, unpadded
from sdekit.likelihood.density import Density, Divergence, column, make_divergence
from sdekit.models.derived import Whitened
from sdekit.processes.reverse import Reverse
from sdekit.processes.sde import SDE
from sdekit.sampling.starts import state
from sdekit.solvers.adaptive import adaptive
from sdekit.solvers.frame import moment
from sdekit.solvers.solution import SolverError
from sdekit.system import Score, expand

_MAX_NFE = 5_000  # a flow that needs more runs away


@dataclass(frozen=True, repr=False)
class Likelihood:
    """Log densities of a batch and what they may be off by, all (B,) and in nats.

    ``log_prob``: log p(x) of the process's marginal at t_min, with the given prior at T.
    ``stderr``: of the divergence's probes: 0 if exact, NaN from a single probe. ``solver_error``: the sum over the
    steps of the size of their errors, as they come out in log p. ``truncation``: estimate of log p_0(x) - log p(x),
    where p_0 is the process's marginal at t = 0 (VE's keeps sigma_min). ``prior_mismatch``: estimate of log p_T - log
    prior at ``latent``; 0 for a prior that was given. ``truncation_error``, ``prior_error``: of these two, the size of
    their last terms.
    ``latent``, like x: where the flow takes x at T. ``nfe``: network evaluations; ``nfe_per_sample`` (B,): those that a
    sample took part in. ``probes``: per sample, 0 if exact.
    """

    log_prob: Tensor
    stderr: Tensor
    solver_error: Tensor
    truncation: Tensor
    truncation_error: Tensor
    prior_mismatch: Tensor
    prior_error: Tensor
    latent: Tensor
    nfe: int
    nfe_per_sample: Tensor
    probes: int

    def __repr__(self) -> str:
        y = self.corrected.double()
        return f"Likelihood({len(y)} samples, corrected log p {float(y.mean()):.6g} on average, nfe={self.nfe})"

    @property
    def corrected(self) -> Tensor:
        """log p_0(x): ``log_prob`` + ``truncation`` + ``prior_mismatch``; a number, without gradients."""
        return self.log_prob.detach() + self.truncation + self.prior_mismatch

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Ends of the interval about ``corrected`` that holds log p_0(x) with this probability.

        Half of it is the sum of Student's quantile (probes - 1 degrees of freedom) times ``stderr``, and of the errors
        of solver, truncation and prior. NaN from a single probe. The truncation's is no bound where the data vary at
        the scale of sigma(t_min): its series converges slowly there. What the score itself is wrong by is not in it.
        """
        quantile = float(student.ppf((1 + level) / 2, self.probes - 1)) if self.probes > 1 else 1.0
        half = quantile * self.stderr + self.solver_error + self.truncation_error + self.prior_error
        return self.corrected - half, self.corrected + half


def log_likelihood(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    divergence: str = "exact",
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    prior_log_prob: Callable[[Tensor], Tensor] | None = None,
    seed: int | None = None,
    ids: Sequence[int] | None = None,
    differentiable: bool = False,
    progress: bool = False,
    mask: Tensor | None = None,
) -> Likelihood:
    """log p(x) = log p_T(x_T) + integral from t_min to T of div f_ode(x_t, t) dt  (Song et al. 2021, eq. 39).

    x, (B, *event), is taken as a point at t_min: the density is that of the process's marginal there;
    ``Likelihood.corrected`` estimates that at t = 0, and ``interval`` says how well. State and log-density are solved
    together, in the frame where the flow's linear part is exact (:class:`sdekit.solvers.frame.FlowFrame`), by Adams's
    method, with error and step size per sample: one network pass with its vector-Jacobian products a step, and one or
    two more for the corrections.

    An error e of the state at time t changes log p by  e . grad log p_t,  and the score is at hand: so a step's error
    is measured as what it does to log p. It must be below  atol + rtol sqrt(D)  nats (sqrt(D/2) is what log p varies by
    over Gaussian data) and what D roundings make, and the state's, RMS over the event, below  atol + rtol |x|.

    ``divergence``: "exact" (D products, batched) or "hutchinson" (``probes`` Rademacher vectors per sample,
    fixed along the path). ``prior_log_prob``: (B, *event) -> (B,), default ``sde.prior_log_prob``.
    Of a process that is no diffusion (PoissonFlow) the density at t_min is all that is known: ``corrected`` is that,
    and ``interval`` NaN.
    ``seed``, ``ids``: of the probes, as in :func:`sdekit.sample`. ``mask``: of padded samples, as there: the density
    is that of what is real (a ``prior_log_prob`` gets latents with 0 elsewhere). ``differentiable``: keep the graph, so
    that ``log_prob`` and ``latent`` have gradients to x and to the score's parameters (memory grows with the
    evaluations).
    Raises ValueError or TypeError for bad input and for a score that is not differentiable in x, FloatingPointError for
    one that is not finite, SolverError where a sample cannot reach T.
    """
    _checks.instance(sde)
    if not isinstance(differentiable, bool):
        raise ValueError(f"differentiable must be True or False, got {differentiable!r}")
    x, padding = real_state(x, mask, sde)
    x = x if differentiable else x.detach()
    make = make_divergence(x, divergence, probes, seed, ids, padding)
    with torch.set_grad_enabled(differentiable), padded(padding):
        return _solve(sde, score, x, True, make, rtol, atol, prior_log_prob, differentiable, progress)[1]


def sample_with_log_prob(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    divergence: str = "exact",
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    prior_log_prob: Callable[[Tensor], Tensor] | None = None,
    seed: int | None = None,
    x_T: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    ids: Sequence[int] | None = None,
    progress: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Likelihood]:
    """Samples x of shape (B, *event) at t_min by the probability flow, and their :class:`Likelihood`, in one solve.

    As :func:`log_likelihood` from T to t_min; ``latent`` is the start. No final denoising: the density is that of the
    point that is returned. Other arguments as in :func:`sdekit.ode_sample`.
    """
    _checks.instance(sde)
    padding = Padding.of(mask, shape, sde)
    with torch.no_grad():
        x = state(sde, score, shape, sde.T, seed, x_T, device, dtype, ids, padding).detach()
    make = make_divergence(x, divergence, probes, seed, ids, padding)
    with torch.no_grad(), padded(padding):
        return _solve(sde, score, x, False, make, rtol, atol, prior_log_prob, False, progress)


def _solve(
    sde: SDE,
    score: Score,
    x: Tensor,
    forwards: bool,
    divergence: Divergence,
    rtol: float,
    atol: float,
    prior_log_prob: Callable[[Tensor], Tensor] | None,
    graph: bool,
    progress: bool,
) -> tuple[Tensor, Likelihood]:
    """From x at t_min to T, or from x at T to t_min: the other end, and the likelihood of the point at t_min."""
    if sde.root is not None:
        return _whitened(sde, score, x, forwards, divergence, rtol, atol, prior_log_prob, graph, progress)
    rtol, atol = _checks.positive(rtol, "rtol"), _checks.positive(atol, "atol")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64 for a density, got {x.dtype}; a network may cast within")
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.set_grad_enabled(graph):  # derivatives are needed
            divergence = Divergence(divergence.vectors.clone(), divergence.exact)
            return _solve(sde, score, x.clone(), forwards, divergence, rtol, atol, prior_log_prob, graph, progress)
    b, d = x.shape[0], x[0].numel()
    here, there = (sde.t_min, sde.T) if forwards else (sde.T, sde.t_min)
    real = entries(x)
    given, x = x, sde.centre(x, here)  # of a process with a mean of its own, all is done without it
    system = sde.probability_flow(score)
    system.prepare([sde.t_min, sde.T], x)
    method = Density(system, x, divergence, rtol, atol, graph)
    low, high = (float(sde.alpha(t) + sde.sigma(t)) for t in (sde.t_min, sde.T))
    first, last = (low, high) if forwards else (high, low)
    columns = torch.cat([x.reshape(b, d) / first, x.new_zeros(b, divergence.columns + 1)], 1)
    ends = torch.tensor([sde.t_min, sde.T], dtype=torch.float64)
    ends = ends if forwards else ends.flip(0)
    solution = adaptive(
        method, columns, ends, max_nfe=_MAX_NFE, progress=progress, calls=lambda: system.nfe,
        network_calls=system.network_calls,
    )  # fmt: skip
    if not solution.success:
        raise SolverError(solution)
    end = sde.place((solution.x[:, :d] * last).reshape(x.shape), there)
    latent = end if forwards else given
    prior = prior_log_prob(latent) if prior_log_prob else unpadded(sde.prior_log_prob, latent)
    if prior.shape != (b,):
        raise ValueError(f"prior_log_prob must return shape ({b},), got {tuple(prior.shape)}")
    # log q(y) at t_min less that at T; log p(x) = log q(y) - d log n
    change = solution.x[:, d:-1] if forwards else -solution.x[:, d:-1]
    exact, n = divergence.exact, divergence.columns
    stderr = prior.new_zeros(b) if exact else change.std(1) / n**0.5 if n > 1 else prior.new_full((b,), torch.nan)
    zero = prior.new_zeros(b)
    truncation = truncation_error = mismatch = prior_error = zero
    if not sde.diffuses:  # the heat equation, which these follow from, is not its own
        truncation_error = prior_error = torch.full_like(zero, torch.nan)
    else:
        truncation, truncation_error = _truncation(sde, system, divergence, *method.seen["t_min"])
        if not prior_log_prob:
            mismatch, prior_error = _mismatch(sde, system, *method.seen["T"])
    likelihood = Likelihood(
        log_prob=prior + change.mean(1) + real * math.log(high / low),
        stderr=stderr.detach(),
        solver_error=solution.x[:, -1].detach(),
        truncation=truncation,
        truncation_error=truncation_error,
        prior_mismatch=mismatch,
        prior_error=prior_error,
        latent=latent,
        nfe=system.nfe,
        nfe_per_sample=solution.nfe_per_sample + system.nfe - solution.nfe,
        probes=0 if exact else n,
    )
    return end, likelihood


def _whitened(
    sde: SDE,
    score: Score,
    x: Tensor,
    forwards: bool,
    divergence: Divergence,
    rtol: float,
    atol: float,
    prior_log_prob: Any,
    graph: bool,
    progress: bool,
) -> tuple[Tensor, Likelihood]:
    """:func:`_solve` for L^-1 x, whose noise is white: log p(x) = log p(L^-1 x) - log |det L|."""
    volume, root = sde.log_volume(), sde.colour
    prior = prior_log_prob and (lambda latent: prior_log_prob(root(latent)) + volume)
    whitened = Whitened(score, sde)
    end, found = _solve(sde.white, whitened, sde.whiten(x), forwards, divergence, rtol, atol, prior, graph, progress)
    return root(end), replace(found, log_prob=found.log_prob - volume, latent=root(found.latent))


def _truncation(
    sde: SDE, system: Reverse, divergence: Divergence, x: Tensor, score: Tensor, div: Tensor
) -> tuple[Tensor, Tensor]:
    """log p_0(x) - log p(x) at t_min, and the size of the last terms of the expansion; one evaluation.

    With z = x/alpha and v = sigma^2/alpha^2, z_t is data plus noise of variance v, whose density obeys the heat
    equation:  d log p(z)/dv = A = alpha^2 (div score + |score|^2)/2.  From (x/alpha(t_min), v(t_min)) to
    (x/alpha(0), v(0)), A and the gradient alpha score are taken as linear, through the values at the start and as far
    again on the other side of it.
    """
    b, d, real = x.shape[0], x[0].numel(), entries(x)
    a0, a1 = float(sde.alpha(0.0)), float(sde.alpha(sde.t_min))
    v0, v1 = (float(sde.sigma(0.0)) / a0) ** 2, (float(sde.sigma(sde.t_min)) / a1) ** 2
    t = float(sde.inverse_half_log_snr(-math.log(2 * v1 - v0) / 2))
    a2, everyone = float(sde.alpha(t)), torch.arange(b, device=x.device)
    far_x, lv = x * (a2 * (2 / a1 - 1 / a0)), system.levels(torch.full((b,), t, dtype=torch.float64))
    out, div_out = divergence(system, far_x, moment(lv, x), everyone, False)
    c, own = system.score_of(lv)
    farther = expand(c, x) * out + expand(own, x) * far_x
    div_farther = expand(c, div_out) * div_out + expand(own, div_out) * column(real, div_out)
    near, far = (a1 * score).reshape(b, d), (a2 * farther).reshape(b, d)
    slope = (a1**2 * div + near.square().sum(1)) / 2
    bend = (v1 - v0) / 2 * ((a2**2 * div_farther.mean(1) + far.square().sum(1)) / 2 - slope)
    move = (sde.place(x, sde.t_min) / a0 - x / a1).reshape(b, d)
    turn = ((near - far) * move).sum(1) / 2
    first = (near * move).sum(1) - (v1 - v0) * slope + real * math.log(a1 / a0)
    return first + bend + turn, bend.abs() + turn.abs()


def _mismatch(sde: SDE, system: Reverse, x: Tensor, score: Tensor, div: Tensor) -> tuple[Tensor, Tensor]:
    """log p_T(x) - log prior(x) to second order in alpha/sigma, and the size of that order; one evaluation, at x = 0.

    Nothing, and no evaluation, where alpha(T) = 0. Its gradient is  delta(x) = score(x, T) + x/sigma^2,  linear in x to
    this order, so that along the ray from 0 the trapezium is exact; at 0 it is  log E exp(-alpha^2 |x_0|^2/(2 sigma^2))
    = -sigma^2/2 (div delta + |delta(0)|^2).
    """
    b, d = x.shape[0], x[0].numel()
    lv = system.levels(torch.full((b,), sde.T, dtype=torch.float64))
    if bool((lv.alpha == 0).all()):  # p_T is the prior
        return x.new_zeros(b), x.new_zeros(b)
    var = float(sde.sigma(sde.T)) ** 2
    with torch.no_grad():  # at x = 0, where the score is a output
        out = system.model(torch.zeros_like(x), moment(lv, x))
        at_zero = (expand(system.score_of(lv)[0], x) * out).reshape(b, d)
    x, delta = x.reshape(b, d), (score + x / var).reshape(b, d)
    first = (at_zero * x).sum(1)
    second = ((delta - at_zero) * x).sum(1) / 2 - var / 2 * (div + entries(x) / var + at_zero.square().sum(1))
    return first + second, second.abs()
