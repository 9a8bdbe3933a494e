"""The reverse family of a process and a score: what the step rules of a sampler see."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.system import Levels, Process, Score, System, Time, as_time, expand, float64


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

    def __init__(self, sde: Process, score: Score, churn: float = 1.0) -> None:
        self.churn = _checks.positive(churn, "churn", zero=True)
        sde.require_signal_at_T()
        self.sde, self.score = sde, CountedScore(score)
        self._nodes: dict[float, Node] = {}  # at the times of the loop that runs, once it has asked for one
        self._visits: frozenset[float] = frozenset()

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
        """Remember all times of a loop, so that the first look tabulates the process at all of them in one call."""
        self._nodes, self._visits = {}, frozenset(times)

    def _node(self, t: float) -> Node:
        node = self._nodes.get(t)
        if node is not None:
            return node
        if t not in self._visits:
            return self._tabulated([t])[t]
        self._nodes = self._tabulated(list(self._visits))
        return self._nodes[t]

    def _tabulated(self, times: list[float]) -> dict[float, Node]:
        time = torch.tensor(times, dtype=torch.float64)
        columns: list[list[Any]] = [y.tolist() for y in self._row(time)]
        return dict(zip(times, map(Node, *columns, time.unbind()), strict=True))

    def levels(self, times: Tensor) -> Levels:
        """alpha, sigma and half log-SNR at all times, in one vectorised call."""
        alpha, sigma = self.sde.alpha(times), self.sde.sigma(times)
        return Levels(times, alpha, sigma, alpha.log() - sigma.log())

    def settle(self) -> None:
        """Raise what the evaluations since the last check did wrong."""
        self.score.check()

    def at(self, t: Time, x: Tensor) -> Node:
        """The process at t: from the table on a grid, computed anywhere else."""
        if isinstance(t, float):
            return self._node(t)
        time = as_time(t, self.sde.T)
        given = time if time.ndim == 0 else batch_time(time, x)
        return Node._make([*(expand(y, x) for y in self._row(time)), given])

    def _row(self, time: Tensor) -> list[Tensor]:
        c = self.sde.coefficients(time)
        return [*c, c.alpha.log() - c.sigma.log()]

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """f x - (1 + churn^2)/2 g^2 score(x, t); one evaluation."""
        n = self.at(t, x)
        return combine(n.f, x, -0.5 * (1 + self.churn**2) * n.g2, self.score(x, n.time))

    def add_drift(self, x: Tensor, t: float, h: float, at: Tensor | None = None) -> Tensor:
        """x + h drift(at, t), without the drift in memory of its own; one evaluation."""
        if type(self).drift is not Reverse.drift:
            return super().add_drift(x, t, h, at)
        n, y = self.at(t, x), x if at is None else at
        score = self.score(y, n.time)
        return x.add(y, alpha=h * n.f).add_(score, alpha=-0.5 * h * (1 + self.churn**2) * n.g2)

    def diffusion(self, t: Time) -> Any:
        """churn g(t): a float for a float, else a tensor of t's shape and dtype."""
        if isinstance(t, float):
            return self.churn * self._node(t).g2 ** 0.5
        g = self.churn * self.sde.coefficients(t).g2.sqrt()
        return g.to(t.dtype) if t.is_floating_point() else g

    def predict(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """(E[x_0|x_t], E[eps|x_t]) with x = alpha x_0 + sigma eps; one evaluation."""
        n = self.at(t, x)
        score = self.score(x, n.time)
        return combine(1 / n.alpha, x, n.sigma**2 / n.alpha, score), -n.sigma * score

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """E[x_0|x_t] = (x + sigma^2 score)/alpha; one evaluation."""
        return self.predict(x, t)[0]


def combine(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """a x + b y, in one pass and one tensor less where b is a number."""
    return (a * x).add_(y, alpha=b) if isinstance(b, float) else a * x + b * y


_WINDOW = 64  # evaluations between looks at whether they were finite


class CountedScore:
    """A score as the solvers see it: every evaluation is counted, bounded by a budget, and checked.

    The count is the number of calls, whatever the batch. A result of another shape or of a dtype
    that is not floating raises at once; a non-finite one raises FloatingPointError that names t,
    at once for per-sample times and within 64 evaluations otherwise (looking at every value would
    make a GPU wait). Past ``budget`` evaluations it raises RuntimeError instead of calling.
    """

    def __init__(self, score: Score, budget: int | None = None) -> None:
        if not callable(score):
            raise TypeError(f"score must be a callable (x, t) -> like x, got {type(score).__name__}")
        self.score, self.budget, self.nfe = score, budget, 0
        self._times: list[Tensor] = []  # of the evaluations since the last check
        self._sums = torch.zeros(0)  # theirs, in one piece of memory: scattered, they would break up the heap
        self._slots: tuple[Tensor, ...] = ()
        self._like: tuple[Any, Any] = (None, None)  # dtype and device that the sums are for

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The checked score, in x's dtype; one evaluation."""
        if self.nfe == self.budget:
            raise RuntimeError(f"the step rule needs more than the nfe budget of {self.budget} evaluations")
        self.nfe += 1
        out = self.score(x, t)
        if not (isinstance(out, Tensor) and out.dtype is x.dtype and out.shape == x.shape):
            out = self._fitting(out, x)
        if out.stride() != x.stride():  # or the next x would come in the layout of this result
            out = torch.empty_like(x).copy_(out)
        if out.dtype is not self._like[0] or out.device != self._like[1]:
            self._make_room(out)
        # A sum is finite only if every entry is: one reduction, and nobody waits for it.
        slot = self._slots[len(self._times)]
        try:
            torch.sum(out, None, out=slot)
        except (
            RuntimeError
        ):  # out= wants no gradients and no dual numbers; to detach always would cost more than to try
            torch.sum(out.detach(), None, out=slot)
        self._times.append(t)
        if len(self._times) == _WINDOW or t.ndim:
            self.check()
        return out

    def _make_room(self, out: Tensor) -> None:
        self.check()
        self._like = (out.dtype, out.device)
        with torch.inference_mode(False):  # they are written to whatever the mode of a later call
            dtype = torch.float64 if out.dtype is torch.float64 else torch.float32
            self._sums = torch.zeros(_WINDOW, dtype=dtype, device=out.device)
            self._slots = self._sums.unbind()

    @staticmethod
    def _fitting(out: Any, x: Tensor) -> Tensor:
        """The score in x's dtype, or an error that says what it was instead."""
        if not isinstance(out, Tensor) or out.shape != x.shape or not out.is_floating_point():
            got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"score must return a floating tensor of x's shape {tuple(x.shape)}, got {got}")
        return out.to(x.dtype)

    def check(self) -> None:
        """Raise FloatingPointError if an evaluation since the last check was not finite."""
        times, self._times = self._times, []
        if not times:
            return
        finite = torch.isfinite(self._sums[: len(times)])
        if not finite.all():
            t = times[int((~finite).int().argmax())]
            at = f"t = {float(t.min()):g}" + (f" ... {float(t.max()):g}" if t.ndim == 1 and t.numel() > 1 else "")
            raise FloatingPointError(f"score returned NaN or infinite values at {at}; check it there, or raise t_min")


def batch_time(t: Tensor, x: Tensor) -> Tensor:
    """Per-sample times on x's device in its widest dtype."""
    return t.to(x.device, float64(x.device))
