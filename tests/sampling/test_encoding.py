"""The flow as an encoder: closed forms, there and back again, and the arcs between latents."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdekit import VPSDE, HeatODE, SolverError, log_likelihood, ode_sample
from sdekit.sampling.encoding import decode, encode, interpolate, round_trip_error, slerp
from sdekit.solvers.solve import ADAPTIVE
from tests.conftest import gaussian_score
from tests.processes.test_fokker_planck import random_mixture, seeds


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stretch(sde, std):
    """What the flow from t_min to T multiplies N(0, std^2) by."""
    start, end = (float((sde.alpha(t) ** 2 * std**2 + sde.sigma(t) ** 2).sqrt()) for t in (sde.t_min, sde.T))
    return end / start


@pytest.mark.parametrize("event", [(), (3,), (1, 2, 2)])
def test_of_a_gaussian_both_directions_are_a_factor(sde, event):
    """To 1e-8, every process, any event shape; the number of samples and the event's are not mixed up."""
    score, factor, x = gaussian_score(sde, 0.3), stretch(sde, 0.3), normal(5, *event)
    tight = {"method": "scipy:DOP853", "rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(encode(sde, score, x, **tight), factor * x, rtol=1e-8, atol=0)
    torch.testing.assert_close(decode(sde, score, factor * x, **tight), x, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("method", "tol", "near"),
    [("adams", 1e-7, 1e-6), ("rk45", 1e-9, 1e-7), ("rk23", 1e-5, 1e-4), ("flow_rk45", 1e-8, 1e-7),
     ("flow_rk23", 1e-5, 1e-4), ("torchdiffeq:dopri5", 1e-9, 1e-7)],
)  # fmt: skip
def test_every_method_is_the_factor_and_float32_stays(method, tol, near):
    sde = VPSDE()
    score, factor, x = gaussian_score(sde, 0.3), stretch(sde, 0.3), normal(5, 3)
    how = {"method": method, "rtol": tol, "atol": tol / 100}
    torch.testing.assert_close(encode(sde, score, x, **how), factor * x, rtol=near, atol=near / 100)
    torch.testing.assert_close(decode(sde, score, factor * x, **how), x, rtol=near, atol=near / 100)
    low = encode(sde, score, x.float(), method=method)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, (factor * x).float(), rtol=1e-3, atol=1e-4)


def test_decode_undoes_encode_and_the_error_falls_with_the_tolerance(sde):
    """On random mixtures at most 20 tolerances, over three decades, and 1/100 of the first error after them."""
    for seed in (0, 569):  # the last is a hard one: 13 tolerances at 1e-2, the others at most 4
        mixture, _ = random_mixture(seed)
        x = sde.perturb(mixture.sample(6, seed=seed, dtype=torch.float64), sde.t_min, seed=seed)
        errors = []
        for tol in (1e-2, 1e-3, 1e-4, 1e-5):
            error = round_trip_error(sde, mixture.score(sde), x, rtol=tol, atol=tol)
            assert error.shape == (6,)
            assert (error < 20 * tol).all()
            errors.append(float(error.max()))
        assert errors[-1] < 0.01 * errors[0]


def test_latents_have_the_law_at_T_and_are_the_likelihoods(digits64, sde):
    """A mixture's draws at t_min encode to draws of its marginal at T, and to what log_likelihood finds on its way."""
    _, mixture = digits64
    small, _ = random_mixture(3, d=2)
    x = sde.perturb(small.sample(10, seed=0, dtype=torch.float64), sde.t_min, seed=1)
    latent = encode(sde, small.score(sde), x, rtol=1e-6, atol=1e-6)
    exact = log_likelihood(sde, small.score(sde), x, rtol=1e-7, atol=1e-7).latent
    torch.testing.assert_close(latent, exact, rtol=0, atol=1e-4 * float(sde.sigma(sde.T)))
    x = sde.perturb(mixture.sample(12, seed=0, dtype=torch.float64), sde.t_min, seed=1)
    latent = encode(sde, mixture.score(sde), x, rtol=1e-3, atol=1e-3)
    at_T = mixture.at(sde, sde.T)
    mean = at_T.weights @ at_T.means
    variance = at_T.weights @ (at_T.eigenvalues.sum(1) + (at_T.means - mean).square().sum(1))
    assert float((latent - mean).square().sum(1).mean() / variance) == pytest.approx(1, abs=6 * (2 / 64 / 12) ** 0.5)


@pytest.mark.parametrize("denoise", [False, True])
def test_decode_is_ode_sample_from_the_latent(sde, denoise):
    score, z = gaussian_score(sde, 0.3), sde.prior_sample((4, 3), seed=0, dtype=torch.float64)
    for method in ("adams", "rk45", "scipy:RK45"):
        expected = ode_sample(sde, score, z.shape, x_T=z, method=method, rtol=1e-3, atol=1e-3, denoise=denoise)
        assert torch.equal(decode(sde, score, z, method=method, rtol=1e-3, atol=1e-3, denoise=denoise), expected)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_sample_is_the_same_alone_and_in_any_batch(method):
    sde = VPSDE()
    score, a, b = gaussian_score(sde, 0.05), normal(13, 3, 5), normal(13, 3, 5, seed=1)
    a = a * torch.logspace(-3, 1, 13, dtype=torch.float64).reshape(13, 1, 1)
    how = {"method": method, "rtol": 1e-3, "atol": 1e-3}
    weights = torch.linspace(0, 1, 7)
    wholes = {f: f(sde, score, a, **how) for f in (encode, decode, round_trip_error)}
    between = interpolate(sde, score, a, b, weights, **how)
    for rows in ([0], [12], [5, 2]):
        for f, whole in wholes.items():
            assert torch.equal(f(sde, score, a[rows], **how), whole[rows])
        assert torch.equal(interpolate(sde, score, a[rows], b[rows], weights, **how), between[:, rows])
    assert torch.equal(interpolate(sde, score, a, b, weights[[3]], **how)[0], between[3])


def test_a_sample_that_does_not_arrive_raises_with_the_partial_solution():
    """dx/dt = -t score = -x^2 ends at T for every x > 0, and is infinite on the way there for x = -1 at t = 1 + t_min;
    downwards for x = 0.04 at T - t = 25."""
    sde = HeatODE()

    def score(x, t):
        return x**2 / t.reshape(-1) if t.ndim else x**2 / t

    with pytest.raises(SolverError, match="1 of 2 samples stopped") as info:
        encode(sde, score, torch.tensor([1.0, -1.0], dtype=torch.float64), method="rk45")
    assert info.value.solution.status == ["success", "step_underflow"]
    assert float(info.value.solution.t[1]) == pytest.approx(1 + sde.t_min, abs=1e-3)
    with pytest.raises(SolverError, match="1 of 2 samples stopped") as info:
        decode(sde, score, torch.tensor([0.04, -0.01], dtype=torch.float64), method="rk45")
    assert float(info.value.solution.t[0]) == pytest.approx(55, abs=1e-2)


@given(
    seed=seeds,
    event=st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(lambda e: math.prod(e) > 1),
    w=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    size=st.sampled_from([1e-200, 1e-3, 1.0, 1e200]),
)
def test_slerp_of_equal_norms_is_a_rotation_at_constant_speed(seed, event, w, size):
    """Ends exact whatever the norms; norm kept; angle to a is w theta; from b it is the same way back."""
    a, b = normal(3, *event, seed=seed), normal(3, *event, seed=seed + 1)
    far = slerp(size * a, b, [0, 1.0])
    assert torch.equal(far[0], size * a)
    assert torch.equal(far[1], b)
    a, b = (y / y.flatten(1).norm(dim=1).reshape(3, *(1,) * len(event)) for y in (a, b))
    between = slerp(size * a, size * b, w) / size
    assert between.shape == (len(w), 3, *event)
    back = slerp(size * b, size * a, 1 - torch.tensor(w, dtype=torch.float64)) / size

    def angle(x, y):
        x, y = x.flatten(-len(event)), y.flatten(-len(event))
        return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1))

    slack = 1e-12 / (math.pi - angle(a, b))  # near opposite ones the great circle is less well defined
    slack = slack.reshape(3, *(1,) * len(event))
    assert ((between - back).abs() < slack).all()
    assert ((between.flatten(2).norm(dim=2) - 1).abs() < slack.flatten()).all()
    arc = torch.tensor(w, dtype=torch.float64).unsqueeze(1) * angle(a, b)
    assert ((angle(between, a.expand_as(between)) - arc).abs() < slack.flatten() + 1e-14).all()


@pytest.mark.parametrize("gap", [0.0, 1e-300, 1e-16, 1e-12, 1e-8, 1e-4, 0.1, 1.5, 3.0, math.pi - 1e-6])
def test_slerp_is_stable_at_every_angle(gap):
    """In the plane it is (cos w theta, sin w theta), to rounding; nothing switches between nearly parallel and not."""
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[math.cos(gap), math.sin(gap)]], dtype=torch.float64)
    w = torch.linspace(0, 1, 11, dtype=torch.float64)
    exact = torch.stack([torch.cos(w * gap), torch.sin(w * gap)], 1).unsqueeze(1)
    near = 1e-14 if gap < 3 else 1e-14 / (math.pi - gap)
    torch.testing.assert_close(slerp(a, b, w), exact, rtol=near, atol=0 if gap < 3 else near)
    line = torch.lerp(a, b, w.reshape(-1, 1, 1))
    assert float((slerp(a, b, w) - line).abs().max()) <= gap**2 + 1e-16  # and the straight line is its limit


def test_slerp_combines_the_vectors_themselves():
    """Not their directions and norms; of 90 degrees (cos, sin); of one entry, where there is no angle, straight."""
    w = torch.tensor([0.25, 0.5])
    out = slerp(torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 1.0]]), w)
    exact = torch.stack([4 * torch.cos(w * math.pi / 2), torch.sin(w * math.pi / 2)], 1)
    torch.testing.assert_close(out[:, 0], exact)
    assert out.dtype == torch.float32
    torch.testing.assert_close(slerp(torch.tensor([1.0]), torch.tensor([3.0]), [0.25]), torch.tensor([[1.5]]))


def test_between_gaussian_data_are_gaussian_data(sde):
    """Of N(0, c^2 I) the flow is a factor, so that it is the data's own slerp; their norms stay on the shell c sqrt(D),
    of width c/sqrt(2), which the straight line leaves for c sqrt(D/2)."""
    d, c, score = 256, 0.3, gaussian_score(sde, 0.3)
    a, b = c * normal(200, d), c * normal(200, d, seed=1)
    w = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    out = interpolate(sde, score, a, b, w, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out, slerp(a, b, w), rtol=0, atol=1e-3)
    norms = out.norm(dim=2) / c
    assert ((norms.mean(1) - math.sqrt(d)).abs() < 0.3).all()  # six standard errors of the mean
    assert (norms.std(1) < 1.0).all()
    straight = torch.lerp(a, b, torch.full((), 0.5, dtype=torch.float64)).norm(dim=1) / c
    assert float(straight.mean()) == pytest.approx(math.sqrt(d / 2), abs=0.3)
    ends = interpolate(sde, score, a[:2], b[:2], [0.0, 1.0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ends, torch.stack([a[:2], b[:2]]), rtol=0, atol=1e-5)
    mean = interpolate(sde, score, a[:2], b[:2], w, rtol=1e-4, atol=1e-4, denoise=True)
    torch.testing.assert_close(mean, sde.denoise(out[:, :2].flatten(0, 1), sde.t_min, score).reshape(mean.shape))


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, f: encode(VPSDE, f, ONE), TypeError, "sde must be a process, not its class"),
        (lambda s, f: encode(s, None, ONE), TypeError, "score must be a callable"),
        (lambda s, f: encode(s, f, [1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (lambda s, f: encode(s, f, ONE * math.nan), ValueError, "x holds 6 non-finite values"),
        (lambda s, f: encode(s, f, ONE, method="ddim"), ValueError, "unknown adaptive method 'ddim'"),
        (lambda s, f: encode(s, f, ONE, rtol=0), ValueError, "rtol must be a finite number > 0"),
        (lambda s, f: encode(s, lambda x, t: x * math.nan, ONE), FloatingPointError, "score returned NaN"),
        (lambda s, f: decode(s, f, ONE.long()), TypeError, "latent must be a floating tensor"),
        (lambda s, f: decode(s, f, ONE, method="rk4"), ValueError, "unknown adaptive method 'rk4'"),
        (lambda s, f: decode(s, f, ONE, atol=-1), ValueError, "atol must be a finite number > 0"),
        (lambda s, f: round_trip_error(s, f, ONE[:0]), ValueError, "x must have shape"),
        (lambda s, f: interpolate(s, f, ONE, ONE[:1], [0.5]), ValueError, "b must have a's shape, dtype and device"),
        (lambda s, f: interpolate(s, f, ONE, ONE.double(), [0.5]), ValueError, "got torch.float64"),
        (lambda s, f: interpolate(s, f, ONE, -ONE, [0.5]), ValueError, "must not be opposite"),
        (lambda s, f: interpolate(s, None, ONE, ONE, [2.0]), ValueError, r"weights must be .* got \[2.0\]"),
        (lambda s, f: slerp(ONE, "b", [0.5]), TypeError, "b must be a torch.Tensor, got str"),
        (lambda s, f: slerp(ONE, ONE, []), ValueError, r"weights must be at least one number, .* got \[\]"),
        (lambda s, f: slerp(ONE, ONE, 0.5), ValueError, "in one axis, .* got 0.5"),
        (lambda s, f: slerp(ONE, ONE, [-0.1, 0.5]), ValueError, "weights must be"),
        (lambda s, f: slerp(ONE, ONE, [math.nan]), ValueError, "weights must be"),
        (lambda s, f: slerp(ONE, ONE, torch.linspace(0, 1.5, 20)), ValueError, r"shape \(20,\), 0 ... 1.5"),
        (lambda s, f: slerp(ONE, ONE, ["half"]), TypeError, "weights must be a sequence or tensor of numbers"),
        (lambda s, f: slerp(ONE * torch.tensor([[1.0], [0.0]]), ONE, [0.5]), ValueError, r"a must not be .* \[1\]"),
        (lambda s, f: slerp(ONE, ONE * 0, [0.5]), ValueError, r"b must not be zero.* \[0, 1\]"),
        (lambda s, f: slerp(ONE, -3 * ONE, [0.5]), ValueError, r"must not be opposite.* \[0, 1\]"),
        (lambda s, f: slerp(ONE / 3, -0.7 * ONE, [0.5]), ValueError, r"must not be opposite.* \[0, 1\]"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    sde = VPSDE()
    with pytest.raises(error, match=message):
        call(sde, gaussian_score(sde))
