"""check_score: right models pass under every process, and each mistake is found and named."""

import math
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from sdekit.guidance import autoguidance
from torch import nn

from sdekit import (
    VESDE,
    VPSDE,
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
from sdekit.evaluation.check.identify import better
from sdekit.evaluation.check.probe import Probe, chance
from sdekit.processes.kinds import KINDS, express, kind_of
from sdekit.training.digits import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

VP = VPSDE()


@cache
def law(d=4, scale=1.0):
    """Four modes, wide in some directions and narrow in others, of about unit size times ``scale``; not centred."""
    z = torch.randn(4, d, d + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    roots = 0.4 * z[..., :d] * torch.logspace(0, -1, d, dtype=torch.float64)
    covs = roots @ roots.mT / d + 1e-2 * torch.eye(d, dtype=torch.float64)
    return GaussianMixture(scale * (0.7 * z[..., d] + 0.3), scale**2 * covs, [0.4, 0.3, 0.2, 0.1])


@cache
def data(d=4, scale=1.0, n=1000):
    return law(d, scale).sample(n, seed=1, dtype=torch.float32)


def says(sde, predicts, mixture=None, clock=lambda t: t):
    """A network that says what a perfect one does, of t that ``clock`` finds in what it is told."""
    score = (mixture or law()).score(sde)

    def network(x, told):
        t = clock(told.double())
        a, b = express(kind_of(predicts, sde, t), kind_of("v", sde, t), sde.alpha(t), sde.sigma(t))
        return (a[:, None] * score.output(x.double(), t) + b[:, None] * sde.centre(x.double(), t)).to(x)

    return network


def model(predicts="eps", given=None, sde=VP, clock=None, network=None):
    """The network that predicts ``predicts``, said to predict ``given``."""
    return as_score(network or says(sde, predicts), sde, given or predicts, time=clock)


def failed(report):
    return [line.name for line in report.lines if line.verdict == "fail"]


CORRELATED = CorrelatedSDE(VP, 0.5 * torch.eye(4) + 0.5)
SHIFTED = AffineSDE(-1.0, 1.5, lambda t: 3 * t.cos(), T=2.0)
TABLE = BetaTable(torch.linspace(0.01, 0.6, 10))


@pytest.mark.parametrize("predicts", KINDS)
def test_a_perfect_model_of_every_kind_passes(predicts):
    report = check_score(VP, model(predicts), data(), search=False)
    assert [line.name for line in report.lines if line.verdict != "pass"] == []
    assert report["variance"].number == pytest.approx(1, abs=0.6)  # of 32 samples, in any kind
    assert report["symmetric"].number < 1e-4


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
    search = request.node.callspec.id in ("VE", "correlated", "flow", "table of 10")
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
    "factor": (lambda: model(network=lambda x, t: 3 * says(VP, "eps")(x, t)), "3 times eps"),
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
    for y, told in (((x + 1) / 2, "[0, 1]"), ((x + 1) * 127.5, "[0, 255]")):
        assert f"trained on data in [-1, 1], and these are in {told}" in check_score(VP, score, y).found

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


def raising(x, t):
    raise KeyError("no such key")


def writing(x, t):
    out = says(VP, "eps")(x, t)
    x.mul_(0.5)
    return out


def dropping(x, t):
    return nn.functional.dropout(says(VP, "eps")(x, t), 0.1)


@pytest.mark.parametrize(
    ("network", "line", "words"),
    [
        (raising, "answers", "KeyError: 'no such key'"),
        (lambda x, t: torch.cat([x, x], 1), "answers", 'output="mean"'),
        (lambda x, t: says(VP, "eps")(x, t) / (t < 0.9999)[:, None], "finite", "T = 1"),
        (lambda x, t: says(VP, "eps")(x, t) / ((t < 0.3) | (t > 0.9))[:, None], "finite", "t = "),
        (writing, "input", "writes into x"),
        (lambda x, t: says(VP, "eps")(x - 0.3 * x.mean(0), t), "alone", "eval()"),
    ],
)
def test_networks_that_cannot_be_sampled_are_named(network, line, words):
    report = check_score(VP, as_score(network, VP, "eps"), data(), search=line == "answers")
    assert failed(report) == [line]
    assert words in str(report[line])


def test_dropout_is_named():
    with torch.random.fork_rng():  # it is the network's to draw
        report = check_score(VP, as_score(dropping, VP, "eps"), data())
    assert "repeatable" in failed(report)
    assert "eval()" in report["repeatable"].remedy


def test_rough_weights_are_named():
    """No reading explains a mean that is left."""
    rough = as_score(lambda x, t: says(VP, "x0")(x, t) + 0.3 * VP.sigma(t)[:, None] ** 20, VP, "x0")
    report = check_score(VP, rough, data())
    assert "mean" in failed(report)
    assert "EMA" in report.found


def test_a_right_clock_that_raises_elsewhere_is_left_alone():
    def within(x, t):
        assert float(t.max()) <= 1
        return says(VP, "eps")(x, t)

    assert check_score(VP, as_score(within, VP, "eps"), data()).ok


def test_few_levels_are_no_better_reading():
    """A process that ends early has the easy levels alone, where several readings are alike."""
    found = check_score(CosineVP(), model("v", "score", CosineVP()), data()).found
    assert found == "it predicts v"


class Network(nn.Module):
    """The mixture's, with a weight."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        return self.one * says(VP, "v")(x, t)


def test_the_same_seed_is_the_same_report_and_nothing_else_changes():
    network = Network().train()
    first, again, other = (
        check_score(VP, as_score(network, VP, "v"), data(n=100), search=False, seed=seed) for seed in (0, 0, 1)
    )
    assert network.training
    assert network.one.grad is None
    assert first.json() == again.json()
    assert first["loss"].number != other["loss"].number
    with torch.inference_mode():
        inside = check_score(VP, as_score(network, VP, "v"), data(n=100), search=False)
    with torch.no_grad():
        without = check_score(VP, as_score(network, VP, "v"), data(n=100), search=False)
    assert inside.lines == without.lines == first.lines
    assert check_score(VP, as_score(network.bfloat16(), VP, "v"), data(), search=False).ok


def test_conditions_and_batches_follow_their_samples():
    """A y of each sample in chunks of any size is the same."""
    c = torch.linspace(-1, 1, 1000)
    score = as_score(lambda x, t, c: says(VP, "eps")(x - 0 * c[:, None], t) + c[:, None] * 0.1, VP, "eps").given(c)
    reports = [check_score(VP, score, data(), batch=batch, search=False) for batch in (7, 128)]
    for a, b in zip(*(report.lines for report in reports), strict=True):
        assert (a.name, a.verdict) == (b.name, b.verdict)
        assert a.number == pytest.approx(b.number, rel=1e-3, abs=1e-5)


def test_one_dimension_with_and_without_an_axis():
    flat = law(1).score(VP)
    assert check_score(VP, flat, data(1), search=False).ok
    scalar = as_score(lambda x, t: flat.output(x[:, None], t.double())[:, 0], VP, "v")
    assert check_score(VP, scalar, data(1)[:, 0], search=False).ok


def test_better_needs_a_gain_and_certainty():
    probe = Probe(VP, model(), data(), 64, 0, 64)
    assert float(probe.trivial[-1]) == pytest.approx(probe.spread**2, rel=0.02)  # at high levels the mean
    assert float(probe.trivial[0]) == pytest.approx(float(probe.r[0]) ** 2, rel=0.02)  # at low ones x
    from sdekit.evaluation.check.identify import Search
    from sdekit.evaluation.check.readings import Reading

    right, wrong = Search(probe).fits([Reading("eps"), Reading("v")], range(10), 64)
    assert better(right, wrong)
    assert not better(wrong, right)
    assert not better(right, right)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((VPSDE, model(), data()), TypeError, "not its class"),
        ((VP, "score", data()), TypeError, "score must be a callable"),
        ((VP, model(), data().long()), TypeError, "data must be a floating tensor"),
        ((VP, model(), data()[:1]), ValueError, "N of at least 2"),
        ((VP, model(), torch.ones(10, 4)), ValueError, "all 10 are the same"),
        ((VP, model(), torch.full((10, 4), math.nan)), ValueError, "data holds 40 non-finite"),
        ((CosineVP(), model(), data()), ValueError, "wrapped for another process"),
        ((HeatODE(), law().score(HeatODE()), 1e-5 * data()), ValueError, "have nothing in common"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        check_score(*arguments)
    with pytest.raises(ValueError, match="samples must be at least 16"):
        check_score(VP, model(), data(), samples=3)


def test_the_report_has_its_figures_and_settings(tmp_path):
    pytest.importorskip("matplotlib")
    report = check_score(VP, model("v", "eps"), data())
    assert [list(figure.curves) for figure in report.figures] == [
        ["the model", "trivial"],
        ["as given", "read otherwise"],
    ]
    assert report.settings["predicts"] == "eps"
    report.save(tmp_path / "r.html")
    assert "it predicts v" in (tmp_path / "r.html").read_text(encoding="utf-8")
