"""The variational bound against quadrature and the entropy of data whose exact score is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import norm

from sdekit import VPSDE, HeatODE
from sdekit.likelihood.bound import log_bin_probability, variational_bound
from sdekit.likelihood.quantization import Quantization
from tests.conftest import gaussian_score

P = np.array([0.4, 0.05, 0.3, 0.2, 0.05])  # the data: five levels, each entry on its own
V = np.linspace(-1, 1, 5)
ENTROPY = -float((P * np.log(P)).sum())
EPS = np.linspace(-10, 10, 4001)
WEIGHT = norm.pdf(EPS) * (EPS[1] - EPS[0])  # the trapezoid rule, exact to rounding for smooth functions


def point_score(sde):
    """grad log sum_k P_k N(alpha V_k, sigma^2), entry by entry."""
    log_p, v = torch.from_numpy(P).log(), torch.from_numpy(V)

    def score(x, t):
        a, s = (c.reshape(-1, *(1,) * x.ndim) for c in (sde.alpha(t), sde.sigma(t)))
        z = (x.unsqueeze(-1) - a * v.to(x)) / s
        return -((log_p.to(x) - z**2 / 2).softmax(-1) * z / s).sum(-1)

    return score


def squared_error(level, lam):
    """E|eps - eps^|^2 of one entry with that level, at half log-SNR lam."""
    y = np.exp(lam) * V[level] + EPS  # x_t/sigma
    z = y[:, None] - np.exp(lam) * V
    predicted = (softmax(np.log(P) - z**2 / 2, axis=1) * z).sum(1)
    return float(WEIGHT @ (EPS - predicted) ** 2)


def reconstruction(level, lam):
    """E[-log P(bin)] of one entry under N(x_0^, e^-2lam)."""
    y = np.exp(lam) * V[level] + EPS
    mean = softmax(np.log(P) - (y[:, None] - np.exp(lam) * V) ** 2 / 2, axis=1) @ V
    edges = [-np.inf, *(V[1:] + V[:-1]) / 2, np.inf]
    low, high = ((edges[level + i] - mean) * np.exp(lam) for i in (0, 1))
    mass = np.where(low > 0, norm.sf(low) - norm.sf(high), norm.cdf(high) - norm.cdf(low))
    return -float(WEIGHT @ np.log(mass))


def prior_mismatch(sde):
    """KL(p_T || N(0, sigma_T^2)), by quadrature: what the bound exceeds the entropy by when all else is exact."""
    a = float(sde.alpha(sde.T) / sde.sigma(sde.T))
    p = (P * norm.pdf(EPS[:, None] - a * V)).sum(1)
    return float((p * np.log(p / norm.pdf(EPS))).sum() * (EPS[1] - EPS[0]))


def every_level(repeats):
    return torch.arange(5).repeat_interleave(repeats)


def over_levels(y):
    """Mean and standard error of each level's repeats, (5,), from their spread alone."""
    y = y.reshape(5, -1)
    return y.mean(1).numpy(), (y.std(1) / y.shape[1] ** 0.5).numpy()


def over_data(y):
    """Mean and standard error of the expectation over the data."""
    mean, error = over_levels(y)
    return float(P @ mean), float(((P * error) ** 2).sum() ** 0.5)


def double(sde, x, **kwargs):
    return variational_bound(sde, point_score(sde), x, levels=5, dtype=torch.float64, seed=0, **kwargs)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_every_term_of_the_chain_is_what_quadrature_says(sde, steps):
    """Prior to rounding; KL terms (one with steps = 2) and decoder within 6 standard errors of 8000 draws a level."""
    sde.t_min = float(sde.inverse_half_log_snr(-math.log(0.3)))  # noise that the decoder feels: bins are 0.5 wide
    first, last = (float(sde.half_log_snr(t)) for t in (sde.t_min, sde.T))
    lam = np.linspace(first, last, steps) if steps > 1 else np.array([last])
    bound = double(sde, every_level(2000), steps=steps, samples=4)
    torch.testing.assert_close(bound.prior, torch.from_numpy(V).repeat_interleave(2000) ** 2 * math.exp(2 * last) / 2)
    snr = np.exp(2 * lam)
    for level in range(5):
        error = [squared_error(level, b) / np.exp(2 * b) for b in lam[1:]]  # |x_0 - x_0^|^2
        exact = {
            "diffusion": sum(0.5 * (snr[:-1] - snr[1:]) * error),
            "reconstruction": reconstruction(level, lam[0]),
        }
        for name, value in exact.items():
            mean, stderr = (y[level] for y in over_levels(getattr(bound, name)))
            assert abs(mean - value) <= 6 * stderr + 1e-9, (level, name, mean, value, stderr)
            assert stderr < 0.05 * value + 1e-9  # the comparison says something


def test_in_continuous_time_the_exact_score_reaches_the_entropy(sde):
    """I-MMSE: the data's expectation is the entropy plus the prior's mismatch (below 1e-3), no decoder to pay for."""
    bound = double(sde, every_level(500), samples=64)
    assert 0 <= prior_mismatch(sde) < 1e-3
    mean, stderr = over_data(bound.nats)
    assert stderr < 0.025
    assert abs(mean - ENTROPY - prior_mismatch(sde)) < 6 * stderr
    assert float(bound.reconstruction.max()) < 1e-6


def test_each_continuous_term_is_what_quadrature_says():
    """Level by level, where t_min is so late that the decoder pays."""
    sde = VPSDE()
    sde.t_min = float(sde.inverse_half_log_snr(1.0))
    lam = np.linspace(float(sde.half_log_snr(sde.T)), 1.0, 150)
    bound = double(sde, every_level(1000), samples=8)
    for level in range(5):
        integral = np.trapezoid([squared_error(level, b) for b in lam], lam)
        for name, value in (("diffusion", integral), ("reconstruction", reconstruction(level, 1.0))):
            mean, stderr = (y[level] for y in over_levels(getattr(bound, name)))
            assert abs(mean - value) < 6 * stderr, (level, name)
            assert stderr < 0.05 * value


@pytest.mark.parametrize("make", [VPSDE, HeatODE])
def test_the_chain_decreases_to_the_entropy(make):
    """Above it for every number of steps; the gap falls at least twofold per four times the steps, to below 0.1."""
    sde = make()
    gaps = []
    for steps in (4, 16, 64, 256):
        mean, stderr = over_data(double(sde, every_level(400), steps=steps, samples=2).nats)
        gaps.append(mean - ENTROPY)
        assert gaps[-1] > 6 * stderr
    assert all(b < a / 2 for a, b in pairwise(gaps))
    assert gaps[-1] < 0.1


def test_a_wrong_score_pays_and_entries_add():
    """Of independent entries, any event shape: bits per dimension are the entry's; half the score costs more."""
    sde = VPSDE()
    generator = torch.Generator().manual_seed(0)
    x = torch.multinomial(torch.from_numpy(P), 400 * 12, replacement=True, generator=generator).reshape(400, 3, 2, 2)
    surprise = -torch.from_numpy(np.log(P))[x].sum((1, 2, 3)) / (12 * math.log(2))
    bound = double(sde, x, samples=32)
    difference = bound.bits_per_dim - surprise  # zero only on average over each entry's law
    assert abs(float(difference.mean())) < 6 * float(difference.std()) / 20
    assert float(difference.std()) / 20 < 0.04
    worse = variational_bound(sde, lambda x, t: point_score(sde)(x, t) / 2, x, levels=5, samples=32, seed=0)
    assert float((worse.nats - bound.nats).mean()) > 1
    torch.testing.assert_close(bound.nats, bound.prior + bound.diffusion + bound.reconstruction)


@pytest.mark.parametrize("steps", [None, 8])
def test_float32_agrees_with_float64(sde, steps):
    """The state is float32 unless told otherwise; on average only, for NumPy's float32 normals are other numbers."""
    bound = {d: variational_bound(sde, point_score(sde), every_level(400), levels=5, steps=steps, samples=16, seed=0,
                                  dtype=d) for d in (None, torch.float64)}  # fmt: skip
    (a, ea), (b, eb) = (over_data(y.nats) for y in bound.values())
    assert abs(a - b) < 6 * math.hypot(ea, eb)
    assert bound[None].nats.dtype == torch.float64


@pytest.mark.parametrize("steps", [None, 2, 5])
def test_the_error_bar_is_true_or_too_large(steps):
    """Squared, over the spread of 2000 repeats: one for the chain; above one where lam is stratified."""
    bound = double(VPSDE(), every_level(2000), steps=steps, samples=8)
    ratio = (bound.stderr.square().reshape(5, -1).mean(1) / bound.nats.reshape(5, -1).var(1)).numpy()
    if steps is None:
        assert (ratio > 1.0).all()
        assert (ratio < 3.0).all()
    else:
        assert ratio == pytest.approx(1.0, rel=0.25)
    assert torch.isnan(double(VPSDE(), every_level(1), steps=steps).stderr).all()


@given(
    levels=st.integers(2, 40),
    mean=st.floats(-3, 3) | st.floats(-1e6, 1e6),
    std=st.floats(1e-4, 1e4),
    low=st.floats(-5, 5),
    width=st.floats(0.1, 300),
)
def test_the_decoder_sums_to_one(levels, mean, std, low, width):
    """Whatever the Gaussian, and no level has probability zero."""
    quantization = Quantization(levels, low, low + width)
    means = torch.full((levels,), mean, dtype=torch.float64)
    log_p = log_bin_probability(quantization, torch.arange(levels), means, std)
    assert torch.isfinite(log_p).all()
    assert (log_p <= 0).all()
    assert float(log_p.logsumexp(0)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("levels", "std", "mean", "level", "exact"),  # 60 digits of mpmath
    [
        (256, 1e-3, -1.0, 0, -4.3988159615309833e-5),
        (256, 1e-3, -1.0, 1, -10.031612053911055),
        (256, 1e-3, 0.5, 255, -123054.03071316305),
        (256, 0.01, 1.0, 128, -4927.392537685228),
        (256, 1e-6, 1000.0, 3, -5.0097302194540568e17),
        (256, 30.0, -1000.0, 200, -565.3557925805621),
        (256, 1.0, 0.25, 254, -6.0424544536238655),
        (2**24, 1e3, -1e6, 5000, -500022.76967545135),  # a bin 1e-10 wide, a thousand deviations out
        (256, 1e-3, -1e20, 0, -0.0),
        (256, 1e-3, -1e20, 9, -5e45),
    ],
)
def test_the_decoder_is_exact_in_the_tails(levels, std, mean, level, exact):
    quantization = Quantization(levels)
    got = log_bin_probability(quantization, torch.tensor([level]), torch.tensor([mean], dtype=torch.float64), std)
    assert float(got) == pytest.approx(exact, rel=1e-11)


@given(mean=st.floats(-3, 3), std=st.floats(1e-4, 1e4), levels=st.integers(2, 40))
def test_the_decoder_has_its_gradient_everywhere(mean, std, levels):
    """d log P/d mean = (phi(a) - phi(b))/(std P), with P as the first tests have it; finite at open and far bins."""
    quantization, k = Quantization(levels), torch.arange(levels)
    means = torch.full((levels,), mean, dtype=torch.float64, requires_grad=True)
    log_p = log_bin_probability(quantization, k, means, std)
    (got,) = torch.autograd.grad(log_p.sum(), means)
    assert torch.isfinite(got).all()
    log_p, centre = log_p.detach().numpy(), -1 + k.numpy() * quantization.bin
    edges = [(centre + side * quantization.bin / 2 - mean) / std for side in (-1, 1)]
    edges[0][0], edges[1][-1] = -np.inf, np.inf
    # Only where the ratio of density to probability does not cancel or underflow.
    low, high = (np.exp(norm.logpdf(e) - log_p) / std for e in edges)
    np.testing.assert_allclose(got, low - high, rtol=1e-6, atol=1e-6 * float(np.max(low + high)))


@pytest.mark.parametrize("event", [(), (3, 5, 5)])
@pytest.mark.parametrize("steps", [None, 1, 4])
def test_a_sample_is_the_same_alone_and_in_any_batch(sde, event, steps):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, *event), generator=generator, dtype=torch.uint8)
    score = gaussian_score(sde, 0.5)
    whole = variational_bound(sde, score, x, steps=steps, samples=3, seed=3)
    for ids in ([0], [4], [5, 1], [1, 2, 3]):
        part = variational_bound(sde, score, x[ids], steps=steps, samples=3, seed=3, ids=ids)
        for name in ("prior", "diffusion", "reconstruction", "stderr", "nats", "bits_per_dim"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[ids]), name
    other = variational_bound(sde, score, x, steps=steps, samples=3, seed=4)
    assert not torch.equal(other.nats, whole.nats)


def test_a_large_sample_is_the_same_alone_with_threads():
    """A sum of more than 32768 numbers to one is split among threads, a batch of them is not."""
    sde, threads = VPSDE(), torch.get_num_threads()
    x = torch.randint(0, 256, (2, 40001), generator=torch.Generator().manual_seed(0))
    try:
        torch.set_num_threads(2)
        whole = variational_bound(sde, gaussian_score(sde, 0.5), x, samples=2, seed=1)
        for i in range(2):
            alone = variational_bound(sde, gaussian_score(sde, 0.5), x[i : i + 1], samples=2, seed=1, ids=[i])
            for name in ("prior", "diffusion", "reconstruction"):
                assert torch.equal(getattr(alone, name), getattr(whole, name)[i : i + 1]), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("steps", "samples", "nfe"), [(None, 5, 10), (7, 1, 7), (3, 4, 12), (1, 2, 2)])
def test_evaluations_are_counted_at_the_network_within_its_interval(sde, steps, samples, nfe):
    times = []

    def score(x, t):
        assert not torch.is_grad_enabled()
        times.append(t.expand(len(x)))
        return gaussian_score(sde, 0.5)(x, t)

    bound = variational_bound(sde, score, torch.tensor([[3], [200]]), steps=steps, samples=samples, seed=0)
    assert bound.nfe == len(times) == nfe
    assert sde.t_min <= float(torch.cat(times).min())
    assert float(torch.cat(times).max()) <= sde.T


def test_the_chain_runs_on_any_grid():
    """A name, or the times themselves; the default is uniform in half log-SNR."""
    sde, seen = VPSDE(), []

    def score(x, t):
        seen.append(float(t))
        return -x

    def visited(**kwargs):
        seen.clear()
        variational_bound(sde, score, torch.tensor([3]), steps=5, seed=0, **kwargs)
        return sorted(seen)

    uniform = np.linspace(sde.t_min, sde.T, 5)
    assert visited(grid="uniform") == pytest.approx(uniform)
    assert visited(grid=torch.from_numpy(uniform).flip(0)) == pytest.approx(uniform)
    lam = sde.half_log_snr(torch.tensor(visited(), dtype=torch.float64))
    torch.testing.assert_close(lam.diff(), (lam[-1:] - lam[:1]).expand(4) / 4)


def test_quantization_of_8_bits_is_ddpms():
    quantization = Quantization.of(256, (-1, 1))
    assert quantization.bin == 2 / 255
    x = torch.arange(256, dtype=torch.uint8)
    assert quantization.values(x).dtype == torch.get_default_dtype()
    exact = x.double() / 127.5 - 1
    torch.testing.assert_close(quantization.values(x, torch.float64), exact, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"x": torch.zeros(2, 2)}, TypeError, "of discrete data; pass the integer levels"),
        ({"x": torch.ones(2, 2, dtype=torch.bool)}, TypeError, "x must hold integer levels 0 ... 255, got torch.bool"),
        ({"x": [[1, 2]]}, TypeError, "x must be a torch.Tensor of integer levels, got list"),
        ({"x": torch.tensor(3)}, ValueError, r"x must have shape \(B, \*event\), not empty, got \(\)"),
        ({"x": torch.zeros(0, 2, dtype=torch.int64)}, ValueError, "not empty"),
        ({"x": torch.tensor([[0, 256]])}, ValueError, "x must hold levels 0 ... 255, got 0 ... 256; set levels="),
        ({"x": torch.tensor([[-1, 7]])}, ValueError, "x must hold levels 0 ... 255, got -1 ... 7"),
        ({"levels": 1}, ValueError, "levels must be at least 2, got 1"),
        ({"levels": 2.5}, TypeError, "levels must be a whole number"),
        ({"data_range": (1.0, -1.0)}, ValueError, r"data_range must be two finite numbers low < high, got \(1.0, -1"),
        ({"data_range": (0.0, math.nan)}, ValueError, "data_range must be two finite numbers"),
        ({"data_range": (0.0, math.inf)}, ValueError, "data_range must be two finite numbers"),
        ({"data_range": (0.0, "1")}, ValueError, "data_range must be two finite numbers"),
        ({"data_range": 1.0}, ValueError, "data_range must be two finite numbers low < high, got 1.0"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be a whole number"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"dtype": torch.int64}, TypeError, "dtype must be torch.float32 or torch.float64, got torch.int64"),
        ({"dtype": torch.bfloat16}, TypeError, "dtype must be torch.float32 or torch.float64, got torch.bfloat16"),
        ({"steps": 3, "grid": "unifrom"}, ValueError, "unknown grid 'unifrom': did you mean 'uniform'"),
        ({"steps": 3, "grid": torch.tensor([1.0, 0.1])}, ValueError, "grid must hold the chain's 3 times"),
        ({"grid": "uniform"}, ValueError, "grid is the chain's and steps is None: give steps"),
        ({"steps": 2, "grid": torch.tensor([0.5, 0.1])}, ValueError, "grid must start at T = 1, got 0.5"),
        ({"score": lambda x, t: x * math.nan}, FloatingPointError, "NaN or infinite values"),
        ({"score": lambda x, t: x * math.nan, "steps": 3}, FloatingPointError, "NaN or infinite values"),
        ({"score": lambda x, t: x[:1]}, ValueError, "score must return"),
        ({"score": 3}, TypeError, "score must be a callable"),
        ({"ids": [1]}, ValueError, "ids must hold one number per sample"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    sde = VPSDE()
    arguments = {"score": gaussian_score(sde), "x": torch.tensor([[0, 3], [255, 7]]), **kwargs}
    with pytest.raises(error, match=message):
        variational_bound(sde, **arguments)
