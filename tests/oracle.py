"""The tests' own oracle, in NumPy and SciPy: Gaussian mixtures, their flow map, distances, exact propagation.

Frame of the mixture's functions: y = x0 + s eps. A process has s = sigma/alpha and x = alpha y.
"""

import math

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal, norm


class Mixture:
    """sum_k w_k N(m_k, C_k) under added noise of standard deviation s."""

    def __init__(self, means, covs, weights=None):
        self.m, self.covs = np.array(means, float), np.array(covs, float)
        k, self.d = self.m.shape
        self.w = np.full(k, 1 / k) if weights is None else np.array(weights, float)

    def _terms(self, y, s):
        diff = y[:, None, :] - self.m
        cov = self.covs + s * s * np.eye(self.d)
        solved = np.stack([np.linalg.solve(c, diff[:, k].T).T for k, c in enumerate(cov)], 1)
        logdet = np.linalg.slogdet(cov)[1]
        log_n = -0.5 * ((diff * solved).sum(-1) + logdet + self.d * math.log(2 * math.pi)) + np.log(self.w)
        return log_n, solved

    def log_prob(self, y, s=0.0):
        return logsumexp(self._terms(y, s)[0], axis=1)

    def score(self, y, s):
        log_n, solved = self._terms(y, s)
        return -np.einsum("bk,bkd->bd", softmax(log_n, 1), solved)

    def denoise(self, y, s):
        return y + s * s * self.score(y, s)

    def sample(self, n, rng):
        k = rng.choice(len(self.w), size=n, p=self.w)
        z = rng.standard_normal((n, self.d))
        return self.m[k] + np.einsum("bij,bj->bi", np.linalg.cholesky(self.covs)[k], z)

    def posterior(self, a, seen, std):
        """Given seen = a x0 + std eps, in the form of precisions (another than sdekit's), and log p(seen)."""
        a, r = np.asarray(a, float), np.broadcast_to(np.square(std), len(a))
        means, covs, log_w = [], [], []
        for w, m, c in zip(self.w, self.m, self.covs, strict=True):
            precision = np.linalg.inv(c) + a.T @ (a / r[:, None])
            cov = np.linalg.inv(precision)
            covs.append((cov + cov.T) / 2)
            means.append(cov @ (np.linalg.solve(c, m) + a.T @ (seen / r)))
            log_w.append(math.log(w) + multivariate_normal(a @ m, a @ c @ a.T + np.diag(r)).logpdf(seen))
        log_w = np.array(log_w)
        return Mixture(means, covs, softmax(log_w)), float(logsumexp(log_w))

    def flow(self, y, s_from, s_to, rtol=1e-9, atol=1e-10):
        """The probability-flow map from level s_from to s_to, by DOP853 in log s."""
        low, shape = max(s_to, 1e-6), y.shape

        def rhs(log_s, flat):
            z = flat.reshape(shape)
            return (z - self.denoise(z, math.exp(log_s))).ravel()

        out = solve_ivp(rhs, (math.log(s_from), math.log(low)), y.ravel(), method="DOP853", rtol=rtol, atol=atol)
        y = out.y[:, -1].reshape(shape)
        return self.denoise(y, low) if s_to == 0 else y

    def projected_cdf(self, u, scale, s):
        """CDF of u . x for x = scale y at level s (in x's units: variance scale^2 u'Cu + s^2), |u| = 1."""
        means, var = scale * self.m @ u, scale**2 * np.einsum("i,kij,j->k", u, self.covs, u) + s**2
        return lambda v: (self.w * norm.cdf((v[:, None] - means) / np.sqrt(var))).sum(1)


def digits64(floor=1e-3):
    """Ten full-covariance Gaussians fitted to scikit-learn's 8x8 digits."""
    from sklearn.datasets import load_digits

    x, label = load_digits(return_X_y=True)
    x = x / 8 - 1
    groups = [x[label == k] for k in range(10)]
    covs = [np.cov(g.T) + floor * np.eye(64) for g in groups]
    return Mixture([g.mean(0) for g in groups], covs, [len(g) / len(x) for g in groups])


def grid25(std=0.03):
    """25 narrow modes on a square."""
    g = np.linspace(-1, 1, 5)
    means = np.stack(np.meshgrid(g, g, indexing="ij"), -1).reshape(-1, 2)
    return Mixture(means, np.broadcast_to(std**2 * np.eye(2), (25, 2, 2)))


def error(x, ref):
    """Mean over samples of the root mean square over dimensions."""
    return float(np.sqrt(((np.asarray(x) - ref) ** 2).mean(1)).mean())


def ks_distance(values, cdf):
    """Kolmogorov-Smirnov distance of a sample from a continuous law."""
    v = np.sort(values)
    f, n = cdf(v), len(v)
    return float(max((np.arange(1, n + 1) / n - f).max(), (f - np.arange(n) / n).max()))


def ks_threshold(n, false_alarm):
    """The distance that n exact draws exceed with at most this probability (Massart's inequality, any n)."""
    return math.sqrt(math.log(2 / false_alarm) / (2 * n))


def sliced_w2(a, b, directions=200, seed=1):
    """Sliced 2-Wasserstein distance of two samples of one size in the plane."""
    angle = np.random.default_rng(seed).uniform(0, np.pi, directions)
    u = np.stack([np.cos(angle), np.sin(angle)])
    return float(np.sqrt(((np.sort(a @ u, 0) - np.sort(b @ u, 0)) ** 2).mean()))


class UnitNoise:
    """A noise source whose k-th draw is 1 in row k + 1 and 0 elsewhere.

    A sampler on Gaussian data is affine in its noises: row 0 then carries the noiseless result, and the others
    minus row 0 the response to each draw. Mean and variance follow without Monte-Carlo error.
    """

    def __init__(self):
        self.draws, self.rows = 0, 0

    def enter(self, t, s):
        pass

    def normal(self):
        out = torch.zeros(self.rows, dtype=torch.float64)
        out[self.draws + 1] = 1.0
        self.draws += 1
        return out

    def increment(self, t, s):
        return self.normal() * abs(s - t) ** 0.5

    def increment_and_integral(self, t, s):
        dW = self.increment(t, s)
        return dW, (s - t) * (dW / 2 + self.normal() * (abs(s - t) / 12) ** 0.5)


def propagate(system, rule, grid, mean, std, rows):
    """Exact (mean, variance) of a rule's result from x ~ N(mean, std^2), one-dimensional data."""
    from sdekit import solve

    noise = UnitNoise()
    noise.rows = rows + 2
    x = torch.full((rows + 2,), float(mean), dtype=torch.float64)
    x[-1] += std  # the last row is the response to the start's own standard deviation
    out = solve(system, x, grid, rule, noise=noise).x
    assert noise.draws <= rows, "more draws than rows: enlarge rows"
    return float(out[0]), float((out[1:] - out[0]).square().sum())
