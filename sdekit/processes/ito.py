"""Forward processes of any form,  dx = drift(x, t) dt + diffusion(x, t) dW,  known by simulation."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from sdekit import _checks
from sdekit.noise.keyed import Noise
from sdekit.processes.ito_reverse import ItoReverse
from sdekit.system import NOISE_TYPES, Score, System, Time, as_time, expand

_ROOM = 2**22  # entries of the diffusion, at most, of the samples that are simulated together


def _bordered(method: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor, Time], Tensor]:
    """Let a drift written for a time that multiplies x take any t of the surface, and look at what it returns."""

    @functools.wraps(method)
    def drift(self: "ItoSDE", x: Tensor, t: Time) -> Tensor:
        out = method(self, x, _time(t, x, self.T))
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        if got != tuple(x.shape):
            raise ValueError(f"drift of {type(self).__name__} must return x's shape {tuple(x.shape)}, got {got}")
        if out.dtype is not x.dtype:
            raise TypeError(f"drift of {type(self).__name__} must have x's dtype {x.dtype}, got {out.dtype}")
        return out

    return drift


def _bordered_diffusion(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a diffusion, of (t) or of (x, t); its shape is looked at where the noise type is known."""

    @functools.wraps(method)
    def diffusion(self: "ItoSDE", *args: Any) -> Any:
        if len(args) == 2:
            return method(self, args[0], _time(args[1], args[0], self.T))
        return method(self, *(as_time(t, self.T) for t in args))

    return diffusion


def _time(t: Time, x: Tensor, T: float) -> Tensor:
    ready = isinstance(t, Tensor) and t.ndim > 1  # a subclass that asks its parent
    return t if ready else expand(as_time(t, T), x)  # type: ignore[return-value]


class ItoSDE(System):
    """dx = drift(x, t) dt + diffusion dW  on [0, T], in Ito's sense, of any form: data at t = 0, the prior at T.

    For processes whose x_t given x_0 is not Gaussian, or not isotropic; a Gaussian one is better an :class:`SDE`.
    A subclass gives ``drift(x, t)``, like x, and a diffusion G whose form ``noise_type`` says: "additive" diffusion(t),
    a number or of t's shape; "diagonal" diffusion(x, t), like x, entry i a function of x_i alone; "general"
    diffusion(x, t) of shape (B, *event, m), times m noises. t comes as a tensor that multiplies x of shape (B, *event):
    0-d, or (B, 1, ..., 1); in diffusion(t) 0-d or (B,). Where the defaults do not fit, also the class attributes
    ``T``, ``t_min`` (the earliest time that the reverse may touch), ``steps`` (of a simulation from 0 to t) and
    ``origin`` (where the default prior's simulation starts, a number for all entries), and :meth:`prior_sample`,
    :meth:`divergence` and :meth:`score_weight`.

    A new sample is a solution of the reverse:

        x_T = process.prior_sample((1000, 2), seed=0)
        grid = torch.linspace(process.T, process.t_min, 201)
        x = solve(process.reverse(score), x_T, grid, "milstein", noise=Noise(x_T, seed=0)).x

    and the score is learnt from simulated states, whatever their law:

        train(network, process, data, predicts="score", objective=sliced())

    Raises ValueError for a drift or a diffusion of another shape and for a time outside [0, T].
    """

    T: float = 1.0
    t_min: float = 1e-3
    steps: int = 100
    origin: float = 0.0
    sense = "ito"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, border in (("drift", _bordered), ("diffusion", _bordered_diffusion)):
            method = getattr(cls, name)  # the class's own, or one that a plain mixin brings
            if method is not getattr(ItoSDE, name) and not hasattr(method, "__wrapped__"):
                setattr(cls, name, border(method))

    @property
    def interval(self) -> tuple[float, float]:
        """[0, T]: the forward equation may start at the data."""
        return 0.0, self.T

    def perturb(
        self,
        x0: Tensor,
        t: Time,
        *,
        seed: int | None = None,
        steps: int | None = None,
        ids: Sequence[int] | None = None,
    ) -> Tensor:
        """A draw of x_t given x_0, like x0, by simulation in ``steps`` steps from 0 to t, one time or one per sample.

        Milstein's rule for diagonal noise, Euler-Maruyama's for general noise (additive: they are one); the law has an
        error of order 1 in the step. Whole paths, or other rules: ``solve(process, x0, grid, rule)``. Sample i is keyed
        by ids[i]; samples are simulated so many at a time as fit into 32 MiB or so, which changes nothing.
        There is no graph to x0. Raises FloatingPointError, with the time, where states do not stay finite.
        """
        x0 = _checks.state(x0, "x0")
        time = as_time(t, self.T)
        expand(time, x0)  # or it says that there are not as many times as samples
        width = self.diffusion_at(x0[:1], 0.0).numel() if self.noise_type == "general" else x0[0].numel()
        size = max(1, _ROOM // width)
        ids = range(len(x0)) if ids is None else ids
        done = []
        for k in range(0, len(x0), size):
            rows = slice(k, k + size)
            noise = Noise(x0[rows], seed, ids[rows], purpose="perturb")
            done.append(self.draw(x0[rows], time[rows] if time.ndim else time, noise.normal, steps))
        return torch.cat(done)

    def draw(self, x0: Tensor, t: Time, normal: Callable[[], Tensor], steps: int | None = None) -> Tensor:
        """The same made of ``normal()``, the next standard normal tensor like x0: what training calls."""
        _checks.lookup(NOISE_TYPES, self.noise_type, "noise_type")
        n = _checks.count(self.steps if steps is None else steps, "steps")
        time = as_time(t, self.T)
        h, sums, x = time / n, [], x0
        with torch.no_grad():
            for k in range(n):
                x = self._step(x, k * h, h, normal)
                sums.append(x.sum())  # looked at in the end: a device does not wait
            finite = torch.isfinite(torch.stack(sums))
        if not _checks.finite(x):
            k, at = int((~finite).int().argmax()) + 1, float(time.max()) / n
            raise FloatingPointError(
                f"the states of {type(self).__name__} are not finite from t = {k * at:g} on (step {k} of {n}): its "
                "moments explode, or the steps are too long for it; raise steps, or lower T"
            )
        return x

    def _step(self, x: Tensor, t: Tensor, h: Tensor, normal: Callable[[], Tensor]) -> Tensor:
        root, y = expand(h.sqrt(), x), x + expand(h, x) * self.drift(x, t)
        if self.noise_type == "general":
            G = self._matrix(x, t)
            m = G.shape[-1]
            draws = torch.cat([normal().reshape(len(x), -1) for _ in range(-(-m // x[0].numel()))], 1)
            return y + root * (G @ draws[:, :m, None]).reshape(x.shape)
        dW, g = root * normal(), self._number(x, t)
        if self.noise_type == "additive":
            return y + g * dW
        slope = jvp(lambda z: self.diffusion_at(z, t), (x,), (g,))[1]
        return y + g * dW + slope * (dW**2 - root**2) / 2

    def _number(self, x: Tensor, t: Time) -> Any:
        """The diffusion of additive or diagonal noise in the form that multiplies x."""
        g = self.diffusion_at(x, t)
        return expand(torch.as_tensor(g), x) if self.noise_type == "additive" else g

    def _matrix(self, x: Tensor, t: Time) -> Tensor:
        """That of general noise, (B, D, m)."""
        G = self.diffusion_at(x, t)
        return G.reshape(len(x), -1, G.shape[-1])

    def squared(self, x: Tensor, t: Time, v: Tensor) -> Tensor:
        """G G' v, like x."""
        if self.noise_type != "general":
            return self._number(x, t) ** 2 * v
        G = self._matrix(x, t)
        return (G @ (G.mT @ v.reshape(len(x), -1, 1))).reshape(x.shape)

    def divergence(self, x: Tensor, t: Time) -> Tensor:
        """div(G G'), sum over j of d(G G')_ij/dx_j, like x, by automatic differentiation, each sample by itself.

        One derivative for diagonal noise, D, the entries of a sample, for general noise: give the closed form where you
        have it (``return torch.zeros_like(x)`` for a matrix that does not depend on x).
        """
        if self.noise_type == "additive":
            return torch.zeros_like(x)
        if self.noise_type == "diagonal":
            return jvp(lambda y: self.diffusion_at(y, t) ** 2, (x,), (torch.ones_like(x),))[1]
        G, along, own = self._slopes(x, t)
        return (along + (G @ own[..., None])[..., 0]).reshape(x.shape)

    def stratonovich(self, x: Tensor, t: Time) -> Tensor:
        """1/2 sum over the columns G_k of (G_k . grad) G_k, like x: Ito's drift minus Stratonovich's, for dt > 0."""
        if self.noise_type != "general":
            return self.divergence(x, t) / 4
        return self._slopes(x, t)[1].reshape(x.shape) / 2

    def _slopes(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """G, sum_jk G_jk dG_ik/dx_j (B, D) and sum_j dG_jk/dx_j (B, m)."""
        G = self._matrix(x, t)
        along, own = torch.zeros_like(G[..., 0]), torch.zeros_like(G[:, 0])
        for j, unit in enumerate(torch.eye(G.shape[1], dtype=x.dtype, device=x.device)):
            slope = jvp(lambda y: self._matrix(y, t), (x,), (unit.reshape(x.shape[1:]).expand_as(x),))[1]
            along, own = along + (slope * G[:, j : j + 1]).sum(-1), own + slope[:, j]
        return G, along, own

    def score_weight(self, t: Tensor) -> Tensor:
        """What score matching multiplies the square of a score by at t (B,), so that all times count alike: about the
        variance of x_t given x_0. Here t, that of a diffusion of 1.
        """
        return t

    def prior_sample(
        self,
        shape: Sequence[int],
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ids: Sequence[int] | None = None,
    ) -> Tensor:
        """A draw of the law at T, shape (B, *event), by simulation from ``origin``.

        Right where T is so long that the process has forgotten where it started, which is what makes a prior; give your
        own where its law has a closed form.
        """
        like = torch.empty(_checks.event_shape(shape), device=device, dtype=_checks.floating(dtype))
        return self.perturb(torch.full_like(like, self.origin), self.T, seed=seed, ids=ids)

    def marginal(self, x0: Tensor, t: Time) -> Any:
        """There is none: raises TypeError."""
        raise TypeError(
            f"{type(self).__name__} has no Gaussian x_t given x_0: train its score by objective=sliced() (or implicit, "
            'finite_difference), predicts="score", and draw x_t by perturb'
        )

    def reverse(self, score: Score, churn: float = 1.0, *, sense: str = "ito") -> ItoReverse:
        """The reverse family of the score grad log p_t, (x, t) -> like x; at every churn >= 0 its marginals are p_t:

            dx = [drift - (1 + churn^2)/2 (div(G G') + G G' score)] dt + churn G dW,  dt < 0

        ``sense``: of dW where G depends on x, for the rules of that sense. See :class:`ItoReverse`.
        """
        return ItoReverse(self, score, churn, sense=sense)

    def probability_flow(self, score: Score) -> ItoReverse:
        """dx/dt = drift - (div(G G') + G G' score)/2  (Song et al. 2021, appendix A, eq. 17)."""
        return self.reverse(score, churn=0.0)
