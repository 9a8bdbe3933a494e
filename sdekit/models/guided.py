"""The models that guidance makes: a mix of what a pair of models says, a gradient added to what one says."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdekit.batch import only_real
from sdekit.models.conditions import Conditions, joined
from sdekit.models.derived import Derived, columns, fitting, gradient_of, inside, leaf
from sdekit.models.network import NetworkScore
from sdekit.processes.counted import Model, ask
from sdekit.processes.kinds import BLIND, express, kind_of, to_score, zero_signal
from sdekit.processes.law import law_of, require_centred, require_gradient
from sdekit.processes.reverse import levels_of, said_of
from sdekit.system import Score, differentiating, holds, ordinary

Mix = Callable[[Tensor, Tensor], Tensor]  # (c, u) -> what is said, sample by sample


class Apart:
    """What two models say, each by a call of its own; the second in the first one's kind."""

    def __init__(self, strong: Model, weak: Model) -> None:
        self.strong, self.weak = strong, weak
        self.network_calls: int = getattr(strong, "network_calls", 1) + getattr(weak, "network_calls", 1)
        self._alike = strong.predicts == weak.predicts and strong.sde is weak.sde
        if strong.sde is not weak.sde and None not in (strong.sde, weak.sde) and law_of(strong.sde) != law_of(weak.sde):
            raise ValueError(
                f"two models are mixed under one process; these are of {type(strong.sde).__name__} and "
                f"{type(weak.sde).__name__}, which have different noise or means"
            )
        if not self._alike:
            require_centred(strong.sde, "a weaker model of another kind of prediction")

    def prepare(self, times: Sequence[float], x: Tensor) -> list[Any]:
        """What both make of the times, and the numbers between their kinds."""
        numbers: list[Any] = [None] * len(times)
        if not self._alike:
            numbers = columns(self._numbers(torch.tensor(times, dtype=torch.float64)))
        return list(zip(self.strong.prepare(times, x), self.weak.prepare(times, x), numbers, strict=True))

    def both(self, x: Tensor, time: Tensor, ready: Any) -> tuple[Tensor, Tensor]:
        """(c, u)."""
        first, second, numbers = (None, None, None) if ready is None else ready
        c = ask(self.strong, x, time, first).clone()  # a network may write its next result over this one
        u = ask(self.weak, x, time, second)
        if not self._alike:
            a, b = fitting(self._numbers(time), x) if numbers is None else numbers
            u = a * u + b * x
        return c, u

    def _numbers(self, time: Tensor) -> tuple[Tensor, Tensor]:
        sde = self.strong.sde
        lv = levels_of(sde, time.cpu())
        if self.weak.predicts in BLIND and self.strong.predicts not in BLIND and not holds(lv.alpha != 0):
            raise ValueError(zero_signal(sde, self.weak.predicts))
        a, b = express(kind_of(self.strong.predicts, sde, lv.time), said_of(self.weak, sde, lv), lv.alpha, lv.sigma)
        return a, b


class Together:
    """What a network says under two conditions, by one call of twice the samples."""

    network_calls = 1

    def __init__(self, strong: NetworkScore, weak: NetworkScore) -> None:
        self.strong, self.weak = strong, weak
        self._joined: tuple[Any, Any, Any] = (None, None, None)

    def _given(self, x: Tensor) -> Any:
        c, u = (m.conditions.of(x) if m.conditions is not None else ((), {}) for m in (self.strong, self.weak))
        if c is not self._joined[0] or u is not self._joined[1]:
            self._joined = c, u, joined(c, u, len(x))
        return self._joined[2]

    def prepare(self, times: Sequence[float], x: Tensor) -> list[Any]:
        """What the network's clock says of the times for one batch, and for both."""
        self._given(x)
        twice = x.new_empty(2 * x.shape[0], *x.shape[1:])
        return list(zip(self.strong.prepare(times, x), self.strong.clocks(times, twice), strict=True))

    def both(self, x: Tensor, time: Tensor, ready: Any) -> tuple[Tensor, Tensor]:
        """(c, u)."""
        out = self.strong.output(
            torch.cat([x, x]), torch.cat([time, time]) if time.ndim else time, ready and ready[1], self._given(x)
        )
        return out[: len(x)], out[len(x) :]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_joined": (None, None, None)}


class Guided(Derived):
    """A mix of what a pair of models says, within a band of noise levels; outside what the first one says.

    ``kind``: of the predictions that are mixed; None where it is the same in all. ``quiet``: the level sigma/alpha
    above which a prediction of this kind is 0, without a call.
    """

    def __init__(
        self, pair: Apart | Together, mix: Mix, interval: Any = None, kind: str | None = None, quiet: float = math.inf
    ) -> None:
        super().__init__(pair.strong, pair.strong, pair.network_calls)  # type: ignore[arg-type]
        self.pair, self._mix, self._band, self._quiet = pair, mix, band(interval), quiet
        self._kind = None if kind == self.predicts and math.isinf(quiet) else kind
        if self.sde is None and (self._kind or interval is not None):
            raise ValueError("noise levels and kinds of prediction need a process: make the score a model by as_score")
        if self._kind is not None:
            require_centred(self.sde, "guidance in another kind of prediction")

    def prepare(self, times: Sequence[float], x: Tensor) -> list[Any]:
        """What the pair makes of the times, the numbers between the kinds, and whether each is in the band."""
        numbers, within, silent = self._numbers(torch.tensor(times, dtype=torch.float64))
        kinds = columns(numbers) if numbers else [()] * len(times)
        flags = [y.tolist() if isinstance(y, Tensor) else [y] * len(times) for y in (within, silent)]
        return list(zip(self.pair.prepare(times, x), kinds, *flags, strict=True))

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """The mix, in the first model's kind."""
        if ready is None:
            numbers, within, silent = self._numbers(time)
            ready = None, fitting(numbers, x), _flag(within, x), _flag(silent, x)
        inside, numbers, within, silent = ready
        if silent is True:
            return numbers[3] * x
        if within is False:
            return ask(self.pair.strong, x, time, None if inside is None else inside[0])
        c, u = (only_real(y) for y in self.pair.both(x, time, inside))
        if numbers:
            a, b, back, rest = numbers
            out = back * self._mix(a * c + b * x, a * u + b * x) + rest * x
        else:
            out = self._mix(c, u)
        if within is not True:
            out = torch.where(within, out, c)
        return out if silent is False else torch.where(silent, numbers[3] * x, out)

    def _numbers(self, time: Tensor) -> tuple[tuple[Tensor, ...], Any, Any]:
        """(a, b) of the kind that is mixed, and (a, b) back from it; whether in the band; whether above ``quiet``."""
        if self.sde is None or (self._kind is None and self._band == (0.0, math.inf) and math.isinf(self._quiet)):
            return (), True, False  # a process without levels can be guided so, too
        lv = levels_of(self.sde, time.cpu())
        level, (low, high) = lv.sigma / lv.alpha, self._band
        within = True if (low, high) == (0.0, math.inf) else (low < level) & (level <= high)
        silent = False if math.isinf(self._quiet) else level > self._quiet
        if self._kind is None:
            return (), within, silent
        said, mixed = (kind_of(name, self.sde, lv.time) for name in (self.predicts, self._kind))
        if self.predicts in BLIND and self._kind not in BLIND and not holds(lv.alpha != 0):
            raise ValueError(zero_signal(self.sde, self.predicts))
        there, back = express(mixed, said, lv.alpha, lv.sigma), express(said, mixed, lv.alpha, lv.sigma)
        return (*there, *back), within, silent


class Classified(Derived):
    """A model with the gradient of a log-probability added to its score."""

    def __init__(self, score: Score, log_prob: Callable[..., Tensor], scale: float, given: Sequence[Any]) -> None:
        super().__init__(score, inside(score)[0])
        require_gradient(self.sde, "classifier guidance")
        self._log_prob, self._scale = log_prob, scale
        self._given = Conditions(tuple(given) if isinstance(given, tuple | list) else (given,), {})

    def prepare(self, times: Sequence[float], x: Tensor) -> list[Any]:
        """What the model inside makes of the times, and what the gradient is multiplied by in its kind."""
        self._given.of(x)
        gains = self._gain(torch.tensor(times, dtype=torch.float64)).tolist()
        return list(zip(self.inside.prepare(times, x), gains, strict=True))

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What the model inside says, and the gradient in its kind."""
        inside, gain = (None, fitting([self._gain(time)], x)[0]) if ready is None else ready
        if not holds(torch.isfinite(torch.as_tensor(gain))):
            raise ValueError(
                f"log_prob says nothing of x_0 at T = {self.sde.T:g}, where alpha = 0: a classifier cannot guide from "
                f"there. Set T a little lower (for example sde.T = {0.999 * self.sde.T:g}), or guide by conditions"
            )
        out = ask(self.inside, x, time, inside)
        return out + gain * self._slope(x, time)

    def _slope(self, x: Tensor, time: Tensor) -> Tensor:
        graph = torch.is_grad_enabled()
        with differentiating("log_prob"):
            y = leaf(x, graph)
            value = self._log_prob(y, ordinary(time), *self._given.of(x)[0])
            if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"log_prob must return one number a sample, shape ({len(x)},), got {got}")
            return gradient_of(
                value, y, graph, "log_prob must be differentiable in x; take no_grad or detach out of it"
            )

    def _gain(self, time: Tensor) -> Tensor:
        if self.predicts == "score":
            return torch.full_like(time, self._scale)
        return self._scale / to_score(self.predicts, self.sde, time)[0]


def band(interval: Any) -> tuple[float, float]:
    """The levels of an interval; all of them unless given. Raises ValueError for one that is none."""
    if interval is None:
        return 0.0, math.inf
    try:
        low, high = (float(level) for level in interval)
    except (TypeError, ValueError):
        raise ValueError(f"interval must be a pair (low, high) of levels sigma/alpha, got {interval!r}") from None
    if not 0 <= low < high:
        raise ValueError(f"interval must be (low, high) with 0 <= low < high, got ({low:g}, {high:g})")
    return low, high


def each(factor: Tensor, x: Tensor) -> Tensor:
    """A number for each sample, (B,), as it multiplies x."""
    factor = factor.to(x.dtype) if factor.is_floating_point() else factor
    return factor.reshape(-1, *(1,) * (x.ndim - 1))


def _flag(flag: Any, x: Tensor) -> Any:
    """A bool where one time is asked about, or where all samples agree; else one for each, as it masks x."""
    if isinstance(flag, bool):
        return flag
    if flag.ndim == 0 or bool(flag.all()) or not bool(flag.any()):
        return bool(flag.all())
    return each(flag.to(x.device), x)
