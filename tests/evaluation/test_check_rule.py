"""check_rule: every row passes, and every planted mistake is found by the line that should."""

import itertools
import math

import numpy as np
import pytest
import torch

from sdekit import SAMPLERS, VPSDE, RectifiedFlow, Sampler, solve, step_rule
from sdekit.evaluation.check import check_rule
from sdekit.evaluation.check.exact import MEAN, STD, Known, normals, quantile
from sdekit.evaluation.check.orders import ENDS, bias, grid, law, order
from sdekit.evaluation.check.rule import _lines
from sdekit.sampling.samplers import predictor_corrector
from sdekit.solvers.steppers import RULES, StepRule, as_rule, ddim, hamiltonian, langevin
from tests import oracle
from tests.evaluation import planted

# Rows that are the same rule, at a churn that is looked at anyway, are one.
ROWS = {**RULES, **{name: row for name, row in SAMPLERS.items() if row.rule not in RULES.values()}}

RIGHT = [
    planted.third_order_multistep(),
    planted.second_order_multistep(),
    planted.right_noise,
    langevin(),
    hamiltonian(),
    ddim(0.5),
    predictor_corrector("ddim"),
]


def failing(report):
    return [line.name for line in report.lines if line.verdict == "fail"]


@pytest.mark.parametrize("name", ROWS)
def test_every_row_passes(name):
    report = check_rule(name)
    assert report.count("pass") == len(report.lines), str(report)
    rule = ROWS[name] if name in RULES else ROWS[name].rule
    names = {line.name for line in report.lines}
    assert ("order on VPSDE" in names) == ("predictions" in names) == (not rule.noisy and name != "none")
    assert ("law at churn 1" in names) == (rule.churn is None and name != "none")
    if not rule.noisy and name != "none":
        for process in ("VPSDE", "RectifiedFlow"):
            assert report[f"order on {process}"].number == pytest.approx(rule.order, abs=0.2)
    assert len(report.figures) == (0 if name == "none" else 1 if rule.noisy else 2)


def test_a_row_of_samplers_is_looked_at_under_its_own_churn():
    assert {row.churn for row in SAMPLERS.values()} == {0.0, 1.0}  # so that the loop above has all of them
    report = check_rule(Sampler(StepRule(planted.right_noise), churn=1.4))
    assert report["law at churn 1.4"].verdict == "pass"


@pytest.mark.parametrize("name", planted.PLANTED)
def test_a_planted_mistake_is_found_by_its_line(name):
    rule, wanted = planted.PLANTED[name]
    rule = as_rule(rule)
    churns = [0.0, 1.0] if rule.churn is None else [0.0]
    line = next(line for line in _lines(rule, churns, 0, {}) if line.name == wanted)  # no further, to save time
    assert line.verdict == "fail", line
    assert line.remedy


def test_a_report_of_a_planted_mistake():
    """PITFALL 11, as a user sees it: all is well but the laws under noise."""
    report = check_rule(planted.noise_without_drift)
    assert report.title == "check_rule: noise_without_drift"
    assert not report.ok
    assert failing(report) == ["law at churn 0.5", "law at churn 1"]


@pytest.mark.parametrize("rule", RIGHT)
def test_right_rules_are_not_accused(rule):
    """The same as the planted ones, right; and rules of one's own settings, correctors by themselves among them."""
    report = check_rule(rule)
    assert report.count("pass") == len(report.lines), str(report)
    if rule is RIGHT[0]:
        assert report.title == "check_rule: third_order_multistep"


def test_a_rule_that_takes_no_notice_of_churn_is_told_so():
    """The README's midpoint: right on the flow, wrong under a reverse SDE, where it should refuse to run."""

    @step_rule(evaluations=2, order=2, nodes=(0.5,))
    def midpoint(system, x, t, s, noise, state):
        middle = t + (s - t) / 2
        return x + (s - t) * system.drift(x + (middle - t) * system.drift(x, t), middle), state

    report = check_rule(midpoint)
    assert report.ok
    assert report.count("warn") == 1
    assert "declare churn=0.0" in report["noise"].remedy
    assert "law at churn 1" not in {line.name for line in report.lines}
    *_, noise = itertools.islice(_lines(StepRule(midpoint.step, 2, 2, churn=0.0), [0.0], 0, {}), 7)
    assert (noise.name, noise.verdict) == ("noise", "pass")


def test_pitfall_6_and_7_by_their_numbers():
    """The factor costs a whole order, and so does the level: no error is large, and the order says it."""
    right = planted.third_order_multistep(), planted.second_order_multistep()
    wrong = planted.third_order_multistep(1.0), planted.second_order_multistep(True)
    lines = [order(rule, VPSDE(), {}) for rule in (*right, *wrong)]
    assert [line.number for line in lines] == pytest.approx([3, 2, 2, 1], abs=0.15)
    assert [line.verdict for line in lines] == ["pass", "pass", "fail", "fail"]
    assert float(lines[2].text.split()[-1]) < 1e-5


@pytest.mark.parametrize(("name", "churn"), [("heun", 0.0), ("euler_maruyama", 1.0), ("ancestral", 0.0), ("sra1", 0.5)])
def test_the_law_is_the_oracles(name, churn):
    """Mean and variance of each entry by the tests' own propagation, one entry at a time."""
    sde, n, off = VPSDE(), 12, []
    times = grid(sde, n)
    a, b = ((float(sde.alpha(t)), float(sde.sigma(t))) for t in (times[0], times[-1]))
    for m, s in zip(MEAN.tolist(), STD.tolist(), strict=True):

        def score(x, t, m=m, s=s):
            return (sde.alpha(t) * m - x) / (sde.alpha(t) ** 2 * s**2 + sde.sigma(t) ** 2)

        start = (a[0] * m, math.hypot(a[0] * s, a[1]))
        mean, var = oracle.propagate(sde.reverse(score, churn), RULES[name], times, *start, rows=2 * n)
        std = math.hypot(b[0] * s, b[1])
        off.append(((mean - b[0] * m) / std) ** 2 + (var**0.5 / std - 1) ** 2)
    bias, bend = law(RULES[name], sde, n, churn)
    assert bias == pytest.approx(np.mean(off) ** 0.5, rel=1e-9)
    assert bend < 1e-9


@pytest.mark.parametrize("make", [VPSDE, RectifiedFlow])
def test_the_exact_flow_is_the_oracles(make):
    """Quantiles against DOP853 on the probability flow."""
    sde = make()
    times, u = grid(sde, 1), torch.linspace(0.03, 0.97, 7, dtype=torch.float64)[:, None]
    ends = [(float(sde.alpha(t)), float(sde.sigma(t))) for t in times]
    x, y = (quantile(u, *end).numpy() for end in ends)
    mixture = oracle.Mixture([[-1.0], [1.0]], [[[0.35**2]], [[0.35**2]]], [0.35, 0.65])
    flowed = mixture.flow(x / ends[0][0], *(s / a for a, s in ends), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(y / ends[1][0], flowed, rtol=0, atol=1e-8)
    assert [math.log(a / s) for a, s in ends] == pytest.approx(ENDS, abs=1e-9)


def test_a_rule_that_is_not_affine_is_judged_by_samples():
    """A clip that never bites is nothing; one that does bends the law, which samples tell."""

    def clipped(at):
        def step(system, x, t, s, noise, state):
            return (x + (s - t) * system.drift(x, t)).clamp(-at, at), state

        return StepRule(step, churn=0.0)

    assert "samples" not in check_rule(clipped(100.0))["law at churn 0"].text
    sde, made = VPSDE(), {}
    line = bias(as_rule(clipped(1.0)), sde, 0.0, made)
    assert line.verdict == "fail"
    assert "of 4000 samples: the rule is not affine" in line.text
    times = grid(sde, 40)
    alpha, sigma = (y.tolist() for y in (sde.alpha(times), sde.sigma(times)))
    z = torch.randn(40_000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = alpha[0] * MEAN + (alpha[0] ** 2 * STD**2 + sigma[0] ** 2).sqrt() * z
    x = solve(sde.probability_flow(Known(normals, sde)), x, times, clipped(1.0)).x
    std = (alpha[-1] ** 2 * STD**2 + sigma[-1] ** 2).sqrt()
    off = ((x.mean(0) - alpha[-1] * MEAN) / std).square() + (x.std(0) / std - 1).square()
    assert made["law at churn 0"][40] == pytest.approx(float(off.mean().sqrt()), rel=0.02)


def test_an_amount_of_noise_may_be_asked_for():
    names = {line.name for line in check_rule("euler_maruyama", churn=2.0).lines}
    assert "law at churn 2" in names
    assert "law at churn 1" not in names
    assert check_rule("ancestral", churn=1.0).ok
    with pytest.raises(ValueError, match="has its own noise, and takes churn = 0 or 1, not 0.5"):
        check_rule("ancestral", churn=0.5)
    with pytest.raises(ValueError, match="unknown rule 'heum': did you mean 'heun'"):
        check_rule("heum")
    with pytest.raises(TypeError, match="a step rule must be a callable"):
        check_rule(3)


def test_it_says_the_same_each_time():
    reports = [check_rule("ancestral", seed=seed) for seed in (0, 0, 1)]
    assert reports[0].json() == reports[1].json()
    assert reports[0]["law at churn 0"] == reports[2]["law at churn 0"]  # nothing is drawn there
