"""The probability flow as an invertible encoder: data to latents, latents to data, and what lies between two data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import padded, real_state
from sdekit.processes.law import require_centred
from sdekit.processes.sde import SDE
from sdekit.sampling.adaptive import flow
from sdekit.solvers.solution import rms
from sdekit.solvers.solve import without_graph
from sdekit.system import Score, float64


def encode(
    sde: SDE, score: Score, x: Tensor, *, method: str = "adams", rtol: float = 1e-5, atol: float = 1e-5,
    progress: bool = False, differentiable: bool | str = False, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The latent at T of x, (B, *event), like x: the probability flow from t_min to T.

    It is one to one, and the score's alone: networks that learnt the same score encode alike (Song et al. 2021,
    section 4.3 and appendix D.3). x is taken as a point at t_min, as by :func:`log_likelihood`; data without noise are
    of t = 0, and ``sde.perturb(x, sde.t_min)`` puts them there. ``method``, ``rtol``, ``atol``, a sample's independence
    of its batch, ``differentiable``, ``mask``: as in :func:`ode_sample`. Raises ValueError or TypeError for bad input,
    SolverError, which carries the partial solution, where a sample cannot reach T.
    """
    without_graph(x, "x", differentiable)
    how = {"rtol": rtol, "atol": atol, "progress": progress, "differentiable": differentiable}
    return _flow(sde, score, x, 1, method, "x", mask, **how)


def decode(
    sde: SDE, score: Score, latent: Tensor, *, method: str = "adams", rtol: float = 1e-5, atol: float = 1e-5,
    denoise: bool = False, progress: bool = False, differentiable: bool | str = False, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The data at t_min of a latent at T, (B, *event), like it: the probability flow from T to t_min.

    The inverse of :func:`encode`, up to the tolerances, whose meaning is the same; raises as it does. ``denoise``:
    return E[x_0|x] at t_min instead of x, as samplers do; this is no part of the flow, and not undone by encoding.
    """
    without_graph(latent, "latent", differentiable)
    how = {"rtol": rtol, "atol": atol, "denoise": denoise, "progress": progress, "differentiable": differentiable}
    return _flow(sde, score, latent, -1, method, "latent", mask, **how)


def round_trip_error(
    sde: SDE, score: Score, x: Tensor, *, method: str = "adams", rtol: float = 1e-5, atol: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """RMS over the event of decode(encode(x)) - x, per sample, (B,), in units of x.

    What the tolerances do to this x under this score; it falls with them. Raises as :func:`encode`.
    """
    x, padding = real_state(x, mask, sde)
    how: dict[str, Any] = {"method": method, "rtol": rtol, "atol": atol, "mask": mask}
    latent = encode(sde, score, x.detach(), **how)
    with padded(padding):
        return rms(decode(sde, score, latent, **how) - x.detach())


def slerp(a: Tensor, b: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """sin((1 - w) theta)/sin(theta) a + sin(w theta)/sin(theta) b,  theta the angle between a and b, per sample.

    (Shoemake 1985; for latents Song et al. 2021a, DDIM, section 5.3.) a, b: (B, *event); ``weights``: K numbers in
    [0, 1], 0 is a and 1 is b, exactly; returns (K, B, *event), like a. The vectors themselves are combined, not their
    directions and norms: vectors of equal norm keep it, at constant angular speed, and between two draws from a prior
    N(0, s^2 I), whose norms differ little, all norms are typical, where the straight line's middle has 0.7 of them.
    As theta -> 0 this becomes that straight line. Computed in float64.
    Raises ValueError for a zero vector, for opposite ones, between which no great circle is the shortest, for
    weights outside [0, 1] or none, and for a and b that differ in shape, dtype or device.
    """
    _alike(a, b)
    w = _weights(weights).to(a.device, float64(a.device)).unsqueeze(1)
    u, v = _unit(a, "a"), _unit(b, "b")
    apart, along = (_norm(y) for y in (u - v, u + v))  # 2 sin(theta/2) and 2 cos(theta/2)
    # The sum of opposite vectors is all rounding; nearer to that than this, the great circle would be one at random.
    opposite = along <= 32 * torch.finfo(a.dtype).eps
    if bool(opposite.any()):
        raise ValueError(
            f"a and b must not be opposite: no great circle from a to -a is the shortest, got such vectors for the "
            f"samples {_some(opposite)}; go by way of a third one"
        )
    theta = 2 * (apart / along).atan()  # to rounding at every angle, as the arc cosine is not
    # sin(w theta)/sin(theta) by sin(y)/y, which is smooth at 0; torch.sinc(y) is that of pi y.
    in_a, in_b = (y * torch.sinc(y * theta / torch.pi) / torch.sinc(theta / torch.pi) for y in (1 - w, w))
    in_a, in_b = (c.reshape(*c.shape, *(1,) * (a.ndim - 1)) for c in (in_a, in_b))
    return (in_a * a.to(w.dtype) + in_b * b.to(w.dtype)).to(a.dtype)


def interpolate(
    sde: SDE, score: Score, a: Tensor, b: Tensor, weights: Sequence[float] | Tensor, *, method: str = "adams",
    rtol: float = 1e-5, atol: float = 1e-5, denoise: bool = False,
) -> Tensor:  # fmt: skip
    """Data between a and b, (B, *event) each: their latents' :func:`slerp`, decoded; (K, B, *event), like a.

    Weight 0 is a and weight 1 is b, up to the tolerances and to ``denoise`` (:func:`decode`). Both ends are encoded in
    one solution, and all weights decoded in one. (Song et al. 2021, appendix D.3; 2021a, DDIM, section 5.3.)
    Raises as :func:`encode`, :func:`decode` and :func:`slerp`; opposite are then the latents.
    """
    require_centred(sde, "interpolate")
    _alike(a, b)
    weights = _weights(weights)  # before the work, not after it
    latent_a, latent_b = encode(sde, score, torch.cat([a, b]).detach(), method=method, rtol=rtol, atol=atol).chunk(2)
    # The angle is that of white noise; where it is correlated, of L^-1 x.
    between = slerp(sde.whiten(latent_a), sde.whiten(latent_b), weights)
    between = sde.colour(between.flatten(0, 1)).reshape(between.shape)
    out = decode(sde, score, between.flatten(0, 1), method=method, rtol=rtol, atol=atol, denoise=denoise)
    return out.reshape(between.shape)


def _flow(sde: SDE, score: Score, x: Tensor, direction: int, method: str, name: str, mask: Any, **how: Any) -> Tensor:
    _checks.instance(sde)
    x, padding = real_state(x, mask, sde, name)
    times = torch.tensor([sde.t_min, sde.T][::direction], dtype=torch.float64)
    return flow(sde, score, x, times, method, mask=padding, **how)


def _alike(a: Tensor, b: Tensor) -> None:
    _checks.state(a, "a"), _checks.state(b, "b")
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        kinds = [f"{y.dtype} {tuple(y.shape)} on {y.device}" for y in (a, b)]
        raise ValueError(f"b must have a's shape, dtype and device, {kinds[0]}, got {kinds[1]}")


def _weights(weights: Any) -> Tensor:
    try:
        w = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"weights must be a sequence or tensor of numbers in [0, 1], got {weights!r}") from None
    if w.ndim != 1 or w.numel() == 0 or not bool(((w >= 0) & (w <= 1)).all()):
        got = w.tolist() if w.numel() < 9 else f"shape {tuple(w.shape)}, {float(w.min()):g} ... {float(w.max()):g}"
        raise ValueError(f"weights must be at least one number, in one axis, all in [0, 1], got {got}")
    return w


def _unit(x: Tensor, name: str) -> Tensor:
    """x/|x| per sample, (B, D), in the widest dtype; by way of the largest entry, whose square may be out of range."""
    flat = x.reshape(len(x), -1).to(float64(x.device))
    largest = flat.abs().amax(1, keepdim=True)
    if bool((largest == 0).any()):
        raise ValueError(f"{name} must not be zero, which has no direction; samples {_some(largest[:, 0] == 0)} are")
    flat = flat / largest
    return flat / _norm(flat).unsqueeze(1)


def _norm(y: Tensor) -> Tensor:
    return y.square().sum(1).sqrt()


def _some(where: Tensor) -> list[int]:
    return where.nonzero().flatten()[:8].tolist()
