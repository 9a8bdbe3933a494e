"""One matrix: every process of the library against the exact law of small data, by tests that know none of them.

What a process is stands in the table alone. The tests ask it for what it says of itself (``diffuses``, ``place``,
``colour``) and its law for distribution functions and densities.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from sdekit import (
    VESDE,
    VPSDE,
    AffineSDE,
    BetaTable,
    BridgeSDE,
    CorrelatedSDE,
    CosineVP,
    GaussianMixture,
    HeatODE,
    PointSet,
    PoissonFlow,
    RectifiedFlow,
    SigmaTable,
    SubVPSDE,
    log_likelihood,
    sample,
    solve,
)
from sdekit.solvers.steppers import RULES
from tests import oracle
from tests.processes.test_ito import CIR, cir_draws

# n draws, projected on three directions (of one dimension on one), with their exact distribution functions. Massart's
# inequality bounds the false alarm of a projection by ALARM; there are fewer than 400: one in 1e-7 of all runs.
N, ALARM = 6_000, 2e-10
THRESHOLD = oracle.ks_threshold(N, ALARM)  # 0.044: of a Gaussian a mean .11 standard deviations off, or 20 % of them

MEANS = np.array([[-1.0, 0.3], [0.8, 0.8], [0.2, -1.1]])
COVS = np.array([[[0.1, 0.04], [0.04, 0.08]], [[0.05, 0.0], [0.0, 0.05]], [[0.03, -0.02], [-0.02, 0.06]]])
WEIGHTS = np.array([0.5, 0.3, 0.2])
K = torch.tensor([[1.0, 0.7], [0.7, 0.8]], dtype=torch.float64)


class Law:
    """x_t = alpha x_0 + m + sigma L eps in the plane, eps Gaussian or Student's of df degrees of freedom.

    x_0 of three Gaussians, under Student's noise of three points: each case has a closed form.
    """

    d = 2

    def __init__(self, sde, df=math.inf):
        self.sde, self.df = sde, df
        self.gaussian = math.isinf(df)
        self.covs = COVS if self.gaussian else 0 * COVS

    def score(self):
        """The exact model."""
        if self.gaussian:
            return GaussianMixture(MEANS, COVS, WEIGHTS).score(self.sde)
        return PointSet(torch.from_numpy(MEANS[self.picks(10)])).score(self.sde)

    @staticmethod
    def picks(n):
        """The components of n data, in the exact shares."""
        return np.repeat(np.arange(3), np.round(n * WEIGHTS).astype(int))

    def data(self, n, seed):
        z = np.random.default_rng(seed).standard_normal((n, 2))
        k = self.picks(n)
        roots = np.linalg.cholesky(self.covs + 1e-30 * np.eye(2))
        return torch.from_numpy(MEANS[k] + np.einsum("nij,nj->ni", roots[k], z))

    def draws(self, t, n, seed):
        return self.sde.perturb(self.data(n, seed), t, seed=seed)

    def at(self, t):
        """Means and covariances (of Student's noise the scale) of the components of x_t."""
        a, s = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        root = self.sde.colour(torch.eye(2, dtype=torch.float64)).numpy().T
        return self.sde.place(torch.from_numpy(a * MEANS), t).numpy(), a**2 * self.covs + s**2 * root @ root.T

    def cdf(self, t, u):
        means, covs = self.at(t)
        spread = np.sqrt(np.einsum("i,kij,j->k", u, covs, u))
        one = stats.norm if self.gaussian else stats.t(self.df)
        return lambda v: (WEIGHTS * one.cdf((v[:, None] - means @ u) / spread)).sum(1)

    def log_prior(self, x):
        """The kernel about nothing, at T."""
        t, none = self.sde.T, torch.zeros(1, 2, dtype=torch.float64)
        root = float(self.sde.sigma(t)) * self.sde.colour(torch.eye(2, dtype=torch.float64)).numpy().T
        return torch.from_numpy(self.density()(self.sde.place(none, t)[0].numpy(), root @ root.T).logpdf(x.numpy()))

    def log_prob(self, x, t):
        parts = zip(WEIGHTS, *self.at(t), strict=True)
        return torch.from_numpy(np.log(sum(w * self.density()(m, c).pdf(x.numpy()) for w, m, c in parts)))

    def density(self):
        return stats.multivariate_normal if self.gaussian else functools.partial(stats.multivariate_t, df=self.df)


class SquareRoot:
    """The law of Cox, Ingersoll and Ross's process from two points."""

    d = 1
    log_prob = None  # a density is for processes of alpha and sigma

    def __init__(self, process):
        self.process = process

    def score(self):
        return self.process.score

    def data(self, n, seed):
        return torch.from_numpy(np.repeat(self.process.starts, np.round(n * self.process.weights).astype(int)))[:, None]

    def draws(self, t, n, seed):
        return cir_draws(self.process, t, n, seed)

    def cdf(self, t, u):
        return lambda v: self.process.cdf(t)(v * u[0])


@dataclass
class Case:
    """A process, its law, two times between which simulations run, and the times of n steps from late to early."""

    sde: Any
    law: Any
    early: float
    late: float
    steps: Callable[[int], torch.Tensor]
    rule: str  # of high order, of those that run on it
    adaptive: str  # the method that reaches nine digits on it

    def draw(self, n, seed):
        """From the prior to t_min by what there is for that."""
        score = self.law.score()
        if self.law.log_prob is not None:
            return sample(self.sde, score, (n, self.law.d), denoise=False, seed=seed, dtype=torch.float64)
        x = self.sde.prior_sample((n, self.law.d), seed=seed, dtype=torch.float64)
        grid = torch.linspace(self.sde.T, self.sde.t_min, 201)
        return solve(self.sde.reverse(score), x, grid, "milstein").x


def of_levels(make, df=math.inf, adaptive="scipy:DOP853"):
    """Simulations between half log-SNRs of -1.5 and 1.2, in even steps of it."""

    def case():
        sde = make()

        def steps(n):
            return sde.inverse_half_log_snr(torch.linspace(-1.5, 1.2, n + 1, dtype=torch.float64))

        late, early = steps(1).tolist()
        return Case(sde, Law(sde, df), early, late, steps, "unipc_2", adaptive)

    return case


def square_root():
    process = CIR()
    early, late = process.t_min, process.T
    return Case(process, SquareRoot(process), early, late,
                lambda n: torch.linspace(late, early, n + 1, dtype=torch.float64), "heun", "scipy:DOP853")  # fmt: skip


def poisson(D):
    sde = PoissonFlow(D)
    sde.t_min = 0.3  # the data are points, which have no distribution function to compare
    return sde


CASES = {
    "VP": of_levels(VPSDE),
    "subVP": of_levels(SubVPSDE),
    "VE": of_levels(VESDE),
    "heat": of_levels(HeatODE),
    "flow": of_levels(RectifiedFlow),
    "shifted flow": of_levels(lambda: RectifiedFlow(3.0)),
    "cosine": of_levels(CosineVP),
    "betas": of_levels(lambda: BetaTable(torch.linspace(1e-3, 0.3, 50)), adaptive="adams"),
    "betas to 1": of_levels(
        lambda: BetaTable(torch.cat([torch.linspace(1e-3, 0.3, 50), torch.ones(1)])), adaptive="adams"
    ),
    "sigmas": of_levels(lambda: SigmaTable(torch.logspace(-2, 1.5, 40)), adaptive="adams"),
    "affine": of_levels(lambda: AffineSDE(lambda t: torch.cos(3 * t) - 1.2, lambda t: 1 + 2 * t, T=2.0)),
    "to a mean": of_levels(lambda: AffineSDE(-1.5, 0.8, 1.05, T=3.0, along=torch.tensor([1.0, -2.0]).double())),
    "bridge": of_levels(lambda: BridgeSDE(torch.tensor([2.0, -1.0], dtype=torch.float64), 1.3)),
    "correlated VP": of_levels(lambda: CorrelatedSDE(VPSDE(), K)),
    "correlated flow": of_levels(lambda: CorrelatedSDE(RectifiedFlow(), K)),
    **{f"Poisson {D:g}": of_levels(functools.partial(poisson, D), D) for D in (1.0, 2.5, 128.0, 2048.0)},
    "square root": square_root,
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def off(law, x, t):
    """The largest distance from the exact distribution functions, on up to three directions."""
    u = np.random.default_rng(0).normal(size=(3 if law.d > 1 else 1, law.d))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    return max(oracle.ks_distance(x.numpy() @ v, law.cdf(t, v)) for v in u)


def test_another_law_is_seen(case):
    """1.4 times as wide, which the heaviest tails hide best, and a little to the side."""
    x = case.law.draws(case.early, N, 0)
    assert off(case.law, 1.4 * x, case.early) > THRESHOLD
    assert off(case.law, x + 0.15 * x.abs().median(), case.early) > THRESHOLD


def test_perturb_and_simulation_have_the_law(case):
    """perturb at three times; and the process's own equation from an early law to a late one."""
    for t in (case.early, case.late, case.sde.T):
        x = case.sde.perturb(case.law.data(N, 1), t, seed=2)
        assert off(case.law, x, t) < THRESHOLD, t
    x = case.law.draws(case.early, N, 3)
    if not case.sde.diffuses:
        with pytest.raises(ValueError, match="no reverse SDE, only a flow"):
            solve(case.sde, x, case.steps(8).flip(0), "euler_maruyama")
        return
    out = solve(case.sde, x, case.steps(120).flip(0), "euler_maruyama").x
    assert off(case.law, out, case.late) < THRESHOLD + 0.005


def test_the_flow_carries_the_law_both_ways(case):
    """From T to t_min, and from t_min to T, by adaptive steps."""
    sde, x = case.sde, case.law.draws(case.sde.T, N, 4)
    flow = sde.probability_flow(case.law.score())
    end = solve(flow, x, [sde.T, sde.t_min], "scipy:RK45", rtol=1e-4, atol=1e-4).x
    assert off(case.law, end, sde.t_min) < THRESHOLD
    own = case.law.draws(sde.t_min, N, 5)
    back = solve(flow, own, [sde.t_min, sde.T], "scipy:RK45", rtol=1e-4, atol=1e-4).x
    assert off(case.law, back, sde.T) < THRESHOLD


def test_the_reverse_sde_lands_on_the_law(case):
    """At a churn that is neither the flow's nor the reverse SDE's: its drift and its noise are both to be right."""
    churn = 0.7
    if not case.sde.diffuses:
        with pytest.raises(ValueError, match="no reverse SDE"):
            case.sde.reverse(case.law.score(), churn)
        return
    x = case.law.draws(case.late, N, 6)
    out = solve(case.sde.reverse(case.law.score(), churn), x, case.steps(150), "euler_maruyama").x
    assert off(case.law, out, case.early) < THRESHOLD + 0.005


def test_a_rule_has_its_order_on_the_flow(case):
    """The mean over samples of the slope, within 0.15, against the same flow to nine digits."""
    flow, x = case.sde.probability_flow(case.law.score()), case.law.draws(case.late, 20, 7)
    grids = [case.steps(n) for n in (40, 80, 160)]
    exact = solve(flow, x, grids[0][[0, -1]], case.adaptive, rtol=1e-9, atol=1e-9).x
    errors = torch.stack([(solve(flow, x, grid, case.rule).x - exact).norm(dim=1) for grid in grids])
    slopes = -errors.log2().diff(dim=0).mean(1)
    assert float(slopes[-1]) == pytest.approx(RULES[case.rule].order, abs=0.15), slopes


def test_the_likelihood_is_the_laws(case):
    """log p at t_min to 1e-4 nats in closed form, with the exact law at T for the prior; and the process's own."""
    sde, score, x = case.sde, case.law.score(), case.law.draws(case.sde.t_min, 10, 8)
    if case.law.log_prob is None:
        with pytest.raises(TypeError, match="has no alpha and sigma"):
            log_likelihood(sde, score, x)
        return
    prior = functools.partial(case.law.log_prob, t=sde.T)
    out = log_likelihood(sde, score, x, rtol=1e-6, atol=1e-6, prior_log_prob=prior)
    torch.testing.assert_close(out.log_prob, case.law.log_prob(x, sde.t_min), rtol=0, atol=1e-4)
    z = sde.prior_sample((10, 2), seed=0, dtype=torch.float64)
    torch.testing.assert_close(sde.prior_log_prob(z), case.law.log_prior(z))


def test_samples_have_the_law(case):
    """From the process's own prior, by the default sampler; .03 for its steps and for the prior that is not p_T."""
    assert off(case.law, case.draw(N, 9), case.sde.t_min) < THRESHOLD + 0.03
