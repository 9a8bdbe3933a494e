"""Exponential multistep methods: one generator, prediction x clock x order x corrector.

With half log-SNR lambda the flow of  x = alpha x_0 + sigma eps  is solved exactly but for the prediction:
    x_s = (sigma_s/sigma_t) x_t + integral of  alpha_s e^(lambda - lambda_s) x_0(lambda)  over [lambda_t, lambda_s]
    x_s = (alpha_s/alpha_t) x_t - integral of  sigma_s e^(lambda_s - lambda) eps(lambda)  over [lambda_t, lambda_s]
(Lu et al. 2022a, proposition 3.1; 2022b, proposition 4.1). A multistep method puts the polynomial through the last
predictions, in its clock, under the integral. The integrals are taken by Gauss-Legendre quadrature in float64: nothing
cancels as the step goes to 0, where phi-functions in closed form lose all digits.
"""

from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdekit import _checks
from sdekit.reverse import combine
from sdekit.steppers.base import StepRule

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)

# The variable that the predictions are a polynomial of.
CLOCKS = {"half_log_snr": lambda lam: lam, "karras": lambda lam: np.exp(-lam)}


class _Interval(NamedTuple):
    """One step: x_s = linear x_t + sum of predictor[j] times the prediction j nodes back.

    ``corrector`` weighs the prediction at s first, then the same ones; without a corrector nobody reads it.
    """

    linear: float
    predictor: list[float]
    corrector: list[float]


class _State(NamedTuple):
    steps: list[_Interval]  # of the whole grid
    i: int  # the one to take
    x_last: Tensor | None  # where the one before it started
    history: tuple[Tensor, ...]  # predictions, newest first


def multistep(order: int, prediction: str = "x0", clock: str = "half_log_snr", *, corrector: bool = False) -> StepRule:
    """The exponential Adams-Bashforth method through the last ``order`` predictions; one evaluation a step.

    ``prediction``: "x0" (DPM-Solver++'s) or "eps" (DPM-Solver's, DEIS's). ``clock``: "half_log_snr", or "karras",
    sigma/alpha (DEIS's rho). ``corrector``: the prediction at s, which the next step needs anyway, also improves the
    x_s that it starts from, by the Adams-Moulton method of one order more (Zhao et al. 2023, UniC).
    The first steps have the order that the history allows, which caps the order of the whole in the end: not seen up
    to 640 steps at order 3, seen at 4 with the corrector (4.1 falls to 3.6). Needs a reverse system.
    Raises ValueError or TypeError for an order that is no whole number in 1 ... 6, or an unknown prediction or clock.
    """
    order = _checks.count(order, "order")
    if order > 6:
        raise ValueError(f"order must be at most 6, where the weights still have one scale, got {order}")
    index = _checks.lookup({"x0": 0, "eps": 1}, prediction, "prediction")
    to_clock = _checks.lookup(CLOCKS, clock, "clock")

    def begin(system: Any, times: list[float]) -> _State:
        nodes = [system.at(t, torch.zeros(())) for t in times]
        lam, alpha, sigma = (np.array([getattr(n, name) for n in nodes]) for name in ("lam", "alpha", "sigma"))
        start, end = lam[:-1, None], lam[1:, None]
        at = start + (end - start) * (_NODES + 1) / 2  # (N, Q)
        if index == 0:
            linear, kernel = sigma[1:] / sigma[:-1], alpha[1:, None] * np.exp(at - end)
        else:
            linear, kernel = alpha[1:] / alpha[:-1], -sigma[1:, None] * np.exp(end - at)
        kernel, place, at = kernel * _WEIGHTS * (end - start) / 2, to_clock(lam), to_clock(at)
        steps: list[_Interval] = []
        for k in range(1, order + 1):  # the first steps have fewer predictions behind them
            i = np.arange(k - 1, len(linear) if k == order else min(k, len(linear)))
            back = place[i[:, None] - np.arange(k)]
            predictor = _integrals(kernel[i], at[i], back)
            ahead = np.concatenate([place[i + 1, None], back], axis=1)
            weights = _integrals(kernel[i], at[i], ahead) if corrector else predictor
            steps += map(_Interval, linear[i].tolist(), predictor.tolist(), weights.tolist())
        return _State(steps, 0, None, ())

    def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: _State) -> tuple[Tensor, _State]:
        steps, i = state.steps, state.i
        history = (system.predict(x, t)[index], *state.history)
        if corrector and state.x_last is not None:
            x = _sum(steps[i - 1].linear, state.x_last, steps[i - 1].corrector, history)
        x_s = _sum(steps[i].linear, x, steps[i].predictor, history)
        return x_s, _State(steps, i + 1, x, history[:order])

    return StepRule(step, order=order + int(corrector), begin=begin)


def _integrals(kernel: np.ndarray, at: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The integrals of kernel times each Lagrange polynomial of ``nodes`` (N, k), at points ``at`` (N, Q): (N, k)."""
    k = nodes.shape[1]
    factors = [
        [(at - nodes[:, m, None]) / (nodes[:, j, None] - nodes[:, m, None]) for m in range(k) if m != j]
        for j in range(k)
    ]
    return np.stack([reduce(np.multiply, f, kernel).sum(1) for f in factors], axis=1)


def _sum(linear: float, x: Tensor, weights: list[float], predictions: tuple[Tensor, ...]) -> Tensor:
    total = combine(linear, x, weights[0], predictions[0])
    for weight, prediction in zip(weights[1:], predictions[1:], strict=False):
        total = total.add(prediction, alpha=weight)
    return total
