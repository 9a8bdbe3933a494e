"""What the tests of adapters share: a mixture in images 1 x 2 x 2, its exact predictions, and the comparison with them.

A stand-in of a host's network says what :func:`predictions` has, at the alpha and sigma that its host gives to the time
it is told; a label is a component of the mixture.
"""

import torch

from sdekit import GaussianMixture, sample

EVENT = (1, 2, 2)
MEANS = torch.tensor([[1.0, -0.5, 0.3, 0.8], [-1.0, 0.2, 0.6, -0.4], [0.1, 0.9, -0.8, 0.2]], dtype=torch.float64)
SPREADS = torch.tensor([[0.3, 0.1, 0.2, 0.05], [0.02, 0.2, 0.1, 0.3], [0.1, 0.1, 0.4, 0.2]], dtype=torch.float64)
MIXTURE = GaussianMixture(MEANS, torch.diag_embed(SPREADS), [0.5, 0.2, 0.3])
LABELS = torch.tensor([2, 0, 1, 2, 2, 1])
B = len(LABELS)


def predictions(x, alpha, sigma, labels=None):
    """(E[x_0|x], E[eps|x]), like x, at alpha and sigma, () or (B,); given the labels (B,), where there are some."""
    alpha, sigma = (torch.as_tensor(y, dtype=torch.float64).expand(len(x)) for y in (alpha, sigma))
    if labels is None:
        minus_score, x0 = MIXTURE._mean(x, alpha, sigma, 0.0, 1.0), MIXTURE._mean(x, alpha, sigma, 1.0, 0.0)
        return x0.reshape(x.shape), (sigma[:, None] * minus_score).reshape(x.shape)
    a, s, flat = alpha[:, None], sigma[:, None], x.reshape(len(x), -1)
    mean, var = MEANS[labels], SPREADS[labels]
    whitened = (flat - a * mean) / (a**2 * var + s**2)
    return (mean + a * var * whitened).reshape(x.shape), (s * whitened).reshape(x.shape)


def state(alpha, sigma, seed=0):
    """Draws of the marginal, (B, *EVENT), float64, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    x0 = MEANS[LABELS] + SPREADS[LABELS].sqrt() * torch.randn(B, 4, generator=generator, dtype=torch.float64)
    eps = torch.randn(B, 4, generator=generator, dtype=torch.float64)
    return (alpha * x0 + sigma * eps).reshape(B, *EVENT)


def agrees(sde, score, levels, times, labels=None):
    """Assert that the process has ``levels(t)``, the host's alpha and sigma, and the model its exact score there."""
    for t in [sde.t_min, *times, sde.T]:
        alpha, sigma = levels(t)
        assert abs(float(sde.alpha(t)) - alpha) < 1e-12
        assert abs(float(sde.sigma(t)) - sigma) < 1e-12 * max(1.0, sigma)
        x = state(alpha, sigma)
        exact = -predictions(x, alpha, sigma, labels)[1] / sigma
        for time in (t, torch.full((B,), t, dtype=torch.float64)):
            got = score(x, time)
            assert got.dtype is torch.float64
            assert float((got - exact).abs().max()) < 1e-10 * float(exact.abs().max()), t


def samples(sde, score, sampler="unipc_2", steps=8):
    """Assert that samples are those of the mixture itself, and return them."""
    shape, draw = (B, *EVENT), {"steps": steps, "seed": 0, "dtype": torch.float64}
    x = sample(sde, score, shape, sampler, **draw)
    assert float((x - sample(sde, MIXTURE.score(sde), shape, sampler, **draw)).abs().max()) < 1e-8
    return x


def denoiser(flow=False, calls=None):
    """D(x, sigma) of x = x_0 + sigma eps, or (1 - sigma) x_0 + sigma eps; ``calls``: what it was called with."""

    def model(x, sigma, **extra_args):
        assert sigma.shape == (len(x),)
        assert sigma.dtype == x.dtype
        if calls is not None:
            calls.append((x.clone(), sigma.clone(), extra_args))
        return predictions(x.double(), 1 - sigma if flow else torch.ones_like(sigma), sigma)[0].to(x)

    return model
