"""What the tests of zero terminal SNR share: processes with alpha(T) = 0, exact networks, the exact flow from T."""

import math

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.special import softmax

from sdekit import SDE, BetaTable, CosineVP, RectifiedFlow, as_score

MEAN, STD = 0.7, 0.5


class Rounded(SDE):
    """A user's process that means alpha(1) = 0 and gets cos(pi/2) = 6e-17."""

    def alpha(self, t):
        return torch.cos(torch.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(torch.pi / 2 * t)


class Stopped(RectifiedFlow):
    """The rectified flow, stopped where it has a little signal."""

    T = 0.999


def table(n=100):
    """DDPM's betas, scaled to n, the last one 1 (Lin et al. 2024)."""
    betas = torch.linspace(0.1 / n, 20 / n, n, dtype=torch.float64)
    betas[-1] = 1.0
    return BetaTable(betas)


ZERO = {
    "flow": RectifiedFlow,
    "flow_3": lambda: RectifiedFlow(3.0),
    "flow_third": lambda: RectifiedFlow(1 / 3),
    "cosine": CosineVP,
    "cosine_0": lambda: CosineVP(0.0),
    "table": table,
    "rounded": Rounded,
}


def network(sde, predicts, mean=MEAN, std=STD):
    """The exact network for data N(mean, std^2), entry by entry, by hand and finite at alpha = 0."""

    def says(x, t):
        shape = (-1, *(1,) * (x.ndim - 1))
        a, s = (c(t.double()).reshape(shape) for c in (sde.alpha, sde.sigma))
        whitened = (x.double() - a * mean) / (a**2 * std**2 + s**2)
        x0, eps = mean + a * std**2 * whitened, s * whitened
        if predicts == "flow":
            m, n = (y.reshape(shape) for y in sde.velocity(t.double()))
            return (m * x0 + n * eps).to(x)
        return {"x0": x0, "eps": eps, "v": a * eps - s * x0, "score": -whitened}[predicts].to(x)

    return as_score(says, sde, predicts)


def moments(sde, t, mean=MEAN, std=STD):
    """Mean and variance of the marginal at t."""
    a, s = float(sde.alpha(t)), float(sde.sigma(t))
    return a * mean, a**2 * std**2 + s**2


def moved(sde, x, t, s, mean=MEAN, std=STD):
    """Where the exact flow takes x from t to s, for data N(mean, std^2)."""
    (m, v), (m_s, v_s) = moments(sde, t, mean, std), moments(sde, s, mean, std)
    return m_s + (x - m) * math.sqrt(v_s / v)


def exact_flow(g, x, u, end, tolerance=1e-11):
    """x of the rectified flow from u to end, by DOP853 on E[eps - x_0 | x], which NumPy has exactly at u = 1 too."""
    values, vectors = np.linalg.eigh(g.covs)

    def velocity(u, flat):
        a, var = 1 - u, (1 - u) ** 2 * values + u**2
        z = np.einsum("bkd,kdj->bkj", flat.reshape(x.shape)[:, None] - a * g.m, vectors)
        r = softmax(np.log(g.w) - (z**2 / var + np.log(var)).sum(-1) / 2, axis=1)
        return (np.einsum("bkj,kdj,bk->bd", (u - a * values) / var * z, vectors, r) - r @ g.m).ravel()

    out = solve_ivp(velocity, (u, end), np.asarray(x).ravel(), method="DOP853", rtol=tolerance, atol=tolerance / 10)
    return out.y[:, -1].reshape(x.shape)


def levels_from_T(sde, n, end=0.05, little=0.01):
    """n + 1 times whose levels are uniform in log(alpha/sigma + little), from T to sigma/(alpha + sigma) = end.

    A smooth grid: its first gap in alpha/sigma is about little/n, and where alpha/sigma > little it is one in log-SNR.
    """
    low, high = math.log(little), math.log((1 - end) / end + little)
    place = torch.linspace(low, high, n + 1, dtype=torch.float64)
    lam = (place.exp() - little).clamp_min(0.0).log()
    times = sde.inverse_half_log_snr(torch.cat([torch.tensor([-math.inf], dtype=torch.float64), lam[1:]]))
    times[0] = sde.T
    return times


def rounding_grid(sde, n, end=0.2):
    """n + 1 times whose u = sigma/(alpha + sigma) is end + (1 - end) cos(pi i/2n): the first gap falls as 1/n^2."""
    u = end + (1 - end) * torch.cos(torch.linspace(0, math.pi / 2, n + 1, dtype=torch.float64))
    lam = torch.log((1 - u) / u)
    lam[0] = -math.inf
    return sde.inverse_half_log_snr(lam)


def mixture_network(mixture, sde, predicts):
    """The exact network of a :class:`sdekit.GaussianMixture`, from its E[eps] and E[x_0], which are finite at T."""

    def says(x, t):
        a, s = sde.alpha(t.double()), sde.sigma(t.double())
        minus_score, x0 = mixture._mean(x, a, s, 0.0, 1.0), mixture._mean(x, a, s, 1.0, 0.0)
        a, s = a[:, None], s[:, None]
        eps = s * minus_score
        m, n = (y[:, None] for y in sde.velocity(t.double()))
        said = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": m * x0 + n * eps}[predicts]
        return said.reshape(x.shape).to(x)

    return as_score(says, sde, predicts)
