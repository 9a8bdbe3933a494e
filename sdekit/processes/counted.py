"""A model as the solvers see it: what it says at a time, counted, bounded and checked, and for which samples."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdekit.batch import asked, asking, only_real, padded, padding_now
from sdekit.system import ordinary


class Model(Protocol):
    """A score that can also say what its network says; whatever else is called as (x, t) says a score."""

    predicts: str  # the kind, a name in KINDS
    sde: Any  # the process of its numbers
    # network_calls: int, if it has this: the network calls of an evaluation, at most; 1 unless it says so

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What it says, like x, at time, 0-d or (B,), float64; ``ready``: what it made of the time beforehand."""

    def prepare(self, times: Sequence[float], x: Tensor) -> Sequence[Any]:
        """What it makes of times, before a loop visits them with states like x. ValueError for x that it cannot take"""


class Plain:
    """A callable (x, t) -> score, as a model."""

    predicts = "score"

    def __init__(self, score: Callable[[Tensor, Any], Tensor], sde: Any) -> None:
        self.score, self.sde, self.network_calls = score, sde, getattr(score, "network_calls", 1)

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        """The score."""
        return self.score(x, t)

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """The score."""
        return self.score(x, time)

    def prepare(self, times: Sequence[float], x: Tensor) -> Sequence[Any]:
        """Nothing."""
        return [None] * len(times)


def as_model(score: Any, sde: Any) -> Model:
    """The score itself, where it is a model of its own kind. Raises TypeError for what cannot be called."""
    if not callable(score):
        raise TypeError(f"score must be a callable (x, t) -> like x, got {type(score).__name__}")
    return score if hasattr(score, "predicts") and hasattr(score, "output") else Plain(score, sde)


class _Placed:
    """A model of x, for solvers that run on x - m(t)."""

    def __init__(self, model: Model, sde: Any) -> None:
        self.model, self.process = model, sde
        self.sde, self.predicts, self.network_calls = model.sde, model.predicts, getattr(model, "network_calls", 1)

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What the model says of x + m(t)."""
        return self.model.output(self.process.place(x, time), time, ready)

    def prepare(self, times: Sequence[float], x: Tensor) -> Sequence[Any]:
        """What the model makes of times."""
        return self.model.prepare(times, x)


def placed(model: Model, sde: Any) -> Model:
    """The model as solvers ask it: of x less the process's own mean, where it has one."""
    return _Placed(model, sde) if not getattr(sde, "centred", True) and not isinstance(model, _Placed) else model


class Moment(NamedTuple):
    """A time as a model is given it, and the two numbers of  score = a output + b x  there."""

    time: Tensor  # 0-d on the CPU, or (B,) on x's device
    ready: Any
    a: Any
    b: Any


# Calls of networks, and rows in them, in the evaluation under way: also a context's, so that they are counted where
# they are made.
_made: ContextVar[list[int] | None] = ContextVar("calls", default=None)


def called(rows: int) -> None:
    """Told by what calls a network, of every call."""
    if torch.compiler.is_compiling():
        return
    made = _made.get()
    if made is not None:
        made[0] += 1
        made[1] += rows


def ask(model: Model, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
    """Its output; to a model of models their way to ask, so that one with no network in it counts as a call too."""
    if not torch.is_inference_mode_enabled():
        time = ordinary(time)
    if torch.compiler.is_compiling():
        return model.output(x, time, ready)
    made = _made.get()
    before = made[0] if made else 0
    out = model.output(x, time, ready)
    if made and made[0] == before:
        called(len(x))
    return out


@contextmanager
def counting() -> Iterator[list[int]]:
    """[calls, rows] of the networks that are called within, by :func:`ask`; who counts outside hears of them, too."""
    made, outer = [0, 0], _made.get()
    token = _made.set(made)
    try:
        yield made
    finally:
        _made.reset(token)
        if outer is not None:
            outer[0] += made[0]
            outer[1] += made[1]


class MoreCallsError(RuntimeError):
    """An evaluation has made more network calls than a budget was made for; ``model`` is the one that says so."""

    def __init__(self, model: Model, calls: int, spent: int) -> None:
        super().__init__(
            f"the score calls networks {calls} times an evaluation, which the budget does not know: give it the "
            f"attribute network_calls = {calls}, or make it by sdekit.guidance"
        )
        known: Any = copy.copy(model)
        known.network_calls = calls
        self.model, self.spent = known, spent


def remade(model: Model) -> Callable[..., Tensor]:
    """Its output, with a graph that is not kept but made again when a gradient needs it."""
    here, padding = asked(), padding_now()

    def again(*args: Any) -> Tensor:  # perhaps in a thread of autograd's, which knows no context
        with padded(padding), asking(here):
            return model.output(*args)

    return partial(checkpoint, again, use_reentrant=False)


def _version(x: Tensor) -> int:
    """Another one after every change in place, where that is counted."""
    return 0 if x.is_inference() else x._version


_WINDOW = 64  # evaluations between looks at whether they were finite


class Counted:
    """Every evaluation of a model counted, bounded by a budget, and checked.

    ``nfe`` is the number of network calls, whatever their batch, and ``rows`` that of the samples in them, counted at
    the networks that :func:`as_score` has made, in whatever closure, or 1 where there are none.
    ``network_calls``: how many an evaluation makes, as far as is known. A result of another shape or of a dtype
    that is not floating raises at once; a non-finite one raises FloatingPointError that names t,
    at once for per-sample times and within 64 evaluations otherwise (looking at every value would
    make a GPU wait). Past ``budget`` calls it raises RuntimeError instead of calling, and MoreCallsError once an
    evaluation has made more than are known of.
    ``remake``: make each evaluation's graph again when a gradient needs it, instead of keeping it.
    """

    def __init__(self, model: Model, budget: int | None = None) -> None:
        self.model, self.budget, self.nfe, self.rows, self.remake = model, budget, 0, 0, False
        self.network_calls: int = getattr(model, "network_calls", 1)
        self._times: list[Tensor] = []  # of the evaluations since the last check
        self._sums = torch.zeros(0)  # theirs, in one piece of memory: scattered, they would break up the heap
        self._slots: tuple[Tensor, ...] = ()
        self._like: tuple[Any, Any] = (None, None)  # dtype and device that the sums are for
        self.told: tuple[Tensor, int, float, Tensor] | None = None  # see tell

    def tell(self, x: Tensor, t: float, output: Tensor) -> None:
        """What to answer if this very x at t is what is asked for next: it is known from an evaluation near by."""
        self.told = x, _version(x), t, output

    def __call__(self, x: Tensor, moment: Moment) -> Tensor:
        """What the model says, checked, in x's dtype; one evaluation."""
        if self.told is not None:
            (at, version, t, known), self.told = self.told, None
            if x is at and _version(x) == version and moment.time.ndim == 0 and float(moment.time) == t:
                return known
        if self.budget is not None and self.nfe + self.network_calls > self.budget:
            raise RuntimeError(f"the step rule needs more than the nfe budget of {self.budget} evaluations")
        compiling = torch.compiler.is_compiling()
        out = self._ask(x, moment, compiling)
        if not (isinstance(out, Tensor) and out.dtype is x.dtype and out.shape == x.shape):
            out = self._fitting(out, x)
        if padding_now() is not None:
            out = only_real(out)
        if out.stride() != x.stride():  # or the next x would come in the layout of this result
            out = torch.empty_like(x).copy_(out)
        if compiling:  # a list that grows would be a new graph at every evaluation
            return out
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
        time = moment.time
        self._times.append(time)
        if len(self._times) == _WINDOW or time.ndim:
            self.check()
        return out

    def _ask(self, x: Tensor, moment: Moment, compiling: bool) -> Tensor:
        output = remade(self.model) if self.remake else self.model.output
        if compiling:  # what a trace writes down is no count
            self.nfe, self.rows = self.nfe + self.network_calls, self.rows + self.network_calls * len(x)
            return output(x, moment.time, moment.ready)
        made = [0, 0]
        token = _made.set(made)
        try:
            out = output(x, moment.time, moment.ready)
        finally:
            _made.reset(token)
            calls = made[0] or 1
            self.nfe += calls
            self.rows += made[1] or x.shape[0]
        if calls > self.network_calls:
            self.network_calls = calls
            if self.budget is not None:
                asked_for = self.model.model if isinstance(self.model, _Placed) else self.model
                raise MoreCallsError(asked_for, calls, self.nfe)
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
        """What was said in x's dtype, or an error that says what it was instead."""
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
