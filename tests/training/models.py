"""What the tests of training share: one model in every prediction, draws in a given order."""

import torch
from torch import nn


def in_turn(*draws):
    """``normal`` that returns these, one after the other."""
    return iter(draws).__next__


class Says(nn.Module):
    """One and the same model, in whatever it is asked to predict; a and s by hand, their slopes by differences."""

    def __init__(self, sde, predicts):
        super().__init__()
        self.sde, self.predicts = sde, predicts
        self.scale = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def eps(self, x, t):
        return self.scale * torch.tanh(x + 0.5 * x.roll(1, -1)) + 0.1 * x**2

    def forward(self, x, t):
        a, s = (c(t).reshape(-1, 1) for c in (self.sde.alpha, self.sde.sigma))
        eps = self.eps(x, t)
        x0 = (x - s * eps) / a
        if self.predicts == "flow":
            h = 1e-5
            da, ds = ((c(t + h) - c(t - h)).reshape(-1, 1) / (2 * h) for c in (self.sde.alpha, self.sde.sigma))
            return da * x0 + ds * eps
        return {"score": -eps / s, "eps": eps, "x0": x0, "v": a * eps - s * x0}[self.predicts]


def pairs(n=64, event=(3,)):
    generator = torch.Generator().manual_seed(0)
    x0, eps, v, w = torch.randn(4, n, *event, generator=generator, dtype=torch.float64)
    return x0, eps, v, w, torch.linspace(0.05, 0.9, n, dtype=torch.float64)
