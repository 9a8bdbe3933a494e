"""Processes of drift and diffusion: their laws by simulation, and the reverse gives the data's law back.

The exact scores: in one dimension the Fokker-Planck equation solved on a grid, and Cox-Ingersoll-Ross's transition;
in two a Gaussian process bent by a map whose determinant is 1, whose diffusion is then a matrix that depends on x.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from scipy.special import ive
from scipy.stats import ncx2, norm
from torch import nn

from sdekit import VPSDE, BrownianPath, GaussianMixture, ItoSDE, Noise, as_score, guidance, sample, solve
from sdekit.processes import ito
from sdekit.training import train
from sdekit.training.objectives import denoising, finite_difference, implicit, sliced
from tests import oracle

N, ALARM = 8_000, 3e-10
THRESHOLD = oracle.ks_threshold(N, ALARM)  # 0.038; fewer than 60 comparisons below: a false alarm in 5e-8 of all runs


class DoubleWell(ItoSDE):
    """dx = (x - x^3) dt + 0.8 sqrt(1 + x^2/2) dW, on each entry."""

    T, t_min = 2.0, 0.01
    noise_type = "diagonal"

    def drift(self, x, t):
        return x - x**3

    def diffusion(self, x, t):
        return 0.8 * (1 + x**2 / 2).sqrt()


class Additive(ItoSDE):
    """dx = (x - x^3) dt + 0.8 dW."""

    T, t_min = 2.0, 0.01

    def drift(self, x, t):
        return x - x**3

    def diffusion(self, t):
        return 0.8


class FokkerPlanck:
    """p_t on a grid by the generator of the walk on it (second order in its spacing), from two lumps of data."""

    def __init__(self, process, steps=200):
        self.x = np.linspace(-4, 4, 801)
        self.dt, d = process.T / steps, self.x[1] - self.x[0]
        x = torch.from_numpy(self.x)
        p = 0.3 * norm.pdf(self.x, -1.2, 0.25) + 0.7 * norm.pdf(self.x, 0.6, 0.3)
        f, D = process.drift(x, 0.0).numpy(), np.broadcast_to(np.asarray(process.diffusion_at(x, 0.0)) ** 2, x.shape)
        up, down = np.maximum(D / d**2 + f / d, 0) / 2, np.maximum(D / d**2 - f / d, 0) / 2
        up[-1] = down[0] = 0
        moves = expm(self.dt * (np.diag(-up - down) + np.diag(up[:-1], 1) + np.diag(down[1:], -1)))
        self.p = [p / p.sum()]
        for _ in range(steps):
            self.p.append(self.p[-1] @ moves)
        self.scores = []
        for p in self.p:  # where p is rounding the score goes on as it was
            sure = p > 1e-13
            self.scores.append((self.x[sure], np.gradient(np.log(p[sure]), self.x[sure])))

    def cdf(self, t):
        p = self.p[round(t / self.dt)]
        return lambda v: np.interp(v, self.x, np.cumsum(p) - p / 2)

    def draws(self, t, n, seed):
        u = np.random.default_rng(seed).uniform(size=n)
        p = self.p[round(t / self.dt)]
        return torch.from_numpy(np.interp(u, np.cumsum(p) - p / 2, self.x))[:, None]

    def score(self, x, t):
        place = float(t) / self.dt
        k = min(int(place + 1e-9), len(self.p) - 2)
        low, high = (np.interp(x.numpy(), *self.scores[i]) for i in (k, k + 1))
        return torch.from_numpy(low + (place - k) * (high - low))


@cache
def truth(kind):
    return FokkerPlanck(kind())


def back(process, fp, method, churn, *, seed=3, sense="ito"):
    """KS distance from the exact law at t_min of draws at T that were taken back there, on the Fokker-Planck times."""
    x_T = fp.draws(process.T, N, seed)
    grid = torch.linspace(process.T, process.t_min, round((process.T - process.t_min) / fp.dt) + 1)
    x = solve(process.reverse(fp.score, churn, sense=sense), x_T, grid, method, noise=Noise(x_T, seed)).x
    return oracle.ks_distance(x[:, 0].numpy(), fp.cdf(process.t_min))


WAYS = [
    ("milstein", 1.0, "ito"),
    ("milstein", 1.5, "ito"),
    ("euler_maruyama", 0.5, "ito"),
    ("torchsde:milstein", 1.0, "ito"),
    ("heun", 1.0, "stratonovich"),
    ("torchsde:midpoint", 1.0, "stratonovich"),
    ("heun", 0.0, "ito"),
]


@pytest.mark.parametrize("kind", [DoubleWell, Additive])
@pytest.mark.parametrize(("method", "churn", "sense"), WAYS)
def test_the_reverse_of_a_double_well_gives_the_data_back(kind, method, churn, sense):
    """From data of two narrow lumps, of which nothing is left to see at T, at every churn and in both senses."""
    assert back(kind(), truth(kind), method, churn, sense=sense) < THRESHOLD


def test_a_law_that_is_not_the_datas_is_seen():
    """The divergence left out, twice or half the score: each is far beyond the threshold, exact ones at a quarter."""

    class Without(DoubleWell):
        def divergence(self, x, t):
            return torch.zeros_like(x)

    class Twice(DoubleWell):
        def squared(self, x, t, v):
            return 2 * super().squared(x, t, v)

    class Half(DoubleWell):
        def squared(self, x, t, v):
            return super().squared(x, t, v) / 2

    for wrong in (Without, Twice, Half):
        for churn in (1.0, 0.0):
            assert off(wrong(), "milstein", churn) > 1.3 * THRESHOLD, (wrong, churn)


class Once:
    """A path that is asked for each increment once, however many runs there are on it."""

    def __init__(self, path):
        self.increment = cache(path.increment)

    def enter(self, t, s):
        pass


@cache
def one_path():
    x_T = truth(DoubleWell).draws(2.0, 250, 1)
    return x_T, Once(BrownianPath(x_T, 2, start=0.01, end=2.0))


@pytest.mark.parametrize("churn", [1.0, 0.6])
def test_both_senses_are_one_solution_on_one_path(churn):
    """Milstein in Ito's sense and Heun in Stratonovich's, RMS; with the wrong drift, one without the other's term."""

    class Wrong(DoubleWell):
        def stratonovich(self, x, t):
            return torch.zeros_like(x)

    fp, grid = truth(DoubleWell), torch.linspace(2.0, 0.01, 257)
    x_T, path = one_path()

    def end(process, method, sense):
        return solve(process.reverse(fp.score, churn, sense=sense), x_T, grid, method, noise=path).x

    one = end(DoubleWell(), "milstein", "ito")
    right, wrong = (end(kind(), "heun", "stratonovich") for kind in (DoubleWell, Wrong))
    assert oracle.error(right.numpy(), one.numpy()) < 0.012
    assert oracle.error(wrong.numpy(), one.numpy()) > 0.03


def off(process, *args, **kwargs):
    try:
        return back(process, truth(DoubleWell), *args, **kwargs)
    except FloatingPointError:  # so far that the drift's cube overflows
        return 1.0


@pytest.mark.parametrize("kind", [DoubleWell, Additive])
@pytest.mark.parametrize("t", [0.1, 2.0])
def test_perturb_has_the_law_of_the_equation(kind, t):
    fp = truth(kind)
    x = kind().perturb(fp.draws(0.0, N, 5), t, seed=6)
    assert oracle.ks_distance(x[:, 0].numpy(), fp.cdf(t)) < THRESHOLD
    off = kind().perturb(fp.draws(0.0, N, 5), 0.8 * t, seed=6)
    assert t == 2.0 or oracle.ks_distance(off[:, 0].numpy(), fp.cdf(2 * t)) > THRESHOLD  # it has power


def test_perturb_is_milsteins_rule_and_for_a_matrix_eulers():
    """Step by step with the same draws, to rounding: the law alone would not see a term of second order."""

    def noises():
        return Noise(x0, 1).normal

    class Handed:
        def __init__(self):
            self.normal = noises()

        def enter(self, t, s):
            pass

        def increment(self, t, s):
            return self.normal() * abs(s - t) ** 0.5

    x0 = torch.tensor([[0.5, -1.0], [1.3, 0.3]], dtype=torch.float64)
    for kind in (DoubleWell, Additive):
        x = solve(kind(), x0, torch.linspace(0, 0.6, 9), "milstein", noise=Handed()).x
        torch.testing.assert_close(kind().draw(x0, 0.6, noises(), 8), x, rtol=1e-6, atol=1e-6)
    x, process, normal = x0, Bent(), noises()
    for _ in range(8):
        z = torch.cat([normal(), normal()], 1)[:, :3, None]
        x = x + 0.075 * process.drift(x, 0.0) + 0.075**0.5 * (process.diffusion(x, 0.0) @ z)[..., 0]
    torch.testing.assert_close(process.draw(x0, 0.6, noises(), 8), x)


class CIR(ItoSDE):
    """dx = (1 - x) dt + 0.6 sqrt(x) dW: 4/0.36 (1 - e^-t)^-1 x_t is noncentral chi-squared, of 4/0.36 degrees."""

    T, t_min = 1.5, 0.05
    noise_type = "diagonal"
    origin = 1.0
    starts, weights = np.array([0.4, 1.8]), np.array([0.6, 0.4])  # the data

    def drift(self, x, t):
        return 1 - x

    def diffusion(self, x, t):
        return 0.6 * x.clamp_min(1e-6).sqrt()

    def law(self, t):
        """Factor c of the chi-squared variable, degrees and noncentralities: Cox, Ingersoll & Ross 1985, eq. 18."""
        c = 0.36 * (1 - math.exp(-t)) / 4
        return c, 4 / 0.36, self.starts * math.exp(-t) / c

    def cdf(self, t):
        c, k, lam = self.law(t)
        return lambda v: sum(w * ncx2.cdf(v / c, k, n) for w, n in zip(self.weights, lam, strict=True))

    def score(self, x, t):
        """d log p/dx, with I'_v/I_v = I_(v+1)/I_v + v/z."""
        t = float(t if isinstance(t, float) else t.reshape(-1)[0])
        c, k, lam = self.law(t)
        if x.numel() > 1000:  # from a table
            table = torch.linspace(0.02, 6, 1000, dtype=torch.float64)
            return torch.from_numpy(np.interp(x.numpy(), table, self.score(table, t)))
        y, v = np.maximum(x.numpy(), 1e-6) / c, k / 2 - 1
        log_p, slopes = [], []
        for w, n in zip(self.weights, lam, strict=True):
            log_p.append(np.log(w) + ncx2.logpdf(y, k, n))
            z = np.sqrt(n * y)
            slopes.append(-0.5 + v / y + 0.5 * np.sqrt(n / y) * ive(v + 1, z) / ive(v, z))
        p = np.exp(np.stack(log_p) - np.max(log_p, 0))
        return torch.from_numpy((p * np.stack(slopes)).sum(0) / p.sum(0) / c)


def cir_draws(process, t, n, seed):
    rng = np.random.default_rng(seed)
    c, k, lam = process.law(t)
    return torch.from_numpy(c * rng.noncentral_chisquare(k, lam[rng.choice(2, n, p=process.weights)]))[:, None]


def test_the_flow_of_cox_ingersoll_ross_is_the_map_of_quantiles():
    """In one dimension the flow keeps P(x_t < x): to the tolerance, by adaptive steps. The divergence is all of it."""
    process = CIR()
    x_T = torch.linspace(0.3, 2.4, 9, dtype=torch.float64)[:, None]

    def one_time(x, t):  # samples have times of their own
        return torch.cat([process.score(y[None], s) for y, s in zip(x, t.expand(len(x)), strict=True)])

    for method, score in (("rk45", one_time), ("torchdiffeq:dopri5", process.score), ("scipy:DOP853", process.score)):
        flow = process.probability_flow(score)
        x = solve(flow, x_T, [1.5, 0.05], method, rtol=1e-9, atol=1e-9).x
        before, after = (process.cdf(t)(y[:, 0].numpy()) for t, y in ((1.5, x_T), (0.05, x)))
        np.testing.assert_allclose(after, before, atol=1e-7)
    assert flow.nfe > 20


A = np.array([[1.0, -0.8], [0.3, 0.6]])
G = np.array([[0.9, 0.0, 0.3], [-0.4, 0.5, 0.2]])
BEND = 0.6


class Bent(ItoSDE):
    """x = (y_1, y_2 + BEND y_1^2) of dy = -A y dt + G dW, event ``shape`` of two entries and three noises.

    Ito: dx_2 = dy_2 + 2 BEND y_1 dy_1 + BEND (G G')_11 dt; the diffusion is J G with J = [[1, 0], [2 BEND x_1, 1]].
    """

    T, t_min = 1.0, 0.02
    noise_type = "general"

    def __init__(self, shape=(2,), closed=False):
        self.shape, self.closed = shape, closed

    def jacobian(self, x):
        a = x.reshape(-1, 2)[:, 0]
        one, zero = torch.ones_like(a), torch.zeros_like(a)
        return torch.stack([torch.stack([one, zero], -1), torch.stack([2 * BEND * a, one], -1)], -2)

    def flat(self, x):
        y = x.reshape(-1, 2)
        return torch.stack([y[:, 0], y[:, 1] - BEND * y[:, 0] ** 2], -1)

    def bend(self, y):
        return torch.stack([y[:, 0], y[:, 1] + BEND * y[:, 0] ** 2], -1).reshape(-1, *self.shape)

    def drift(self, x, t):
        A_, G_ = torch.from_numpy(A).to(x), torch.from_numpy(G).to(x)
        f = -(self.jacobian(x) @ (A_ @ self.flat(x)[..., None]))[..., 0]
        return (f + torch.tensor([0.0, BEND], dtype=x.dtype) * (G_ @ G_.T)[0, 0]).reshape(x.shape)

    def diffusion(self, x, t):
        return (self.jacobian(x) @ torch.from_numpy(G).to(x)).reshape(*x.shape, 3)

    def divergence(self, x, t):
        """J S J' with S = G G' has the divergence (0, 2 BEND S_11)."""
        if not self.closed:
            return super().divergence(x, t)
        return torch.tensor([0.0, 2 * BEND * (G @ G.T)[0, 0]]).to(x).expand(len(x), 2).reshape(x.shape)


MEAN, COV = np.array([1.0, -0.5]), np.array([[0.2, 0.05], [0.05, 0.1]])  # of y at 0


def gaussian(t):
    """Mean and covariance of y at t, by the matrix exponential and Van Loan's integral."""
    big = expm(t * np.block([[-A, G @ G.T], [np.zeros((2, 2)), A.T]]))
    F = big[:2, :2]
    return F @ MEAN, F @ COV @ F.T + big[:2, 2:] @ F.T


def bent_score(process):
    def score(x, t):
        mean, cov = (torch.from_numpy(y) for y in gaussian(float(t)))
        s = -torch.linalg.solve(cov, (process.flat(x) - mean).T).T  # of y; J is its own to the power -1 but for a sign
        j = process.jacobian(x)
        return (torch.linalg.inv(j).mT @ s[..., None])[..., 0].reshape(x.shape)

    return score


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1)])
def test_the_flow_under_a_matrix_is_that_of_the_straight_process_bent(shape):
    """A probability current is a vector: the flow of x is that of y, linear, under the map. To ten digits."""
    process = Bent(shape)
    y = np.random.default_rng(0).normal(size=(5, 2))

    def rhs(t, flat):
        mean, cov = gaussian(t)
        z = flat.reshape(5, 2)
        return (-z @ A.T + 0.5 * np.linalg.solve(cov, (z - mean).T).T @ (G @ G.T)).ravel()

    exact = solve_ivp(rhs, (1.0, 0.02), y.ravel(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1].reshape(5, 2)
    flow = process.probability_flow(bent_score(process))
    x = solve(flow, process.bend(torch.from_numpy(y)), [1.0, 0.02], "scipy:DOP853", rtol=1e-11, atol=1e-11).x
    np.testing.assert_allclose(process.flat(x).numpy(), exact, atol=1e-8)


@pytest.mark.parametrize("closed", [False, True])
def test_the_reverse_sde_under_a_matrix(closed):
    """The mean and covariance of y at t_min, in Ito's and in Stratonovich's sense, to the step's own error. Without the
    divergence the mean of y_2 is off by BEND (G G')_11, a hundred standard errors.
    """
    process, n = Bent(closed=closed), 8_000
    mean, cov = gaussian(1.0)
    rng = np.random.default_rng(1)
    x_T = process.bend(torch.from_numpy(rng.multivariate_normal(mean, cov, n)))
    grid = torch.linspace(1.0, 0.02, 101)
    wanted_mean, wanted = gaussian(0.02)
    for method, churn, sense in (
        ("torchsde:heun", 1.0, "stratonovich"),
        ("torchsde:euler", 1.0, "ito"),
        ("torchsde:heun", 0.6, "stratonovich"),
    )[: None if closed else 1]:  # by differentiation it is the same, sample by sample (below), and slow
        noise = Noise(x_T.new_empty(n, 3), 2)
        y = process.flat(
            solve(process.reverse(bent_score(process), churn, sense=sense), x_T, grid, method, noise=noise).x
        )
        np.testing.assert_allclose(y.mean(0).numpy(), wanted_mean, atol=0.03)
        np.testing.assert_allclose(np.cov(y.numpy().T), wanted, atol=0.02)


def test_perturb_under_a_matrix():
    process, n = Bent(), 20_000
    y = np.random.default_rng(3).multivariate_normal(MEAN, COV, n)
    for t in (0.02, 1.0):
        mean, cov = gaussian(t)
        end = process.flat(process.perturb(process.bend(torch.from_numpy(y)), t, seed=0))
        np.testing.assert_allclose(end.mean(0).numpy(), mean, atol=0.03)
        np.testing.assert_allclose(np.cov(end.numpy().T), cov, atol=0.03)


def test_the_divergence_is_the_closed_form_sample_by_sample():
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(Bent().divergence(x, 0.5), Bent(closed=True).divergence(x, 0.5))
    v = torch.randn(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g = Bent().diffusion(x, 0.5)
    torch.testing.assert_close(Bent().squared(x, 0.5, v), (g @ g.mT @ v[..., None])[..., 0])
    torch.testing.assert_close(DoubleWell().divergence(x, 0.5), 0.64 * x)
    torch.testing.assert_close(DoubleWell().stratonovich(x, 0.5), 0.16 * x)
    assert torch.equal(Additive().divergence(x, 0.5), torch.zeros_like(x))
    jumps = sum(  # 1/2 sum_k (G_k . grad) G_k, each along its own column
        torch.func.jvp(lambda y, k=k: Bent().diffusion(y, 0.5)[..., k], (x,), (g[..., k],))[1] for k in range(3)
    )
    torch.testing.assert_close(Bent().stratonovich(x, 0.5), jumps / 2)
    one = DoubleWell().divergence(x[:, 0], 0.5)  # an event without axes
    torch.testing.assert_close(one, 0.64 * x[:, 0])


class Wavy(ItoSDE):
    """A matrix without structure: both terms of the divergence are there."""

    noise_type = "general"

    def diffusion(self, x, t):
        a, b = x[:, 0], x[:, 1]
        rows = [[a.sin() + b**2, a, t * b.cos()], [a * b, b.cos(), 1 + a**2]]
        return torch.stack([torch.stack(row, -1) for row in rows], -2)


def test_the_divergence_of_a_matrix_is_that_by_differences():
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h, slopes = 1e-5, []
    for step in h * torch.eye(2, dtype=torch.float64):
        up, down = (Wavy().diffusion(y, 0.7) for y in (x + step, x - step))
        slopes.append((up @ up.mT - down @ down.mT) / (2 * h))
    by_differences = slopes[0][:, :, 0] + slopes[1][:, :, 1]
    torch.testing.assert_close(Wavy().divergence(x, 0.7), by_differences, rtol=1e-7, atol=1e-7)


class InTime(ItoSDE):
    """dx = -t x dt + 0.5 t dW: of mean exp(-t^2/2), linear in x."""

    def drift(self, x, t):
        return -t * x

    def diffusion(self, t):
        return 0.5 * t


@pytest.mark.parametrize("kind", [InTime, DoubleWell, Bent])
def test_a_sample_is_its_own_in_any_batch_chunk_and_set_of_times(kind, monkeypatch):
    """As many samples as entries, so that a time on the wrong axis would broadcast without a word."""
    process, x0 = kind(), torch.tensor([[0.5, -1.0], [2.0, 0.3]], dtype=torch.float64)
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    both = process.perturb(x0, t, seed=1, ids=[4, 9])
    for i in range(2):
        alone = process.perturb(x0[i : i + 1], float(t[i]), seed=1, ids=[[4, 9][i]])
        assert torch.equal(alone, both[i : i + 1])
    rows = []
    drift = kind.drift
    monkeypatch.setattr(ito, "_ROOM", 12)
    monkeypatch.setattr(kind, "drift", lambda self, x, t: rows.append(len(x)) or drift(self, x, t))
    many = x0.repeat(10, 1)
    a = process.perturb(many, 0.5, seed=1)
    assert max(rows) <= 6
    monkeypatch.setattr(ito, "_ROOM", 2**20)
    assert torch.equal(a, process.perturb(many, 0.5, seed=1))
    assert max(rows) == 20
    assert not torch.equal(a, process.perturb(many, 0.5, seed=2))
    assert torch.equal(process.perturb(x0, 0.0, seed=1), x0)


def test_per_sample_times_in_drift_and_solver():
    """A drift that depends on t, on two samples of two entries, through the flow's adaptive steps."""
    process, x = InTime(), torch.tensor([[0.5, -1.0], [2.0, 0.3]], dtype=torch.float64)
    flow = process.probability_flow(lambda x, t: -x * (1 + (t if t.ndim == 0 else t[:, None])))
    both = solve(flow, x, [1.0, 0.1], "rk45").x
    for i in range(2):
        torch.testing.assert_close(solve(flow, x[i : i + 1], [1.0, 0.1], "rk45").x, both[i : i + 1])
    exact = solve_ivp(
        lambda t, y: -t * y + 0.125 * t**2 * y * (1 + t), (1.0, 0.1), x.numpy().ravel(), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(both.numpy().ravel(), exact.y[:, -1], rtol=1e-4)
    sra = solve(process.reverse(lambda x, t: -x), x, [1.0, 0.1], "adaptive_sra1", rtol=0.1, atol=0.1)
    assert sra.success


def test_the_default_prior_is_the_law_at_T():
    process = CIR()
    process.T = 6.0
    x = process.prior_sample((N, 1), seed=0, dtype=torch.float64)
    process.starts = np.array([1.0, 1.0])
    assert oracle.ks_distance(x[:, 0].numpy(), process.cdf(6.0)) < THRESHOLD
    assert x.dtype == torch.float64
    assert torch.equal(x[2:4], process.prior_sample((2, 1), seed=0, dtype=torch.float64, ids=[2, 3]))


def test_score_matching_on_simulated_states_finds_the_score():
    """The part of E |s|^2 that a small network leaves over against Fokker-Planck's score, at three times."""
    fp, process = truth(DoubleWell), DoubleWell()
    process.steps = 12
    options = {"objective": sliced(), "steps": 400, "batch": 256, "lr": 1e-2, "device": "cpu"}
    data, times = fp.draws(0.0, 4096, 1).float(), lambda u: 0.05 + 1.95 * u
    trained = train(net(), process, data, predicts="score", times=times, **options).network
    score = as_score(trained, process)
    for t in (0.2, 0.6, 2.0):
        x, p = torch.from_numpy(fp.x)[:, None], fp.p[round(t / fp.dt)]
        exact = fp.score(x, t)[:, 0].numpy()
        found = score(x, t)[:, 0].detach().numpy()
        assert (p * (found - exact) ** 2).sum() < 0.2 * (p * exact**2).sum(), t
    x_T = process.prior_sample((64, 1), seed=1)
    solution = solve(process.reverse(score), x_T, torch.linspace(2.0, 0.05, 40), "milstein")
    assert solution.nfe == 39


@pytest.mark.parametrize("objective", [implicit(), sliced(3), finite_difference(step=1e-3)])
def test_a_loss_on_simulated_states_is_the_formula(objective):
    """t (s^2 + 2 s') at the x_t that the same normals make; in one dimension all three are this."""
    process, t = DoubleWell(), torch.tensor([0.3, 1.0, 1.7], dtype=torch.float64)
    score = as_score(lambda x, t: torch.sin(2 * x), process)
    x0 = torch.tensor([[0.5], [-1.0], [1.2]], dtype=torch.float64)
    losses = objective(score, x0, t, Noise(x0, 3).normal)
    x = process.draw(x0, t, Noise(x0, 3).normal)[:, 0]
    torch.testing.assert_close(losses, t * (torch.sin(2 * x) ** 2 + 4 * torch.cos(2 * x)), rtol=1e-5, atol=1e-5)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))

    def forward(self, x, t):
        return self.layers(torch.stack([x[:, 0], t, t.log()], 1)) / t.sqrt()[:, None].clamp_max(1.0)


def test_conditions_and_guidance_follow_their_samples():
    """Labels, and the guided mix 2 c - u, against the same by hand; and where samples leave an adaptive loop."""
    process, labels, none = DoubleWell(), torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3])

    def network(x, t, y):
        return -3 * x + 0.5 * y[:, None].to(x)

    score = as_score(network, process)
    x, grid = torch.tensor([[0.1], [0.7], [-0.5]], dtype=torch.float64), torch.linspace(2.0, 1.9, 5)
    guided = guidance.classifier_free(score, labels, none, 2.0)
    for made, a in ((score.given(labels), 1.0), (guided, 2.0)):

        def by_hand(x, t, a=a):
            return a * network(x, t, labels) + (1 - a) * network(x, t, none)

        ends = [solve(process.reverse(s), x, grid, "milstein", noise=Noise(x, 1)).x for s in (made, by_hand)]
        torch.testing.assert_close(*ends)
        assert solve(process.probability_flow(made), x, grid, "rk45", rtol=1e-3, atol=1e-3).success


class Explosive(ItoSDE):
    """dx = x^3 dt + dW leaves every bound."""

    def drift(self, x, t):
        return x**3

    def diffusion(self, t):
        return 1.0


def bad(kind=ItoSDE, **methods):
    return type("Bad", (kind,), methods)()


X = torch.ones(4, 2)


def draw(kind=DoubleWell, t=0.5, x=X, **methods):
    return lambda: bad(kind, **methods).perturb(x, t)


def down(method="milstein", grid=(1, 0.5), churn=1.0, sense="ito", **options):
    return lambda: solve(DoubleWell().reverse(lambda x, t: -x, churn, sense=sense), X, grid, method, **options)


REFUSED = {
    "drift's shape": (draw(drift=lambda s, x, t: x[:, :1]), "drift of Bad must return x's shape"),
    "drift is no tensor": (draw(drift=lambda s, x, t: 0.0), "got float"),
    "drift's dtype": (draw(drift=lambda s, x, t: x.double()), "x's dtype torch.float32"),
    "diffusion's shape": (draw(diffusion=lambda s, x, t: x[:, :1]), "means diffusion"),
    "matrix": (draw(Bent, diffusion=lambda s, x, t: x), r"shape \(B, \*event, m\)"),
    "additive of x": (draw(Additive, diffusion=lambda s, x, t: x), "'additive' means"),
    "additive's shape": (draw(Additive, diffusion=lambda s, t: torch.ones(3)), "3 entries"),
    "noise type": (draw(noise_type="diagonl"), "did you mean 'diagonal'"),
    "no drift": (draw(ItoSDE, diffusion=lambda s, t: 1.0), r"Bad needs drift\(x, t\)"),
    "time": (draw(t=2.5), r"t must lie in \[0, 2\]"),
    "times": (draw(t=torch.ones(3)), "3 entries for a batch of 4"),
    "state": (draw(x=X * math.nan), "x0 holds 8 non-finite values"),
    "steps": (lambda: DoubleWell().perturb(X, 1.0, steps=0), "steps must be at least 1"),
    "ids": (lambda: DoubleWell().perturb(X, 1.0, ids=[1]), "ids must hold one number per sample"),
    "sense": (down(sense="itho"), "did you mean 'ito'"),
    "churn": (down(churn=-1.0), "churn must be a finite number >= 0"),
    "rule's sense": (down("heun"), "solves Stratonovich's equation"),
    "back-end's sense": (lambda: solve(DoubleWell(), X, [0, 0.5], "torchsde:heun"), "use torchsde:euler"),
    "the other sense": (down(sense="stratonovich"), "solves Ito's equation"),
    "forwards": (down(grid=(0.5, 1)), "grid must decrease"),
    "below t_min": (down(grid=(1, 0)), "grid must lie in"),
    "a rule on alpha": (down("ddim", churn=0.0), "no alpha and sigma"),
    "adams": (down("adams", churn=0.0), "no alpha and sigma"),
    "denoise": (down(denoise=True), "no alpha and sigma"),
    "sample": (lambda: sample(DoubleWell(), lambda x, t: -x, (3, 1)), "solve.process.reverse"),
    "eps": (lambda: as_score(nn.Identity(), DoubleWell(), predicts="eps"), 'models predict a "score"'),
    "oracle": (
        lambda: DoubleWell().reverse(GaussianMixture([[0.0]], [[[1.0]]]).score(VPSDE())),
        "predicts v of VPSDE",
    ),
    "other's network": (lambda: DoubleWell().reverse(as_score(nn.Identity(), VPSDE())), "predicts score of VPSDE"),
    "denoising": (
        lambda: train(net(), DoubleWell(), torch.ones(4, 1), predicts="score", objective=denoising(), steps=1, batch=2),
        r"objective=sliced\(\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_named(case):
    call, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        call()


def test_what_explodes_says_when():
    with pytest.raises(FloatingPointError, match=r"Explosive are not finite from t = 0\.\d+ on \(step \d+ of 100\)"):
        Explosive().perturb(10 * torch.ones(4, 2), 1.0, seed=0)
    with pytest.raises(FloatingPointError, match="score returned NaN or infinite values at t = 1"):
        solve(DoubleWell().reverse(lambda x, t: x * math.nan), X, [1, 0.5], "milstein")
