"""Models made of models: what they have from the one that they are made of."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import samples
from sdekit.processes.counted import Model, as_model, ask
from sdekit.processes.kinds import BLIND, Kind, express, kind_of, to_score
from sdekit.processes.law import law_of, require_centred, require_same
from sdekit.processes.reverse import levels_of
from sdekit.processes.sde import SDE
from sdekit.system import NOTHING, Score, as_time, expand


class Derived:
    """A model of the kind and the process of the one inside; ``device``, ``event``, ``data_range`` and ``levels`` too.

    ``network_calls``: those of one evaluation, at most.
    """

    def __init__(self, score: Score, inside: Model, calls: int | None = None) -> None:
        self.inside, self.sde, self.predicts = inside, inside.sde, inside.predicts
        self.network_calls: int = getattr(inside, "network_calls", 1) if calls is None else calls
        self.event: tuple[int, ...] | None = getattr(score, "event", None)
        self.data_range: tuple[float, float] | None = getattr(score, "data_range", None)
        self.levels: int | None = getattr(score, "levels", None)
        self.score = score

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inside!r})"

    @property
    def device(self) -> torch.device | None:
        """Where the network's weights are, if the score inside tells."""
        return getattr(self.score, "device", None)

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        """Score at x (B, *event) and t (0-d or (B,)), like x."""
        time = as_time(t, self.sde.T)
        out = self.output(x, time)
        if self.predicts == "score":
            return out
        a, b = to_score(self.predicts, self.sde, time)
        return expand(a, x) * out + expand(b, x) * self.sde.centre(x, time)

    def under(self, sde: SDE) -> "Under":
        """The same model under another process, by the map of noise levels (:class:`Under`)."""
        return Under(self, sde)

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What it says, a ``predicts`` like x."""
        raise NotImplementedError

    def prepare(self, times: Sequence[float], x: Tensor) -> Sequence[Any]:
        """What it and the models inside make of the times of a loop."""
        raise NotImplementedError


class Chunked(Derived):
    """A model that is asked for at most so many samples at a time."""

    def __init__(self, score: Score, sde: Any, many: int) -> None:
        super().__init__(score, as_model(score, sde))
        self._many = many

    def prepare(self, times: Sequence[float], x: Tensor) -> Sequence[Any]:
        """What the model inside makes of the times."""
        return self.inside.prepare(times, x)

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What the model inside says."""
        parts = []
        for rows in torch.arange(len(x)).split(self._many):
            own = slice(int(rows[0]), int(rows[-1]) + 1)
            with samples(rows, len(x)):
                parts.append(ask(self.inside, x[own], time[own] if time.ndim else time, ready).clone())
        return torch.cat(parts)


class Under(Derived):
    """A model of a process, under another one; what ``score.under(sde)`` returns.

    x = alpha x_0 + sigma eps says of x_0 what x' = alpha' x_0 + sigma' eps does where the level sigma'/alpha' is the
    same, so the model is asked about x' at the time t' of its own process where that is  (Karras et al. 2022, appendix
    B.3). At levels that its own process does not have, or only below its t_min, it is asked at the nearest one, about
    x of that size, and E[x_0|x] is taken from there: high above the data that depends on neither, and far below it is
    x.
    """

    def __init__(self, model: Model, sde: SDE) -> None:
        super().__init__(model, model)  # type: ignore[arg-type]
        _checks.instance(sde)
        for one in (model.sde, sde):
            require_centred(one, "under")
        if law_of(model.sde) != law_of(sde):
            raise ValueError(
                f"under changes noise levels alone: {type(model.sde).__name__} and {type(sde).__name__} have different "
                "noise, which a model is trained for"
            )
        self.sde = sde
        end = levels_of(sde, torch.tensor(sde.T, dtype=torch.float64))
        if model.predicts in BLIND and bool(end.alpha <= NOTHING * end.sigma):
            self.predicts = "v"  # E[x_0|x] is known where alpha = 0, and these could not say it

    def given(self, *args: Any, **kwargs: Any) -> "Under":
        """That of the model with these conditions (:meth:`NetworkScore.given`)."""
        inside: Any = self.inside
        return Under(inside.given(*args, **kwargs), self.sde)

    def prepare(self, times: Sequence[float], x: Tensor) -> list[Any]:
        """The times of the model's own process and what it makes of them, and the numbers there."""
        own, numbers = self._carried(torch.tensor(times, dtype=torch.float64))
        return list(zip(own.unbind(), self.inside.prepare(own.tolist(), x), columns(numbers), strict=True))

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What the model inside says, in this kind."""
        if ready is None:
            own, numbers = self._carried(time.cpu())
            ready = own.to(time.device), None, fitting(numbers, x)
        own, inside, (gain, a, b) = ready
        return a * ask(self.inside, gain * x, own, inside).to(x.dtype) + b * x

    def _carried(self, times: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """t', the factor of x, and (a, b) of what is said here, a o + b x."""
        lv, theirs = levels_of(self.sde, times), self.inside.sde
        ends = torch.tensor([theirs.T, theirs.t_min], dtype=torch.float64)
        top, bottom = levels_of(theirs, ends).lam
        lam = lv.lam.clamp(top, bottom)
        own = theirs.inverse_half_log_snr(lam)
        own = torch.where(lam == top, ends[0], torch.where(lam == bottom, ends[1], own))
        at = levels_of(theirs, own)
        gain = torch.hypot(at.alpha, at.sigma) / torch.hypot(lv.alpha, lv.sigma)
        said, wanted = kind_of(self.inside.predicts, theirs, own), kind_of(self.predicts, self.sde, times)
        same = lam == lv.lam
        a, b = express(wanted, said, at.alpha, at.sigma)  # of gain x, which has the same x_0 and eps
        # At another level it has not: x_0 is what the model says, and eps what is then left of x.
        c, d = express(Kind(torch.ones_like(gain), torch.zeros_like(gain)), said, at.alpha, at.sigma)
        share = wanted.m - wanted.n * lv.alpha / lv.sigma
        rest = share * d * gain + wanted.n / lv.sigma
        return own, (gain, torch.where(same, a, share * c), torch.where(same, b * gain, rest))


class Whitened(Derived):
    """A model of a process with noise L z, of L^-1 x: what it says of x_0 and eps, times L^-1."""

    def __init__(self, score: Score, sde: SDE) -> None:
        super().__init__(score, as_model(score, sde))
        require_same(self.inside.sde, sde, torch.linspace(sde.t_min, sde.T, 9, dtype=torch.float64))
        self._outer, self.sde = sde, sde.white

    def prepare(self, times: Sequence[float], x: Tensor) -> Sequence[Any]:
        """What the model inside makes of the times."""
        return self.inside.prepare(times, x)

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What the model inside says of L x, times L^-1."""
        return self._outer.whiten(ask(self.inside, self._outer.colour(x), time, ready).to(x.dtype))


class Scores:
    """A function of scores that tell no process, which is then a score and no model."""

    def __init__(self, made: Derived) -> None:
        self.made, self.network_calls = made, made.network_calls

    @property
    def device(self) -> torch.device | None:
        """Where the network's weights are, if a score inside tells."""
        return self.made.device

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        """The score at x (B, *event) and t (0-d or (B,)), like x."""
        return self.made.output(x, as_time(t, math.inf))


def finished(made: Derived) -> Any:
    """The model, or a score where no process is known."""
    return Scores(made) if made.sde is None else made


def inside(*scores: Score) -> list[Model]:
    """Scores as models, where a process is known to any of them: a score is one under every process."""
    sde = next((s.sde for s in scores if hasattr(s, "predicts") and hasattr(s, "sde")), None)
    return [as_model(score, sde) for score in scores]


def columns(numbers: Sequence[Tensor]) -> list[tuple[float, ...]]:
    """Numbers of many times, (n,) each, as those of each time."""
    return list(zip(*(y.tolist() for y in numbers), strict=True))


def fitting(numbers: Sequence[Tensor], x: Tensor) -> tuple[Any, ...]:
    """Numbers of a time () or of times (B,) as they multiply x."""
    return tuple(expand(y, x) for y in numbers)


def gradient_of(value: Tensor, x: Tensor, graph: bool, message: str) -> Tensor:
    """d sum(value)/dx; ValueError with the message where there is none."""
    if not value.requires_grad:
        raise ValueError(message)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=graph, retain_graph=graph, allow_unused=True)
    if slope is None:
        raise ValueError(message)
    return slope


def leaf(x: Tensor, graph: bool) -> Tensor:
    """x to differentiate by: itself where somebody outside differentiates too."""
    if graph and x.requires_grad:
        return x
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()
