"""Langevin and Hamiltonian dynamics at a fixed time: correctors."""

import math
from typing import Any

from torch import Tensor

from sdekit import _checks
from sdekit.processes.kinds import Kind, express
from sdekit.processes.reverse import combine
from sdekit.solvers.steppers.base import StepRule, step_rule


def langevin(snr: float = 0.16) -> StepRule:
    """x <- x + e score(x, t) + sqrt(2 e) z  with  e = 2 (alpha_t/alpha_s)^2 (snr sigma_t)^2, at t throughout.

    Song et al. 2021, algorithms 4 and 5, take e from the norms of noise and score, averaged over the
    batch; this is that rule with the norms' expected values, which needs no batch and does not depend on
    the state (a step that does needs a correction of the drift, or samples another law).
    Raises ValueError for snr <= 0.
    """
    snr = _checks.positive(snr, "snr")

    @step_rule(noisy=True)
    def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
        n = system.at(t, x)
        e = 2 * (n.alpha / system.at(s, x).alpha * snr * n.sigma) ** 2
        a, b = express(Kind(0.0, -e / n.sigma), n.said, n.alpha, n.sigma)
        return combine(1.0 + b, x, a, system.model(x, n.time)) + (2 * e) ** 0.5 * noise.normal(), state

    return step


def hamiltonian(snr: float = 0.16, friction: float = 1.0) -> StepRule:
    """One leapfrog step of underdamped Langevin dynamics, at t throughout; with c = exp(-friction h/sigma_t)

        p <- c p + sqrt(1 - c^2) z,   y = x + h/2 p,   p <- p + h score(y, t),   x <- y + h/2 p

    and h = 2 (alpha_t/alpha_s) snr sigma_t: as far as a step of :func:`langevin` of that snr goes, which this becomes,
    but for the place of its score, as ``friction`` grows. The momentum p is refreshed in part, not drawn anew, and goes
    on to the next step and level, so that x does not diffuse but moves on. It is N(0, I) at first, one per sample. No
    step is rejected: there is no density to do it by. On a Gaussian of variance v the law that it keeps has the
    variance v - h^2/4. One evaluation. Leapfrog: Neal 2011, section 5.2; refreshed in part: Horowitz 1991.
    Raises ValueError for snr <= 0 and friction <= 0.
    """
    snr, friction = _checks.positive(snr, "snr"), _checks.positive(friction, "friction")

    @step_rule(noisy=True)
    def step(system: Any, x: Tensor, t: float, s: float, noise: Any, p: Any) -> tuple[Tensor, Any]:
        n = system.at(t, x)
        r = 2 * snr * n.alpha / system.at(s, x).alpha
        h, c = r * n.sigma, math.exp(-friction * r)
        z = noise.normal()
        p = z if p is None else c * p + (1 - c * c) ** 0.5 * z
        y = x + h / 2 * p
        a, b = express(Kind(0.0, -h / n.sigma), n.said, n.alpha, n.sigma)
        p = p + combine(b, y, a, system.model(y, n.time))
        return y + h / 2 * p, p

    return step
