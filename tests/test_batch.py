"""Padded samples: each is what it would be alone, without its padding, whatever is done with it."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdekit.guidance import classifier_free

from sdekit import (
    SAMPLERS,
    VESDE,
    VPSDE,
    BridgeSDE,
    BrownianPath,
    CorrelatedSDE,
    Noise,
    PoissonFlow,
    RectifiedFlow,
    as_score,
    calibrate,
    decode,
    dynamic_threshold,
    encode,
    log_likelihood,
    ode_sample,
    pc_sample,
    round_trip_error,
    sample,
    sample_with_log_prob,
    sde_sample,
    solve,
)
from sdekit.batch import Padding, event_mean, padded
from sdekit.posterior import Observation, posterior_score
from sdekit.system import System

N, D = 6, 2
COUNTS = (6, 3, 1, 3, 5)
B = len(COUNTS)
MASK = torch.zeros(B, N, dtype=torch.bool)
for sample_, places in enumerate(((0, 1, 2, 3, 4, 5), (4, 0, 3), (2,), (1, 2, 3), (5, 4, 3, 1, 0))):
    MASK[sample_, list(places)] = True
F64 = {"dtype": torch.float64}
MIX = torch.tensor([[0.3, -0.2], [0.1, 0.25]], dtype=torch.float64)


def network(sde, padding=torch.nan):
    """Of sets of points, which see the mean of the real ones; what it says of the others is ``padding``."""

    def eps(x, t, mask=None):
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x)
        mean = torch.where(real > 0, x, 0.0).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        a, s = (y.to(x)[:, None, None] for y in (sde.alpha(t), sde.sigma(t)))
        r = s / (a + s)
        out = s * (x - a * 0.5 * torch.tanh(mean)) / (0.25 * a**2 + s**2) + 0.1 * r * torch.tanh(x @ MIX.to(x))
        return torch.where(real > 0, out, padding)

    return eps


def flow():
    """Up to where a network that predicts eps can begin."""
    sde = RectifiedFlow()
    sde.T = 0.99
    return sde


def velocity(sde, padding):
    """The same as alpha eps - sigma x_0."""

    def v(x, t, mask=None):
        a, s = (y.to(x)[:, None, None] for y in (sde.alpha(t), sde.sigma(t)))
        return (network(sde, padding)(x, t, mask) * (a * a + s * s) - s * x) / a

    return v


def both(sde, padding=torch.nan, predicts="eps"):
    """(the score of the padded batch, that of one sample without padding)."""
    score = as_score((velocity if predicts == "v" else network)(sde, padding), sde, predicts)
    return score.given(MASK), score


def alone(draw, score):
    """What ``draw`` makes of each sample without its padding."""
    return [draw(score, (1, n, D), ids=[i])[0] for i, n in enumerate(COUNTS)]


def same(x, singles, atol=1e-9):
    assert (x[~MASK] == 0).all()
    for row, mask, single in zip(x, MASK, singles, strict=True):
        torch.testing.assert_close(row[mask], single, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler(name):
    """Noise, first step and denoising included; what a network says of the padding, NaN, reaches nobody."""
    sde = VPSDE()
    padded_score, score = both(sde)

    def draw(score, shape, **how):
        return sample(sde, score, shape, name, steps=8, seed=3, **F64, **how)

    same(draw(padded_score, (B, N, D), mask=MASK), alone(draw, score))


@pytest.mark.parametrize("sde", [VESDE(sigma_max=10.0), flow(), PoissonFlow(8.0, T=10.0)])
def test_every_process(sde):
    """The prior is that of as many numbers as are real: Student's in so many dimensions for a Poisson flow."""
    padded_score, score = both(sde)
    for how in ({"sampler": "unipc_2", "nfe": 9}, {"sampler": "heun", "nfe": 8, "denoise": False}):

        def draw(score, shape, how=how, **rest):
            return sample(sde, score, shape, seed=5, **how, **F64, **rest)

        same(draw(padded_score, (B, N, D), mask=MASK), alone(draw, score))


@pytest.mark.parametrize("method", ["adams", "flow_rk45", "rk45", "rk23"])
def test_errors_are_those_of_what_is_real(method):
    """Steps too: a norm over the padding would be too small, most of all for the sample of one point."""
    sde = VPSDE()
    padded_score, score = both(sde)
    x_T = Noise(torch.empty(B, N, D, **F64), 1, mask=MASK).normal()
    grid = [sde.T, sde.t_min]
    together = solve(sde.probability_flow(padded_score), x_T, grid, method, mask=MASK, denoise=True)
    singles = [solve(sde.probability_flow(score), x_T[i][MASK[i]][None], grid, method, denoise=True) for i in range(B)]
    same(together.x, [one.x[0] for one in singles])
    assert together.nfe_per_sample.tolist() == [int(one.nfe_per_sample) for one in singles]
    assert len(set(together.nfe_per_sample.tolist())) > 1

    def draw(score, shape, **how):
        return ode_sample(sde, score, shape, method=method, seed=3, **F64, **how)

    same(draw(padded_score, (B, N, D), mask=MASK), alone(draw, score))


def test_adaptive_noise():
    """Also on a Brownian path, whose tree is each sample's own."""
    sde = VPSDE()
    padded_score, score = both(sde)

    def draw(score, shape, **how):
        return sde_sample(sde, score, shape, seed=3, **F64, **how)

    same(draw(padded_score, (B, N, D), mask=MASK), alone(draw, score))

    def correct(score, shape, **how):
        return pc_sample(sde, score, shape, steps=12, seed=3, corrector="hamiltonian", **F64, **how)

    same(correct(padded_score, (B, N, D), mask=MASK), alone(correct, score))


@pytest.mark.parametrize("options", [{}, {"divergence": "hutchinson", "probes": 3}], ids=["exact", "hutchinson"])
@pytest.mark.parametrize(
    ("make", "predicts"),
    [(VPSDE, "eps"), (VPSDE, "v"), (flow, "v"), (lambda: PoissonFlow(8.0, T=10.0), "v")],
    ids=["vp eps", "vp", "flow", "pfgm"],
)
def test_likelihood(options, make, predicts):
    """Every number of it, though the network says something of the padding that depends on it."""
    sde = make()
    padded_score, score = both(sde, 7.0, predicts)
    how = {"seed": 1, "rtol": 1e-4, "atol": 1e-4, **options}
    x = 0.5 * Noise(torch.empty(B, N, D, **F64), 2, mask=MASK).normal()
    filled = torch.where(MASK[..., None], x, 3.0)  # what lies in the padding does not matter
    found = log_likelihood(sde, padded_score, filled, mask=MASK, **how)
    for i, mask in enumerate(MASK):
        one = log_likelihood(sde, score, x[i][mask][None], ids=[i], **how)
        for name in (
            "log_prob", "stderr", "solver_error", "truncation", "truncation_error", "prior_mismatch", "prior_error",
            "nfe_per_sample",
        ):  # fmt: skip
            got, alone = (float(getattr(y, name)[k]) for y, k in ((found, i), (one, 0)))
            assert got == pytest.approx(alone, abs=1e-8, nan_ok=True), name
    drawn, there = sample_with_log_prob(sde, padded_score, (B, N, D), mask=MASK, **how, **F64)
    assert (drawn[~MASK] == 0).all()
    torch.testing.assert_close(
        there.log_prob, log_likelihood(sde, padded_score, drawn, mask=MASK, **how).log_prob, rtol=0, atol=2e-2
    )


def test_likelihood_of_independent_points():
    """Closed form: N(0, 0.25) each, so that log p is a sum over the real ones."""
    sde = VPSDE()

    def eps(x, t):
        a, s = (y.to(x)[:, None, None] for y in (sde.alpha(t), sde.sigma(t)))
        return s * x / (0.25 * a**2 + s**2)

    x = 0.5 * Noise(torch.empty(B, N, D, **F64), 2, mask=MASK).normal()
    found = log_likelihood(sde, as_score(eps, sde, "eps"), x, mask=MASK, rtol=1e-6, atol=1e-6)
    each = torch.distributions.Normal(0.0, torch.tensor(0.5, **F64)).log_prob(x).sum(2)
    truth = torch.where(MASK, each, 0.0).sum(1)
    torch.testing.assert_close(found.corrected, truth, rtol=0, atol=1e-4)
    low, high = found.interval()
    assert ((low <= truth) & (truth <= high)).all()


class Pulled(System):
    """dx = (1 - x) dt + g dW, which moves what is in the padding too."""

    noise_type = "diagonal"

    def drift(self, x, t):
        return 1.0 - x

    def diffusion(self, x, t):
        return 0.3 * torch.ones_like(x)


@pytest.mark.parametrize("method", ["euler_maruyama", "heun", "milstein"])
def test_a_system_of_the_users_own(method):
    x = torch.ones(B, N, D, **F64)
    grid = torch.linspace(0, 1, 9)
    out = solve(Pulled(), x, grid, method, noise=Noise(x, 4, mask=MASK), mask=MASK).x
    flat = [torch.ones(1, n, D, **F64) for n in COUNTS]
    same(out, [solve(Pulled(), y, grid, method, noise=Noise(y, 4, [i])).x[0] for i, y in enumerate(flat)])
    drift = Pulled()
    drift.churn = 0.0
    x = torch.full_like(x, 3.0)
    out = solve(drift, x, [0.0, 1.0], "rk45", rtol=1e-8, atol=1e-8, mask=MASK).x
    torch.testing.assert_close(out[MASK], torch.full_like(out[MASK], 1 + 2 * math.exp(-1)), rtol=0, atol=1e-7)
    assert (out[~MASK] == 0).all()


def test_a_system_of_the_users_own_on_a_path():
    x = torch.ones(B, N, D, **F64)
    flat = [torch.ones(1, n, D, **F64) for n in COUNTS]
    constant = Pulled()
    constant.noise_type, constant.diffusion = "additive", lambda t: 0.3 * torch.ones_like(torch.as_tensor(t))
    ends, how = {"start": 0.0, "end": 1.0}, {"method": "adaptive_sra1", "rtol": 0.02, "atol": 0.02}
    out = solve(constant, x, [0.0, 1.0], noise=BrownianPath(x, 4, mask=MASK, **ends), mask=MASK, **how).x
    paths = [BrownianPath(y, 4, [i], **ends) for i, y in enumerate(flat)]
    same(out, [solve(constant, y, [0.0, 1.0], noise=p, **how).x[0] for y, p in zip(flat, paths, strict=True)])


def test_guidance_and_thresholds_measure_what_is_real():
    """The standard deviations of rescaled guidance and the quantile of a dynamic threshold."""
    sde = VPSDE()

    def pulled(x, t, mask, towards):
        return network(sde, 9.0)(x, t, mask) - 0.4 * towards

    def draw(score, shape, mask=None, **how):
        given = torch.ones(shape[:2], dtype=torch.bool) if mask is None else mask
        guided = classifier_free(as_score(pulled, sde, "eps"), (given, 1.0), (given, 0.0), 3.0, rescale=0.7)
        clipped = dynamic_threshold(sde, guided, (-0.5, 0.5), percentile=0.6)
        return sample(sde, clipped, shape, nfe=8, seed=2, mask=mask, **F64, **how)

    same(draw(None, (B, N, D), mask=MASK), alone(draw, None))


def test_latents():
    """There and back, and how far off that is, of what is real."""
    sde = VPSDE()
    padded_score, score = both(sde)
    x = 0.5 * Noise(torch.empty(B, N, D, **F64), 2, mask=MASK).normal()
    how = {"rtol": 1e-4, "atol": 1e-4}
    latent = encode(sde, padded_score, torch.where(MASK[..., None], x, torch.nan), mask=MASK, **how)
    back = decode(sde, padded_score, latent, mask=MASK, denoise=True, **how)
    off = round_trip_error(sde, padded_score, x, mask=MASK, **how)
    singles = [x[i][MASK[i]][None] for i in range(B)]
    latents = [encode(sde, score, y, **how) for y in singles]
    same(latent, [z[0] for z in latents])
    same(back, [decode(sde, score, z, denoise=True, **how)[0] for z in latents])
    for i, y in enumerate(singles):
        assert float(off[i]) == pytest.approx(float(round_trip_error(sde, score, y, **how)), abs=1e-9)


def test_start_and_calibration():
    sde = VPSDE()
    padded_score, score = both(sde)
    x_T = Noise(torch.empty(B, N, D, **F64), 1, mask=MASK).normal()
    x = sample(sde, padded_score, (B, N, D), nfe=8, x_T=torch.where(MASK[..., None], x_T, 5.0), mask=MASK)
    same(x, [sample(sde, score, (1, n, D), nfe=8, x_T=x_T[i][MASK[i]][None])[0] for i, n in enumerate(COUNTS)])
    fitted = calibrate(sde, score, (4, 3, D), nfe=5, seed=0, noises=16, batch=8, iterations=3)

    def draw(score, shape, **how):
        return sample(sde, score, shape, fitted, seed=3, **F64, **how)

    same(draw(padded_score, (B, N, D), mask=MASK), alone(draw, score))


@settings(max_examples=25)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 1000))
def test_noise(counts, d, seed):
    """Numbers, integrals and paths of any sizes: one number or hundreds, which are drawn otherwise."""
    mask = torch.zeros(len(counts), max(counts), dtype=torch.bool)
    for row, n in zip(mask, counts, strict=True):
        row[torch.randperm(len(row), generator=torch.Generator().manual_seed(n))[:n]] = True
    like = torch.empty(*mask.shape, d)
    noise, path = Noise(like, seed, mask=mask), BrownianPath(like, seed, mask=mask, start=0.0, end=1.0)
    noise.enter(0.5, 0.25)
    first, (second, integral) = noise.normal(), noise.increment_and_integral(0.5, 0.25)
    w = path.increment(0.0, 0.375)
    for i, n in enumerate(counts):
        own = torch.empty(1, n, d)
        one, mine = Noise(own, seed, [i]), BrownianPath(own, seed, [i], start=0.0, end=1.0)
        one.enter(0.5, 0.25)
        assert torch.equal(first[i][mask[i]], one.normal()[0])
        for got, alone in zip((second, integral), one.increment_and_integral(0.5, 0.25), strict=True):
            assert torch.equal(got[i][mask[i]], alone[0])
        assert torch.equal(w[i][mask[i]], mine.increment(0.0, 0.375)[0])
    assert (torch.stack([first, second, integral, w])[:, ~mask] == 0).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK.float(), "torch.bool, True where an entry is real, got torch.float32"),
        (MASK.tolist(), "got list"),
        (MASK[:4], r"first axes of \(5, 6, 2\).*got \(4, 6\)"),
        (MASK[:, :5], r"got \(5, 5\)"),
        (MASK[:, 0], r"got \(5,\)"),
        (MASK[:, None], r"got \(5, 1, 6\)"),
        (MASK & (torch.arange(B) != 2)[:, None], "without a single real entry"),
    ],
)
def test_masks_that_are_refused(mask, message):
    padded_score, _ = both(VPSDE())
    with pytest.raises((TypeError, ValueError), match=message):
        sample(VPSDE(), padded_score, (B, N, D), nfe=5, mask=mask)


def test_what_takes_no_mask():
    """Processes that tie the entries together, and solvers whose error is the batch's."""
    score = both(VPSDE())[0]
    with pytest.raises(ValueError, match="CorrelatedSDE has noise that ties all entries together"):
        sample(CorrelatedSDE(VPSDE(), torch.eye(12)), score, (B, 12), nfe=5, mask=torch.ones(B, 12).bool())
    with pytest.raises(ValueError, match="BridgeSDE has a mean of its own"):
        sample(BridgeSDE(torch.zeros(N, D), 1.3), score, (B, N, D), nfe=5, mask=MASK)
    x, flow = torch.zeros(B, N, D), VPSDE().probability_flow(score)
    for method in ("torchdiffeq:dopri5", "scipy:RK45"):
        with pytest.raises(ValueError, match="mask is not known to .*: use adams"):
            solve(flow, x, [1.0, 0.5], method, mask=MASK)
    with pytest.raises(ValueError, match="the same mask"):
        solve(flow, x, [1.0, 0.5], "ancestral", noise=Noise(x, 0), mask=MASK)


def test_a_mask_that_broadcasts():
    """(B, N, 1) and (B, N, D) say the same as (B, N); for channels first it is (B, 1, N)."""
    sde = VPSDE()
    padded_score, _ = both(sde)
    whole = MASK[..., None].expand(B, N, D)
    x, y, z = (sample(sde, padded_score, (B, N, D), nfe=6, seed=0, mask=m) for m in (MASK, MASK[..., None], whole))
    assert torch.equal(x, y)
    assert torch.equal(x, z)
    first = as_score(lambda x, t: 0.5 * x, sde, "eps")
    out = sample(sde, first, (B, D, N), nfe=6, seed=0, mask=MASK[:, None])
    assert torch.equal(out != 0, MASK[:, None].expand(B, D, N))


def test_posterior_scores_see_what_is_real():
    """What a model says of the padding, and how it leans on it, is no part of A x_0."""
    sde = VPSDE()
    _, score = both(sde, 7.0)

    def draw(model, shape, mask=None, method="mmps", **how):
        seen = Observation(torch.tensor([0.3, -0.4], **F64), lambda x: x.sum(1), 0.5)
        given = score if mask is None else score.given(mask)
        made = posterior_score(sde, given, seen, method=method)
        return sample(sde, made, shape, nfe=9, seed=3, mask=mask, **F64, **how)

    for method in ("mmps", "dps", "pigdm"):
        same(draw(None, (B, N, D), MASK, method), alone(partial(draw, method=method), None), atol=1e-7)


def test_gradients_through_checkpoints_are_those_without():
    """What is made again for a gradient knows what was real."""
    sde = VPSDE()
    grown = torch.tensor(1.0, requires_grad=True, **F64)

    def pulled(x, t, mask, towards):
        return grown * network(sde, 9.0)(x, t, mask) - 0.4 * towards

    guided = classifier_free(as_score(pulled, sde, "eps"), (MASK, 1.0), (MASK, 0.0), 3.0, rescale=0.7)
    clipped = dynamic_threshold(sde, guided, (-0.5, 0.5), percentile=0.6)
    found = []
    for way in (True, "checkpoint"):
        x = sample(sde, clipped, (B, N, D), nfe=5, seed=2, mask=MASK, differentiable=way, **F64)
        found.append(torch.autograd.grad(x.square().sum(), grown)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_half_precision(dtype):
    """Neither overflow nor the rounding of a long sum."""
    y = torch.ones(2, 70_000, dtype=dtype)
    mask = torch.ones(2, 70_000, dtype=torch.bool)
    with padded(Padding.of(mask, y.shape, None)):
        assert torch.equal(event_mean(y), torch.ones(2, dtype=dtype))
    assert torch.equal(event_mean(y), torch.ones(2, dtype=dtype))


class Own(VPSDE):
    """With a prior of its own, in terms of points."""

    def prior_sample(self, shape, **how):
        assert tuple(shape)[2:] == (D,)
        return super().prior_sample(shape, **how) * torch.tensor([1.0, 2.0], **F64)

    def prior_log_prob(self, x):
        assert x.shape[2:] == (D,)
        return (-0.5 * (x / torch.tensor([1.0, 2.0])).square() - math.log(2 * math.pi) / 2).sum((1, 2)) - x.shape[
            1
        ] * math.log(2.0)


def test_a_prior_of_ones_own_is_asked_of_points():
    """It gets (b, n, d), not numbers in a row."""
    sde = Own()
    padded_score, score = both(sde, 7.0)

    def draw(score, shape, **how):
        return sample(sde, score, shape, nfe=6, seed=3, **F64, **how)

    same(draw(padded_score, (B, N, D), mask=MASK), alone(draw, score))
    x = 0.5 * Noise(torch.empty(B, N, D, **F64), 2, mask=MASK).normal()
    found = log_likelihood(sde, padded_score, x, mask=MASK).log_prob
    for i, mask in enumerate(MASK):
        one = log_likelihood(sde, score, x[i][mask][None]).log_prob
        assert float(found[i]) == pytest.approx(float(one), abs=1e-8)


def test_a_poisson_flow_takes_its_lengths_from_what_is_real():
    """The first number of a sample makes its length: not that of the padding, which is 0."""
    sde, like = PoissonFlow(2.0), torch.empty(B, N, D, **F64)
    with padded(Padding.of(MASK, like.shape, sde)):
        eps = sde.unit_noise(Noise(like, 1, mask=MASK).normal)
    for i, n in enumerate(COUNTS):
        one = sde.unit_noise(Noise(torch.empty(1, n, D, **F64), 1, [i]).normal)
        assert torch.equal(eps[i][MASK[i]], one[0])


def test_a_padded_call_within_another_run():
    """A score that draws padded samples itself, in an adaptive run whose samples leave one by one."""
    sde = VPSDE()
    inner, _ = both(sde)
    drawn = []

    def nested(x, t):
        drawn.append(sample(sde, inner, (B, N, D), nfe=5, seed=0, mask=MASK, **F64))
        a, s = (y.reshape(-1, 1) for y in (sde.alpha(t), sde.sigma(t)))
        return -x / (a**2 * torch.linspace(0.01, 4, 3, **F64) + s**2)

    ode_sample(sde, nested, (6, 3), method="rk45", seed=1, rtol=1e-2, atol=1e-2, **F64)
    assert all(torch.equal(x, drawn[0]) for x in drawn)


def test_what_lies_in_the_padding_may_be_nan():
    sde = VPSDE()
    padded_score, _ = both(sde, 7.0)
    x = 0.5 * Noise(torch.empty(B, N, D, **F64), 2, mask=MASK).normal()
    spoilt = torch.where(MASK[..., None], x, torch.nan)
    for y in (x, spoilt):
        found = log_likelihood(sde, padded_score, y, mask=MASK, rtol=1e-2, atol=1e-2).log_prob
        assert torch.isfinite(found).all()
    assert torch.isfinite(sample(sde, padded_score, x.shape, nfe=5, x_T=spoilt, mask=MASK)).all()
    with pytest.raises(ValueError, match="x holds 24 non-finite values"):
        log_likelihood(sde, padded_score, spoilt)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_states_that_are_no_floating_numbers(dtype):
    """As without a mask."""
    score, x = both(VPSDE())[0], torch.ones(B, N, D, dtype=dtype)
    for call in (
        lambda: solve(VPSDE().probability_flow(score), x, [1.0, 0.5], "heun", mask=MASK),
        lambda: log_likelihood(VPSDE(), score, x, mask=MASK),
        lambda: sample(VPSDE(), score, x.shape, nfe=5, x_T=x, mask=MASK),
    ):
        with pytest.raises(TypeError, match="must be a floating tensor, got torch"):
            call()


def test_another_mask_for_the_noise_is_refused():
    x, flow = torch.zeros(B, N, D), VPSDE().reverse(both(VPSDE())[0])
    other = Noise(x, 0, mask=MASK.roll(1, 0))
    with pytest.raises(ValueError, match="the same mask"):
        solve(flow, x, [1.0, 0.5], "euler_maruyama", noise=other, mask=MASK)
    solve(flow, x, [1.0, 0.5], "euler_maruyama", noise=Noise(x, 0, mask=MASK.clone()), mask=MASK)


def test_in_inference_mode():
    """Likelihoods take derivatives whatever the mode that the mask was made in."""
    sde = VPSDE()
    score = as_score(network(sde, 7.0), sde, "eps")
    x = 0.5 * Noise(torch.empty(B, N, D, **F64), 2, mask=MASK).normal()
    with torch.inference_mode():
        mask = MASK.clone()
        found = log_likelihood(sde, score.given(mask), x, mask=mask)
        drawn = sample(sde, score.given(mask), x.shape, nfe=5, seed=0, mask=mask)
    torch.testing.assert_close(found.log_prob, log_likelihood(sde, score.given(MASK), x, mask=MASK).log_prob)
    torch.testing.assert_close(drawn, sample(sde, score.given(MASK), x.shape, nfe=5, seed=0, mask=MASK))
