"""score_sde's networks: the mixture's score with the sign, the scale and the labels that each SDE has there."""

import math
import pickle

import numpy as np
import pytest
import torch

from sdekit import VESDE, VPSDE, HeatODE, SubVPSDE, sample
from sdekit.adapters.score_sde import from_score_sde
from tests.adapters.exact import EVENT, LABELS, MIXTURE, B, agrees, predictions, samples


class Theirs:
    """What their objects have that is looked at."""

    N = 1000

    def __init__(self, first=0.1, last=20.0, N=1000):
        self.beta_0, self.beta_1, self.N = first, last, N

    def levels(self, t):
        log_alpha = -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        return np.exp(log_alpha), self.std(np.exp(2 * log_alpha), -np.expm1(2 * log_alpha))


VP = type("VPSDE", (Theirs,), {"std": lambda self, square, rest: np.sqrt(rest)})
SubVP = type("subVPSDE", (Theirs,), {"std": lambda self, square, rest: rest})


class VE:
    def __init__(self, first=0.01, last=50.0, N=1000):
        self.sigma_min, self.sigma_max, self.N = first, last, N

    def levels(self, t):
        return 1.0 + 0 * t, self.sigma_min * (self.sigma_max / self.sigma_min) ** t


VE.__name__ = "VESDE"


def told_999_t(theirs):
    """model(x, 999 t) = -sigma score."""

    def model(x, labels, y=None):
        alpha, sigma = theirs.levels(labels.double().numpy() / 999)
        return predictions(x, torch.from_numpy(alpha), torch.from_numpy(sigma), y)[1]

    return model


def told_sigma(x, labels, y=None):
    """model(x, sigma) = score."""
    return -predictions(x, 1.0, labels, y)[1] / labels.reshape(-1, 1, 1, 1)


KINDS = {
    "vpsde": (VP, told_999_t, VPSDE),
    "subvpsde": (SubVP, told_999_t, SubVPSDE),
    "vesde": (VE, lambda theirs: told_sigma, VESDE),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_score_is_exact(name):
    theirs, model, ours = KINDS[name]
    other = (0.2, 9.0)
    for sde, like in ((name, theirs()), (name.upper()[:-3], theirs()), (theirs(*other), theirs(*other)),
                      (ours(*other), theirs(*other))):  # fmt: skip
        process, score = from_score_sde(model(like), sde)
        assert isinstance(process, ours)
        agrees(process, score, like.levels, [0.02, 0.4, 0.9])
        agrees(process, score.given(LABELS), like.levels, [0.4], LABELS)
    samples(process, score)
    assert pickle.loads(pickle.dumps(from_score_sde(told_sigma, name)[1])).sde.T == 1.0


def test_an_object_of_ours_is_taken_as_it_is():
    mine = VPSDE(0.3, 12.0)
    mine.t_min = 1e-3
    assert from_score_sde(told_999_t(VP(0.3, 12.0)), mine)[0] is mine


@pytest.mark.parametrize("n", [100, 1000])
def test_discrete_vp_models_are_told_places_from_the_least_noise(n):
    bar = np.cumprod(1 - np.linspace(0.1 / n, 20 / n, n))
    log_bar = np.concatenate([[0.0], np.log(bar)])

    def model(x, labels):
        at = torch.from_numpy(np.exp(np.interp(labels.numpy(), np.arange(-1, n), log_bar)))
        return predictions(x, at.sqrt(), (1 - at).sqrt())[1]

    sde, score = from_score_sde(model, VP(N=n), continuous=False)
    levels = lambda t: (math.sqrt(bar[round(t * n) - 1]), math.sqrt(1 - bar[round(t * n) - 1]))  # noqa: E731
    agrees(sde, score, levels, [2 / n, 0.5])
    samples(sde, score)


def test_discrete_ve_models_are_told_whole_places_from_the_most_noise():
    n = 50
    sigmas = torch.linspace(math.log(50.0), math.log(0.01), n, dtype=torch.float64).exp()

    def model(x, labels):
        assert labels.dtype is torch.int64
        return told_sigma(x, sigmas[labels])

    sde, score = from_score_sde(model, VE(N=n), continuous=False)
    agrees(sde, score, lambda t: (1.0, float(sigmas[n - round(t * n)])), [2 / n, 0.5])
    draw = {"grid": sde.times.flip(0), "seed": 0, "dtype": torch.float64}  # a whole place has its level alone
    x, exact = (sample(sde, model, (B, *EVENT), "dpmpp_2m", **draw) for model in (score, MIXTURE.score(sde)))
    assert float((x - exact).abs().max()) < 1e-8


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown sde 'HeatODE'.*known are subvpsde, vesde, vpsde"):
        from_score_sde(told_sigma, HeatODE())
    with pytest.raises(ValueError, match="unknown sde 'vppsde': did you mean 'vpsde'"):
        from_score_sde(told_sigma, "vpp")
    with pytest.raises(TypeError, match="sde must be a process or a name, not its class"):
        from_score_sde(told_sigma, VPSDE)
    with pytest.raises(ValueError, match="continuous=False goes with vpsde and vesde"):
        from_score_sde(told_sigma, "subvpsde", continuous=False)
    with pytest.raises(ValueError, match="sde is a VESDE without sigma_min and sigma_max"):
        from_score_sde(told_sigma, type("VESDE", (), {})())
    with pytest.raises(TypeError, match="network must be a callable"):
        from_score_sde(None, "vpsde")
