"""Processes that end without signal: closed forms at and near T, the shift, tables, and what a model says there."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdekit import SDE, BetaTable, CosineVP, GaussianMixture, RectifiedFlow, as_score
from sdekit.processes.kinds import KINDS
from tests.zero import MEAN, ZERO, Rounded, moments, network, table

shifts = st.floats(0.05, 20)


@pytest.fixture(params=ZERO)
def zero(request):
    return ZERO[request.param]()


def test_the_end_is_pure_noise(zero):
    """alpha(T) = 0 (6e-17 where a user's cosine rounds), sigma(T) = 1: the prior is the marginal, whatever the data."""
    t = zero.T
    assert t == 1.0
    assert abs(float(zero.alpha(t))) <= (6.2e-17 if isinstance(zero, Rounded) else 0.0)
    assert float(zero.sigma(t)) == pytest.approx(1.0, abs=3e-16)
    x0 = torch.full((4, 3), 5.0)
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(zero.perturb(x0, t, noise=noise), noise, rtol=1e-6, atol=1e-7)
    mean, std = zero.marginal(x0, torch.tensor([t, 0.5, t, 0.5]))
    assert mean[::2].abs().max() < 1e-15
    assert mean[1::2].min() > 0.1
    torch.testing.assert_close(std.flatten()[::2], torch.ones(2))
    mixture = GaussianMixture([[1.0, -2.0]], [[[0.3, 0.1], [0.1, 0.2]]])
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(mixture.at(zero, t).log_prob(x), zero.prior_log_prob(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(mixture.score(zero)(x, t), -x, rtol=1e-13, atol=1e-13)


def test_snr_falls_to_0_and_everything_below_T_is_finite(zero):
    t = torch.linspace(zero.t_min, 1, 401, dtype=torch.float64)
    lam = zero.half_log_snr(t)
    assert bool((lam.diff() < 0).all())
    assert float(zero.snr(1.0)) < 1e-32
    assert float(lam[-1]) < -37
    c = zero.coefficients(t[:-1])
    assert all(bool(torch.isfinite(y).all()) for y in c)
    assert bool((c.g2 > 0).all())
    at_T = zero.coefficients(1.0)  # the slopes stay; what is divided by alpha does not
    assert math.isfinite(float(at_T.dalpha))
    assert math.isfinite(float(at_T.dsigma))
    assert float(at_T.f) < -1e15
    assert float(at_T.g2) > 1e15
    exact = not isinstance(zero, Rounded)
    assert [math.isinf(float(y)) for y in (at_T.f, at_T.g2)] == [exact, exact]
    assert all(bool(torch.isfinite(y).all()) for y in zero.velocity(torch.ones(3, dtype=torch.float64)))


@given(shift=shifts, t=st.floats(1e-6, 1 - 1e-9))
def test_coefficients_of_the_rectified_flow(shift, t):
    """By hand: u' = shift/(1 + (shift - 1) t)^2, f = -u'/(1 - u), g^2 = 2 u u' + 2 u^2 u'/(1 - u) = 2 u u'/(1 - u)."""
    c = RectifiedFlow(shift).coefficients(t)
    u, slope = shift * t / (1 + (shift - 1) * t), shift / (1 + (shift - 1) * t) ** 2
    left = (1 - t) / (1 + (shift - 1) * t)  # 1 - u
    want = (left, u, -slope / left, 2 * u * slope / left, -slope, slope)
    for got, value in zip(c, want, strict=True):
        assert float(got) == pytest.approx(value, rel=1e-6)
    at_T = RectifiedFlow(shift).coefficients(1.0)
    assert [float(at_T.dalpha), float(at_T.dsigma)] == pytest.approx([-1 / shift, 1 / shift], rel=1e-12)


@given(shift=shifts, t=st.floats(1e-6, 1))
def test_shift_is_another_clock(shift, t):
    """u(t) = shift t/(1 + (shift - 1) t): a shifted process at t is the plain one at u, and t_min is where u = 1e-3."""
    sde, plain = RectifiedFlow(shift), RectifiedFlow()
    u = float(sde.sigma(t))
    assert u == pytest.approx(shift * t / (1 + (shift - 1) * t), rel=1e-14)
    assert float(sde.alpha(t)) == pytest.approx(float(plain.alpha(u)), rel=1e-9, abs=1e-15)
    assert float(sde.alpha(t) + sde.sigma(t)) == pytest.approx(1, abs=1e-14)
    assert float(sde.sigma(sde.t_min)) == pytest.approx(float(plain.sigma(plain.t_min)), rel=1e-13) == 1e-3
    assert u / (shift - (shift - 1) * u) == pytest.approx(t, rel=1e-13)  # the inverse
    assert [float(y) for y in sde.velocity(t)] == [-1.0, 1.0]
    composed = float(RectifiedFlow(2.0).sigma(u))  # shifts multiply
    assert composed == pytest.approx(float(RectifiedFlow(2 * shift).sigma(t)), rel=1e-13)


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0])
def test_alpha_keeps_its_digits_near_T(shift):
    """In rational arithmetic: 1 - u has none left from 1 - 1e-16 on, alpha all."""
    for k in range(1, 50):
        t = 1 - 2.0**-k
        exact = (1 - Fraction(t)) / (1 + (Fraction(shift) - 1) * Fraction(t))
        assert float(RectifiedFlow(shift).alpha(t)) == pytest.approx(float(exact), rel=1e-15)


@pytest.mark.parametrize("s", [0.0, 0.008, 0.1])
def test_cosine_is_nichol_and_dhariwal_s(s):
    """abar = cos^2(pi/2 (t + s)/(1 + s)) over its value at 0, in extended precision, near both ends too."""
    t = np.array([1e-8, 1e-4, 0.1, 0.5, 0.9, 1 - 1e-4, 1 - 1e-9])
    wide = t.astype(np.longdouble)
    half_pi = np.arctan2(np.longdouble(1), np.longdouble(0))

    def cosine(t):
        return np.cos(half_pi * (t + np.longdouble(s)) / (1 + np.longdouble(s)))

    alpha = cosine(wide) / cosine(np.longdouble(0))
    sde = CosineVP(s)
    a, sigma = sde.alpha(torch.from_numpy(t)), sde.sigma(torch.from_numpy(t))
    torch.testing.assert_close(a, torch.from_numpy(alpha.astype(float)), rtol=1e-9, atol=0)
    exact = np.sqrt(1 - alpha**2).astype(float)[1:]  # at 1e-8 not even extended precision has its digits
    torch.testing.assert_close(sigma[1:], torch.from_numpy(exact), rtol=1e-11, atol=0)
    torch.testing.assert_close(a**2 + sigma**2, torch.ones_like(a), rtol=1e-14, atol=0)
    slope = -math.pi / 2 / (1 + s) / math.cos(math.pi / 2 * s / (1 + s))
    at_T = sde.coefficients(1.0)
    assert float(at_T.dalpha) == pytest.approx(slope, rel=1e-12)
    assert float(at_T.dsigma) == pytest.approx(0.0, abs=1e-12)


def test_a_table_that_ends_without_signal():
    """abar_i = prod (1 - beta) to the last, which is 0; alpha is linear in t on the last interval."""
    sde, n = table(50), 50
    bar = torch.cumprod(1 - sde.betas, 0)
    torch.testing.assert_close(sde.alpha(sde.times) ** 2, bar, rtol=1e-12, atol=0)
    torch.testing.assert_close(sde.sigma(sde.times) ** 2, 1 - bar, rtol=1e-12, atol=0)
    left = torch.tensor([1.0, 0.75, 0.5, 1e-3, 1e-9, 0.0], dtype=torch.float64)  # of the last interval
    t = 1 - left / n
    torch.testing.assert_close(sde.alpha(t), bar[-2].sqrt() * n * (1 - t), rtol=1e-12, atol=0)
    torch.testing.assert_close(sde.alpha(t) ** 2 + sde.sigma(t) ** 2, torch.ones_like(t), rtol=1e-15, atol=0)
    assert float(sde.coefficients(1.0).dalpha) == pytest.approx(-n * float(bar[-2]) ** 0.5, rel=1e-12)
    before = BetaTable(sde.betas[:-1])  # up to the last interval the same chain
    torch.testing.assert_close(sde.alpha(before.times * (n - 1) / n), before.alpha(before.times), rtol=1e-12, atol=0)
    for betas in ([0.1, 1.0, 0.5], [0.1, 1.1], [1.0, 1.0]):
        with pytest.raises(ValueError, match="betas must lie between 0 and 1"):
            BetaTable(betas)


def test_the_inverse_reaches_the_end(zero):
    assert float(zero.inverse_half_log_snr(-math.inf)) == 1.0
    lam = torch.tensor([-math.inf, -27.0, -20.0, -6.9, -1.0, 0.0, 3.0, -math.inf], dtype=torch.float64)
    t = zero.inverse_half_log_snr(lam)
    assert t[0] == t[-1] == 1.0
    torch.testing.assert_close(zero.half_log_snr(t[3:-1]), lam[3:-1], rtol=0, atol=1e-11)
    # of a time near 1 there are 16 digits, of what is left of it as many less
    torch.testing.assert_close(zero.half_log_snr(t[1:3]), lam[1:3], rtol=0, atol=3e-3)
    with pytest.raises(ValueError, match=r"lam must lie in \[-inf, .*got nan"):
        zero.inverse_half_log_snr(torch.tensor([0.0, math.nan]))


def test_transitions_to_the_end_forget(zero):
    """x_T | x_t ~ N(0, 1); and a step of no length is none, at T too."""
    a, s = zero.transition(torch.tensor([zero.t_min, 0.5]), torch.ones(2))
    assert float(a.abs().max()) < 1e-15
    torch.testing.assert_close(s, torch.ones(2).double(), rtol=1e-15, atol=0)
    a, s = zero.transition(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 1.0]))
    assert a.tolist() == [1.0, 1.0]
    assert s.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("predicts", KINDS)
def test_what_a_model_says_at_T(zero, predicts):
    """Its score is that of the prior; E[x_0|x_T] is the mean of the data, which eps and score do not know."""
    score = network(zero, predicts)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([1.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    (m, v), (_, one) = moments(zero, 0.5), moments(zero, 1.0)
    assert one == pytest.approx(1, abs=1e-15)
    want = torch.where((t == 1)[:, None], -x, -(x - m) / v)
    torch.testing.assert_close(score(x, t), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(score(x, 1.0), -x, rtol=1e-12, atol=1e-12)
    if predicts not in ("eps", "score"):
        torch.testing.assert_close(zero.denoise(x, 1.0, score), torch.full_like(x, MEAN), rtol=1e-12, atol=1e-12)
        x_0, eps = zero.probability_flow(score).predict(x, 1.0)
        torch.testing.assert_close(x_0, torch.full_like(x, MEAN), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(eps, x, rtol=1e-12, atol=1e-12)


def test_what_rounds_to_0_is_0_and_what_does_not_is_not():
    """A cosine's 6e-17 stands for 0; a signal of 1e-9 of the noise is one."""

    class Faint(SDE):
        def alpha(self, t):
            return 1 - (1 - 1e-9) * t

        def sigma(self, t):
            return t

    times = torch.tensor([0.5, 1.0], dtype=torch.float64)
    x = torch.zeros(2, 2, dtype=torch.float64)
    for sde, last in ((Rounded(), 0.0), (Faint(), 1e-9)):
        system = sde.probability_flow(network(sde, "x0"))
        lv = system.levels(times)
        assert float(lv.alpha[1]) == pytest.approx(last, abs=1e-16)
        assert math.isinf(float(lv.lam[1])) == (last == 0)
        assert system.at(1.0, x).alpha == pytest.approx(last, abs=1e-16)
    quiet = as_score(lambda x, t: x, Faint(), "eps")
    Faint().probability_flow(quiet).prepare([1.0, 0.5], x)  # which says something of x_0 there
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Rounded().probability_flow(as_score(lambda x, t: x, Rounded(), "eps")).prepare([1.0, 0.5], x)
