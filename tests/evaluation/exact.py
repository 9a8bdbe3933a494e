"""Perfect models of a mixture, of every kind, and what is said of them."""

from functools import cache

import torch

from sdekit import VPSDE, GaussianMixture, as_score
from sdekit.processes.kinds import express, kind_of

VP = VPSDE()


@cache
def law(d=4, scale=1.0):
    """Four modes, wide in some directions and narrow in others, of about unit size times ``scale``; not centred."""
    z = torch.randn(4, d, d + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    roots = 0.4 * z[..., :d] * torch.logspace(0, -1, d, dtype=torch.float64)
    covs = roots @ roots.mT / d + 1e-2 * torch.eye(d, dtype=torch.float64)
    return GaussianMixture(scale * (0.7 * z[..., d] + 0.3), scale**2 * covs, [0.4, 0.3, 0.2, 0.1])


@cache
def data(d=4, scale=1.0, n=1000):
    return law(d, scale).sample(n, seed=1, dtype=torch.float32)


def data_of(mixture, n=200):
    return mixture.sample(n, seed=1, dtype=torch.float32)


def says(sde, predicts, mixture=None, clock=lambda t: t):
    """A network that says what a perfect one does, of t that ``clock`` finds in what it is told."""
    score = (mixture or law()).score(sde)

    def network(x, told):
        t = clock(told.double())
        a, b = express(kind_of(predicts, sde, t), kind_of("v", sde, t), sde.alpha(t), sde.sigma(t))
        return (a[:, None] * score.output(x.double(), t) + b[:, None] * sde.centre(x.double(), t)).to(x)

    return network


def model(predicts="eps", given=None, sde=VP, clock=None, network=None):
    """The network that predicts ``predicts``, said to predict ``given``."""
    return as_score(network or says(sde, predicts), sde, given or predicts, time=clock)


def failed(report):
    return [line.name for line in report.lines if line.verdict == "fail"]
