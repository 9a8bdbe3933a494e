"""Bits per dimension against probabilities of bins that are known."""

import math

import pytest
import torch

from sdekit import VPSDE, GaussianMixture, bits_per_dim
from tests.conftest import NAMED, gaussian_score

LEVELS = 5
WEIGHTS = torch.tensor([0.1, 0.3, 0.05, 0.35, 0.2], dtype=torch.float64)
K = torch.arange(LEVELS)[:, None]


def smooth(std=0.6):
    """-log2 of the bins of N(0, std^2), which is no more than five bins wide, so the outer ones are cut at +-1.25."""
    edges = torch.linspace(-1.25, 1.25, LEVELS + 1, dtype=torch.float64) / std
    return -torch.special.ndtr(edges).diff().log2()


def lattice(d=1):
    """Data on the levels themselves, independent in d dimensions."""
    values = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)
    if d == 1:
        return GaussianMixture(values[:, None], 1e-16 * torch.ones(LEVELS, 1, 1), WEIGHTS)
    means = torch.cartesian_prod(values, values)
    return GaussianMixture(
        means, 1e-16 * torch.eye(2).expand(len(means), 2, 2), torch.outer(WEIGHTS, WEIGHTS).flatten()
    )


@pytest.mark.parametrize("name", ["VP", "subVP", "heat"])
def test_the_process_s_own_noise_makes_the_bound_exact_on_levels(name):
    """PITFALL 22: -log2 w_k to the solver's accuracy, in one and two dimensions: no offset, and the entropy is in."""
    sde = NAMED[name]()
    out = bits_per_dim(sde, lattice().score(sde), K, levels=LEVELS, dequantization="truncated_normal", rtol=1e-6,
                       atol=1e-6, dtype=torch.float64, seed=0)  # fmt: skip
    torch.testing.assert_close(out.bits, -WEIGHTS.log2(), rtol=0, atol=2e-3)
    assert bool(((out.bits + WEIGHTS.log2()).abs() <= out.error + 1e-7).all())
    pair = torch.tensor([[0, 3], [2, 2], [4, 1]])
    out = bits_per_dim(sde, lattice(2).score(sde), pair, levels=LEVELS, dequantization="truncated_normal", rtol=1e-5,
                       atol=1e-5, dtype=torch.float64, seed=0)  # fmt: skip
    torch.testing.assert_close(out.bits, -WEIGHTS[pair].log2().mean(1), rtol=0, atol=2e-3)


def test_uniform_is_a_bound_in_the_mean_that_importance_weights_close():
    """PITFALL 22: over 400 draws each the mean lies above the bins' -log2 P; 16 weights close it by two thirds."""
    sde, n = VPSDE(), 400
    score, exact = gaussian_score(sde, 0.6), smooth()
    x = K.repeat(n, 1)
    mean = {}
    for samples in (1, 16):
        out = bits_per_dim(
            sde, score, x, levels=LEVELS, samples=samples, dtype=torch.float64, rtol=1e-4, atol=1e-4, seed=1
        )
        bits = out.bits.reshape(n, LEVELS)
        mean[samples], se = bits.mean(0), bits.std(0) / n**0.5
        assert bool((mean[samples] > exact - 6 * se).all())
    values = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)
    u = torch.linspace(-0.25, 0.25, 2001, dtype=torch.float64)  # E log p over a bin, by the midpoints of many
    log_p = torch.distributions.Normal(0.0, 0.6).log_prob(values[:, None] + (u[1:] + u[:-1]) / 2)
    jensen = -(log_p.mean(1) + math.log(0.5)) / math.log(2)
    out = bits_per_dim(sde, score, x, levels=LEVELS, dtype=torch.float64, rtol=1e-4, atol=1e-4, seed=2)
    bits = out.bits.reshape(n, LEVELS)
    assert bool(((bits.mean(0) - jensen).abs() <= 6 * bits.std(0) / n**0.5 + 1e-3).all())
    gap = mean[1] - exact
    wide = gap > 0.02  # the others' density is nearly flat
    assert bool(wide.any())
    assert bool(((mean[16] - exact)[wide] < 0.3 * gap[wide]).all())


def test_a_sample_is_the_same_alone_and_in_any_batch():
    sde = VPSDE()
    kwargs = {"levels": LEVELS, "samples": 2, "seed": 3, "dequantization": "truncated_normal"}
    whole = bits_per_dim(sde, gaussian_score(sde, 0.5), K, **kwargs)
    part = bits_per_dim(sde, gaussian_score(sde, 0.5), K[[3, 1]], ids=[3, 1], **kwargs)
    assert torch.equal(part.bits, whole.bits[[3, 1]])
    assert whole.nfe > 0


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"x": torch.zeros(2, 2)}, TypeError, "x must hold integer levels 0 ... 255, got torch.float32"),
        ({"x": torch.full((2, 2), 256)}, ValueError, "x must hold levels 0 ... 255, got 256"),
        ({"levels": 1}, ValueError, "levels must be at least 2"),
        ({"samples": 0}, ValueError, "samples must be at least 1"),
        ({"dequantization": "unifrom"}, ValueError, "did you mean 'uniform'"),
        ({"samples": 2, "divergence": "hutchinson"}, ValueError, "samples > 1 needs divergence='exact'"),
        ({"rtol": -1.0}, ValueError, "rtol must be a finite number > 0"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    sde = VPSDE()
    arguments = {"score": gaussian_score(sde), "x": torch.ones(2, 2, dtype=torch.int64), **kwargs}
    with pytest.raises(error, match=message):
        bits_per_dim(sde, **arguments)
