"""Models made of models: what they have from the one that they are made of."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdekit.processes.counted import Model, as_model, ask, samples
from sdekit.processes.kinds import to_score
from sdekit.system import Score, as_time, expand


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
        return expand(a, x) * out + expand(b, x) * x

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
