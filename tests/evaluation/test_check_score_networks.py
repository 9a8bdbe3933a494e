"""check_score: what a network does that no solver can live with, and what must not change."""

import math

import pytest
import torch
from torch import nn

from sdekit import VPSDE, CosineVP, HeatODE, as_score, check_score
from sdekit.evaluation.check.identify import better
from sdekit.evaluation.check.probe import Probe
from tests.evaluation.exact import VP, data, failed, law, model, says


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
        (lambda x, t: says(VP, "eps")(x - 0.3 * x.mean(0), t), "alone", "eval()"),
    ],
)
def test_networks_that_cannot_be_sampled_are_named(network, line, words):
    report = check_score(VP, as_score(network, VP, "eps"), data(), search=line == "answers")
    assert failed(report) == [line]
    assert words in str(report[line])


def test_what_writes_into_x_is_named_where_nobody_gives_it_a_copy():
    """as_score gives such a network one; a score that is a bare function gets the state itself."""
    assert check_score(VP, as_score(writing, VP, "eps"), data(), search=False).ok
    sigma = VP.sigma

    def score(x, t):
        return -writing(x, t.expand(len(x))) / sigma(t)

    report = check_score(VP, score, data(), search=False)
    assert failed(report)[0] == "input"
    assert "writes into x" in str(report["input"])


def test_dropout_is_named():
    with torch.random.fork_rng():  # it is the network's to draw
        report = check_score(VP, as_score(dropping, VP, "eps"), data())
    assert "repeatable" in failed(report)
    assert "eval()" in report["repeatable"].remedy


def test_rough_weights_are_named():
    """No reading explains a mean that is left."""
    rough = as_score(lambda x, t: says(VP, "x0")(x, t) + 0.25 * VP.sigma(t)[:, None] ** 20, VP, "x0")
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
