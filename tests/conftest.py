"""What the tests share: processes to loop over, a mixture, and a guard on the global generator."""

import gc
import os

import hypothesis
import pytest
import torch

from sdekit import SDE, VESDE, VPSDE, AffineSDE, GaussianMixture, HeatODE, SubVPSDE
from tests import oracle

torch.set_num_threads(1)  # the tests run in parallel processes

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_finish(session):
    """What is imported by now stays: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


class CosineVP(SDE):
    """A user's process in two methods; no __init__, no call to super()."""

    T = 0.99

    def alpha(self, t):
        return torch.cos(torch.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(torch.pi / 2 * t)


class Flow(SDE):
    """Rectified flow, stopped before its SNR is zero."""

    T = 0.999

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t


NAMED = {"VP": VPSDE, "subVP": SubVPSDE, "VE": VESDE, "heat": HeatODE}
PROCESSES = {
    **NAMED,
    "heat_squared": lambda: HeatODE(lambda t: t**2, T=9.0),
    "cosine": CosineVP,
    "flow": Flow,
    "affine": lambda: AffineSDE(lambda t: torch.cos(3 * t) - 1.2, lambda t: 1 + 2 * t, T=2.0),
}


@pytest.fixture(params=NAMED)
def named(request):
    """Each of the four processes of the surface."""
    return NAMED[request.param]()


@pytest.fixture(params=PROCESSES)
def sde(request):
    """Every process, a user's own among them."""
    return PROCESSES[request.param]()


@pytest.fixture(scope="session")
def digits64():
    """The oracle's 64-dimensional mixture and the same as a GaussianMixture."""
    g = oracle.digits64()
    return g, GaussianMixture(g.m, g.covs, g.w)


@pytest.fixture(autouse=True)
def _global_generator_untouched():
    """Nothing in sdekit may draw from, or seed, torch's global generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator was used"


def gaussian_score(sde, std=1.0):
    """The score of data N(0, std^2), entry by entry, so that no arithmetic mixes samples."""

    def score(x, t):
        a, s = sde.alpha(t), sde.sigma(t)
        v = a**2 * std**2 + s**2
        return -x / (v if v.ndim == 0 else v.reshape(-1, *(1,) * (x.ndim - 1)))

    return score
