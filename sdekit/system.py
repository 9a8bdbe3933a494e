"""What a solver can integrate, and the border where time and coefficients get their shapes."""

import inspect
import math
import numbers
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

NOTHING = 1e-12  # alpha/sigma from which on there is no signal: what a schedule rounds to where it means 0

Time = float | Tensor
Score = Callable[[Tensor, Any], Tensor]  # (x, t) -> grad log p_t(x), like x; t is 0-d or (B,)

# Torchsde's words for what the diffusion depends on, and the form that it has then.
NOISE_TYPES = {
    "additive": "diffusion(t), a number or a tensor of t's shape",
    "diagonal": "diffusion(x, t), like x",
    "general": "diffusion(x, t) of shape (B, *event, m)",
}


def float64(device: torch.device) -> torch.dtype:
    """The widest dtype of a device: Apple's mps has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def as_time(t: Any, T: float) -> Tensor:
    """t (float, 0-d or (B,) tensor) in [0, T] as a float64 tensor; the border where time enters."""
    if isinstance(t, Tensor):
        if t.dtype == torch.bool or t.is_complex():
            raise TypeError(f"t must be a real tensor, got {t.dtype}")
        if t.ndim > 1:
            raise ValueError(f"t must be a float, a 0-d or a (B,) tensor, got shape {tuple(t.shape)}")
        time = t.to(float64(t.device))
    elif isinstance(t, numbers.Real) and not isinstance(t, bool):
        time = torch.tensor(float(t), dtype=torch.float64)
    else:
        raise TypeError(f"t must be a float, a 0-d or a (B,) tensor, got {type(t).__name__}")
    # A float32 time may lie a rounding beyond T. On a device a look would wait for it.
    if time.device.type == "cpu" and not holds((time >= 0) & (time <= T * (1 + 1e-6))):
        raise ValueError(f"t must lie in [0, {T:g}], got {time.min():g} ... {time.max():g}")
    return time


def holds(conditions: Tensor) -> bool:
    """Whether all are true; yes where values cannot be looked at: inside vmap, and while torch.compile traces."""
    if torch.compiler.is_compiling():
        return True
    try:
        return bool(conditions.all())
    except RuntimeError:
        return True


def ordinary(y: Tensor) -> Tensor:
    """y, or a copy of one that was made in inference mode, which autograd does not take."""
    if not y.is_inference():
        return y
    with torch.inference_mode(False):
        return y.clone()


@contextmanager
def made_outside(what: str) -> Iterator[None]:
    """What is called within is ``what``; ValueError where autograd refuses a tensor of inference mode that it holds."""
    try:
        yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise ValueError(
            f"{what} holds tensors that were made in torch.inference_mode, such as its weights, and has no gradient "
            "through them: make it outside, or under torch.no_grad"
        ) from error


@contextmanager
def differentiating(what: str) -> Iterator[None]:
    """Within, a gradient of ``what`` is taken, whatever the caller's mode."""
    with torch.inference_mode(False), torch.enable_grad(), made_outside(what):
        yield


def expand(c: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape () or (B,) in the form that multiplies x of shape (B, *event).

    The one broadcast rule: a (B,) coefficient gets one trailing axis per axis of the event.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype}; convert with .float() or .double()")
    if c.ndim == 0:
        return c
    if c.shape[0] != x.shape[0]:
        raise ValueError(f"t has {c.shape[0]} entries for a batch of {x.shape[0]}; pass one time, or one per sample")
    return c.reshape(-1, *(1,) * (x.ndim - 1)).to(x)


class System:
    """Anything a solver can integrate: ``dx = drift(x, t) dt + diffusion dW``, in either direction of time.

    ``noise_type``: "additive": the diffusion is diffusion(t). "diagonal": diffusion(x, t), like x, whose entry i
    depends on x_i alone (and on t), times dW_i. "general": the matrix diffusion(x, t) of shape (B, *event, m) times m
    noises, for the back-end torchsde only. With the last two the step rule says whether dW is Ito's or Stratonovich's.
    """

    noise_type: str = "additive"
    churn: float = 1.0  # 0 means that diffusion is zero and no noise need be drawn
    nfe: int = 0  # network evaluations so far
    network_calls: int = 1  # of one evaluation, at most, as far as is known
    backwards_only: bool = False  # True where the equation means something in decreasing time alone
    diffuses: bool = True  # False: it is not made by a Brownian motion, and has a flow but no SDE
    shifted: bool = False  # what runs is x - m(t), and ``centre`` and ``place`` say how
    root: Callable[[Tensor], Tensor] | None = None  # L where the noise is L dW; None where it is dW
    sense: str | None = None  # "ito" or "stratonovich", where the drift is made for dW of one sense alone
    replayed: bool = False  # True where a step is taken again and again from one state, till all it asks for is known

    @property
    def interval(self) -> tuple[float, float]:
        """The times that a solver may visit."""
        return -math.inf, math.inf

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """The drift, like x."""
        raise NotImplementedError(f"{type(self).__name__} needs drift(x, t)")

    def add_drift(self, x: Tensor, t: float, h: float, at: Tensor | None = None) -> Tensor:
        """x + h drift(at, t), in a new tensor; ``at`` is x unless given. The step rules' way to use the drift: a system
        that wraps another and changes its drift changes this too. It is there because a system may know a shorter way.
        """
        drift = self.drift(x if at is None else at, t)
        if drift.dtype is not x.dtype:  # it would take x with it, or fail later without saying why
            raise TypeError(f"drift must have x's dtype {x.dtype}, got {drift.dtype}; convert with .to(x.dtype)")
        return x.add(drift, alpha=h)

    def diffusion(self, *args: Any, **kwargs: Any) -> Any:
        """The diffusion, of the arguments and the shape that go with ``noise_type`` (NOISE_TYPES)."""
        raise NotImplementedError(f"{type(self).__name__} needs {NOISE_TYPES[self.noise_type]}")

    def diffusion_at(self, x: Tensor, t: Time) -> Any:
        """The diffusion at (x, t), whatever the noise type: what a step rule multiplies an increment by.

        Raises TypeError for a diffusion of other arguments, ValueError for one of another shape than the noise type's.
        """
        try:
            if self.noise_type == "additive":
                return self.diffusion(t)
            g = self.diffusion(x, t)
        except TypeError as error:
            raise TypeError(f"noise_type {self.noise_type!r} means {NOISE_TYPES[self.noise_type]}: {error}") from error
        got = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
        if got[: x.ndim] != tuple(x.shape) or len(got) - x.ndim != (self.noise_type == "general"):
            raise ValueError(
                f"noise_type {self.noise_type!r} means {NOISE_TYPES[self.noise_type]}; got {got} for x {tuple(x.shape)}"
            )  # what broadcasts would go wrong without a word
        return g

    def at(self, t: Time, x: Tensor) -> Any:
        """The process at t, for step rules on alpha, sigma and the score; only a reverse system has one."""
        raise TypeError(f"this step rule needs a score: give it sde.reverse(score), not {type(self).__name__}")

    def levels(self, times: Tensor) -> "Levels":
        """The process at many times at once, for rules that tabulate their weights; only a reverse system has them."""
        return self.at(float(times[0]), times)

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``; a system may remember it for the key."""
        return make()

    def centre(self, x: Tensor, t: Time) -> Tensor:
        """x - m(t), of a system that is ``shifted``."""
        return x

    def place(self, x: Tensor, t: Time) -> Tensor:
        """x of x - m(t)."""
        return x

    def common(self, x: Tensor) -> bool:
        """Whether all samples like x are of one equation: a BridgeSDE may have another for each."""
        return True

    def prepare(self, times: Sequence[float], x: Tensor) -> None:
        """Told before a loop where it starts and which times it will visit, so that one vectorised call serves all."""

    def require_sense(self, sense: str | None, others: str) -> None:
        """Raise ValueError where a method takes dW in another sense than the drift was made for: another law."""
        if self.churn and self.noise_type != "additive" and self.sense and sense and sense != self.sense:
            raise ValueError(
                f"this method solves {sense.capitalize()}'s equation, and {type(self).__name__} is in "
                f"{self.sense.capitalize()}'s sense: use {others}, or process.reverse(score, sense={sense!r})"
            )

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        """The class, and the arguments that it was made with, as far as it keeps them under their names."""
        try:
            names = list(inspect.signature(type(self)).parameters)
        except (TypeError, ValueError):
            names = []
        known = ((name, vars(self).get(name)) for name in names)
        return f"{type(self).__name__}({', '.join(f'{k}={shown(v)}' for k, v in known if v is not None)})"

    def settle(self) -> None:
        """Told after a loop, to raise what was not worth waiting for the device at every step."""


def shown(value: Any) -> str:
    """A value as it is printed among the arguments of what was made with it; whatever it is, in a few words."""
    try:
        if isinstance(value, Tensor):
            return f"<tensor {tuple(value.shape)}>" if value.numel() > 4 else str(value.tolist())
        plain = value is None or isinstance(value, int | float | str | System)
        text = repr(value) if plain else getattr(value, "__qualname__", None)
        if isinstance(text, str):
            return text if len(text) <= 100 or isinstance(value, System) else text[:97] + "..."
    except Exception:  # of a tensor without values, an object with attributes of its own: printing is no place to fail
        pass
    return f"<{type(value).__name__}>"


class Levels(NamedTuple):
    """A process at times of any shape, float64: signal, noise and half log-SNR lam = log(alpha/sigma)."""

    time: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor


class Coefficients(NamedTuple):
    """What a process is at time t: float64 tensors of t's shape.

    ``f`` = d log(alpha)/dt, so that the drift is f x, and ``g2`` = d(sigma^2)/dt - 2 f sigma^2; where alpha = 0 they
    are infinite, and ``dalpha``, ``dsigma`` = d alpha/dt, d sigma/dt are not.
    """

    alpha: Tensor
    sigma: Tensor
    f: Tensor
    g2: Tensor
    dalpha: Tensor
    dsigma: Tensor


class Process(Protocol):
    """What the reverse family needs of a process; :class:`sdekit.SDE` is one."""

    T: float
    t_min: float

    def alpha(self, t: Any) -> Tensor:
        """The signal's scale at t."""

    def sigma(self, t: Any) -> Tensor:
        """The noise's standard deviation at t."""

    def inverse_half_log_snr(self, lam: Any) -> Tensor:
        """The time at which log(alpha/sigma) is lam."""

    def coefficients(self, t: Any) -> Coefficients:
        """alpha, sigma, f and g^2 at t, and the derivatives of the first two."""

    def velocity(self, t: Any) -> tuple[Tensor, Tensor]:
        """(m, n) of the velocity m x_0 + n eps that a flow-matching network of the process predicts."""
