"""Training finds the score: targets in closed form, a Gaussian learnt to its exact score, seeds, errors."""

import math
import re
from functools import partial

import pytest
import torch

from sdekit import VESDE, VPSDE, CosineVP, GaussianMixture, HeatODE, PoissonFlow, RectifiedFlow, SubVPSDE, as_score
from sdekit.processes.kinds import KINDS
from sdekit.training.distributed import Ranks
from sdekit.training.draws import TIMES, Draws, Order, doubts, lognormal
from sdekit.training.ema import EMA
from sdekit.training.networks import build, seeded
from sdekit.training.objectives import OBJECTIVES, denoising, edm
from sdekit.training.trainer import train


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
@pytest.mark.parametrize("predicts", KINDS)
def test_a_perfect_network_has_no_loss(predicts, sde):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 64, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    for shift, low, high in ((0, 0, 1e-8), (1, 1e-2, 1e9)):
        losses = denoising()(as_score(Target(sde, predicts, x0 + shift), sde, predicts), x0, t, lambda: eps)
        assert losses.shape == (64,)
        assert low <= float(losses.mean()) < high


def test_the_score_is_weighted_by_sigma_squared():
    sde = VPSDE()
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4096, 1, generator=generator, dtype=torch.float64)
    t = torch.full((4096,), 1e-4, dtype=torch.float64)
    loss = denoising()(as_score(lambda x, t: torch.zeros_like(x), sde), x0, t, lambda: eps)
    assert float(loss.mean()) == pytest.approx(1.0, abs=0.1)  # unweighted it is 1/sigma^2 = 1e5


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


def steps_of(draw, steps, batch=50, world=1, rank=0):
    """What the steps 1, 2, ... draw by ``draw``, stacked."""
    draws, found = Draws(3, batch, Ranks(rank, world), torch.device("cpu")), []
    for step in range(1, steps + 1):
        draws.enter(step)
        found.append(draw(draws))
    return torch.stack(found)


def test_times_are_uniform_and_fill_every_gap():
    draws = steps_of(Draws.levels, 400)
    assert ((draws >= 0) & (draws < 1)).all()
    assert draws[:, 7].mean() == pytest.approx(0.5, abs=0.06)  # each entry alone is uniform: 4 standard errors
    assert draws[:, 7].std() == pytest.approx(12**-0.5, abs=0.03)
    gaps = draws.sort(1).values.diff(dim=1)
    assert (gaps - 1 / 50).abs().max() < 1e-12


def test_what_a_step_draws_is_a_function_of_the_step_and_the_place_in_the_batch():
    """So a run resumes, and two processes draw between them what one draws."""
    like = torch.zeros(6, 2)

    def draw(draws):
        return torch.cat([draws.levels()[:, None], draws.uniform()[:, None], draws.normal(like), draws.normal(like)], 1)

    whole = steps_of(draw, 5, batch=6)
    assert torch.equal(whole[3:], steps_of(draw, 5, batch=6)[3:])
    assert len(torch.unique(whole[..., 1:])) == whole[..., 1:].numel()
    shares = [steps_of(draw, 5, 6, world=2, rank=r) for r in range(2)]
    assert torch.equal(whole, torch.cat(shares, 1))


def test_every_item_once_in_an_epoch_in_another_order_each():
    draws = Draws(0, 4, Ranks(0, 1), torch.device("cpu"))
    seen = [i for chosen in Order(10, draws, 1, 15) for i in chosen]
    assert len(seen) == 60
    epochs = [seen[k : k + 10] for k in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    assert [i for chosen in Order(10, draws, 8, 15) for i in chosen] == seen[28:]


def test_lognormal_times_have_its_quantiles_and_stay_inside():
    sde = HeatODE()
    u = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001
    log_r = sde.sigma(lognormal(sde)(u)).log()
    assert log_r.mean() == pytest.approx(-1.2, abs=2e-3)
    assert log_r.std() == pytest.approx(1.2, rel=2e-3)
    cut = VPSDE()
    t = lognormal(cut, mean=5.0, std=3.0)(u)
    assert t.max() <= cut.T
    assert t.min() >= cut.t_min


def test_labels_are_told_and_dropped_at_the_rate_asked_for():
    told = []

    class Watch(torch.nn.Linear):
        classes = 3

        def forward(self, x, t, labels):
            told.append(labels)
            return super().forward(x)

    labels = torch.arange(90) % 3
    train(line(Watch), VPSDE(), labels[:, None].float(), labels=labels, steps=100, batch=30, label_drop=0.2)
    kinds = torch.cat(told)
    # 3,000 draws of 0.2: 5 standard errors are 0.037, a false alarm in two million
    assert (kinds == 3).double().mean() == pytest.approx(0.2, abs=0.037)
    assert set(kinds.tolist()) == {0, 1, 2, 3}


def test_one_training_learns_the_scores_with_labels_and_without():
    """Two Gaussians, a label each: with it N(+-1, 0.3^2), without it their mixture, which a network that is always (or
    never) told its label does not learn.
    """
    sde, labels = VPSDE(), torch.arange(2000) % 2
    data = 0.3 * gaussian_data(2000, 1.0, 0.0) + (2.0 * labels - 1)[:, None]
    network = build("MLP", dim=1, width=32, layers=2, classes=2)
    trained = train(network, sde, data, labels=labels, steps=1000, batch=256, lr=5e-3, ema=0.99, label_drop=0.2).network
    score, x, t = as_score(trained, sde, predicts="v"), torch.linspace(-1.5, 1.5, 31)[:, None], 0.3
    with torch.no_grad():
        found = {label: score.given(label)(x, t) for label in (0, 1, None)}
    cov = 0.09 * torch.eye(1)
    truth = {
        0: GaussianMixture(-torch.ones(1, 1), cov[None]).score(sde)(x, t),
        1: GaussianMixture(torch.ones(1, 1), cov[None]).score(sde)(x, t),
        None: GaussianMixture(torch.tensor([[-1.0], [1.0]]), cov.expand(2, 1, 1)).score(sde)(x, t),
    }
    off = {label: float((found[label] - truth[label]).square().mean().sqrt()) for label in truth}
    apart = float((truth[0] - truth[None]).square().mean().sqrt())
    assert max(off.values()) < 0.15 * apart


def test_labels_cannot_be_dropped_where_none_stands_for_that():
    class Plain(torch.nn.Linear):
        def forward(self, x, t, labels):
            return super().forward(x)

    labels = torch.arange(10) % 2
    with pytest.raises(ValueError, match=r"network\.classes"):
        train(line(Plain), VPSDE(), labels[:, None].float(), labels=labels, steps=1)
    train(line(Plain), VPSDE(), labels[:, None].float(), labels=labels, steps=1, label_drop=0.0)


def test_a_compiled_network_trains_to_the_same_loss(monkeypatch):
    """Compiled without a compiler of C++: what is traced is the whole of it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    one, two = (
        train(build("MLP", width=8, layers=1), VPSDE(), gaussian_data(100), steps=3, batch=16, compile=c).losses
        for c in (False, True)
    )
    assert torch.allclose(one, two, rtol=1e-5)


def test_a_dataset_trains_as_the_tensor_does():
    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, i):
            return data[i], int(i % 2)

    data = gaussian_data(100)
    before = torch.random.get_rng_state()
    runs = [
        train(build("MLP", width=8, layers=1, classes=2), VPSDE(), source, labels=labels, steps=12, batch=16, workers=w)
        for source, labels, w in ((data, torch.arange(100) % 2, 0), (Items(), None, 0), (Items(), None, 1))
    ]
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert torch.equal(runs[0].losses, runs[2].losses)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bf16_trains_to_nearly_the_same_loss():
    losses = [
        train(build("MLP", width=32), VPSDE(), gaussian_data(), steps=60, batch=256, bf16=b).losses
        for b in (False, True)
    ]
    assert not torch.equal(*losses)
    assert losses[1][-20:].mean() == pytest.approx(float(losses[0][-20:].mean()), rel=0.05)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predicts": "epsilon"}, "unknown prediction"),
        ({"steps": 0}, "steps"),
        ({"ema": 1.0}, "ema"),
        ({"schedule": "cos"}, "cosine"),
        ({"times": "even"}, "times"),
        ({"lr": -1.0}, "lr"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
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


@pytest.mark.parametrize(
    ("sde", "predicts", "times", "said"),
    [
        (HeatODE(), "v", "uniform", "only 3.7% of the times .* 0.03 to 3: times='lognormal'"),
        (PoissonFlow(), "x0", "uniform", "only 3.7% of the times"),
        (VESDE(), "eps", "lognormal", "predicts eps is hardly shown the levels near 50, .*predict v or x0"),
        (HeatODE(), "score", "lognormal", "predicts score is hardly shown the levels near 80"),
        (RectifiedFlow(), "eps", "uniform", "zero terminal SNR"),
    ],
)
def test_what_would_end_in_wrong_samples_is_said(sde, predicts, times, said, caplog):
    """Measured on a mixture in the plane, whose samples by a good network are .12 off in sliced Wasserstein distance:
    .52 (HeatODE, the defaults), 306 (VE, eps, lognormal), 25 (HeatODE, eps, lognormal).
    """
    with caplog.at_level("WARNING", "sdekit"):
        network = build("MLP", dim=1, width=8, layers=1)
        train(network, sde, gaussian_data(64, 1.0), predicts=predicts, times=times, steps=1, batch=8, device="cpu")
    assert len(caplog.messages) == 1
    assert re.search(said, caplog.messages[0])


@pytest.mark.parametrize("std", [0.2, 1.0, math.nan, 0.0])
@pytest.mark.parametrize(
    ("sde", "predicts", "times"),
    [
        (VPSDE(), "eps", "uniform"), (SubVPSDE(), "v", "uniform"), (VESDE(), "eps", "uniform"),
        (RectifiedFlow(), "flow", "uniform"), (CosineVP(), "v", "lognormal"), (HeatODE(), "x0", "lognormal"),
        (PoissonFlow(), "x0", "lognormal"),
    ],
)  # fmt: skip
def test_what_is_usual_is_not_doubted(sde, predicts, times, std):
    assert doubts(sde, predicts, TIMES[times](sde), std) == []


@pytest.mark.parametrize("objective", [edm(), denoising, OBJECTIVES["variational"], "denoising", lambda out, x: out])
def test_what_is_no_objective_is_refused(objective):
    """A weighting, a maker of objectives that was not called, a name, a loss of another form."""
    with pytest.raises(
        TypeError, match=r"objective must be a function \(score, x_0, t, normal\).*denoising\(edm\(\)\)"
    ):
        train(line(), VPSDE(), gaussian_data(n=64), objective=objective, steps=1, batch=8, device="cpu")


@pytest.mark.parametrize(
    ("std", "mean", "said"),
    [(74.0, 127.0, "mean is 127 and their standard deviation 74.6"), (0.01, 0.0, "deviation 0.01")],
)
def test_data_that_are_not_of_unit_size_are_said(std, mean, said, caplog):
    with caplog.at_level("WARNING", "sdekit"):
        data = gaussian_data(64, std, mean)
        train(build("MLP", dim=1, width=8, layers=1), VPSDE(), data, steps=1, batch=8, device="cpu")
    assert len(caplog.messages) == 1
    assert said in caplog.messages[0]


def test_times_of_ones_own_are_asked_for_a_batch_alone():
    """A callable may know its batch's size."""
    order = torch.linspace(0.5, 1.0, 8, dtype=torch.float64)
    train(
        build("MLP", dim=1, width=8, layers=1), VPSDE(), gaussian_data(64), times=lambda u: 1e-3 + u * order * 0.9,
        steps=2, batch=8, device="cpu",
    )  # fmt: skip


class Foreign(torch.nn.Module):
    """A clock in a thousand steps, and a prediction in a mapping, as in other people's networks."""

    def __init__(self):
        super().__init__()
        self.inside, self.clocks = build("MLP", dim=1, width=16, layers=1), []

    def forward(self, x, clock):
        self.clocks.append(clock)
        return {"sample": self.inside(x, clock / 1000)}


def test_a_foreign_network_is_trained_in_its_own_words():
    """time= and output= mean what they mean to as_score: the same weights as of the network inside."""
    plain, foreign = build("MLP", dim=1, width=16, layers=1), Foreign()
    how = {"steps": 20, "batch": 16, "device": "cpu", "predicts": "v"}
    train(plain, VPSDE(), gaussian_data(64), **how)
    trained = train(foreign, VPSDE(), gaussian_data(64), time=lambda t: 1000 * t, output="sample", **how).network
    for a, b in zip(plain.parameters(), foreign.inside.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(float(c.min()) > 0 and float(c.max()) <= 1000 for c in foreign.clocks)
    score = as_score(trained, VPSDE(), "v", time=lambda t: 1000 * t, output="sample")
    assert torch.isfinite(score(torch.zeros(4, 1), 0.5)).all()
    with pytest.raises(ValueError, match=r"output='eps' is not in what the network returned"):
        train(Foreign(), VPSDE(), gaussian_data(64), output="eps", **how)


def test_a_blind_prediction_is_doubted_whatever_else_is():
    times = lambda u: 0.1 + 0.8 * u  # noqa: E731
    for std, given in ((1.0, None), (74.0, times), (74.0, TIMES["uniform"](RectifiedFlow()))):
        assert any("zero terminal SNR" in said for said in doubts(RectifiedFlow(), "eps", given, std))
