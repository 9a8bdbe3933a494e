"""DDIM, at every amount of its own noise."""

from typing import Any

from torch import Tensor

from sdekit import _checks
from sdekit.processes.kinds import Kind, express
from sdekit.processes.reverse import combine
from sdekit.solvers.steppers.base import StepRule, step_rule


def ddim(eta: float = 0.0) -> StepRule:
    """x_s = alpha_s x_0 + sqrt(sigma_s^2 - w^2) eps + w z,  w = eta sigma_s/sigma_t sqrt(v).

    In what the model says and x a step is two terms, finite where alpha_t = 0 too;
    v = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2 is the variance of the forward step from s to t. eta = 0 is
    DDIM, 1 is DDPM's ancestral sampling with the posterior's variance, between is between; eta is this rule's
    own noise, and a system with another churn is refused. Song, Meng & Ermon 2021, eq. 12 and 16.
    Raises ValueError unless 0 <= eta <= 1.
    """
    eta = _checks.positive(eta, "eta", zero=True)
    if eta > 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta:g}; for more noise use a system with churn > 1")

    @step_rule(noisy=eta > 0, churn=eta)
    def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
        n_t, n_s = system.at(t, x), system.at(s, x)
        w, left = 0.0, n_s.sigma
        if eta:
            if s > t:
                raise ValueError(f"ddim with eta = {eta:g} adds noise, which holds backwards in time only; use eta = 0")
            r = (n_t.alpha * n_s.sigma) / (n_s.alpha * n_t.sigma)
            fresh = (1 - r) * (1 + r)  # the share of the variance that the forward step from s to t adds
            w, left = eta * n_s.sigma * fresh**0.5, n_s.sigma * (r**2 + (1 - eta**2) * fresh) ** 0.5
        a, b = express(Kind(n_s.alpha, left), n_t.said, n_t.alpha, n_t.sigma)
        x_s = combine(b, x, a, system.model(x, n_t.time))
        return (x_s + w * noise.normal() if eta else x_s), state

    return step
