"""Replacement: exact where nothing seen bears on the unseen, better with repeats where it does; the noise is right."""

import numpy as np
import pytest
import torch

from sdekit import VPSDE, GaussianMixture, HeatODE, RectifiedFlow, Sampler, sample
from sdekit.posterior.replacement import replaced
from sdekit.sampling.samplers import predictor_corrector
from sdekit.solvers.steppers import RULES

MASK = torch.tensor([True, False])
Y = torch.tensor([0.8, 0.0], dtype=torch.float64)
DRAW = VPSDE(), lambda x, t: -x, (2, 2)


def gaussian(correlation):
    return GaussianMixture([[0.3, -0.2]], [[[0.25, 0.25 * correlation], [0.25 * correlation, 0.25]]])


@pytest.mark.parametrize("make", [VPSDE, HeatODE, RectifiedFlow])
@pytest.mark.parametrize("std", [0.0, 0.3])
def test_the_noise_of_what_is_put_in_is_that_of_x(make, std):
    """At every time the seen entry is N(alpha y, sigma^2), as x_t is that has y = x_0 + std eps: 6 standard errors."""
    sde, n, seen = make(), 4000, {}

    def look(k, t, x):
        seen[t] = x[:, 0]

    noisy = Y + std * torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = replaced(RULES["ancestral"], MASK, noisy, std=std)
    data = gaussian(0.0).score(sde)
    sample(sde, data, (n, 2), rule, steps=20, grid="karras", seed=1, dtype=torch.float64, callback=look)
    checked = 0
    for t, x in seen.items():
        a, s = float(sde.alpha(t)), float(sde.sigma(t))
        if s < a * std:
            continue
        checked += 1
        z = (x - a * Y[0]) / s
        assert abs(float(z.mean())) < 6 / n**0.5
        assert abs(float(z.var()) - 1) < 6 * (2 / n) ** 0.5
    assert checked > 5


def test_what_is_unseen_is_exact_without_correlation_and_nears_it_with_repeats():
    """The conditional mean is -.2 + correlation (.8 - .3). 6 standard errors of 3,000 draws are .055."""
    sde, n = VPSDE(), 3000

    def mean(correlation, repeats):
        rule = replaced(RULES["ancestral"], MASK, Y, repeats=repeats)
        x = sample(sde, gaussian(correlation).score(sde), (n, 2), Sampler(rule), steps=50, grid="karras", seed=0)
        np.testing.assert_allclose(x[:, 0], 0.8, atol=0.05)
        return float(x[:, 1].mean())

    assert abs(mean(0.0, 1) + 0.2) < 0.055
    once, often = (abs(mean(0.9, repeats) - (-0.2 + 0.9 * 0.5)) for repeats in (1, 8))
    assert often < 0.055
    assert once > 2 * often


def test_a_budget_counts_the_repeats():
    calls = []

    def score(x, t):
        calls.append(1)
        return -x

    rule = replaced(RULES["ancestral"], MASK, Y, repeats=3)
    sample(VPSDE(), score, (2, 2), rule, nfe=20, seed=0)
    assert len(calls) == 19


def test_a_sample_is_what_it_is_alone():
    sde, y = VPSDE(), torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    draw = lambda rows, ids: sample(  # noqa: E731
        sde, gaussian(0.5).score(sde), (len(ids), 2), replaced(RULES["ddim"], MASK, y[rows], repeats=2), steps=8,
        grid="karras", seed=0, ids=ids, dtype=torch.float64,
    )  # fmt: skip
    x = draw(slice(None), range(4))
    torch.testing.assert_close(x[2:3], draw(slice(2, 3), [2]), rtol=0, atol=1e-9)


def test_predictor_and_corrector_take_it_too():
    rule = replaced(predictor_corrector().rule, MASK, Y, repeats=2)
    x = sample(VPSDE(), gaussian(0.5).score(VPSDE()), (4, 2), Sampler(rule, churn=1.0), steps=50, seed=0)
    assert float((x[:, 0] - 0.8).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replaced(RULES["ancestral"], MASK.long(), Y), "mask must be a bool tensor"),
        (lambda: replaced(RULES["ancestral"], MASK, Y[:1]), "mask must have the shape of one sample of y"),
        (lambda: replaced(RULES["unipc_3"], MASK, Y), "without a history"),
        (
            lambda: sample(*DRAW, replaced(RULES["dpm_solver_2"], MASK, Y, repeats=2), steps=3),
            "begins each step afresh",
        ),
        (lambda: replaced(RULES["ancestral"], MASK, Y, repeats=0), "repeats must be at least 1"),
        (lambda: replaced(RULES["ancestral"], MASK, Y, std=-1.0), "std must be a finite number >= 0"),
        (
            lambda: sample(VPSDE(), lambda x, t: -x, (2, 3), replaced(RULES["ancestral"], MASK, Y), steps=3),
            r"mask must have the shape of one sample, \(3,\)",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_repeats_do_not_forget_what_was_seen_with_noise():
    """N(0, .36) seen as 1 with std .3: the posterior is .8 +- .268, which trips below that level mixed away (.23)."""
    sde, n = VPSDE(), 3000
    data = GaussianMixture([[0.0]], [[[0.36]]]).score(sde)
    y = torch.ones(1, dtype=torch.float64)
    for repeats in (1, 3):
        rule = replaced(RULES["ancestral"], torch.tensor([True]), y, std=0.3, repeats=repeats)
        x = sample(sde, data, (n, 1), rule, steps=60, grid="karras", seed=0, dtype=torch.float64)
        assert abs(float(x.mean()) - 0.8) < 0.06
        assert abs(float(x.std()) - 0.268) < 0.06
