"""The reverse family of a process and a model: what the step rules of a sampler see."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.processes.counted import Counted, Model, Moment, as_model, placed
from sdekit.processes.kept import MOST, kept
from sdekit.processes.kinds import BLIND, Kind, express, kind_of, zero_signal
from sdekit.processes.law import require_same
from sdekit.system import NOTHING, Levels, Process, Score, System, Time, as_time, expand, float64, holds

V = TypeVar("V")


def said_of(model: Model, sde: Process, lv: Levels) -> Kind:
    """What a model predicts, as a kind of the process. Raises ValueError for one that was wrapped for another."""
    require_same(model.sde, sde, lv.time)
    return kind_of(model.predicts, model.sde, lv.time)


def levels_of(sde: Process, times: Tensor) -> Levels:
    """alpha, sigma and half log-SNR at all times, in one vectorised call; what a schedule rounds to for 0 is 0."""
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    alpha = torch.where(alpha > NOTHING * sigma, alpha, torch.zeros_like(alpha))
    return Levels(times, alpha, sigma, alpha.log() - sigma.log())


class Node(NamedTuple):
    """A process at one time, in the form that multiplies x: Python floats on a grid, tensors per sample."""

    alpha: Any
    sigma: Any
    f: Any  # d log(alpha)/dt
    g2: Any  # squared diffusion
    lam: Any  # half log-SNR
    said: Kind  # what the model predicts
    drift: tuple[Any, Any]  # a, b of the drift, a output + b x
    time: Moment  # what the model is given


class Reverse(System):
    """dx = [f x - (1 + churn^2)/2 g^2 score] dt + churn g dW,  dt < 0  (Song et al. 2021, eq. 6 and 13).

    Every ``churn`` >= 0 has the marginals p_t: 1 is the reverse SDE, 0 the probability flow, above 1
    is more noise than the process had. t is a float, a 0-d or a (B,) tensor; everything returned is like x.
    ``model(x, moment)``: what the model says, counted; :meth:`express` has the numbers that make of it whatever kind
    of prediction a rule works with.
    Of a process with a mean of its own (ShiftedSDE) all methods here are of x less that, which ``centre`` takes and
    :func:`sdekit.solve` too.
    Raises ValueError for churn < 0, and for a model that says nothing where alpha = 0 if it is asked there.
    """

    def __init__(self, sde: Process, score: Score, churn: float = 1.0) -> None:
        self.churn = _checks.positive(churn, "churn", zero=True)
        self.sde, self.model = sde, Counted(placed(as_model(score, sde), sde))
        if self.churn and not self.diffuses:
            raise ValueError(
                f"{type(sde).__name__} has no reverse SDE, whose churn is {self.churn:g}: only a flow, churn = 0, for "
                "samplers without noise (unipc_2, heun, ode_sample)"
            )
        self._nodes: dict[float, Node] = {}  # at the times of the loop that runs, once it has asked for one
        self._visits: frozenset[float] = frozenset()
        self._kept: dict[Hashable, Any] = {}
        self._placed: tuple[Any, Any] = (None, None)

    @property
    def diffuses(self) -> bool:  # type: ignore[override]
        """Whether the process is made by a Brownian motion: if not there is no reverse SDE."""
        return getattr(self.sde, "diffuses", True)

    @property
    def shifted(self) -> bool:  # type: ignore[override]
        """Whether the process has a mean of its own; everything here is of x less that."""
        return not getattr(self.sde, "centred", True)

    def centre(self, x: Tensor, t: Time) -> Tensor:
        """x - m(t): what :meth:`place` was given, where x is what it last made of it (an evaluation was at that)."""
        if not self.shifted:
            return x
        return self._placed[1] if x is self._placed[0] else self.sde.centre(x, t)  # type: ignore[attr-defined]

    def place(self, x: Tensor, t: Time) -> Tensor:
        """x of x - m(t)."""
        if not self.shifted:
            return x
        self._placed = self.sde.place(x, t), x  # type: ignore[attr-defined]
        return self._placed[0]

    @property
    def root(self) -> Any:  # type: ignore[override]
        """The process's L."""
        return getattr(self.sde, "root", None)

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """Network evaluations so far, counted at the network."""
        return self.model.nfe

    @property
    def network_calls(self) -> int:  # type: ignore[override]
        """Those of one evaluation, at most, as far as is known."""
        return self.model.network_calls

    @property
    def backwards_only(self) -> bool:  # type: ignore[override]
        """With noise the family's marginals are p_t in decreasing time only; the flow runs both ways."""
        return self.churn > 0

    @property
    def interval(self) -> tuple[float, float]:
        """[t_min, T]: nearer to the data the score may be singular."""
        return self.sde.t_min, self.sde.T

    def prepare(self, times: Sequence[float], x: Tensor) -> None:
        """All times of a loop. What is computed of them is kept for the next loop over the same, of any system."""
        self._nodes, self._visits = {}, frozenset(times)
        model, sde = self.model.model, self.sde
        visits = torch.tensor(sorted(self._visits), dtype=torch.float64)

        def make() -> dict[Hashable, Any]:
            require_same(model.sde, sde, visits)  # the likelier mistake, so it is said first
            if bool((self.levels(visits).alpha == 0).any()):
                self.require_signal()
            return {}

        def watch(times: Tensor) -> list[Tensor]:
            seen = [sde.alpha(times), sde.sigma(times)]
            if model.predicts == "flow":
                seen += kind_of("flow", model.sde, times)
            return seen if model.sde is sde else [*seen, model.sde.alpha(times), model.sde.sigma(times)]

        key = (self._visits, self.churn, model.predicts, model.sde is sde, sde.T, sde.t_min)
        self._kept = kept(sde, key, make, lambda _: visits, watch)
        model.prepare((), x)  # what does not fit x says so before the first step

    def require_signal(self) -> None:
        """Raise ValueError for a model that says nothing where alpha = 0."""
        if self.model.model.predicts in BLIND:
            raise ValueError(zero_signal(self.sde, self.model.model.predicts))

    def keep(self, key: Hashable, make: Callable[[], V]) -> V:
        """``make()``, once for a grid: a function of process, churn, what the model predicts and ``key`` alone."""
        if not self._visits:  # no loop runs, and nobody has looked whether the process is what it was
            return make()
        value: V = self._kept.get(key)  # type: ignore[assignment]
        if value is None:
            with torch.inference_mode(False), torch.no_grad():  # a later loop may be of another mode
                value = self._kept[key] = make()
            for old in list(self._kept)[:-MOST]:  # of rules that are made anew for every call
                self._kept.pop(old, None)
        return value

    def moments(self, times: Sequence[float], x: Tensor) -> list[Moment]:
        """What the model is given at these times, for states like x. The tensors are its own: it may change them."""
        numbers = self.keep(("moments", tuple(times)), lambda: self._numbers(times))
        own = torch.tensor(times, dtype=torch.float64).unbind()
        ready = self.model.model.prepare(times, x)
        return [Moment(t, r, a, b) for t, r, (a, b) in zip(own, ready, numbers, strict=True)]

    def _numbers(self, times: Sequence[float]) -> list[tuple[float, float]]:
        a, b = self.score_of(self.levels(torch.tensor(times, dtype=torch.float64)))
        return list(zip(a.tolist(), b.tolist(), strict=True))

    def levels(self, times: Tensor) -> Levels:
        """alpha, sigma and half log-SNR at all times, in one vectorised call."""
        return levels_of(self.sde, times)

    def said(self, lv: Levels) -> Kind:
        """What the model predicts, as a kind of this process."""
        return said_of(self.model.model, self.sde, lv)

    def express(self, wanted: Kind, lv: Levels) -> tuple[Tensor, Tensor]:
        """(a, b) of  wanted = a output + b x  at the levels."""
        return express(wanted, self.said(lv), lv.alpha, lv.sigma)

    def score_of(self, lv: Levels) -> tuple[Tensor, Tensor]:
        """(a, b) of  score = a output + b x  at the levels."""
        if self.model.model.predicts == "score" and self.model.model.sde is self.sde:
            return torch.ones_like(lv.alpha), torch.zeros_like(lv.alpha)
        return self.express(Kind(torch.zeros_like(lv.sigma), -1 / lv.sigma), lv)

    def settle(self) -> None:
        """Raise what the evaluations since the last check did wrong, and forget the loop's times."""
        self._nodes, self._visits, self._kept = {}, frozenset(), {}
        self.model.check()

    def at(self, t: Time, x: Tensor) -> Node:
        """The process at t: from the table on a grid, computed anywhere else."""
        if isinstance(t, float):
            node = self._nodes.get(t)
            return self._look(t, x) if node is None else node
        time = as_time(t, self.sde.T)
        given = time if time.ndim == 0 else batch_time(time, x)
        row, lv = self._row(time)
        if time.device.type == "cpu" and not holds(lv.alpha != 0):
            self.require_signal()
        a, b = (expand(y, x) for y in self.score_of(lv))
        alpha, sigma, f, g2, lam, m, n, out, own = (expand(y, x) for y in row)
        return Node(alpha, sigma, f, g2, lam, Kind(m, n), (out, own), Moment(given, None, a, b))

    def _look(self, t: float, x: Tensor) -> Node:
        """The node at t; with it those at all times of the loop that it belongs to."""
        times = sorted(self._visits) if t in self._visits else [t]
        rows = self.keep(("nodes", tuple(times)), lambda: self._rows(times))
        nodes = {
            t: Node(alpha, sigma, f, g2, lam, Kind(m, n), (out, own), moment)
            for t, (alpha, sigma, f, g2, lam, m, n, out, own), moment in zip(
                times, rows, self.moments(times, x), strict=True
            )
        }
        if nodes[t].alpha == 0:
            self.require_signal()
        if t in self._visits:
            self._nodes = nodes
        return nodes[t]

    def _rows(self, times: list[float]) -> list[tuple[float, ...]]:
        row, _ = self._row(torch.tensor(times, dtype=torch.float64))
        return list(zip(*(y.tolist() for y in row), strict=True))

    def _row(self, time: Tensor) -> tuple[list[Tensor], Levels]:
        lv, c = self.levels(time), self.sde.coefficients(time)
        said = self.said(lv)
        # The flow's velocity alpha' x_0 + sigma' eps, finite also where f is not, and the drift that goes with noise.
        noise = self.churn**2 * c.g2 / (2 * lv.sigma) if self.churn else 0.0
        drift = express(Kind(c.dalpha, c.dsigma + noise), said, lv.alpha, lv.sigma)
        return [lv.alpha, lv.sigma, c.f, c.g2, lv.lam, *said, *drift], lv

    def score(self, x: Tensor, time: Moment | Time) -> Tensor:
        """The score at x and a node's ``time`` (or any t), in x's dtype; one evaluation."""
        moment = time if isinstance(time, Moment) else self.at(time, x).time
        out = self.model(x, moment)
        if isinstance(moment.a, float) and moment.a == 1.0 and moment.b == 0.0:
            return out
        return combine(moment.b, x, moment.a, out)

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """f x - (1 + churn^2)/2 g^2 score(x, t); one evaluation."""
        n = self.at(t, x)
        out, own = self._finite(n)
        return combine(own, x, out, self.model(x, n.time))

    def add_drift(self, x: Tensor, t: float, h: float, at: Tensor | None = None) -> Tensor:
        """x + h drift(at, t), without the drift in memory of its own; one evaluation."""
        if type(self).drift is not Reverse.drift:
            return super().add_drift(x, t, h, at)
        n, y = self.at(t, x), x if at is None else at
        out, own = self._finite(n)
        said = self.model(y, n.time)
        if own == 0:  # a network that predicts this very velocity
            return x.add(said, alpha=h * out)
        return x.add(y, alpha=h * own).add_(said, alpha=h * out)

    def _finite(self, n: Node) -> tuple[Any, Any]:
        if isinstance(n.alpha, float) and n.alpha == 0:
            self.require_drift()
        return n.drift

    def require_drift(self) -> None:
        """Raise ValueError where alpha = 0, if the system has noise: its drift and diffusion are infinite there."""
        if self.churn:
            raise ValueError(
                f"the reverse SDE of {type(self.sde).__name__} has no finite drift where alpha = 0, at T = "
                f"{self.sde.T:g}: start a little lower (sde.T = {0.99 * self.sde.T:g}, with grid='karras': even steps "
                "of t are too long), or sample by a rule on the transition (ancestral, sa_solver, dpmpp_2m_sde) or "
                "the flow (churn = 0)"
            )

    def diffusion(self, t: Time) -> Any:
        """churn g(t): a float for a float, else a tensor of t's shape and dtype."""
        if isinstance(t, float):
            node = self._nodes.get(t)
            return self.churn * float(self.sde.coefficients(t).g2 if node is None else node.g2) ** 0.5
        g = self.churn * self.sde.coefficients(t).g2.sqrt()
        return g.to(t.dtype) if t.is_floating_point() else g

    def predict(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """(E[x_0|x_t], E[eps|x_t]) with x = alpha x_0 + sigma eps; one evaluation."""
        n = self.at(t, x)
        out = self.model(x, n.time)
        x_0, eps = (express(Kind(*wanted), n.said, n.alpha, n.sigma) for wanted in ((1.0, 0.0), (0.0, 1.0)))
        return combine(x_0[1], x, x_0[0], out), combine(eps[1], x, eps[0], out)

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """E[x_0|x_t] = (x + sigma^2 score)/alpha; one evaluation."""
        return self.predict(x, t)[0]


def combine(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """a x + b y, in one pass and one tensor less where b is a number."""
    return (a * x).add_(y, alpha=b) if isinstance(b, float) else a * x + b * y


def batch_time(t: Tensor, x: Tensor) -> Tensor:
    """Per-sample times on x's device in its widest dtype."""
    return t.to(x.device, float64(x.device))
