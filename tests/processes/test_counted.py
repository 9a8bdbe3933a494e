"""What is counted, is counted at the networks, whatever closure calls them."""

import pytest
import torch

from sdekit import SAMPLERS, VPSDE, as_score, calibrate, log_likelihood, ode_sample, sample, solve, static_threshold
from tests.conftest import gaussian_score

SDE = VPSDE()


class Networks:
    """Several networks of one process, and how often any was called with how many samples."""

    def __init__(self):
        self.rows = []
        self.parts = [as_score(self.eps(std), SDE, "eps") for std in (0.5, 0.7)]

    def eps(self, std):
        def network(x, t):
            self.rows.append(len(x))
            a, s = SDE.alpha(t).to(x)[:, None], SDE.sigma(t).to(x)[:, None]
            return s * x / (a**2 * std**2 + s**2)

        return network

    def guided(self, x, t):
        strong, weak = self.parts
        return 1.5 * strong(x, t) - 0.5 * weak(x, t)


@pytest.mark.parametrize("name", ["unipc_2", "heun", "ancestral", "dpmpp_2s", "restart"])
@pytest.mark.parametrize("says", [False, True])
def test_a_budget_holds_for_a_closure_of_two_networks(name, says):
    """PITFALLS 54. Where it does not say so, its first evaluation does, and counts."""
    networks = Networks()

    def guided(x, t):
        return networks.guided(x, t)

    if says:
        guided.network_calls = 2
    nfe = 2 * (SAMPLERS[name].rule.extra + 3 * SAMPLERS[name].rule.evaluations + 1) + 2 * (not says)
    x = sample(SDE, guided, (3, 2), name, nfe=nfe, grid="karras", seed=0)
    assert nfe - 4 < len(networks.rows) <= nfe
    assert torch.equal(x, sample(SDE, guided, (3, 2), name, steps=3, grid="karras", seed=0))
    x = sample(SDE, static_threshold(SDE, guided, (-9.0, 9.0)), (3, 2), name, nfe=nfe, grid="karras", seed=0)
    assert x.isfinite().all()


def test_a_budget_for_less_than_a_step_says_what_it_needs():
    networks = Networks()
    with pytest.raises(ValueError, match="at least 4, one step.*final denoising, of a score that calls networks 2"):
        sample(SDE, lambda x, t: networks.guided(x, t), (3, 2), "ddim", nfe=4, seed=0)
    with pytest.raises(ValueError, match="nfe must be at least"):
        sample(SDE, gaussian_score(SDE), (3, 2), nfe=0, seed=0)


def test_what_solvers_report_is_what_the_networks_saw():
    networks = Networks()
    x = SDE.prior_sample((4, 2), seed=0, dtype=torch.float64)
    x[0] *= 3  # some samples take more steps
    system = SDE.probability_flow(networks.guided)
    for method, denoise in (("rk45", True), ("adams", False), ("heun", True)):
        networks.rows.clear()
        before = system.nfe, system.model.rows
        out = solve(system, x, torch.linspace(1.0, 1e-3, 9), method, rtol=1e-3, atol=1e-3, denoise=denoise)
        assert out.nfe == len(networks.rows) == system.nfe - before[0]
        assert system.model.rows - before[1] == sum(networks.rows) == int(out.nfe_per_sample.sum())
    networks.rows.clear()
    likelihood = log_likelihood(SDE, networks.guided, 0.3 * x, rtol=1e-3, atol=1e-3)
    assert likelihood.nfe == len(networks.rows)
    assert int(likelihood.nfe_per_sample.sum()) == sum(networks.rows)


def test_limits_count_calls_too():
    networks = Networks()
    x = SDE.prior_sample((4, 2), seed=0, dtype=torch.float64)
    out = solve(SDE.probability_flow(networks.guided), x, [1.0, 1e-3], "rk45", rtol=1e-9, atol=1e-9, max_nfe=60)
    assert out.nfe == len(networks.rows) <= 60
    assert "max_nfe" in out.status


def test_a_score_without_a_network_is_one_call():
    count = []

    def score(x, t):
        count.append(len(x))
        return gaussian_score(SDE)(x, t)

    ode_sample(SDE, score, (3, 2), seed=0)
    calls = len(count)
    system = SDE.probability_flow(score)
    solve(system, SDE.prior_sample((3, 2), seed=0), [1.0, 1e-3])
    assert system.nfe == len(count) - calls


def test_a_calibration_of_guidance_that_says_what_it_makes():
    networks = Networks()

    def guided(x, t):
        return networks.guided(x, t)

    guided.network_calls = 2
    made = calibrate(SDE, guided, (1, 2), nfe=8, noises=8, iterations=2, batch=4)
    assert made.nfe == 4
    networks.rows.clear()
    sample(SDE, guided, (3, 2), made, seed=0)
    assert len(networks.rows) == 8
    assert sample(SDE, guided, (3, 2), made, nfe=8, seed=0).shape == (3, 2)
    with pytest.raises(ValueError, match="nfe = 7 allows"):
        sample(SDE, guided, (3, 2), made, nfe=7, seed=0)
