"""What training minimises: objectives (score, x_0, t, normal) -> one loss per sample, (B,).

All look at x_t = alpha x_0 + sigma eps, divide by D, the entries of a sample, and (``denoising`` with a weighting of
its own and ``variational`` aside) differ from  E sigma^2 |score - true score|^2 / D  by a number that does not depend
on the network: the same minimiser on the same scale. sigma^2 keeps every noise level in the loss; unweighted, the
lowest would be all of it. An :class:`sdekit.ItoSDE` has no sigma: x_t is simulated, sigma^2 stands for its
``score_weight``, and the objectives that need no kernel take it: implicit, sliced, finite_difference and explicit.

``score`` is a :class:`sdekit.models.network.NetworkScore`, x_0 (B, *event), t (B,) in float64, and ``normal()`` the
next standard normal tensor like x_0, the only source of randomness: eps first, then the projections. Losses are
float32, or float64 for float64 data, and keep a graph to the weights where gradients are enabled.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import entries, event_mean, only_real
from sdekit.likelihood.bound import log_bin_probability
from sdekit.likelihood.density import NO_GRADIENT
from sdekit.likelihood.quantization import Quantization
from sdekit.models.network import NetworkScore, eps_slope, prediction_target
from sdekit.processes.kinds import BLIND, Kind, express, kind_of, zero_signal
from sdekit.processes.law import require_gradient
from sdekit.processes.sde import SDE
from sdekit.system import NOTHING, Score, differentiating, expand, ordinary

Objective = Callable[[NetworkScore, Tensor, Tensor, Callable[[], Tensor]], Tensor]
Weighting = Callable[[SDE, Tensor], Tensor]


def edm(sigma_data: float = 0.5) -> Weighting:
    """(r^2 + d^2)/(r d)^2 of |x_0 error|^2, r = sigma/alpha, d = ``sigma_data``  (Karras et al. 2022, table 1)."""
    d = _checks.positive(sigma_data, "sigma_data")
    return lambda sde, t: 1 + 1 / (d * d * sde.snr(t))


# Weights of |eps error|^2. An error in x_0 is sigma/alpha times that in eps, one in the score 1/sigma times.
# "simple" has none of its own: it is 1 on the error of whatever is predicted, but sigma^2 on that of a score.
WEIGHTINGS: dict[str, Weighting | None] = {
    "simple": None,
    # g^2 |score error|^2: 1/2 of its integral over t is the bound in nats per dimension  (Song, Durkan et al. 2021)
    "likelihood": lambda sde, t: sde.coefficients(t).g2 / sde.sigma(t) ** 2,
    # min(SNR, 5) |x_0 error|^2  (Hang et al. 2023)
    "min_snr": lambda sde, t: (5 / sde.snr(t)).clamp_max(1.0),
    "edm": edm(),
}


def denoising(weighting: str | Weighting = "simple") -> Objective:
    """Denoising score matching:  w(t) |network(x_t, t) - target|^2 / D  (Vincent 2011).

    The target is :func:`sdekit.models.network.prediction_target`. ``weighting``: a name in WEIGHTINGS, or a callable
    (sde, t (B,)) -> weights (B,) of |eps error|^2; so that one model has one loss whatever it predicts. Under "simple",
    which is 1 on the prediction's own error ("score": sigma^2), the weight of |eps error|^2 is
    1 for "eps" and "score" (Ho et al. 2020, L_simple), 1/SNR for "x0", and for "v" ((alpha^2 + sigma^2)/alpha)^2,
    SNR + 1 as a weight of |x_0 error|^2 under VP (Salimans & Ho 2022); "flow" is Lipman et al. 2023.

    Raises ValueError for an unknown weighting, and for a network that does not return x's shape.
    """
    weight = weighting if callable(weighting) else _checks.lookup(WEIGHTINGS, weighting, "weighting")

    def objective(score: NetworkScore, x0: Tensor, t: Tensor, normal: Callable[[], Tensor]) -> Tensor:
        x, eps = _noised(score.sde, x0, t, normal)
        error = _wide(score.output(x, t) - prediction_target(score.predicts, score.sde, x0, eps, t))
        if weight is None:
            w = score.sde.sigma(t) ** 2 if score.predicts == "score" else torch.ones_like(t)
        else:
            w = _of_output(weight, weighting, score, t)
        return w.to(error) * event_mean(error.square())

    return objective


def _of_output(weight: Weighting, weighting: Any, score: NetworkScore, t: Tensor) -> Tensor:
    """The weight of the error of what is predicted. Where alpha = 0 its limit, for there it is infinity times 0."""
    sde = score.sde
    zero = sde.alpha(t) <= NOTHING * sde.sigma(t)
    near = torch.where(zero, (1 - 1e-9) * t, t)
    blind = score.predicts in BLIND and float(sde.alpha(sde.T)) <= NOTHING
    if blind and bool((zero & (weight(sde, t) > 1 / NOTHING)).any()):  # only then does a device wait
        raise ValueError(
            f"weighting {weighting!r} is infinite at T of {type(sde).__name__}, where alpha = 0, for a network that "
            f"predicts {score.predicts}: draw times below T, or train one that predicts v, x0 or flow"
        )
    return weight(sde, near) * eps_slope(score.predicts, sde, near) ** 2


def implicit() -> Objective:
    """Implicit score matching:  sigma^2 (|s|^2 + 2 div s)/D  at x_t  (Hyvarinen 2005).

    The divergence is exact, D products with the Jacobian that gradients pass through: for small D.
    Raises ValueError where the network's output has no path to x.
    """

    def objective(score: NetworkScore, x0: Tensor, t: Tensor, normal: Callable[[], Tensor]) -> Tensor:
        require_gradient(score.sde, "implicit score matching")
        x = score.sde.draw(x0, t, normal)
        d = x[0].numel()
        units = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)
        square, products = _square_and_products(score, x, t, units)
        return _scaled(score.sde, t, square + 2 * products.sum(0) / entries(x))

    return objective


def sliced(projections: int = 1) -> Objective:
    """Sliced score matching:  sigma^2 (|s|^2 + 2 mean_v v . d(v . s)/dx)/D  (Song et al. 2019, SSM-VR).

    v: ``projections`` Rademacher vectors per sample, one product with the Jacobian each; the mean over all v is
    :func:`implicit`. Raises ValueError where the network's output has no path to x.
    """
    projections = _checks.count(projections, "projections")

    def objective(score: NetworkScore, x0: Tensor, t: Tensor, normal: Callable[[], Tensor]) -> Tensor:
        require_gradient(score.sde, "sliced score matching")
        x = score.sde.draw(x0, t, normal)
        square, products = _square_and_products(score, x, t, [_signs(normal()) for _ in range(projections)])
        return _scaled(score.sde, t, square + 2 * products.mean(0) / entries(x))

    return objective


def finite_difference(projections: int = 1, step: float = 0.1) -> Objective:
    """Finite-difference score matching:  sigma^2 mean_v (|s+ + s-|^2/4 + v . (s+ - s-)/h)/D,  s+- = s(x_t +- h v).

    :func:`sliced` without second derivatives: h = ``step`` sigma(t) and two evaluations per Rademacher
    vector v (so a network must not be random itself). It exceeds sliced, with d along v, by

        sigma^2 h^2 (s . d^2 s + v . d^3 s/3)/D + O(h^4) = O(step^2)

    since the k-th derivative of a score that varies over sigma is of the order of sigma^-(k + 1); nothing where the
    score is affine. Rounding adds some 1e-7 |x|/(step sigma) in float32, the reason why ``step`` is not smaller.
    Pang et al. 2020, FD-SSM with SSM-VR's square.
    """
    projections, step = _checks.count(projections, "projections"), _checks.positive(step, "step")

    def objective(score: NetworkScore, x0: Tensor, t: Tensor, normal: Callable[[], Tensor]) -> Tensor:
        require_gradient(score.sde, "finite-difference score matching")
        x = score.sde.draw(x0, t, normal)
        h = step * expand(score.sde.score_weight(t).sqrt(), x)
        draws = []
        for _ in range(projections):
            v = _signs(normal())
            up, down = _wide(score(x + h * v, t)), _wide(score(x - h * v, t))
            draws.append(event_mean((up + down).square() / 4 + v * (up - down) / h))
        return _scaled(score.sde, t, torch.stack(draws).mean(0))

    return objective


def explicit(reference: Score) -> Objective:
    """Explicit score matching:  sigma^2 |s - reference(x_t, t)|^2 / D  against a score that is known.

    Raises ValueError where ``reference`` does not return x's shape.
    """

    def objective(score: NetworkScore, x0: Tensor, t: Tensor, normal: Callable[[], Tensor]) -> Tensor:
        x = score.sde.draw(x0, t, normal)
        with torch.no_grad():
            known = reference(x, t)
        if known.shape != x.shape:
            raise ValueError(f"reference must return x's shape {tuple(x.shape)}, got {tuple(known.shape)}")
        return _scaled(score.sde, t, event_mean(_wide(score(x, t) - known).square()))

    return objective


def variational(quantization: Quantization | None = None) -> Objective:
    """DDPM's L_vlb (Ho et al. 2020, eq. 5; fixed variance) in nats per dimension, from one term per sample.

    For a process with a table of times t_1 < ... < t_N, ``sde.times``, and t drawn uniformly from it, the mean is the
    bound without its first term L_T, which has no parameters. With lam the half log-SNR the loss at t_i is

        i > 1    N (e^{2 (lam_{i-1} - lam_i)} - 1)/2 |eps - eps^|^2 / D
        i = 1    -N log p(x_0|x_1) / D

    (at t_N with alpha = 0: N SNR(t_{N-1})/2 |x_0 - x_0^|^2 / D, which is the same)
    where p is N(x_0^(x_1), (sigma/alpha)^2 I) at t_1: integrated over the bins of ``quantization`` (x_0 are then its
    values; :func:`sdekit.likelihood.bound.log_bin_probability`), or its density where there is none.
    Raises ValueError for a process without ``times`` and for t that are not among them.
    """

    def objective(score: NetworkScore, x0: Tensor, t: Tensor, normal: Callable[[], Tensor]) -> Tensor:
        sde = score.sde
        times = getattr(sde, "times", None)
        if times is None:
            raise ValueError(f"sde must have a table of times, as BetaTable and SigmaTable; got {type(sde).__name__}")
        times = times.to(t)
        n = len(times)
        index = torch.searchsorted(times, t.contiguous()).clamp_max(n - 1)
        if not torch.equal(times[index], t):
            raise ValueError(f"t must be among sde.times, {n} times from {float(times[0]):g} to {float(times[-1]):g}")
        lam = sde.half_log_snr(times)
        if not isinstance(entries(x0), int):
            raise ValueError("the bound is over all entries of an item, and mask leaves some out: use denoising()")
        x, eps = _noised(sde, x0, t, normal)
        out = score.output(x, t)
        error = event_mean(_wide(eps - _as_kind(Kind(0.0, 1.0), score, out, x, t)).square())
        gaps = torch.cat([lam[:1], lam[:-1]]) - lam
        zero = torch.isinf(gaps)
        loss = (n / 2 * torch.expm1(2 * torch.where(zero, 0.0, gaps)))[index].to(error) * error
        zero, first = zero[index], index == 0
        if zero.any():
            if score.predicts in BLIND:
                raise ValueError(zero_signal(sde, score.predicts))
            off = x0[zero] - _as_kind(Kind(1.0, 0.0), score, out[zero], x[zero], t[zero])
            loss = loss.index_put((zero,), (n / 2 * torch.exp(2 * lam[-2])).to(error) * event_mean(_wide(off).square()))
        if not first.any():
            return loss
        if quantization is None:  # x_0 - x_0^ = sigma/alpha (eps^ - eps)
            decoder = error[first] / 2 + math.log(2 * math.pi) / 2 - lam[0].to(error)
        else:
            mean = _as_kind(Kind(1.0, 0.0), score, out[first], x[first], t[first])
            levels = ((x0[first].double() - quantization.low) / quantization.bin).round().long()
            decoder = -event_mean(log_bin_probability(quantization, levels, mean, math.exp(-float(lam[0])))).to(error)
        return loss.index_put((first,), n * decoder)

    return objective


def classification() -> Objective:
    """-log p_t(labels|x_t), cross-entropy: what a :class:`sdekit.training.networks.Classifier` learns, not a score.

    For ``train(classifier, sde, data, labels=labels, objective=classification(), label_drop=0.0)``; of the prediction
    nothing is asked. The least is the labels' entropy given x_t.  Dhariwal & Nichol 2021, section 4.1.
    """

    def objective(score: NetworkScore, x0: Tensor, t: Tensor, normal: Callable[[], Tensor]) -> Tensor:
        if score.conditions is None:
            raise ValueError("classification needs labels: train(..., labels=labels, label_drop=0.0)")
        x, _ = _noised(score.sde, x0, t, normal)
        return -_wide(score.network(x, t, *score.conditions.of(x)[0]))

    return objective


# The objectives that need no argument, by name.
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "denoising": denoising,
    "implicit": implicit,
    "sliced": sliced,
    "finite_difference": finite_difference,
    "variational": variational,
}


def _noised(sde: SDE, x0: Tensor, t: Tensor, normal: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """(x_t, eps)."""
    mean, std = sde.marginal(x0, t)
    eps = sde.unit_noise(normal)
    return mean + std * eps, eps


def _as_kind(wanted: Kind, score: NetworkScore, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """What the network said of x, as another kind of prediction, of two numbers."""
    sde = score.sde
    kind = Kind(*(torch.full_like(t, c) for c in wanted))
    a, b = express(kind, kind_of(score.predicts, sde, t), sde.alpha(t), sde.sigma(t))
    return expand(a, x) * out + expand(b, x) * sde.centre(x, t)


def _square_and_products(score: Score, x: Tensor, t: Tensor, vectors: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """|s|^2/D (B,), and v . (ds/dx)^T v (n, B) for each of n vectors like x."""
    graph, products = torch.is_grad_enabled(), []
    with differentiating("score"):
        x = ordinary(x).detach().requires_grad_()
        s = only_real(score(x, ordinary(t)))
        if not s.requires_grad:
            raise ValueError(NO_GRADIENT)
        for v in vectors:
            (jv,) = torch.autograd.grad(s, x, v, create_graph=graph, retain_graph=True, allow_unused=True)
            if jv is None:  # a graph to the weights, none to x
                raise ValueError(NO_GRADIENT)
            products.append((_wide(v) * _wide(jv)).reshape(len(x), -1).sum(1))
    return event_mean(_wide(s).square()), torch.stack(products)


def _signs(z: Tensor) -> Tensor:
    return only_real(torch.ones_like(z).copysign(z))


def _scaled(sde: SDE, t: Tensor, y: Tensor) -> Tensor:
    """sigma^2 y, (B,)."""
    return sde.score_weight(t).to(y) * y


def _wide(y: Tensor) -> Tensor:
    """At least float32: half precision squares and sums badly."""
    return y.to(torch.promote_types(y.dtype, torch.float32))
