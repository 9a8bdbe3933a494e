"""A trained network as a model. The only place that knows a network's time, conditions and output."""

import copy
import dataclasses
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdekit import _checks
from sdekit.models.conditions import Chosen, Conditions
from sdekit.models.derived import Under
from sdekit.processes.counted import called
from sdekit.processes.kinds import KINDS, Kind, express, kind_of, to_score
from sdekit.processes.sde import SDE
from sdekit.system import as_time, expand, holds


def prediction_target(predicts: str, sde: SDE, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a perfect network predicts for the pair (x_0, eps) at t: the regression target of training.

    score -eps/s;  eps;  x_0;  v = a eps - s x_0 (Salimans & Ho 2022);  flow = the process's velocity, a' x_0 + s' eps.
    """
    m, n = kind_of(predicts, sde, t)
    return expand(m, x0) * x0 + expand(n, x0) * eps


def eps_slope(predicts: str, sde: SDE, t: Tensor) -> Tensor:
    """d eps/d output, of t's shape: eps is linear in what a network predicts, plus a term in x and t alone."""
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    return express(Kind(zero, one), kind_of(predicts, sde, t), sde.alpha(t), sde.sigma(t))[0]


class NetworkScore:
    """The model that a trained network is; made by :func:`as_score`, called as ``score(x, t)``.

    ``event``, ``data_range`` and ``levels``: the data's shape without the batch, their bounds, and of how many equal
    steps between these they were (None: continuous), where a checkpoint tells them.
    """

    event: tuple[int, ...] | None = None
    data_range: tuple[float, float] | None = None
    levels: int | None = None

    def __init__(
        self,
        network: Callable[..., Any],
        sde: SDE,
        predicts: str,
        time: Callable[[Tensor], Tensor] | None,
        output: str | int | Callable[[Any], Tensor] | None = None,
    ) -> None:
        _checks.lookup(KINDS, predicts, "prediction")
        self.network, self.sde, self.predicts, self._time, self._take = network, sde, predicts, time, output
        weights = network.parameters() if isinstance(network, nn.Module) else iter(())
        self._weight = next((w for w in weights if w.is_floating_point()), None)
        self.conditions: Conditions | None = None
        self._in_place: bool | None = None  # whether the network changes its x, found out once: then it gets a copy

    @property
    def device(self) -> torch.device | None:
        """Where the network's weights are; None for a plain callable. Samplers draw there by default."""
        return None if self._weight is None else self._weight.device

    def given(self, *args: Any, **kwargs: Any) -> "NetworkScore":
        """The score of p(x | conditions): the network is called as network(x, t, *args, **kwargs).

        Tensors (nested in tuples, lists and mappings too; arrays become tensors) whose first axis is the batch follow
        their samples: into chunks, and where finished samples leave the batch of an adaptive solver. Whatever else
        there is (numbers, flags, tensors with a first axis of one or of another meaning) is passed as it is. A whole
        number as a positional argument, or a 0-d tensor of whole numbers, is a label for all samples, and goes as
        (B,). ``given()`` or ``given(None)`` is without conditions. Where no tensor fits the batch though one should, a
        ValueError says so before the first step.
        """
        other = copy.copy(self)
        nothing = all(a is None for a in args) and not kwargs
        other.conditions = None if nothing else Conditions(args, kwargs)
        return other

    def under(self, sde: SDE) -> Under:
        """The same model under another process, by the map of noise levels: one network for every process.

        At each time of ``sde`` the network is asked at the time of its own process where sigma/alpha is the same, so
        samples of the same latent over the same levels are the same. Raises TypeError for what is no process.
        """
        return Under(self, sde)

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        """Score at x (B, *event) and t (0-d or (B,)), like x."""
        time = as_time(t, self.sde.T)
        if self.predicts == "score":
            return self.output(x, time)
        a, b = to_score(self.predicts, self.sde, time)
        return expand(a, x) * self.output(x, time) + expand(b, x) * self.sde.centre(x, time)

    def speaks_like(self, other: "NetworkScore") -> bool:
        """Whether both are of one network, wrapped alike: conditions may differ."""
        mine, its = ((m.network, m.sde, m.predicts, m._time, m._take) for m in (self, other))
        return all(a is b or a == b for a, b in zip(mine, its, strict=True))

    def prepare(self, times: Sequence[float], x: Tensor) -> Sequence[Any]:
        """What the network's clock says of the times of a loop, asked for all at once: numbers where it can tell by
        itself what they are for a batch, else tensors (B, ...).

        Raises ValueError for conditions that do not fit x's batch.
        """
        if self.conditions is not None:
            self.conditions.of(x)
        return self.clocks(times, x)

    def clocks(self, times: Sequence[float], x: Tensor) -> Sequence[Any]:
        """:meth:`prepare`, whatever the conditions."""
        if self._time is None or not times:
            return times
        grid = torch.tensor(times, dtype=torch.float64)
        clocks = self._time(grid.clone())
        if not isinstance(clocks, Tensor) or clocks.shape[:1] != grid.shape:
            return [self._clock(t, x) for t in grid.unbind()]
        if clocks.ndim == 1 and clocks.is_floating_point() and not clocks.requires_grad:
            return clocks.tolist()
        return [self._spread(clock, x) for clock in clocks.split(1)]

    def output(self, x: Tensor, time: Tensor, ready: Any = None, given: Chosen | None = None) -> Tensor:
        """What the network itself says, a ``predicts`` like x, at x (B, *event) and time (0-d or (B,)), float64; with
        ``given`` as the conditions, if that is given.
        """
        if isinstance(ready, float):
            clock = torch.full((x.shape[0],), ready, dtype=self._wide(x), device=x.device)
        elif ready is None or ready.shape[0] != x.shape[0] or ready.device != x.device:
            clock = self._clock(time, x)
        else:
            clock = ready.clone()  # which the network may change
        dtype = x.dtype if self._weight is None else self._weight.dtype
        y = x if x.dtype is dtype else x.to(dtype)
        if self._in_place is not False and y is x:
            y = x.clone()
        called(y.shape[0])
        if given is None and self.conditions is not None:
            given = self.conditions.of(x)
        out = self.network(y, clock) if given is None else self.network(y, clock, *given[0], **given[1])
        if self._in_place is None and y.dtype is x.dtype and not torch.compiler.is_compiling():
            self._in_place = _changed(y, x)
        if self._take is not None:
            out = _taken(out, self._take, x)
        if not isinstance(out, Tensor) or out.shape != x.shape or not out.is_floating_point():
            raise ValueError(_wrong_output(out, x))
        return out if out.dtype is x.dtype else out.to(x.dtype)

    def __repr__(self) -> str:
        given = "" if self.conditions is None else f".given({self.conditions!r})"
        name = getattr(self.network, "__qualname__", type(self.network).__name__)
        return f"as_score({name}, {self.sde!r}, predicts={self.predicts!r}){given}"

    def _wide(self, x: Tensor) -> torch.dtype:
        """A time keeps at least float32: in bf16 it would have three digits."""
        return torch.promote_types(x.dtype if self._weight is None else self._weight.dtype, torch.float32)

    def _clock(self, time: Tensor, x: Tensor) -> Tensor:
        clock = time.expand(x.shape[0] if time.ndim or time.device == x.device else 1)
        return self._spread(clock if self._time is None else self._time(clock), x)

    def _spread(self, clock: Tensor, x: Tensor) -> Tensor:
        """One time, or one for each sample, as the network gets it."""
        dtype = self._wide(x) if clock.is_floating_point() else clock.dtype  # whole numbers stay what they are
        if clock.shape == (1,) and clock.device != x.device:  # as a number: a device's host would wait for a copy
            return torch.full((x.shape[0],), clock.item(), dtype=dtype, device=x.device)
        return clock.expand(x.shape[0], *clock.shape[1:]).to(x.device, dtype)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, which has no way to keep a function without a name (cloudpickle has)."""
        if any(_modules_above("cloudpickle", "dill")):
            return dict(self.__dict__)
        for name, function in (("network", self.network), ("time", self._time), ("output", self._take)):
            if "<" in getattr(function, "__qualname__", ""):
                raise pickle.PicklingError(
                    f"{name} is a lambda or a function within a function, which cannot be pickled; give as_score a "
                    "function of a module, or functools.partial of one"
                )
        return dict(self.__dict__)

    def __copy__(self) -> "NetworkScore":
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "NetworkScore":
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        other._weight = None
        if isinstance(other.network, nn.Module):
            other._weight = next((w for w in other.network.parameters() if w.is_floating_point()), None)
        return other


def as_score(
    network: Callable[..., Any],
    sde: SDE,
    predicts: str = "score",
    *,
    time: Callable[[Tensor], Tensor] | None = None,
    output: str | int | Callable[[Any], Tensor] | None = None,
) -> NetworkScore:
    """The score of any trained network ``network(x, t)``.

    ``predicts``: what it returns, with x = alpha x_0 + sigma eps: "score", "eps" (score = -eps/sigma),
    "x0", "v" (alpha eps - sigma x_0) or "flow" (``sde.velocity``: alpha' x_0 + sigma' eps; for RectifiedFlow
    eps - x_0 whatever its shift). Solvers work on what it says itself, not on a score made of it.
    ``time``: the network's own clock, from sde's t (float64, (n,): the times of the samples or of a whole grid), each
    by itself, to what the network takes; for example ``lambda t: 999 * t`` for a 1000-step DDPM,
    ``lambda t: t.log() / 4`` for EDM's c_noise. Whole numbers reach the network as such.
    ``output``: where the prediction is in what the network returns: an attribute ("sample"), a key, an index, or a
    callable; "mean" takes the first C channels of the 2 C that a network with learned variance returns.
    The network gets x in the dtype of its weights (x's own for a plain callable) and t as (B,), in float32
    or wider, on x's device; the score comes back like x, so a float32 state runs with a bf16 network. Conditions:
    :meth:`NetworkScore.given`.

    Raises TypeError or ValueError for arguments that are none of these. A network that predicts eps or a score cannot
    start where alpha(T) = 0, since it says nothing of x_0 there (Lin et al. 2024); a solver that is to says so.
    """
    if not callable(network):
        raise TypeError(f"network must be a callable (x, t) -> tensor, got {type(network).__name__}")
    _checks.instance(sde, gaussian=predicts != "score")
    if time is not None and not callable(time):
        raise TypeError(f"time must be a callable from sde's t to the network's clock, got {time!r}")
    if output is not None and (isinstance(output, bool) or not (isinstance(output, str | int) or callable(output))):
        raise TypeError(f"output must be an attribute, a key, an index or a callable, got {output!r}")
    return NetworkScore(network, sde, predicts, time, output)


def _changed(copied: Tensor, x: Tensor) -> bool | None:
    """Whether a new copy of x has been written to since; None where a device would have to wait to tell."""
    if not copied.is_inference():
        return copied._version > 0
    return not holds(copied == x) if x.device.type == "cpu" else None


def _modules_above(*names: str) -> Iterator[bool]:
    """For every caller, whether it is in a package of these names."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__", "").partition(".")[0] in names
        frame = frame.f_back  # type: ignore[assignment]


def _taken(out: Any, where: Any, x: Tensor) -> Any:
    """The prediction in what a network returned."""
    if callable(where):
        return where(out)
    if where == "mean" and isinstance(out, Tensor):
        return out[:, : x.shape[1]]
    if isinstance(where, str) and not isinstance(out, Mapping) and hasattr(out, where):
        return getattr(out, where)
    try:
        return out[where]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"output={where!r} is not in what the network returned, {_described(out)}") from None


def _wrong_output(out: Any, x: Tensor) -> str:
    if not isinstance(out, Tensor):
        return f"the network returned {_described(out)}; say where the prediction is with as_score(..., output=...)"
    if out.shape == x.shape:
        return f"the network must return floating numbers, got {out.dtype}{_COMPLEX if out.is_complex() else ''}"
    said = f"the network must return x's shape {tuple(x.shape)}, got {tuple(out.shape)}"
    if x.ndim > 1 and out.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        said += '; twice the channels are a mean and a learned variance: as_score(..., output="mean") takes the mean'
    return said


_COMPLEX = "; torch.view_as_real makes two real numbers of a complex one, for the state and for what is returned"


def _described(out: Any) -> str:
    """What a network returned, in words."""
    if isinstance(out, Mapping):
        return f"a {type(out).__name__} of {', '.join(map(repr, out))}"
    if dataclasses.is_dataclass(out):
        return f"a {type(out).__name__} with {', '.join(f.name for f in dataclasses.fields(out))}"
    if isinstance(out, tuple | list):
        names = getattr(out, "_fields", None)
        return f"a {type(out).__name__} of {', '.join(names) if names else f'{len(out)} entries'}"
    return f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
