"""Training finds the score: targets in closed form, a Gaussian learnt to its exact score, seeds, errors."""

import math

import pytest
import torch

from sdekit import VESDE, VPSDE, GaussianMixture, SubVPSDE, as_score
from sdekit.score import PREDICTIONS
from sdekit.training.ema import EMA
from sdekit.training.networks import build, seeded
from sdekit.training.trainer import matching_loss, train, unit_times


def gaussian_data(n=2000, std=0.5, mean=1.0):
    """Exact mean and standard deviation, so that the learnt score has a known truth."""
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(0))
    return mean + std * (x - x.mean()) / x.std(correction=0)


def line(make=torch.nn.Linear, bias=True):
    """A linear layer that does not draw from the global generator."""
    return seeded(make, 0, {"in_features": 1, "out_features": 1, "bias": bias})


class Target(torch.nn.Module):
    """A network that knows x_0, so that a perfect prediction can be written down by hand."""

    def __init__(self, sde, predicts, x0):
        super().__init__()
        self.sde, self.predicts, self.x0 = sde, predicts, x0

    def forward(self, x, t):
        t = t.double()
        a, s = (c.reshape(-1, 1) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        eps = (x - a * self.x0) / s
        h = 1e-6
        da = (self.sde.alpha(t + h) - self.sde.alpha(t - h)).reshape(-1, 1) / (2 * h)
        ds = (self.sde.sigma(t + h) - self.sde.sigma(t - h)).reshape(-1, 1) / (2 * h)
        by_hand = {
            "score": -(x - a * self.x0) / s**2,
            "eps": eps,
            "x0": self.x0,
            "v": a * eps - s * self.x0,
            "flow": da * self.x0 + ds * eps,
        }
        return by_hand[self.predicts]


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(sigma_max=5.0)], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_perfect_network_has_no_loss(predicts, sde):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 64, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    assert float(matching_loss(Target(sde, predicts, x0), sde, predicts, x0, eps, t)) < 1e-8
    assert float(matching_loss(Target(sde, predicts, x0 + 1), sde, predicts, x0, eps, t)) > 1e-2


def test_the_score_is_weighted_by_sigma_squared():
    sde = VPSDE()
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4096, 1, generator=generator, dtype=torch.float64)
    t = torch.full((4096,), 1e-4, dtype=torch.float64)
    loss = matching_loss(lambda x, t: torch.zeros_like(x), sde, "score", x0, eps, t)
    assert float(loss) == pytest.approx(1.0, abs=0.1)  # unweighted it is 1/sigma^2 = 1e5


@pytest.mark.parametrize("predicts", ["v", "eps", "x0", "score"])
def test_training_on_a_gaussian_reaches_its_score(predicts):
    sde = VPSDE()
    network = build("MLP", dim=1, width=32, layers=2)
    trained = train(network, sde, gaussian_data(), predicts=predicts, steps=300, batch=256, lr=1e-2, ema=0.98)
    learnt = as_score(trained.network, sde, predicts=predicts)
    exact = GaussianMixture(torch.tensor([[1.0]]), torch.tensor([[[0.25]]])).score(sde)
    for t in (0.1, 0.3, 0.6, 1.0):
        spread = math.hypot(float(sde.alpha(t)) * 0.5, float(sde.sigma(t)))
        x = float(sde.alpha(t)) + spread * torch.linspace(-2, 2, 41)[:, None]  # two standard deviations of p_t
        error = (learnt(x, t) - exact(x, t)).square().mean().sqrt() * spread  # a score of 0 has 1
        assert float(error) < 0.2, (t, float(error))


def test_a_seed_reproduces_bit_for_bit_and_leaves_the_global_rng():
    def run(seed):
        network = build("MLP", dim=1, width=8, layers=1, seed=1)
        return train(network, VPSDE(), gaussian_data(100), steps=20, batch=16, seed=seed)

    before = torch.random.get_rng_state()
    a, b, c = run(0), run(0), run(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.losses, b.losses)
    assert all(torch.equal(u, v) for u, v in zip(a.network.parameters(), b.network.parameters(), strict=True))
    assert not torch.equal(a.losses, c.losses)
    assert a.losses.shape == (20,)


@pytest.mark.parametrize("even", [True, False])
def test_times_are_uniform_and_even_ones_fill_every_gap(even):
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([unit_times(50, generator, even=even) for _ in range(400)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert draws[:, 7].mean() == pytest.approx(0.5, abs=0.06)  # each entry alone is uniform: 4 standard errors
    assert draws[:, 7].std() == pytest.approx(12**-0.5, abs=0.03)
    gaps = draws.sort(1).values.diff(dim=1)
    assert bool((gaps - 1 / 50).abs().max() < 1e-12) == even


def test_times_may_be_drawn_by_a_callable_and_reach_both_ends():
    seen = []

    class Watch(torch.nn.Linear):
        def forward(self, x, t):
            seen.append(t)
            return super().forward(x)

    train(line(Watch), VPSDE(), gaussian_data(50), steps=50, batch=64)
    times = torch.cat(seen)
    assert times.dtype == torch.float32
    assert 1e-5 <= times.min() < 0.01
    assert 0.99 < times.max() <= 1
    seen.clear()
    train(line(Watch), VPSDE(), gaussian_data(50), steps=5, batch=64, times=lambda u: 0.5 + 0.1 * u)
    assert torch.cat(seen).min() >= 0.5
    assert torch.cat(seen).max() <= 0.6


def test_the_average_follows_its_formula():
    network = line(bias=False)
    torch.nn.init.constant_(network.weight, 0.0)
    ema, expected = EMA(network, decay=0.5), 0.0
    for n in range(1, 30):
        torch.nn.init.constant_(network.weight, float(n))
        ema.update(network)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert float(ema.network.weight) == pytest.approx(expected, rel=1e-5)
    assert not ema.network.weight.requires_grad
    assert float(network.weight.detach()) == 29


def test_the_warm_up_forgets_the_first_weights():
    network = line(bias=False)
    torch.nn.init.constant_(network.weight, 1e3)
    ema = EMA(network, decay=0.9999)
    torch.nn.init.constant_(network.weight, 0.0)
    for _ in range(100):
        ema.update(network)
    assert float(ema.network.weight) < 1.0  # 990 without a warm-up


def test_a_loss_that_is_not_finite_stops_with_its_step():
    class Breaks(torch.nn.Linear):
        calls = 0

        def forward(self, x, t):
            self.calls += 1
            return super().forward(x) * (float("nan") if self.calls == 7 else 1.0)

    with pytest.raises(FloatingPointError, match="step 7"):
        train(line(Breaks), VPSDE(), gaussian_data(50), steps=10, batch=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predicts": "epsilon"}, "unknown prediction"),
        ({"steps": 0}, "steps"),
        ({"ema": 1.0}, "ema"),
        ({"schedule": "cos"}, "cosine"),
        ({"times": "even"}, "times"),
        ({"lr": -1.0}, "lr"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        train(build("MLP"), VPSDE(), gaussian_data(10), **({"steps": 1} | arguments))


class Level(torch.nn.Module):
    """One number for all x and t; Adam moves it by the rate of each step while its target is far."""

    def __init__(self):
        super().__init__()
        self.level = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return x * 0 + self.level


def travelled(**options):
    network = Level()
    train(network, VPSDE(), torch.full((8, 1), 1e4), predicts="x0", lr=1e-2, batch=8, seed=0, device="cpu", **options)
    return float(network.level.detach()) / 1e-2


def test_learning_rate_and_clipping_are_what_they_say():
    """The way of one weight is the sum of the rates."""
    assert travelled(steps=40, warmup=0, schedule="constant") == pytest.approx(40, rel=0.01)
    assert travelled(steps=40, warmup=0, schedule="cosine") == pytest.approx(20.5, rel=0.01)
    assert travelled(steps=40, warmup=40, schedule="constant") == pytest.approx(20, rel=0.01)
    assert travelled(steps=40, warmup=0, schedule="constant", clip=1e-12) < 0.01  # far below Adam's epsilon
