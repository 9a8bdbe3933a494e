"""k-diffusion's denoisers: the mixture's E[x_0|x] of x = x_0 + sigma eps, and wrappers of a VP model that says it."""

import pytest
import torch
from torch import nn

from sdekit.adapters.k_diffusion import from_k_diffusion
from tests.adapters.exact import LABELS, agrees, predictions, samples

BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def inner(says):
    """A VP model (x, place in the table, cond=None), between the places too, as the wrapper has them."""
    log_sigmas = ((1 - BAR) / BAR).sqrt().log()

    def model(x, t, cond=None):
        low = t.long().clamp(max=len(BAR) - 2)
        sigma = torch.lerp(log_sigmas[low], log_sigmas[low + 1], t - low).exp()
        alpha = (1 + sigma**2).rsqrt()
        x0, eps = predictions(x, alpha, alpha * sigma, cond)
        a, s = (y.reshape(-1, 1, 1, 1) for y in (alpha, alpha * sigma))
        return {"eps": eps, "v": a * eps - s * x0}[says]

    return model


class Discrete(nn.Module):
    """As DiscreteEpsDDPMDenoiser and DiscreteVDDPMDenoiser: levels in a buffer, D(x, sigma, **kwargs)."""

    def __init__(self, says):
        super().__init__()
        self.register_buffer("sigmas", ((1 - BAR) / BAR).sqrt())
        self.inner_model, self.says = inner(says), says

    def sigma_to_t(self, sigma):
        log = self.sigmas.log()
        high = torch.searchsorted(log, sigma.log()).clamp(1, len(log) - 1)
        return high - 1 + ((sigma.log() - log[high - 1]) / (log[high] - log[high - 1])).clamp(0, 1)

    def forward(self, x, sigma, **kwargs):
        s = sigma.reshape(-1, 1, 1, 1)
        out = self.inner_model(x / (s**2 + 1).sqrt(), self.sigma_to_t(sigma), **kwargs)
        return x - s * out if self.says == "eps" else x / (s**2 + 1) - s / (s**2 + 1).sqrt() * out


class Guided(nn.Module):
    """As the CFGDenoiser of its users' scripts."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model

    def forward(self, x, sigma, uncond, cond, cond_scale):
        u, c = (self.inner_model(x, sigma, cond=each) for each in (uncond, cond))
        return u + (c - u) * cond_scale


@pytest.mark.parametrize("says", ["eps", "v"])
def test_the_score_of_a_wrapper_is_exact(says):
    sde, score = from_k_diffusion(Discrete(says))
    ends = ((1 - BAR) / BAR).sqrt()
    assert (sde.t_min, sde.T) == (float(ends[0]), float(ends[-1]))
    agrees(sde, score, lambda t: (1.0, t), [0.1, 1.0, 7.0])
    agrees(sde, score.given(cond=LABELS), lambda t: (1.0, t), [1.0], LABELS)
    for sampler in ("unipc_2", "edm"):
        samples(sde, score, sampler)


def test_a_function_says_its_levels():
    def denoise(x, sigma, label=None):
        return predictions(x, 1.0, sigma, label)[0]

    sde, score = from_k_diffusion(denoise, sigma_min=0.01, sigma_max=30)
    assert (sde.t_min, sde.T) == (0.01, 30.0)
    agrees(sde, score, lambda t: (1.0, t), [1.0])
    agrees(sde, score.given(label=LABELS), lambda t: (1.0, t), [1.0], LABELS)
    assert from_k_diffusion(Discrete("eps"), sigma_max=10)[0].T == 10.0


def test_guidance_with_levels_further_in():
    sde, score = from_k_diffusion(Guided(Discrete("eps")))
    other = LABELS.flip(0)
    agrees(sde, score.given(uncond=other, cond=LABELS, cond_scale=1.0), lambda t: (1.0, t), [1.0], LABELS)
    agrees(sde, score.given(uncond=other, cond=LABELS, cond_scale=0), lambda t: (1.0, t), [1.0], other)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="denoiser must be a callable"):
        from_k_diffusion(Discrete)
    with pytest.raises(ValueError, match="sigma_min and sigma_max must be given: function has no sigmas"):
        from_k_diffusion(lambda x, sigma: x, sigma_max=80)
    with pytest.raises(ValueError, match="sigma_min must be smaller than sigma_max, got 20 and 14.6"):
        from_k_diffusion(Discrete("eps"), sigma_min=20)
    with pytest.raises(ValueError, match="sigma_max must be a finite number > 0, got -1"):
        from_k_diffusion(Discrete("eps"), sigma_max=-1)
