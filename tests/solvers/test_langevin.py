"""Correctors at a fixed level: their stationary law on a Gaussian, by a formula. SMLD as published."""

import math

import pytest
import torch

from sdekit import SDE, VPSDE, Noise, RectifiedFlow, SigmaTable, as_score, pc_sample, sample, solve
from sdekit.sampling import Sampler
from sdekit.solvers.steppers import chain, euler_maruyama, hamiltonian, langevin, repeat, smld
from tests import oracle
from tests.conftest import NAMED, gaussian_score


def at_one_level(sde, rule, n, start):
    """Exact mean and variance of x after n steps at one level, from N(0, start) there, on data N(0, 1/4)."""
    t = float(sde.inverse_half_log_snr(0.5))
    grid = torch.linspace(t, t * (1 - 1e-9), n + 1, dtype=torch.float64)
    return oracle.propagate(sde.reverse(gaussian_score(sde, 0.5)), rule, grid, 0.0, start**0.5, rows=n)


def level(sde):
    t = float(sde.inverse_half_log_snr(0.5))
    return float(sde.alpha(t) ** 2 / 4 + sde.sigma(t) ** 2), float(sde.sigma(t))


@pytest.mark.parametrize("friction", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("snr", [0.08, 0.3])
def test_hamiltonian_keeps_the_variance_less_a_quarter_of_the_squared_step(sde, snr, friction):
    """v - h^2/4, h = 2 snr sigma, to six digits, at once and from a point: the law does not depend on friction."""
    v, sigma = level(sde)
    wanted = v - (snr * sigma) ** 2
    rule = hamiltonian(snr, friction)
    for n, start in ((40, wanted), (1, wanted), (400, 0.0)):
        mean, var = at_one_level(sde, rule, n, start)
        assert mean == 0.0
        assert var == pytest.approx(wanted, rel=1e-6 if n < 400 else 1e-3)


def test_the_bias_is_of_second_order_and_less_than_langevins():
    """Langevin's step e = h^2/2 keeps v/(1 - e/2v): both biases fall as h^2, and Langevin's is the larger."""
    sde = VPSDE()
    v, sigma = level(sde)
    off = {"langevin": [], "hamiltonian": []}
    for snr in (0.2, 0.1):
        for name, rule in (("langevin", langevin(snr)), ("hamiltonian", hamiltonian(snr))):
            off[name].append(at_one_level(sde, rule, 1600, v)[1] / v - 1)
        assert off["langevin"][-1] == pytest.approx(1 / (1 - (snr * sigma) ** 2 / v) - 1, rel=1e-3)
    for first, second in off.values():
        assert math.log2(first / second) == pytest.approx(2.0, abs=0.1)
    assert all(abs(h) < abs(e) for h, e in zip(off["hamiltonian"], off["langevin"], strict=True))


def test_it_forgets_faster_than_langevin():
    """What is left of a start twice as wide as the law, after so many evaluations at snr 0.16."""
    sde = VPSDE()
    v = level(sde)[0]
    left = {}
    for name, rule in (("langevin", langevin(0.16)), ("hamiltonian", hamiltonian(0.16))):
        law = at_one_level(sde, rule, 1500, v)[1]
        left[name] = abs(at_one_level(sde, rule, 30, 4 * v)[1] / law - 1)
    assert left["hamiltonian"] < 0.5 * left["langevin"]


def test_great_friction_is_langevin_at_a_midpoint():
    """With all of p drawn anew:  y = x + h/2 z,  x <- x + h z + h^2/2 score(y): Langevin's e = h^2/2."""
    sde, x = VPSDE(), torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    system, t = sde.reverse(gaussian_score(sde, 0.5)), 0.4
    out, p = hamiltonian(0.1, 1e3)(system, x, t, t, Noise(x, 3), torch.ones_like(x))
    h, z = 0.2 * float(sde.sigma(t)), Noise(x, 3).normal()
    s = gaussian_score(sde, 0.5)(x + h / 2 * z, torch.tensor(t))
    torch.testing.assert_close(out, x + h * z + h**2 / 2 * s)
    torch.testing.assert_close(p, z + h * s)


def test_the_momentum_goes_on_and_is_refreshed_in_part():
    sde, x = VPSDE(), torch.zeros(3, 2, dtype=torch.float64)
    system, p, noise = sde.reverse(lambda x, t: torch.zeros_like(x)), torch.ones_like(x), Noise(x, 3)
    before = p.clone()
    _, after = hamiltonian(0.1, 2.0)(system, x, 0.4, 0.4, noise, p)
    c = math.exp(-2.0 * 0.2)
    torch.testing.assert_close(after, c * before + math.sqrt(1 - c**2) * Noise(x, 3).normal())
    assert torch.equal(p, before)  # a step may be taken again from the same state


@pytest.mark.parametrize("steps", [1, 3])
def test_an_evaluation_a_step_in_the_sampler_and_a_sample_its_own(steps):
    """PITFALL 12: bit by bit alone and in a batch; every evaluation counted at the score."""
    sde, seen = NAMED["VP"](), []

    def score(x, t):
        seen.append(float(t))
        return gaussian_score(sde)(x, t)

    options = {"corrector": "hamiltonian", "corrector_steps": steps, "steps": 8, "seed": 5}
    whole = pc_sample(sde, score, (4, 2), denoise=False, **options)
    assert len(seen) == 8 * (steps + 1)
    assert torch.equal(whole[2:3], pc_sample(sde, score, (1, 2), denoise=False, ids=[2], **options))
    assert not torch.equal(whole, pc_sample(sde, score, (4, 2), denoise=False, **{**options, "corrector": "langevin"}))
    row = Sampler(chain(repeat(hamiltonian(0.16), steps), euler_maruyama), churn=1.0)
    assert torch.equal(whole, sample(sde, score, (4, 2), row, steps=8, seed=5, denoise=False))
    system = sde.reverse(score)
    assert solve(system, whole, [0.5, 0.4], repeat(hamiltonian(), steps)).nfe == steps


def test_bad_input_is_named():
    for rule, kwargs in ((hamiltonian, {"snr": 0.0}), (hamiltonian, {"friction": -1.0}), (langevin, {"snr": -0.1})):
        with pytest.raises(ValueError, match=f"{next(iter(kwargs))} must be a finite number > 0"):
            rule(**kwargs)
    with pytest.raises(ValueError, match="did you mean 'hamiltonian'"):
        pc_sample(VPSDE(), gaussian_score(VPSDE()), (2, 2), corrector="hamiltonean")


class Listed:
    """A noise source that hands out these draws, in order."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def enter(self, t, s):
        pass

    def normal(self):
        return next(self.draws)


SIGMAS = [1.0, 0.4, 0.16, 0.064]  # decreasing, as the papers count them


def mixture_score(x, sigma):
    """Of half N(-1, 0.01 + sigma^2) and half N(1, 0.01 + sigma^2), each entry."""
    v = 0.01 + sigma**2
    return (torch.tanh(x / v) - x) / v


def published(x, draws, eps, steps, final):
    """Song & Ermon 2019, algorithm 1, line by line; ``final``: the last line of 2020's."""
    draws = iter(draws)
    for sigma in SIGMAS:
        alpha = eps * sigma**2 / SIGMAS[-1] ** 2
        for _ in range(steps):
            x = x + alpha / 2 * mixture_score(x, sigma) + math.sqrt(alpha) * next(draws)
    return x + SIGMAS[-1] ** 2 * mixture_score(x, SIGMAS[-1]) if final else x


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("predicts", ["score", "eps"])
def test_smld_is_the_published_algorithm(final, predicts):
    """With the same noise, to rounding; every level, the first too, ``steps`` times."""
    eps, steps = 5e-4, 7
    sde, calls = SigmaTable(SIGMAS[::-1]), []

    def network(x, t):
        sigma = float(sde.sigma(t[0]))
        calls.append(sigma)
        return mixture_score(x, sigma) * (1.0 if predicts == "score" else -sigma)

    x, *draws = torch.randn(1 + 4 * steps, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    system = sde.reverse(as_score(network, sde, predicts=predicts), churn=0.0)
    out = solve(system, x, sde.times.flip(0), smld(eps, steps), noise=Listed(draws), denoise=final)
    torch.testing.assert_close(out.x, published(x, draws, eps, steps, final), rtol=1e-12, atol=1e-12)
    assert calls == pytest.approx([sigma for sigma in SIGMAS for _ in range(steps)] + SIGMAS[-1:] * final)
    assert out.nfe == 4 * steps + final


def test_smld_by_sample_with_its_budget():
    """The public call; sample i its own; a budget that the first level is counted in."""
    sde = SigmaTable(SIGMAS[::-1])

    def score(x, t):
        return mixture_score(x, float(sde.sigma(t)))

    row, grid = Sampler(smld(2e-3, 40)), sde.times.flip(0)
    whole = sample(sde, score, (2000, 1), row, grid=grid, seed=1, dtype=torch.float64)
    assert torch.equal(whole[3:4], sample(sde, score, (1, 1), row, grid=grid, seed=1, ids=[3], dtype=torch.float64))
    assert abs(float((whole > 0).double().mean()) - 0.5) < 0.06
    assert float((whole.abs() - 1).std()) == pytest.approx(0.1, abs=0.03)
    sample(sde, score, (2, 1), row, grid=grid, seed=1, nfe=4 * 40 + 1)
    with pytest.raises(ValueError, match="grid has 3 steps, but nfe = 160 allows 2"):
        sample(sde, score, (2, 1), row, grid=grid, seed=1, nfe=4 * 40)


def test_smld_of_another_scale_is_that_of_x_over_alpha():
    class Shrinking(SDE):
        def alpha(self, t):
            return 1 / (1 + t)

        def sigma(self, t):
            return t / (1 + t)

    class Straight(SDE):
        def alpha(self, t):
            return torch.ones_like(t)

        def sigma(self, t):
            return t

    x, *draws = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid, ends = [0.9, 0.5, 0.2], []
    for sde in (Straight(), Shrinking()):
        start = x * float(sde.alpha(0.9))
        system = sde.probability_flow(gaussian_score(sde, 0.5))
        end = solve(system, start, grid, smld(0.01, 5), noise=Listed(draws)).x
        ends.append(end / sde.alpha(0.2))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_smld_says_what_it_cannot_take():
    with pytest.raises(ValueError, match="eps must be a finite number > 0"):
        smld(eps=0.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        smld(steps=0)
    sde = RectifiedFlow()
    system = sde.probability_flow(as_score(lambda x, t: -x, sde, predicts="x0"))
    with pytest.raises(ValueError, match="alpha = 0 at t = 1: start a little lower"):
        solve(system, torch.ones(2, 1), [1.0, 0.5], smld())
