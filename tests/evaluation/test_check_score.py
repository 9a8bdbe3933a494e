"""check_score: right models pass under every process, and each mistake is found and named."""

import sys
from pathlib import Path

import pytest
import torch
from sdekit.guidance import autoguidance
from torch import nn

from sdekit import (
    VESDE,
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
    as_score,
    check_score,
)
from sdekit.evaluation.check.probe import chance
from sdekit.processes.kinds import KINDS
from sdekit.training.digits import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from tests.evaluation.exact import VP, data, data_of, failed, law, model, says

CORRELATED = CorrelatedSDE(VP, 0.5 * torch.eye(4) + 0.5)
SHIFTED = AffineSDE(-1.0, 1.5, lambda t: 3 * t.cos(), T=2.0)
TABLE = BetaTable(torch.linspace(0.01, 0.6, 10))


@pytest.mark.parametrize("predicts", KINDS)
def test_a_perfect_model_of_every_kind_passes(predicts):
    report = check_score(VP, model(predicts), data(), search=False)
    assert [line.name for line in report.lines if line.verdict != "pass"] == []
    assert report["symmetric"].number < 1e-4
    wide = GaussianMixture(torch.zeros(1, 64), 0.5 * torch.eye(64)[None])  # in which 32 samples are 2,048 numbers
    report = check_score(VP, model(network=says(VP, predicts, wide), predicts=predicts), data_of(wide), search=False)
    assert report["variance"].number == pytest.approx(1, abs=0.15)  # E|x_0 - D|^2 = sigma^2/alpha tr dD/dx


@pytest.mark.parametrize(
    ("sde", "score", "x"),
    [
        (VESDE(), law().score(VESDE()), data()),
        (HeatODE(), law(4, 100.0).score(HeatODE()), data(4, 100.0)),
        (VP, law(4, 0.01).score(VP), data(4, 0.01)),
        (CORRELATED, law().score(CORRELATED), data()),
        (CORRELATED, model("eps", sde=CORRELATED), data()),
        (SHIFTED, model("x0", sde=SHIFTED), data()),
        (BridgeSDE(torch.full((4,), 2.0)), law().score(BridgeSDE(torch.full((4,), 2.0))), data()),
        (PoissonFlow(8.0), PointSet(data(n=100)).score(PoissonFlow(8.0)), data(n=100)),
        (RectifiedFlow(), model("flow", sde=RectifiedFlow()), data()),
        (CosineVP(), model("v", sde=CosineVP()), data()),
        (TABLE, model(sde=TABLE, network=says(TABLE, "eps", clock=lambda i: (i + 1) / 10), clock=lambda t: 10 * t - 1),
         data()),
        (RectifiedFlow(), model().under(RectifiedFlow()), data()),
        (VP, lambda x, t: law().score(VP)(x, t), data().double()),
        (VP, autoguidance(model(), model(), 2.0), data()),
    ],
    ids=["VE", "heat, 100", "VP, .01", "correlated", "correlated eps", "shifted", "bridge", "Poisson", "flow", "cosine",
         "table of 10", "under", "closure in float64", "guidance"],
)  # fmt: skip
def test_right_models_are_not_accused(sde, score, x, request):
    search = request.node.callspec.id in ("correlated", "flow", "table of 10")
    report = check_score(sde, score, x, search=search)
    assert failed(report) == [], report
    assert not report.found


def test_a_bridge_to_a_y_of_each_sample():
    y = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    sde, base = BridgeSDE(y), BridgeSDE(torch.zeros(4))
    score = as_score(lambda x, t, y: says(base, "x0")(x - t[:, None] * y, t), sde, "x0")
    assert check_score(sde, score.given(y), data(), search=False).ok
    report = check_score(sde, score.given(y.roll(1, 0)), data(), search=False)
    assert "levels" in failed(report)


@pytest.mark.parametrize(("d", "n"), [(1, 1000), (2, 1000), (2, 5), (4, 20)])
def test_chance_is_no_mistake(d, n):
    """What a few numbers are off by chance: without it half of the right models in one dimension fail."""
    for seed in range(8):
        x = law(d).sample(n, seed=seed, dtype=torch.float32)
        report = check_score(VP, law(d).score(VP), x, seed=seed, search=False)
        assert failed(report) == []
        assert (n < 32) == any(line.name == "data" for line in report.lines)


def test_chance_of_few_values_is_students():
    """How often a mean of n normal numbers is off by more than so many of their own deviations: as rarely as said."""
    z = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    off = sum(abs(float(row.mean())) > chance(row, 1.96) for row in z[:4000]) / 4000
    assert off == pytest.approx(0.05, abs=0.015)


MISTAKES = {
    "kind": (lambda: model("v", "eps"), "predicts v"),
    "kind, of a score": (lambda: model("score", "x0"), "predicts score"),
    "clock": (lambda: model(clock=lambda t: t / 1000), "on the clock t"),
    "clock of another length": (
        lambda: model(network=says(VP, "eps", clock=lambda i: i / 1000), clock=lambda t: t),
        "on the clock 1000 t",
    ),
    "clock and kind": (lambda: model("eps", "v", clock=lambda t: 1 - t), "predicts eps on the clock t"),
    "sign": (lambda: model(network=lambda x, t: -says(VP, "eps")(x, t)), "minus eps"),
    "sign, of a closure": (lambda: lambda x, t: -law().score(VP)(x, t), "minus score"),
    "factor": (lambda: model(network=lambda x, t: 3 * says(VP, "eps")(x, t)), "it predicts 3 times eps"),
    "process": (lambda: as_score(says(CosineVP(), "v"), VP, "v"), "of CosineVP()"),
    "scale": (lambda: as_score(says(VP, "eps", law(4, 0.5)), VP, "eps"), "times 0.5"),
    "one step late": (lambda: model(clock=lambda t: (t + 1e-3).clamp(0, 1)), "earlier"),
    "one step early": (lambda: model(clock=lambda t: (t - 1e-3).clamp(0, 1)), "later"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    make, found = MISTAKES[name]
    report = check_score(VP, make(), data(n=4000))
    assert not report.ok
    assert found in report.found, report
    assert "reading" in failed(report)


def test_mistakes_at_zero_signal_are_named():
    """At alpha(T) = 0 a model said to predict eps says nothing of x_0, which is no NaN of its network."""
    report = check_score(CosineVP(), model("v", "eps", CosineVP()), data())
    assert report.found == "it predicts v"
    assert "zero terminal SNR" in report["start"].remedy
    right = model(sde=CosineVP(), network=lambda x, t: says(CosineVP(), "eps")(x, t.clamp_max(0.999)))
    report = check_score(CosineVP(), right, data(), search=False)
    assert report.ok
    assert report["start"].verdict == "warn"


def test_a_table_s_own_steps_count():
    """Ten steps: off by one is a tenth."""
    network = says(TABLE, "eps", clock=lambda i: ((i + 1) / 10).clamp(0, 1))
    found = check_score(TABLE, model(sde=TABLE, network=network, clock=lambda t: 10 * t), data()).found
    assert "one step of 10 earlier" in found
    found = check_score(TABLE, model(sde=TABLE, network=network, clock=lambda t: t), data()).found
    assert "10 t - 1 (a table's index from 0)" in found


def test_a_network_with_a_table_is_asked_within_it():
    asked = []

    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.arange(1.0, 1001.0) / 1000, requires_grad=False)

        def forward(self, x, index):
            asked.append((int(index.min()), int(index.max()), index.is_floating_point()))
            return says(VP, "eps")(x, self.table[index])

    clock = lambda t: (999 * (1 - t)).round().long()  # noqa: E731
    report = check_score(VP, as_score(Embedded(), VP, "eps", time=clock), data())
    assert "1000 t - 1" in report.found
    assert min(low for low, _, _ in asked) >= 0
    assert max(high for _, high, _ in asked) <= 999
    assert not any(floating for _, _, floating in asked)


def test_data_of_another_range_and_order():
    modes = GaussianMixture([[0.8, -0.7], [-0.8, 0.3], [0.5, 0.9]], 1e-3 * torch.eye(2).repeat(3, 1, 1))
    x = modes.sample(500, seed=0, dtype=torch.float32).clamp(-1, 1)
    score = as_score(says(VP, "eps", modes), VP, "eps")
    assert check_score(VP, score, x, search=False).ok
    assert "trained on data in [-1, 1], and these are in [0, 255]" in check_score(VP, score, (x + 1) * 127.5).found

    pictures = data(6).reshape(-1, 3, 1, 2)
    score = as_score(says(VP, "v", law(6)), VP, "v")
    flat = as_score(lambda x, t: score.network(x.flatten(1), t).reshape(x.shape), VP, "v")
    assert check_score(VP, flat, pictures, search=False).ok
    assert "order 2, 1, 0 (BGR)" in check_score(VP, flat, pictures[:, [2, 1, 0]]).found


def test_conditions_of_others_are_named_and_weak_ones_are_not():
    import networks  # of benchmarks

    images, labels = load_digits()
    sde, score = networks.load("eps_conditional", 512)
    images, labels = images[:512], labels[:512]
    assert check_score(sde, score.given(labels), images, search=False).ok
    report = check_score(sde, score.given(labels.roll(3)), images, search=False)
    assert "conditions" in failed(report)
    assert "their order" in report["conditions"].remedy

    listening = as_score(lambda x, t, c: says(VP, "eps")(x, t) + 1e-4 * c[:, None], VP, "eps")
    c = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert check_score(VP, listening.given(c), data(), search=False)["conditions"].verdict == "pass"
    deaf = as_score(lambda x, t, c: says(VP, "eps")(x, t), VP, "eps")
    assert "does not listen" in check_score(VP, deaf.given(c), data(), search=False)["conditions"].remedy
    same = check_score(VP, deaf.given(torch.ones(1000)), data(), search=False)
    assert same["conditions"].verdict == "pass"


def test_padded_samples_are_refused_and_masks_of_other_kinds_are_not():
    """A mask that the data are 0 outside of; one that says which pixels were seen is a condition as any."""
    mask = torch.arange(6) < torch.tensor([6, 3, 4, 5])[torch.arange(64) % 4, None]
    x = torch.randn(64, 6, 2, generator=torch.Generator().manual_seed(0))
    score = as_score(lambda x, t, real: x * 0, VP, "x0").given(mask)
    with pytest.raises(ValueError, match=r"padded, it seems, by the condition <tensor \(64, 6\)>.*samples of one size"):
        check_score(VP, score, torch.where(mask[..., None], x, 0.0), search=False)
    assert not check_score(VP, score, x, samples=16, search=False).ok
