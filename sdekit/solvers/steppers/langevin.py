"""Langevin dynamics at a fixed time: a corrector."""

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
