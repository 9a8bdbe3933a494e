"""Every kind of prediction from every other: one formula, all pairs, finite where alpha = 0."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdekit import VPSDE, CosineVP, RectifiedFlow
from sdekit.processes.kinds import BLIND, KINDS, Kind, express, kind_of
from tests.conftest import PROCESSES

PAIRS = list(itertools.product(KINDS, KINDS))


@pytest.mark.parametrize(("wanted", "said"), PAIRS)
def test_every_kind_from_every_other(sde, wanted, said):
    t = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64) * sde.T
    x0, eps = torch.tensor(0.7).double(), torch.tensor([1.3, -0.2, 0.4, 2.0]).double()
    x = sde.alpha(t) * x0 + sde.sigma(t) * eps
    p, o = (k.m * x0 + k.n * eps for k in (kind_of(name, sde, t) for name in (wanted, said)))
    a, b = express(kind_of(wanted, sde, t), kind_of(said, sde, t), sde.alpha(t), sde.sigma(t))
    torch.testing.assert_close(a * o + b * x, p, rtol=1e-9, atol=1e-9)
    if wanted == said:
        torch.testing.assert_close(a, torch.ones_like(a), rtol=1e-12, atol=0)
        assert bool((b == 0).all())


@pytest.mark.parametrize("sde", [RectifiedFlow(), RectifiedFlow(3.0), CosineVP(), CosineVP(0.0)])
@pytest.mark.parametrize(("wanted", "said"), PAIRS)
def test_at_alpha_0_all_but_eps_and_score_say_everything(sde, wanted, said):
    t = torch.tensor(1.0, dtype=torch.float64)
    assert float(sde.alpha(t)) == 0
    numbers = torch.stack(express(kind_of(wanted, sde, t), kind_of(said, sde, t), sde.alpha(t), sde.sigma(t)))
    assert bool(torch.isfinite(numbers).all()) == (said not in BLIND or wanted in BLIND)


@given(lam=st.floats(-30, 30), x0=st.floats(-3, 3), eps=st.floats(-3, 3))
def test_the_notes_formulas(lam, x0, eps):
    """MATH, one frame: w = eps - x_0 from x_0, eps, v, written out."""
    alpha = math.exp(lam) / math.hypot(1, math.exp(lam))
    sigma = math.exp(-lam) / math.hypot(1, math.exp(-lam))
    velocity, x = Kind(-1.0, 1.0), alpha * x0 + sigma * eps
    by_hand = {
        "x0": (Kind(1.0, 0.0), -(alpha + sigma) / sigma, 1 / sigma),
        "eps": (Kind(0.0, 1.0), (alpha + sigma) / alpha, -1 / alpha),
        "v": (Kind(-sigma, alpha), alpha + sigma, sigma - alpha),  # alpha^2 + sigma^2 = 1
    }
    for name, (kind, a, b) in by_hand.items():
        got = express(velocity, kind, alpha, sigma)
        assert got == pytest.approx((a, b), rel=1e-9, abs=1e-12), name
    said = eps - x0
    assert (x - sigma * said) / (alpha + sigma) == pytest.approx(x0, abs=1e-12)
    assert (x + alpha * said) / (alpha + sigma) == pytest.approx(eps, abs=1e-12)


def test_a_flow_network_predicts_the_velocity_of_its_process():
    """alpha' x_0 + sigma' eps; of the rectified flow eps - x_0 whatever the shift, as its networks do."""
    t = torch.tensor([0.2, 0.8], dtype=torch.float64)
    for shift in (1.0, 3.0):
        assert [y.tolist() for y in RectifiedFlow(shift).velocity(t)] == [[-1.0, -1.0], [1.0, 1.0]]
    sde = VPSDE()
    beta = 0.1 + 19.9 * t
    torch.testing.assert_close(sde.velocity(t)[0], -beta / 2 * sde.alpha(t))
    torch.testing.assert_close(sde.velocity(t)[1], beta * sde.alpha(t) ** 2 / (2 * sde.sigma(t)))


@pytest.mark.parametrize("name", PROCESSES)
def test_slopes_are_difference_quotients(name):
    sde = PROCESSES[name]()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64) * sde.T
    h, c = 1e-6 * sde.T, sde.coefficients(t)
    for value, slope in ((sde.alpha, c.dalpha), (sde.sigma, c.dsigma)):
        torch.testing.assert_close((value(t + h) - value(t - h)) / (2 * h), slope, rtol=1e-5, atol=1e-9)
