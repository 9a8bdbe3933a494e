"""Exact log-likelihood through the probability flow (instantaneous change of variables)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.adaptive import adaptive
from sdekit.noise import Noise
from sdekit.reverse import Reverse
from sdekit.rungekutta import RungeKutta
from sdekit.sde import SDE
from sdekit.solution import SolverError, rms
from sdekit.system import Score

_VJP_NUMBERS = 2**24  # vector-Jacobian products are batched up to this many numbers at a time


@dataclass
class Likelihood:
    """``log_prob`` (B,) in nats; ``stderr`` (B,) of the divergence's probes: 0 if exact, NaN from a single probe;
    ``latent`` like x: where the flow takes x at T; ``nfe``: network evaluations.
    """

    log_prob: Tensor
    stderr: Tensor
    latent: Tensor
    nfe: int


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
) -> Likelihood:
    """log p(x) = log p_T(x_T) + integral from t_min to T of div f_ode(x_t, t) dt  (Song et al. 2021, eq. 39).

    x, (B, *event), is taken as a point at t_min: the density is that of the process's marginal there. State and
    log-density are solved together by RK45, with error and step size per sample, and the log-density's error
    counts as much as the whole state's. Each right-hand side is one network pass with its vector-Jacobian products.

    ``divergence``: "exact" (D products, batched) or "hutchinson" (``probes`` Rademacher vectors per sample,
    fixed along the path). ``prior_log_prob``: (B, *event) -> (B,), default ``sde.prior_log_prob``.
    Raises ValueError or TypeError for bad input and for a score that is not differentiable in x, SolverError where
    a sample cannot reach T.
    """
    x = _checks.state(x).detach()
    rtol, atol = _checks.positive(rtol, "rtol"), _checks.positive(atol, "atol")
    probes = _checks.count(probes, "probes")
    b, d = x.shape[0], x[0].numel()
    exact = _checks.lookup({"exact": True, "hutchinson": False}, divergence, "divergence")
    if exact:
        vectors = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)
    else:
        draw = Noise(x, seed, ids, purpose="probe")
        vectors = torch.stack([torch.where(draw.normal() < 0, -1.0, 1.0).to(x) for _ in range(probes)])
    n = 1 if exact else probes

    def differentiable(y: Tensor, t: Tensor) -> Tensor:
        out = score(y, t)
        if isinstance(out, Tensor) and not out.requires_grad:
            raise ValueError("score must be differentiable in x for its divergence; take no_grad or detach out of it")
        return out

    system = sde.probability_flow(differentiable)

    def rhs(y: Tensor, t: Tensor, run: Tensor) -> Tensor:
        state = y[:, :d].reshape(-1, *x.shape[1:])
        dx, products = _drift_and_products(system, state, t, vectors, run)
        div = products.sum(0).unsqueeze(1) if exact else products.T
        return torch.cat([dx.reshape(-1, d), div], 1)

    def norm(y: Tensor) -> Tensor:
        return torch.maximum(rms(y[:, :d]), rms(y[:, d:]))

    y = torch.cat([x.reshape(b, d), x.new_zeros(b, n)], 1)
    ends = torch.tensor([sde.t_min, sde.T], dtype=torch.float64)
    with torch.no_grad():
        solution = adaptive(RungeKutta(rhs, rtol, atol, norm=norm), y, ends)
    system.settle()
    if not solution.success:
        raise SolverError(solution)
    latent, change = solution.x[:, :d].reshape(x.shape), solution.x[:, d:]
    prior = (prior_log_prob or sde.prior_log_prob)(latent)
    if prior.shape != (b,):
        raise ValueError(f"prior_log_prob must return shape ({b},), got {tuple(prior.shape)}")
    if exact:
        stderr = torch.zeros_like(prior)
    else:
        stderr = change.std(1) / probes**0.5 if probes > 1 else torch.full_like(prior, torch.nan)
    return Likelihood(prior + change.mean(1), stderr, latent, system.nfe)


def _drift_and_products(system: Reverse, x: Tensor, t: Tensor, vectors: Tensor, run: Tensor) -> tuple[Tensor, Tensor]:
    """The flow's drift f at x and v . (df/dx)^T v for every v in ``vectors[:, run]``, (n, B); one network pass.

    The sum over unit vectors is the exact divergence. For entries of +-1 the linear part of the drift
    contributes its divergence exactly, so only the score's is estimated.
    """
    with torch.enable_grad():
        x = x.requires_grad_()
        drift = system.drift(x, t)
        size = max(1, _VJP_NUMBERS // x.numel())
        chunks = vectors.split(size)
        products = []
        for i, chunk in enumerate(chunks):
            v = chunk[:, run]
            (jv,) = torch.autograd.grad(drift, x, v, is_grads_batched=True, retain_graph=i + 1 < len(chunks))
            products.append((v * jv).reshape(*v.shape[:2], -1).sum(2))
    return drift.detach(), torch.cat(products)
