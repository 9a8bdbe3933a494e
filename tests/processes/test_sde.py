"""Processes: everything that follows from alpha and sigma, against closed forms and moment equations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from sdekit import (
    SDE,
    VESDE,
    VPSDE,
    BetaTable,
    CorrelatedSDE,
    GaussianMixture,
    HeatODE,
    PointSet,
    SubVPSDE,
    as_score,
    log_likelihood,
    solve,
)
from tests.conftest import PROCESSES

FRACTIONS = torch.tensor([0.0, 0.01, 0.3, 0.7, 1.0], dtype=torch.float64)


def times(sde):
    return sde.t_min + FRACTIONS * (sde.T - sde.t_min)


def test_closed_forms_of_the_named_processes():
    t = times(VPSDE())
    beta, b = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t**2
    vp, sub, ve = VPSDE(), SubVPSDE(), VESDE()
    a = torch.exp(-b / 2)
    for got, want in [
        (vp.alpha(t), a),
        (vp.sigma(t), torch.sqrt(1 - a**2)),
        (vp.coefficients(t).f, -beta / 2),
        (vp.diffusion(t) ** 2, beta),
        (sub.alpha(t), a),
        (sub.sigma(t), 1 - a**2),
        (sub.coefficients(t).f, -beta / 2),
        (sub.diffusion(t) ** 2, beta * (1 - a**4)),
        (ve.sigma(t), 0.01 * 5000**t),
        (ve.coefficients(t).f, 0 * t),
        (ve.diffusion(t), 0.01 * 5000**t * math.sqrt(2 * math.log(5000))),
    ]:
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    heat, square = HeatODE(), HeatODE(lambda t: t**2, T=9.0)
    t = times(heat)
    torch.testing.assert_close(heat.diffusion(t) ** 2, 2 * t)
    t = times(square)
    torch.testing.assert_close(square.diffusion(t) ** 2, 4 * t**3)
    assert heat.t_min == pytest.approx(0.002)
    assert square.t_min == pytest.approx(0.002**0.5)


def test_diffusion_at_the_singular_end_is_its_limit():
    """VP's sigma has a vertical tangent at 0, but g^2 = beta_min there."""
    assert float(VPSDE().diffusion(0.0)) ** 2 == pytest.approx(0.1, rel=1e-8)
    both = VPSDE().diffusion(torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert both.square().tolist() == pytest.approx([0.1, 0.1 + 19.9 * 0.5], rel=1e-8)
    for name in ("subVP", "VE", "heat", "cosine", "flow"):
        assert math.isfinite(float(PROCESSES[name]().diffusion(0.0)))


@given(name=st.sampled_from(sorted(PROCESSES)), cut=st.floats(0.01, 0.9), m0=st.floats(-3, 3), v0=st.floats(0, 4))
def test_moments_by_ode_are_the_marginals(name, cut, m0, v0):
    """PITFALLS 1, 2: dm/dt = f m, dv/dt = 2 f v + g^2 from any t to T, against alpha and sigma."""
    sde = PROCESSES[name]()
    t0, t1 = sde.t_min + cut * (sde.T - sde.t_min) * 0.5, sde.T * 0.98

    def rhs(t, y):
        c = sde.coefficients(t)
        return [float(c.f) * y[0], 2 * float(c.f) * y[1] + float(c.g2)]

    a0, s0, a1, s1 = (float(f(t)) for t in (t0, t1) for f in (sde.alpha, sde.sigma))
    out = solve_ivp(rhs, (t0, t1), [a0 * m0, a0**2 * v0 + s0**2], rtol=1e-9, atol=1e-12, method="LSODA").y[:, -1]
    np.testing.assert_allclose(out, [a1 * m0, a1**2 * v0 + s1**2], rtol=2e-6, atol=1e-9)


def test_transition_composes_and_reaches_the_marginal(sde):
    t, u, w = (float(sde.t_min + c * (sde.T - sde.t_min)) for c in (0.2, 0.5, 0.9))
    (a1, s1), (a2, s2), (a3, s3) = sde.transition(t, u), sde.transition(u, w), sde.transition(t, w)
    assert float(a1 * a2) == pytest.approx(float(a3))
    assert float((a2 * s1) ** 2 + s2**2) == pytest.approx(float(s3**2), rel=1e-9)
    assert float(a3 * sde.alpha(t)) == pytest.approx(float(sde.alpha(w)))
    assert float((a3 * sde.sigma(t)) ** 2 + s3**2) == pytest.approx(float(sde.sigma(w)) ** 2, rel=1e-9)
    with pytest.raises(ValueError, match="runs forwards"):
        sde.transition(u, t)


def test_transition_of_a_tiny_step_in_any_dtype_of_time():
    """g^2 h is what is left of sigma_u^2 - a^2 sigma_t^2; in the arithmetic of a float32 time it would be noise."""
    single = torch.tensor(0.5), torch.tensor(0.500001)
    double = (t.double() for t in single)
    assert float(VPSDE().transition(*single)[1]) == pytest.approx(float(VPSDE().transition(*double)[1]), rel=1e-6)
    sde, t, h = VPSDE(), 0.5, 1e-9
    assert float(sde.transition(t, t + h)[1]) == pytest.approx(float(sde.diffusion(t)) * h**0.5, rel=1e-5)


def test_half_log_snr_and_its_inverse(sde):
    t = times(sde)
    torch.testing.assert_close(sde.inverse_half_log_snr(sde.half_log_snr(t)), t, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(sde.snr(t), torch.exp(2 * sde.half_log_snr(t)))
    with pytest.raises(ValueError, match="lam must lie in"):
        sde.inverse_half_log_snr(1e4 if sde.sigma(0.0) > 0 else -1e4)


def test_prior_is_exact_at_any_time(sde):
    """PITFALL 1: a solver that starts at t draws sigma(t), not sigma(T). z-test at 6 sigma: p < 2e-9."""
    n = 40_000
    for t in (None, 0.5 * sde.T):
        std = float(sde.sigma(sde.T if t is None else t))
        x = sde.prior_sample((n,), seed=0, dtype=torch.float64, t=t) / std
        assert abs(float(x.mean())) < 6 / n**0.5
        assert abs(float(x.var()) - 1) < 6 * (2 / n) ** 0.5
    x = sde.prior_sample((5, 2, 3), seed=1, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, sde.sigma(sde.T))
    torch.testing.assert_close(sde.prior_log_prob(x), normal.log_prob(x).sum((1, 2)))


def test_perturb_marginal_and_denoise_agree(sde):
    x0 = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 2, 3)
    for t in (sde.T / 2, torch.tensor([0.1, 0.2, 0.5, 1.0], dtype=torch.float64) * sde.T):
        mean, std = sde.marginal(x0, t)
        noise = torch.ones_like(x0)
        x = sde.perturb(x0, t, noise=noise)
        torch.testing.assert_close(x, mean + std * noise)
        back = sde.denoise(x, t, lambda x, t, std=std: -torch.ones_like(x) / std)  # the score that knows the noise
        torch.testing.assert_close(back, x0, rtol=1e-6, atol=1e-9)
    assert torch.equal(sde.perturb(x0, 0.1, seed=3), sde.perturb(x0, 0.1, seed=3))
    assert not torch.equal(sde.perturb(x0, 0.1, seed=3), sde.perturb(x0, 0.1, seed=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_time_is_a_float_a_scalar_or_one_per_sample(sde, dtype):
    x = torch.ones(3, 2, 2, dtype=dtype)
    t = 0.25
    for time in (t, torch.tensor(t), torch.full((3,), t), torch.full((3,), t, dtype=torch.float64)):
        for y in (sde.drift(x, time), sde.perturb(x, time, seed=0), sde.marginal(x, time)[0]):
            assert y.shape == x.shape
            assert y.dtype == dtype
        torch.testing.assert_close(sde.drift(x, time), sde.drift(x, t))
        for c in (sde.alpha(time), sde.sigma(time), sde.diffusion(time)):
            assert c.shape == (() if isinstance(time, float) else time.shape)
            assert c.dtype == (torch.float64 if isinstance(time, float) else time.dtype)


def test_derivatives_work_inside_torch_transforms():
    sde = VPSDE()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.func.vmap(lambda row: sde.drift(row, 0.3))(x), sde.drift(x, 0.3))
    with torch.inference_mode():
        torch.testing.assert_close(sde.drift(x, 0.3), -0.5 * (0.1 + 19.9 * 0.3) * x)
    t = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(sde.coefficients(t).f.sum(), t)
    assert float(slope) == pytest.approx(-19.9 / 2)


def test_coefficients_inside_vmap(sde):
    """Per-sample times as a batch that nobody can look at: the same numbers, and derivatives of them."""
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64) * sde.T
    for one, all_ in zip(torch.func.vmap(sde.coefficients)(t), sde.coefficients(t), strict=True):
        torch.testing.assert_close(one, all_, rtol=1e-10, atol=0)
    slopes = torch.func.vmap(torch.func.grad(lambda u: sde.coefficients(u).g2))(t)
    h = 1e-5 * sde.T
    quotients = (sde.coefficients(t + h).g2 - sde.coefficients(t - h).g2) / (2 * h)
    torch.testing.assert_close(slopes, quotients, rtol=1e-4, atol=1e-6)


def test_a_constant_alpha_may_be_a_number():
    class Constant(SDE):
        def alpha(self, t):
            return 1.0

        def sigma(self, t):
            return 0.1 + t

    t = torch.tensor([0.1, 0.2])
    assert Constant().alpha(t).tolist() == [1.0, 1.0]
    torch.testing.assert_close(Constant().diffusion(t) ** 2, 2 * (0.1 + t))


def test_a_mixin_may_bring_alpha():
    class Scale:
        def alpha(self, t):
            return torch.exp(-t)

    class Mixed(Scale, SDE):
        def sigma(self, t):
            return torch.sqrt(1 - torch.exp(-2 * t))

    assert float(Mixed().alpha(0.5)) == pytest.approx(math.exp(-0.5))
    assert float(Mixed().diffusion(0.5)) == pytest.approx(2**0.5)


class Hole(SDE):
    """Not a process: alpha is not a number at one time."""

    def alpha(self, t):
        return torch.where(t == 0.5, math.nan, 1.0 - 0.5 * t)

    def sigma(self, t):
        return t + 0.1


def test_devices_without_float64_get_float32():
    """PITFALL 25: Apple's mps."""
    from sdekit.system import float64

    assert float64(torch.device("mps")) == torch.float32
    assert float64(torch.device("cpu")) == torch.float64


def test_noise_that_shrinks_is_refused():
    class Backwards(SDE):
        def alpha(self, t):
            return 1.0

        def sigma(self, t):
            return 2.0 - t

    with pytest.raises(ValueError, match=r"g\^2 < 0 at t = .*sigma/alpha must increase"):
        Backwards().diffusion(0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPSDE(20.0, 0.1), "beta_min must be smaller than beta_max.*swapped"),
        (lambda: VPSDE(-1.0, 2.0), "beta_min must be a finite number > 0, got -1"),
        (lambda: VESDE(50.0, 0.01), "sigma_min must be smaller"),
        (lambda: VESDE(0.0, 1.0), "sigma_min must be a finite number > 0"),
        (lambda: VESDE(0.01, math.nan), "sigma_max must be a finite"),
        (lambda: HeatODE(T=-1.0), "T must be a finite number > 0"),
        (lambda: HeatODE(3.0), "sigma must be a callable"),
        (lambda: HeatODE(lambda t: 80 - t), "increasing"),
        (lambda: HeatODE(lambda t: t - 1), "not negative"),
        (lambda: HeatODE(lambda t: t + 1), r"sigma\(0\) = 0, got 1"),
        (lambda: HeatODE(lambda t: t * 1e-5), "far above 0.002"),
        (lambda: HeatODE(lambda t: math.sinh(t)), "sigma must map a float64 tensor by torch operations"),
        (lambda: HeatODE(lambda t: torch.from_numpy(np.sinh(t.numpy()))), "sigma must map a float64 tensor by torch"),
        (lambda: VPSDE().sigma(-1e-7), r"t must lie in \[0, 1\]"),
        (lambda: VPSDE().marginal(torch.full((2, 3), 100), torch.tensor([0.2, 0.2])), "x must be a floating tensor"),
        (lambda: VPSDE().perturb(torch.full((2, 3), 100), 0.1, seed=0), "x0 must be floating, got torch.int64"),
        (
            lambda: VPSDE().denoise(torch.ones(2, 1), 0.1, lambda x, t: x[:1]),
            r"score must return .* x's shape \(2, 1\)",
        ),
        (lambda: Hole().drift(torch.ones(2), 0.5), "alpha or sigma has no finite logarithm or slope at t = 0.5"),
        (lambda: VPSDE().alpha(1.5), r"t must lie in \[0, 1\], got 1.5"),
        (lambda: VPSDE().drift(torch.ones(2), torch.tensor([0.1, -0.1])), r"t must lie in \[0, 1\]"),
        (lambda: VPSDE().alpha("0.5"), "t must be a float"),
        (lambda: VPSDE().alpha(torch.ones(2, 2)), r"got shape \(2, 2\)"),
        (lambda: VPSDE().drift(torch.ones(2), torch.ones(3)), "3 entries for a batch of 2"),
        (lambda: VPSDE().prior_sample((0, 2)), "every entry at least 1"),
        (lambda: VPSDE().prior_sample(()), r"shape must be \(B, \*event\)"),
        (lambda: VPSDE().perturb(torch.ones(2), 0.1, noise=torch.ones(3)), "noise must have x0's shape"),
        (lambda: VPSDE().prior_sample((2,), seed=-1), "seed must be at least 0"),
        (lambda: SDE().alpha(0.1), "needs a method alpha"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        make()


@pytest.mark.parametrize("lam", [math.nan, -math.inf, 1e9, [0.0, math.nan]])
def test_the_inverse_of_half_log_snr_refuses_what_is_not_reached(lam):
    """VE reaches neither end of infinity; a steep schedule, where Newton or the secant alone would cycle, is solved."""
    with pytest.raises(ValueError, match="lam must lie in .*got"):
        VESDE().inverse_half_log_snr(torch.tensor(lam, dtype=torch.float64))
    steep = HeatODE(lambda t: 1e-3 * t + torch.sigmoid(20 * (t - 5)), T=10.0)
    lam = steep.half_log_snr(torch.linspace(1e-3, 10, 2001, dtype=torch.float64))
    assert float((steep.half_log_snr(steep.inverse_half_log_snr(lam)) - lam).abs().max()) < 1e-11


def test_the_inverse_of_half_log_snr_is_exact_to_rounding(sde):
    """Everywhere in (0, T], in order; and without a usable slope, by bisection alone."""
    lam = torch.linspace(
        float(sde.half_log_snr(sde.T)), float(sde.half_log_snr(1e-6 * sde.T)), 200, dtype=torch.float64
    )
    t = sde.inverse_half_log_snr(lam)
    assert float((sde.half_log_snr(t) - lam).abs().max()) < 1e-12
    assert bool((t.diff() < 0).all())

    class Opaque(SDE):
        T, t_min = sde.T, sde.t_min

        def alpha(self, t):
            return sde.alpha(t).detach()

        def sigma(self, t):
            return sde.sigma(t).detach()

    assert float((sde.half_log_snr(Opaque().inverse_half_log_snr(lam[::20])) - lam[::20]).abs().max()) < 1e-12


def test_what_is_printed_says_what_was_made():
    """A process by its arguments, a system by its process, a score by its network; a table by its shape."""
    assert repr(VPSDE(beta_max=18.0)) == "VPSDE(beta_min=0.1, beta_max=18.0)"
    assert repr(VESDE().reverse(lambda x, t: x)) == "Reverse(sde=VESDE(sigma_min=0.01, sigma_max=50.0), churn=1.0)"
    assert repr(BetaTable(torch.full((100,), 0.02))) == "BetaTable(betas=<tensor (100,)>)"
    score = as_score(torch.nn.Identity(), VPSDE(), "v")
    vp = "VPSDE(beta_min=0.1, beta_max=20.0)"
    given = f"as_score(Identity, {vp}, predicts='v').given(3, <tensor (2, 5)>, scale=2.0)"
    assert repr(score.given(3, torch.zeros(2, 5), scale=2.0)) == given
    assert repr(score.under(VESDE())) == f"Under(as_score(Identity, {vp}, predicts='v'))"
    mixture = GaussianMixture(torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3))
    assert repr(mixture.score(VPSDE())) == f"GaussianMixture(2 in 3 dimensions).score({vp})"
    assert repr(PointSet(torch.zeros(9, 3)).score(VPSDE())) == f"PointSet(<tensor (9, 3)>).score({vp})"
    assert repr(CorrelatedSDE(VPSDE(), torch.eye(2))) == f"CorrelatedSDE({vp}, covariance)"
    flow = VPSDE().probability_flow(mixture.score(VPSDE()))
    out = solve(flow, torch.ones(4, 3), [1.0, 0.5])
    assert repr(out) == f"Solution(4 of 4 samples (3,) at the end, nfe={out.nfe})"
    found = log_likelihood(VPSDE(), mixture.score(VPSDE()), torch.ones(4, 3))
    assert repr(found).startswith("Likelihood(4 samples, corrected log p -4.2")


class Odd(VPSDE):
    """Made with things that are hard to print."""

    def __init__(self, thing, *rest):
        super().__init__()
        self.thing = thing


class Shy:
    def __getattr__(self, name):
        raise RuntimeError(name)


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (torch.zeros(2, device="meta"), "<Tensor>"),
        (torch.zeros(3, 4), "<tensor (3, 4)>"),
        (None, "None"),
        (Shy(), "<Shy>"),
        ("a" * 1000, "'" + 96 * "a" + "..."),
        (math.sin, "sin"),
        ([1, 2], "<list>"),
    ],
    ids=["meta", "large", "none", "shy", "long", "function", "list"],
)
def test_printing_never_fails(thing, said):
    shown = "" if thing is None else f"thing={said}"
    assert repr(Odd(thing, 1)) == f"Odd({shown})"


def test_what_holds_itself_is_printed():
    odd = Odd(1)
    odd.thing = odd
    assert repr(odd) == "Odd(thing=...)"
