"""Rules on drift and diffusion: they integrate any system, SDE or ODE, forwards or backwards.

From t to s the increment is dW = W_s - W_t, of variance |s - t|. Ito's integral looks at the diffusion where a step
begins, so in decreasing time it is adapted to what came before in the direction of integration, at later times: its
solution there is another than that of increasing time, and (dW)^2 stands for |h|. Stratonovich's is symmetric: a
solution goes back along the path on which it came. For additive noise the two are one. Ito's equation
dx = d dt + g dW is Stratonovich's with d - 1/2 g g' in increasing time, d + 1/2 g g' in decreasing time (g' = dg/dx).
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from sdekit.processes.kinds import Kind, express
from sdekit.processes.reverse import combine
from sdekit.solvers.steppers.base import step_rule


def require_additive(system: Any, name: str) -> None:
    """Raises ValueError where the diffusion depends on x."""
    if system.churn and system.noise_type != "additive":
        raise ValueError(
            f"{name} takes additive noise, diffusion(t), and {type(system).__name__} has noise_type "
            f"{system.noise_type!r}; use milstein (Ito) or heun (Stratonovich)"
        )


def plus(x: Tensor, g: Any, dW: Tensor) -> Tensor:
    """x + g dW, in place and in one pass where g is a number; x is the caller's own."""
    return x.add_(dW, alpha=g) if isinstance(g, float) else x + g * dW


@step_rule(sense="ito")
def euler_maruyama(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
    """x_s = x + (s - t) drift + diffusion dW, both at (x, t). Ito; strong order 1 (diagonal noise 1/2)."""
    x_s = system.add_drift(x, t, s - t)  # x + (s - t) drift(x, t)
    if system.churn:
        x_s = plus(x_s, system.diffusion_at(x, t), noise.increment(t, s))
    return x_s, state


@step_rule(sense="ito")
def milstein(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
    """x_s = x + h d + g dW + 1/2 g g' (dW^2 - |h|),  h = s - t, drift d and diffusion g at (x, t).

    Ito, strong order 1 for additive and diagonal noise; Euler on an ODE. g g' is one derivative of diffusion(x, t)
    along g; none is taken for additive noise, where this is Euler-Maruyama. dW^2 has the mean |h| in both directions of
    time. Kloeden & Platen 1992, Numerical Solution of Stochastic Differential Equations, eq. 10.3.1.
    """
    h = s - t
    x_s = system.add_drift(x, t, h)
    if system.churn:
        dW, g = noise.increment(t, s), system.diffusion_at(x, t)
        x_s = plus(x_s, g, dW)
        if system.noise_type != "additive":
            slope = jvp(lambda y: system.diffusion_at(y, t), (x,), (g,))[1]
            x_s = x_s.add_(slope * (dW**2 - abs(h)), alpha=0.5)
    return x_s, state


@step_rule(evaluations=2, order=2, weak_order=2, sense="stratonovich")
def heun(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
    """x' = x + h d_t + g_t dW,  x_s = x + h/2 (d_t + d'_s) + (g_t + g'_s)/2 dW,  h = s - t, d = drift, g = diffusion.

    Order 2 on an ODE (Karras et al. 2022, algorithm 1, is this with sigma_t = t). With noise the stochastic Heun method
    (Ruemelin 1982, SIAM J. Numer. Anal. 19(3)), of strong order 1. For diagonal noise its limit is the Stratonovich
    solution, in both directions of time the same path; for Ito's give it the drift d - 1/2 g dg/dx forwards in time,
    d + 1/2 g dg/dx backwards, or use milstein.
    """
    h = s - t
    y = system.add_drift(x, t, h)
    if system.churn:
        dW = noise.increment(t, s)
        y = plus(y, system.diffusion_at(x, t), dW)
    x_s = system.add_drift(torch.lerp(x, y, 0.5), s, h / 2, at=y)
    if system.churn:
        x_s = plus(x_s, system.diffusion_at(y, s) / 2, dW)
    return x_s, state


@step_rule(evaluations=4, order=4, nodes=(0.5,), sense="ito")
def rk4(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
    """The classical Runge-Kutta method on the drift, plus diffusion dW at (x, t): order 4 on an ODE. With noise Ito, of
    Euler-Maruyama's strong orders: 1 for additive, 1/2 for diagonal noise.
    """
    h = s - t
    m = t + 0.5 * (s - t)
    y_2 = system.add_drift(x, t, h / 2)
    y_3 = system.add_drift(x, m, h / 2, at=y_2)
    y_4 = system.add_drift(x, m, h, at=y_3)
    # x + h/6 (k_1 + 2 k_2 + 2 k_3 + k_4) by the stages, in place of the drifts that they came from
    x_s = torch.lerp(y_3, y_2, 1 / 3).add_(y_4, alpha=1 / 3).sub_(x, alpha=1 / 3)
    x_s = system.add_drift(x_s, s, h / 6, at=y_4)
    if system.churn:
        x_s = plus(x_s, system.diffusion_at(x, t), noise.increment(t, s))
    return x_s, state


@step_rule(evaluations=2, order=2, weak_order=2, nodes=(0.75,))
def sra1(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
    """y = x + 3/4 h d_t + 3/2 g_s J/h,  x_s = x + h/3 (d_t + 2 d(y, t + 3/4 h)) + g_s (dW - J/h) + g_t J/h,  h = s - t.

    J is the integral of W_u - W_t du over the step. Strong order 1.5 for additive noise, which that of a diffusion
    model and its reverse is; order 2 on an ODE. Roessler 2010, SIAM J. Numer. Anal. 48(3), scheme SRA1.
    Raises ValueError for diagonal noise, diffusion(x, t).
    """
    h = s - t
    require_additive(system, "sra1")
    d_t = system.drift(x, t)
    x_s, y = x.add(d_t, alpha=h / 3), x.add(d_t, alpha=0.75 * h)
    if system.churn:
        dW, integral = noise.increment_and_integral(t, s)
        g_t, g_s, mean = system.diffusion(t), system.diffusion(s), integral / h
        x_s, y = x_s + g_s * (dW - mean) + g_t * mean, y + 1.5 * g_s * mean
    return system.add_drift(x_s, t + 0.75 * (s - t), 2 / 3 * h, at=y), state


@step_rule()
def reverse_diffusion(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
    """The reverse of the exact forward step from s to t (Song et al. 2021, eq. 46).

    With the transition x_t | x_s ~ N(a x_s, v I):  x_s = (2 - a) x + (1 + churn^2)/2 v score + churn sqrt(v) z.
    (On an ODE, churn = 0, this is the paper's eq. 47.)
    """
    n_t, n_s = system.at(t, x), system.at(s, x)
    a = n_t.alpha / n_s.alpha
    r = a * n_s.sigma / n_t.sigma
    v = n_t.sigma**2 * (1 - r) * (1 + r)
    if n_t.alpha == 0 or n_s.alpha == 0:
        raise ValueError(
            "reverse_diffusion takes a step as small against the noise, and one that begins or ends where alpha = 0, "
            f"at T = {max(t, s):g}, is all of it: start a little lower, or take ancestral, whose transition is exact"
        )
    out, own = express(Kind(0.0, -0.5 * (1 + system.churn**2) * v / n_t.sigma), n_t.said, n_t.alpha, n_t.sigma)
    x_s = combine(2 - a + own, x, out, system.model(x, n_t.time))
    if system.churn:
        x_s = plus(x_s, system.churn * v**0.5, noise.normal())
    return x_s, state
