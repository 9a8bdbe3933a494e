"""Discrete tables as processes: DDPM's and SMLD's own formulas, written from betas and sigmas."""

import math

import numpy as np
import pytest
import torch

from sdekit import (
    BetaTable,
    GaussianMixture,
    Noise,
    SigmaTable,
    as_score,
    log_likelihood,
    ode_sample,
    pc_sample,
    sample,
    solve,
)  # fmt: skip

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # Ho et al. 2020, section 4
SIGMAS = torch.logspace(math.log10(0.01), math.log10(50), 60, dtype=torch.float64)
UNEVEN = torch.tensor([0.1, 0.4, 0.05, 0.7, 0.3], dtype=torch.float64)  # neighbours far apart: an index off shows
LEVELS = torch.tensor([0.1, 0.15, 0.9, 1.0, 4.0], dtype=torch.float64)
TABLES = {
    "beta": lambda: BetaTable(BETAS),
    "sigma": lambda: SigmaTable(SIGMAS),
    "uneven beta": lambda: BetaTable(UNEVEN),
    "uneven sigma": lambda: SigmaTable(LEVELS),
}


@pytest.fixture(params=TABLES)
def table(request):
    return TABLES[request.param]()


@pytest.mark.parametrize("betas", [BETAS, UNEVEN], ids=["linear", "uneven"])
def test_a_beta_table_is_exact_at_its_times(betas):
    """alpha^2 is the running product, and a step of the process is DDPM's: N(sqrt(1 - beta_i) x, beta_i)."""
    sde, bar = BetaTable(betas), np.cumprod(1 - betas.numpy())
    assert sde.times.tolist() == [i / len(betas) for i in range(1, len(betas) + 1)]
    assert (sde.T, sde.t_min) == (1.0, 1 / len(betas))
    assert torch.equal(sde.betas, betas)
    np.testing.assert_allclose(sde.alpha(sde.times), np.sqrt(bar), rtol=1e-14)
    np.testing.assert_allclose(sde.sigma(sde.times), np.sqrt(1 - bar), rtol=1e-11)  # numpy's 1 - bar cancels
    before = torch.cat([torch.zeros(1).double(), sde.times[:-1]])
    scale, std = sde.transition(before, sde.times)
    np.testing.assert_allclose(scale[1:], torch.sqrt(1 - betas)[1:], rtol=1e-13)
    np.testing.assert_allclose(std[1:] ** 2, betas[1:], rtol=1e-9)  # of two numbers near 1
    assert float(sde.alpha(0.0)) == 1.0
    assert float(sde.sigma(0.0)) == 0.0
    assert float(sde.sigma(sde.t_min)) ** 2 == pytest.approx(float(betas[0]), rel=1e-14)


@pytest.mark.parametrize("sigmas", [SIGMAS, LEVELS], ids=["geometric", "uneven"])
def test_a_sigma_table_is_exact_at_its_times(sigmas):
    sde = SigmaTable(sigmas)
    np.testing.assert_allclose(sde.sigma(sde.times), sigmas, rtol=1e-14)
    assert torch.equal(sde.sigmas, sigmas)
    assert torch.equal(sde.alpha(sde.times), torch.ones_like(sigmas))
    assert (sde.T, sde.t_min) == (1.0, 1 / len(sigmas))
    np.testing.assert_allclose(sde.sigma(0.3 * sde.times[0]), 0.3 * sigmas[0], rtol=1e-14)
    assert float(sde.sigma(0.0)) == 0.0


def test_between_its_times_a_table_is_a_line_in_the_logarithm():
    betas, sigmas = BetaTable(UNEVEN), SigmaTable(LEVELS)
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        t = betas.times[:-1] + share / 5
        log_bar = torch.log(1 - UNEVEN).cumsum(0)
        expected = (1 - share) * log_bar[:-1] + share * log_bar[1:]
        torch.testing.assert_close(betas.alpha(t) ** 2, expected.exp(), rtol=1e-13, atol=0)
        expected = LEVELS[:-1] ** (1 - share) * LEVELS[1:] ** share
        torch.testing.assert_close(sigmas.sigma(t), expected, rtol=1e-13, atol=0)


def test_the_slope_at_a_time_of_the_table_is_that_of_its_own_step():
    """g^2 = -N log(1 - beta_i) up to and at t_i, and N log(sigma_i^2/sigma_{i-1}^2) sigma^2 under SMLD."""
    for n in (5, 49, 1000):  # i/N times N is not always i
        betas = torch.linspace(0.001, 0.5, n, dtype=torch.float64)
        sde = BetaTable(betas)
        for t in (sde.times, sde.times - 0.4 / n):
            torch.testing.assert_close(sde.coefficients(t).g2, -n * torch.log1p(-betas), rtol=1e-9, atol=0)
            torch.testing.assert_close(sde.coefficients(t).f, n * torch.log1p(-betas) / 2, rtol=1e-9, atol=0)
    sde = SigmaTable(LEVELS)
    growth = 5 * torch.log(LEVELS[1:] ** 2 / LEVELS[:-1] ** 2)
    torch.testing.assert_close(sde.coefficients(sde.times[1:]).g2, growth * LEVELS[1:] ** 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(float(sde.coefficients(0.1).g2), 2 * 25 * 0.1 * 0.1**2)  # sigma = 0.1 5 t


def test_tables_are_monotone_with_finite_coefficients_everywhere(table):
    n = len(table.times)
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    for values in (
        *table.coefficients(t)[:-1],
        table.diffusion(torch.cat([table.times, torch.tensor([1e-12, 1e-6 / n])])),
    ):
        assert torch.isfinite(values).all()
    assert (table.alpha(t).diff() <= 0).all()
    assert (table.sigma(t).diff() > 0).all()
    before, after = table.times[:-1] * (1 - 1e-9), table.times[:-1] * (1 + 1e-9)
    torch.testing.assert_close(table.sigma(after), table.sigma(before), rtol=1e-6, atol=0)  # no jump at a time
    lam = table.half_log_snr(table.times)
    torch.testing.assert_close(table.inverse_half_log_snr(lam), table.times, rtol=1e-9, atol=0)


def test_any_form_of_time_gives_the_same(table):
    t = torch.tensor([0.0, 0.013, 0.2, 0.555, 1.0], dtype=torch.float64)
    for name in ("alpha", "sigma"):
        method = getattr(table, name)
        whole = method(t)
        assert [float(method(float(u))) for u in t] == whole.tolist()
        assert [float(method(u)) for u in t] == whole.tolist()
        assert torch.equal(torch.func.vmap(method)(t), whole)
        assert method(t.float()).dtype == torch.float32
    g2 = table.coefficients(t).g2
    for u, value in zip(t, g2, strict=True):
        assert float(table.coefficients(u).g2) == value
    variance, slope = torch.func.jvp(lambda u: table.coefficients(u).sigma ** 2, (t[1:],), (torch.ones(4).double(),))
    torch.testing.assert_close(slope, g2[1:] + 2 * table.coefficients(t[1:]).f * variance, rtol=1e-12, atol=1e-15)


def test_a_solver_s_first_time_is_not_the_table_s(table):
    """t_min is where solvers stop, and may be set; the process stays."""
    before = table.sigma(table.times)
    table.t_min = 0.5
    assert torch.equal(table.sigma(table.times), before)


MIXTURE = GaussianMixture([[-1.0], [0.8]], [[[0.05]], [[0.3]]], [0.3, 0.7])


def test_an_ancestral_step_is_the_posterior_of_ho_et_al():
    """Equations 6 and 7, from betas alone: the mean with x_0^ for x_0, and beta~ as the variance."""
    for betas, places in ((BETAS, (2, 3, 500, 1000)), (UNEVEN, (2, 3, 4, 5))):
        sde = BetaTable(betas)
        score = MIXTURE.score(sde)
        bar = np.cumprod(1 - betas.numpy())
        x = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
        for i in places:
            t, s = float(sde.times[i - 1]), float(sde.times[i - 2])
            beta, now, before = float(betas[i - 1]), bar[i - 1], bar[i - 2]
            eps = -math.sqrt(1 - now) * score(x, t)
            x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
            mean = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - now)
            noise = Noise(x, 5)
            noise.enter(t, s)
            expected = mean + math.sqrt((1 - before) / (1 - now) * beta) * noise.normal()
            got = solve(sde.reverse(score), x, [t, s], "ancestral", noise=Noise(x, 5)).x
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_an_ancestral_step_of_smld_is_that_of_song_et_al():
    """Song et al. 2021, equation 47: s^2 = sigma^2 differences, and the posterior's variance."""
    sde = SigmaTable(LEVELS)
    score, x = MIXTURE.score(sde), torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    for i in range(1, 5):
        t, s, high, low = (float(y) for y in (sde.times[i], sde.times[i - 1], LEVELS[i] ** 2, LEVELS[i - 1] ** 2))
        noise = Noise(x, 5)
        noise.enter(t, s)
        expected = x + (high - low) * score(x, t) + math.sqrt(low * (high - low) / high) * noise.normal()
        got = solve(sde.reverse(score), x, [t, s], "ancestral", noise=Noise(x, 5)).x
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["beta", "sigma"])
def test_sampling_and_likelihood_run_on_tables(name):
    """Fractions of the two components within 5 standard errors; log p, corrected for t_min, to 1e-4."""
    sde, n = TABLES[name](), 2000
    score = MIXTURE.score(sde)
    for x in (
        sample(sde, score, (n, 1), "ancestral", grid=sde.times.flip(0), seed=0, dtype=torch.float64),
        sample(sde, score, (n, 1), "dpmpp_2m", steps=20, seed=1, dtype=torch.float64),
        ode_sample(sde, score, (n, 1), method="adams", seed=2, dtype=torch.float64),
        pc_sample(sde, score, (n, 1), steps=100, seed=3, dtype=torch.float64),
    ):
        exact = 0.3 * 0.5 * math.erfc((-0.4 + 1) / math.sqrt(0.1)) + 0.7 * 0.5 * math.erfc(-1.2 / math.sqrt(0.6))
        assert abs(float((x > -0.4).double().mean()) - exact) < 5 * math.sqrt(0.25 / n) + 0.01
    x = MIXTURE.sample(20, seed=0, dtype=torch.float64)
    found = log_likelihood(sde, score, x)
    assert float((found.corrected - MIXTURE.log_prob(x)).abs().max()) < 1e-4


@pytest.mark.parametrize("make", [BetaTable, SigmaTable])
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([[0.1, 0.2]], ValueError, "1-D"),
        ([0.1], ValueError, "at least 2"),
        (0.1, ValueError, "1-D"),
        ([0.1, math.nan], ValueError, "finite"),
        ([0.1, math.inf], ValueError, "finite"),
        ([0.0, 0.1], ValueError, "between|positive"),
        ([-0.1, 0.1], ValueError, "between|positive"),
        ("cosine", TypeError, "sequence of numbers"),
        (None, TypeError, "sequence of numbers"),
    ],
)
def test_bad_tables_are_named(make, values, error, message):
    name = "betas" if make is BetaTable else "sigmas"
    with pytest.raises(error, match=f"^{name} must.*({message})"):
        make(values)


def test_what_only_one_of_them_refuses():
    with pytest.raises(ValueError, match="betas must lie between 0 and 1"):
        BetaTable([1.0, 0.1])
    with pytest.raises(ValueError, match="betas must lie between 0 and 1"):
        BetaTable([0.1, 1.1])
    for values in ([2.0, 1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="sigmas must be positive and increase"):
            SigmaTable(values)


def test_a_table_is_a_copy_and_takes_any_numbers():
    values = np.array([0.1, 0.2, 0.3])
    sde = BetaTable(values)
    values[:] = 0.9
    assert sde.betas.tolist() == [0.1, 0.2, 0.3]
    assert SigmaTable([1, 2, 3]).sigmas.dtype == torch.float64


def test_zero_terminal_snr_is_refused_with_its_remedy():
    for betas in ([0.5] * 200, [0.1, 0.2, 1.0]):
        sde = BetaTable(betas)
        with pytest.raises(ValueError, match=r"zero terminal SNR.*set T a little lower.*predicts v, x0 or flow"):
            sample(sde, as_score(lambda x, t: x, sde), (2, 2), nfe=5, seed=0)


def test_a_last_beta_of_1_ends_without_signal():
    """Lin et al. 2024: alpha is 0 at T, linear on the last interval, and the rest of the table is what it was."""
    betas = torch.linspace(0.01, 0.3, 10)
    one, cut = BetaTable(torch.cat([betas, torch.ones(1)])), BetaTable(betas)
    torch.testing.assert_close(one.alpha(one.times[:-1]), cut.alpha(cut.times), rtol=1e-12, atol=0)
    assert float(one.alpha(1.0)) == 0
    assert float(one.sigma(1.0)) == 1
    t = torch.tensor([10.25, 10.5, 10.75]).double() / 11
    torch.testing.assert_close(one.alpha(t) / one.alpha(10 / 11), torch.tensor([0.75, 0.5, 0.25]).double())
    torch.testing.assert_close(one.alpha(t) ** 2 + one.sigma(t) ** 2, torch.ones(3).double())
    c = one.coefficients(one.times)
    assert torch.isfinite(torch.stack([c.dalpha, c.dsigma])).all()
    assert torch.isfinite(torch.stack(c[:-1]))[:, :-1].all()
