"""What data are given an observation of them: scores of p(x_t | y), and sampling that is right as particles grow."""

from sdekit.posterior.observation import Observation, blur, colourisation, downsample, inpainting
from sdekit.posterior.particles import PosteriorSamples, posterior_sample
from sdekit.posterior.replacement import replaced
from sdekit.posterior.scores import posterior_score

__all__ = [
    "Observation",
    "PosteriorSamples",
    "blur",
    "colourisation",
    "downsample",
    "inpainting",
    "posterior_sample",
    "posterior_score",
    "replaced",
]
