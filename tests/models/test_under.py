"""One network under every process: the same latent gives the same sample, by the map of noise levels."""

import functools
import math

import pytest
import torch

from sdekit import (
    SAMPLERS,
    VESDE,
    VPSDE,
    CosineVP,
    GaussianMixture,
    HeatODE,
    PointSet,
    RectifiedFlow,
    Sampler,
    SubVPSDE,
    as_score,
    calibrate,
    guidance,
    log_likelihood,
    ode_sample,
    sample,
)
from sdekit.processes.kinds import KINDS, express, kind_of
from sdekit.system import expand

ALL = {"VP": VPSDE, "subVP": SubVPSDE, "VE": VESDE, "heat": HeatODE, "flow": RectifiedFlow, "cosine": CosineVP}
DATA = GaussianMixture([[-1.0, 0.2], [0.8, 0.5]], torch.eye(2).expand(2, 2, 2) * 0.05, [0.4, 0.6])
LEVELS = torch.logspace(math.log10(45), math.log10(0.03), 13, dtype=torch.float64)  # which all of them have
LATENT = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(sde, predicts):
    """The exact model of the data as a network of a process."""
    exact = DATA.score(sde)

    def says(x, t):
        time = t.double()
        a, b = express(kind_of(predicts, sde, time), kind_of("v", sde, time), sde.alpha(time), sde.sigma(time))
        return expand(a, x) * exact.output(x, time) + expand(b, x) * x

    return as_score(says, sde, predicts)


def drawn(sde, score, row="dpmpp_2m"):
    """Samples of the latent at the highest level, in all the levels as steps."""
    times = sde.inverse_half_log_snr(-LEVELS.log())
    x_T = torch.hypot(sde.alpha(times[0]), sde.sigma(times[0])) * LATENT
    return sample(sde, score, LATENT.shape, row, grid=times, x_T=x_T, start=float(times[0]))


@functools.cache
def at_home(own, predicts, row):
    """The samples of a process's own network."""
    sde = ALL[own]()
    return drawn(sde, network(sde, predicts), row)


@pytest.mark.parametrize("own", ALL)
@pytest.mark.parametrize("other", ALL)
def test_the_same_latent_gives_the_same_sample(own, other):
    """36 pairs, five kinds of prediction."""
    mine, theirs = ALL[own](), ALL[other]()
    for predicts in KINDS:
        score = network(mine, predicts)
        assert score.under(theirs).predicts in (predicts, "v")
        for row in ("ddim", "dpmpp_2m", "unipc_2", "deis"):
            x = drawn(theirs, score.under(theirs), row)
            torch.testing.assert_close(x, at_home(own, predicts, row), rtol=0, atol=1e-10)


@pytest.mark.parametrize("other", ALL)
def test_it_is_the_score_of_the_other_process(other):
    """At a time for all and at one for each sample; the adaptive method and the likelihood see no difference."""
    mine, theirs = VPSDE(), ALL[other]()
    score, want = network(mine, "v").under(theirs), DATA.score(theirs)
    times = theirs.inverse_half_log_snr(-LEVELS[[1, 4, 7, 9, 11]].log())
    x = theirs.perturb(DATA.sample(5, seed=0, dtype=torch.float64), times, seed=1)
    torch.testing.assert_close(score(x, times), want(x, times), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(score(x, times[2]), want(x, times[2]), rtol=1e-9, atol=1e-9)
    x_0 = DATA.sample(4, seed=2, dtype=torch.float64)
    one, two = (log_likelihood(theirs, s, x_0, rtol=1e-5, atol=1e-5).log_prob for s in (score, want))
    torch.testing.assert_close(one, two, rtol=0, atol=3e-3)  # between T of 150 and of infinity, and t_min of each
    one, two = (ode_sample(theirs, s, (4, 2), rtol=1e-5, atol=1e-5, seed=0, dtype=torch.float64) for s in (score, want))
    torch.testing.assert_close(one, two, rtol=0, atol=3e-3)


@pytest.mark.parametrize("other", ALL)
@pytest.mark.parametrize("data", [DATA, PointSet(DATA.means)])
def test_the_oracles_models_are_carried_too(data, other):
    """To the model that the data have under the other process; in a loop, which prepares them, as well."""
    theirs = ALL[other]()
    score, want = data.score(VPSDE()).under(theirs), data.score(theirs)
    times = theirs.inverse_half_log_snr(-LEVELS[[1, 4, 7, 9, 11]].log())
    x = theirs.perturb(LATENT, times, seed=1)
    torch.testing.assert_close(score(x, times), want(x, times), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(drawn(theirs, score), drawn(theirs, want), rtol=0, atol=1e-9)


@pytest.mark.parametrize("predicts", KINDS)
def test_levels_that_the_network_has_not_are_asked_about_at_the_nearest(predicts):
    """A flow has pure noise and 1e-3, VE here from 4 to .1: x_0 is the network's there, and eps what is left of x."""
    mine, theirs = VESDE(0.1, 4.0), RectifiedFlow()
    score, x = network(mine, predicts), LATENT.float()
    carried = score.under(theirs)
    for t, own in ((1.0, mine.T), (0.9, mine.T), (2e-3, mine.t_min)):
        a, s = (float(y(t)) for y in (theirs.alpha, theirs.sigma))
        b, r = (float(y(own)) for y in (mine.alpha, mine.sigma))
        x_0 = mine.denoise(x * math.hypot(b, r) / math.hypot(a, s), own, score)
        found = theirs.probability_flow(carried).predict(x, t)
        torch.testing.assert_close(found[0], x_0, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], (x - a * x_0) / s, rtol=1e-4, atol=1e-4)
    for name in ("unipc_2", "ddim", "heun", "ancestral", "sa_solver"):
        assert sample(theirs, carried, (3, 2), name, steps=4, grid="karras", seed=0).isfinite().all()


def test_conditions_guidance_and_calibrations_go_along():
    mine, theirs = VPSDE(), RectifiedFlow()

    def says(x, t, m):
        time = t.double()
        a, s = (y.reshape(-1, 1) for y in (mine.alpha(time), mine.sigma(time)))
        return s * (x - a * m[:, None]) / (0.3 * a**2 + s**2)

    m, none = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    score = as_score(says, mine, "eps")
    guided = guidance.classifier_free(score, m, none, 2.0)
    torch.testing.assert_close(drawn(theirs, guided.under(theirs)), drawn(mine, guided), rtol=0, atol=1e-10)
    carried = network(mine, "v").under(theirs)
    made = calibrate(theirs, carried, (32, 2), nfe=5, seed=0, noises=32, iterations=10)
    assert sample(theirs, carried, (3, 2), made, seed=0).isfinite().all()


def test_a_score_of_another_process_is_refused():
    """It would be asked at the wrong level, and nothing would tell: samples are of another spread."""
    mine, theirs = VPSDE(), VPSDE(0.1, 8.0)
    score = network(mine, "eps")
    for row in ("ddim", "ancestral", Sampler(SAMPLERS["heun"].rule)):
        with pytest.raises(ValueError, match=r"wrapped for another process.*score\.under\(sde\) carries it over"):
            sample(theirs, score, (2, 2), row, steps=5, seed=0)
    same = VPSDE()
    assert sample(same, score, (2, 2), "ddim", steps=5, seed=0).isfinite().all()
    with pytest.raises(TypeError, match="sde must be"):
        score.under(3)
