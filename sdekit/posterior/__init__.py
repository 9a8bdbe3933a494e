"""What data are given an observation of them: scores of p(x_t | y), and samplers of p(x_0 | y), right in a limit."""

from sdekit.posterior.annealed import AnnealedSamples, annealed_sample
from sdekit.posterior.observation import Observation, blur, colourisation, downsample, inpainting
from sdekit.posterior.particles import PosteriorSamples, posterior_sample
from sdekit.posterior.replacement import replaced
from sdekit.posterior.scores import posterior_score

__all__ = [
    "AnnealedSamples",
    "Observation",
    "PosteriorSamples",
    "annealed_sample",
    "blur",
    "colourisation",
    "downsample",
    "inpainting",
    "posterior_sample",
    "posterior_score",
    "replaced",
]
