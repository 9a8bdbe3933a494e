"""Training where alpha(T) = 0: every weight at T is its limit or refused by name, and losses are finite."""

import math

import pytest
import torch
from torch import nn

from sdekit import BetaTable, Noise, RectifiedFlow, as_score, sample, variational_bound
from sdekit.likelihood.quantization import Quantization
from sdekit.training import Preconditioned, train
from sdekit.training.objectives import OBJECTIVES, WEIGHTINGS, denoising, variational
from tests.training.models import in_turn
from tests.zero import MEAN, STD, ZERO, moments, network, table

ALL = ["x0", "v", "flow", "eps", "score"]
SEEING = ["x0", "v", "flow"]


class Small(nn.Module):
    """A network of two numbers and t, with weights of its own choice."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 2)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(torch.cat([x, t.reshape(-1, 1).to(x)], dim=1))))


@pytest.fixture
def small():
    state = torch.random.get_rng_state()
    made = Small()  # its layers drew from the global generator before they got other weights
    torch.random.set_rng_state(state)
    return made


def at_T(u):
    """Times: T, whatever u."""
    return torch.ones_like(u)


@pytest.mark.parametrize("name", ["flow", "flow_3", "cosine", "table", "rounded"])
@pytest.mark.parametrize("predicts", SEEING)
def test_a_few_steps_of_training(small, name, predicts):
    """Every weighting, objective and law of times, T itself among them: finite losses, and finite weights after."""
    sde, data = ZERO[name](), torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    objectives = [denoising(w) for w in WEIGHTINGS] + [
        make() for key, make in OBJECTIVES.items() if key not in ("denoising", "variational")
    ]
    for times in ("uniform", "lognormal", at_T, *(["table"] if name == "table" else [])):
        if times == "table":
            objectives.append(variational())
        for objective in objectives:
            # 100 is the table: all its times are in the batch
            run = train(
                small, sde, data, predicts=predicts, objective=objective, times=times, steps=2, batch=100, lr=1e-5,
                warmup=0, device="cpu",
            )  # fmt: skip
            assert bool(torch.isfinite(run.losses).all())
            assert all(bool(torch.isfinite(w).all()) for w in run.network.parameters())


@pytest.mark.parametrize("name", ["flow", "flow_3", "cosine", "table", "rounded"])
@pytest.mark.parametrize("predicts", SEEING)
def test_weights_at_T_are_their_limits(name, predicts):
    """Of |x_0 error|^2 at T, where SNR = 0: edm's is 1/d^2, d = 1/2, the others' are 0; "simple" is on the output's."""
    sde = ZERO[name]()
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.ones(5, dtype=torch.float64)
    score = network(sde, predicts)
    m = {"x0": 1.0, "v": -1.0, "flow": float(sde.velocity(1.0)[0])}[predicts]  # of x_0 in the output
    square = (MEAN - x0).square().mean(1)
    want = {"simple": m**2 * square, "edm": 4 * square, "likelihood": 0 * square, "min_snr": 0 * square}
    assert set(want) == set(WEIGHTINGS)
    for weighting in WEIGHTINGS:
        loss, before = (denoising(weighting)(score, x0, u, in_turn(eps)) for u in (t, t * (1 - 1e-6)))
        torch.testing.assert_close(loss, want[weighting], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(before, loss, rtol=2e-3, atol=1e-3)  # and that is where it goes


@pytest.mark.parametrize("predicts", ["eps", "score"])
def test_infinite_weights_are_refused_by_name(predicts):
    """At T a network of eps can be right, |x| there, but x_0 follows from it only by a division by 0."""
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sde in (RectifiedFlow(), table(), ZERO["rounded"]()):
        score = as_score(lambda x, t: 0 * x, sde, predicts)
        for weighting in ("likelihood", "edm"):
            message = f"weighting '{weighting}' is infinite.*alpha = 0.*predicts {predicts}"
            with pytest.raises(ValueError, match=message):
                denoising(weighting)(score, x0, torch.ones(5, dtype=torch.float64), in_turn(eps))
            below = denoising(weighting)(score, x0, torch.full((5,), 0.99, dtype=torch.float64), in_turn(eps))
            assert bool(torch.isfinite(below).all())
        for weighting in ("simple", "min_snr"):
            loss = denoising(weighting)(score, x0, torch.ones(5, dtype=torch.float64), in_turn(eps))
            torch.testing.assert_close(loss, eps.square().mean(1), rtol=1e-6, atol=0)
    sde = table()
    with pytest.raises(ValueError, match=f"zero terminal SNR.*predicts {predicts}"):
        variational()(as_score(lambda x, t: 0 * x, sde, predicts), x0[:1], sde.times[-1:], in_turn(eps[:1]))


BETAS = torch.tensor([0.02, 0.05, 0.3, 0.1, 0.6, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("predicts", SEEING)
def test_the_mean_over_the_table_is_ddpm_s_bound(predicts):
    """Ho et al. 2020, equations 5-7, from betas, the last of which is 1: KL terms and the Gaussian decoder."""
    sde, n, d = BetaTable(BETAS), len(BETAS), 3
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, d, generator=generator, dtype=torch.float64).expand(n, d)
    eps = torch.randn(n, d, generator=generator, dtype=torch.float64)
    bar, total = torch.cumprod(1 - BETAS, 0), 0.0
    for i in range(n):
        x = bar[i].sqrt() * x0[i] + (1 - bar[i]).sqrt() * eps[i]
        guess = MEAN + bar[i].sqrt() * STD**2 / (bar[i] * STD**2 + 1 - bar[i]) * (x - bar[i].sqrt() * MEAN)
        if i == 0:
            std = ((1 - bar[0]) / bar[0]).sqrt()
            total = total - torch.distributions.Normal(guess, std).log_prob(x0[0]).sum()
            continue
        apart = bar[i - 1].sqrt() * BETAS[i] * (x0[i] - guess) / (1 - bar[i])
        total = total + apart.square().sum() / (2 * (1 - bar[i - 1]) / (1 - bar[i]) * BETAS[i])
    loss = variational()(network(sde, predicts), x0, sde.times, in_turn(eps))
    torch.testing.assert_close(loss.mean(), total / d, rtol=1e-10, atol=0)


def test_with_bins_it_is_variational_bound_on_the_same_noise():
    """From T on, with finite gradients though T and t_1 are in one batch."""
    sde, quantization = BetaTable(BETAS), Quantization(7, -1.0, 1.0)
    levels = torch.arange(10 * 2).reshape(10, 2) % 7
    score = network(sde, "v")
    bound = variational_bound(
        sde, score, levels, levels=7, steps=6, grid=sde.times.flip(0), dtype=torch.float64, seed=4
    )
    x0 = quantization.values(levels, torch.float64)
    noise, total = Noise(x0, 4, purpose="bound"), torch.zeros(10, dtype=torch.float64)
    times = [0.0, *sde.times.tolist()]
    for i in [*range(2, len(times)), 1]:
        noise.enter(times[i], times[i - 1])
        total += variational(quantization)(score, x0, sde.times[i - 1].expand(10), noise.normal)
    torch.testing.assert_close(2 * total / 6, bound.diffusion + bound.reconstruction, rtol=1e-9, atol=1e-9)
    for predicts in SEEING:
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        says = network(sde, predicts).network
        score = as_score(lambda x, t: scale * says(x, t), sde, predicts)  # noqa: B023
        loss = variational(quantization)(score, x0[:6], sde.times, in_turn(torch.ones(6, 2, dtype=torch.float64)))
        (gradient,) = torch.autograd.grad(loss.sum(), scale)
        assert bool(torch.isfinite(gradient))


@pytest.mark.parametrize("name", ["flow", "cosine", "table", "rounded"])
def test_preconditioned_networks_start_at_T(name):
    """c_skip y + c_out F at r infinite: d F(x, .), y = x/alpha being nowhere; and samples of Gaussian data."""
    sde, d = ZERO[name](), 0.5

    class Told(nn.Module):
        def forward(self, y, noise):
            self.y, self.noise = y, noise
            return torch.tanh(y)

    inner = Told()
    whole = Preconditioned(inner, sde, d)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1.0, 1.0, 1 - 1e-5, 0.5], dtype=torch.float64)
    out = whole(x, t)
    torch.testing.assert_close(out[:3], d * torch.tanh(x[:3]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out[:2], d * torch.tanh(x[:2]), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(inner.y[:2], x[:2], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(inner.noise[:2], torch.full((2,), math.log(1000) / 4).double(), rtol=1e-6, atol=0)
    lam = float(sde.half_log_snr(0.5))
    assert float(inner.noise[3]) == pytest.approx(-lam / 4, rel=1e-12)

    class Zero(nn.Module):  # the best F for data N(0, d^2)
        def forward(self, y, noise):
            assert bool(torch.isfinite(noise).all())
            return torch.zeros_like(y)

    score = as_score(Preconditioned(Zero(), sde, d), sde, "x0")
    x_T = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = sample(sde, score, x_T.shape, "dpmpp_2m", steps=60, x_T=x_T, denoise=False)
    v = moments(sde, sde.t_min, 0.0, d)[1]
    torch.testing.assert_close(found, v**0.5 * x_T, rtol=0, atol=0.02)
