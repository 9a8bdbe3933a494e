"""The variational objective: DDPM's terms from betas, and variational_bound on the same noise."""

import pytest
import torch
from torch import nn

from sdekit import VPSDE, BetaTable, Noise, SigmaTable, as_score, variational_bound
from sdekit.likelihood.quantization import Quantization
from sdekit.training.objectives import variational
from tests.training.models import Says, in_turn, pairs

BETAS = torch.tensor([0.02, 0.05, 0.3, 0.1, 0.6, 0.4], dtype=torch.float64)


def test_the_mean_over_the_table_is_ddpm_s_bound():
    """Ho et al. 2020, equations 5-7, from betas: KL terms between posteriors, and the Gaussian decoder."""
    sde, n, d = BetaTable(BETAS), len(BETAS), 3
    score = as_score(Says(sde, "eps"), sde, "eps")
    x0, eps, *_ = pairs(n, (d,))
    x0 = x0[:1].expand(n, d)
    bar = torch.cumprod(1 - BETAS, 0)
    total = 0.0
    for i in range(n):
        x = bar[i].sqrt() * x0[i] + (1 - bar[i]).sqrt() * eps[i]
        found = score.network.eps(x, None)
        guess = (x - (1 - bar[i]).sqrt() * found) / bar[i].sqrt()
        if i == 0:
            std = ((1 - bar[0]) / bar[0]).sqrt()
            total = total - torch.distributions.Normal(guess, std).log_prob(x0[0]).sum()
            continue
        means = [
            (bar[i - 1].sqrt() * BETAS[i] * z + (1 - BETAS[i]).sqrt() * (1 - bar[i - 1]) * x) / (1 - bar[i])
            for z in (x0[i], guess)
        ]
        tilde = (1 - bar[i - 1]) / (1 - bar[i]) * BETAS[i]
        total = total + (means[0] - means[1]).square().sum() / (2 * tilde)
    loss = variational()(score, x0, sde.times, in_turn(eps))
    torch.testing.assert_close(loss.mean(), total / d, rtol=1e-10, atol=0)


@pytest.mark.parametrize("sde", [BetaTable(BETAS), SigmaTable([0.05, 0.2, 0.5, 3.0])], ids=["beta", "sigma"])
def test_with_bins_it_is_variational_bound_on_the_same_noise(sde):
    """Sample by sample, without the prior's term; levels come back from their values, in float32 too."""
    quantization = Quantization(7, -1.0, 1.0)
    levels = torch.arange(10 * 2).reshape(10, 2) % 7
    score = as_score(Says(sde, "x0"), sde, "x0")
    bound = variational_bound(
        sde, score, levels, levels=7, steps=len(sde.times), grid=sde.times.flip(0), dtype=torch.float64, seed=4
    )
    x0 = quantization.values(levels, torch.float64)
    noise = Noise(x0, 4, purpose="bound")
    total = torch.zeros(10, dtype=torch.float64)
    times = [0.0, *sde.times.tolist()]
    for i in [*range(2, len(times)), 1]:
        noise.enter(times[i], times[i - 1])
        t = sde.times[i - 1].expand(10)
        total += variational(quantization)(score, x0, t, noise.normal).detach()
    nats = bound.diffusion + bound.reconstruction
    torch.testing.assert_close(2 * total / len(sde.times), nats, rtol=1e-9, atol=1e-9)


def test_the_bound_over_bins_trains_whatever_the_network_says():
    """Finite gradients with the model far off, and at both open bins."""
    sde = BetaTable(torch.linspace(1e-4, 0.02, 1000))
    levels = torch.tensor([[0, 255], [128, 3], [254, 0]])
    quantization = Quantization()
    score = as_score(Says(sde, "eps"), sde, "eps")
    x0 = quantization.values(levels, torch.float64)
    for scale in (0.0, 1.0, 1e4):
        nn.init.constant_(score.network.scale, scale)
        loss = variational(quantization)(score, x0, sde.times[:3], in_turn(torch.ones_like(x0)))
        (gradient,) = torch.autograd.grad(loss.sum(), score.network.scale)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient)


def test_what_does_not_fit_is_named():
    x0, eps, _, _, t = pairs()
    with pytest.raises(ValueError, match="sde must have a table of times.*got VPSDE"):
        variational()(as_score(Says(VPSDE(), "eps"), VPSDE(), "eps"), x0, t, in_turn(eps))
    table = BetaTable(BETAS)
    with pytest.raises(ValueError, match="t must be among sde.times"):
        variational()(as_score(Says(table, "eps"), table, "eps"), x0, t, in_turn(eps))
