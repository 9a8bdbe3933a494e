"""The reverse family of a process and a score: what the step rules of a sampler see."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.score import CountedScore, Score, batch_time, refuse_zero_terminal_snr, solver_time
from sdekit.sde import SDE
from sdekit.system import System, Time, as_time, expand


class Node(NamedTuple):
    """A process at one time, in the form that multiplies x: Python floats on a grid, tensors per sample."""

    alpha: Any
    sigma: Any
    f: Any  # d log(alpha)/dt
    g2: Any  # squared diffusion
    lam: Any  # half log-SNR
    time: Tensor  # what the score is given


class Reverse(System):
    """dx = [f x - (1 + churn^2)/2 g^2 score] dt + churn g dW,  dt < 0  (Song et al. 2021, eq. 6 and 13).

    Every ``churn`` >= 0 has the marginals p_t: 1 is the reverse SDE, 0 the probability flow, above 1
    is more noise than the process had. t is a float, a 0-d or a (B,) tensor; everything returned is like x.
    Raises ValueError for churn < 0 and for a process with zero terminal SNR.
    """

    def __init__(self, sde: SDE, score: Score, churn: float = 1.0) -> None:
        self.churn = _checks.positive(churn, "churn", zero=True)
        refuse_zero_terminal_snr(sde)
        self.sde, self.score = sde, CountedScore(score)
        self._nodes: dict[float, Node] = {}

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """Network evaluations so far, counted at the network."""
        return self.score.nfe

    @property
    def backwards_only(self) -> bool:  # type: ignore[override]
        """With noise the family's marginals are p_t in decreasing time only; the flow runs both ways."""
        return self.churn > 0

    @property
    def interval(self) -> tuple[float, float]:
        """[t_min, T]: nearer to the data the score may be singular."""
        return self.sde.t_min, self.sde.T

    def prepare(self, times: Sequence[float], x: Tensor) -> None:
        """Tabulate the coefficients at all times of a loop in one vectorised call."""
        c = self.sde.coefficients(torch.tensor(times, dtype=torch.float64))
        columns: list[list[Any]] = [y.tolist() for y in (*c, c.alpha.log() - c.sigma.log())]
        columns.append(list(torch.tensor(times, dtype=torch.float64).unbind()))
        self._nodes = dict(zip(times, map(Node._make, zip(*columns, strict=True)), strict=True))

    def settle(self) -> None:
        """Raise what the evaluations since the last check did wrong."""
        self.score.check()

    def at(self, t: Time, x: Tensor) -> Node:
        """The process at t: from the table on a grid, computed anywhere else."""
        if isinstance(t, float):
            if t not in self._nodes:
                alpha, sigma, f, g2 = (float(y) for y in self.sde.coefficients(t))
                return Node(alpha, sigma, f, g2, float(self.sde.half_log_snr(t)), solver_time(t))
            return self._nodes[t]
        time = as_time(t, self.sde.T)
        c = self.sde.coefficients(time)
        given = time if time.ndim == 0 else batch_time(time, x)
        return Node._make([*(expand(y, x) for y in (*c, c.alpha.log() - c.sigma.log())), given])

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """f x - (1 + churn^2)/2 g^2 score(x, t); one evaluation."""
        n = self.at(t, x)
        return combine(n.f, x, -0.5 * (1 + self.churn**2) * n.g2, self.score(x, n.time))

    def diffusion(self, t: Time) -> Any:
        """churn g(t): a float for a float, else a tensor of t's shape."""
        if isinstance(t, float):
            node = self._nodes.get(t)
            return self.churn * (float(self.sde.diffusion(t)) if node is None else node.g2**0.5)
        return self.churn * self.sde.diffusion(t)

    def predict(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """(E[x_0|x_t], E[eps|x_t]) with x = alpha x_0 + sigma eps; one evaluation."""
        n = self.at(t, x)
        score = self.score(x, n.time)
        return combine(1 / n.alpha, x, n.sigma**2 / n.alpha, score), -n.sigma * score

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """E[x_0|x_t] = (x + sigma^2 score)/alpha; one evaluation."""
        return self.predict(x, t)[0]


def combine(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """a x + b y, in one pass less where b is a number."""
    return torch.add(a * x, y, alpha=b) if isinstance(b, float) else a * x + b * y
