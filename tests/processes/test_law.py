"""What a process is beside alpha and sigma is never ignored: whoever does not know it refuses it, or is right."""

import copy

import numpy as np
import pytest
import torch

from sdekit import (
    SAMPLERS,
    VESDE,
    VPSDE,
    AffineSDE,
    BridgeSDE,
    CorrelatedSDE,
    GaussianMixture,
    HeatODE,
    Noise,
    PointSet,
    PoissonFlow,
    as_score,
    guidance,
    interpolate,
    log_likelihood,
    ode_sample,
    sample,
    solve,
)
from sdekit.noise import BrownianPath
from sdekit.posterior import Observation, annealed_sample, posterior_score, replaced
from sdekit.processes.law import law_of
from sdekit.sampling import AskTell
from sdekit.sampling.sensitivity import sensitivity
from sdekit.solvers.steppers import RULES
from sdekit.training import build, finite_difference, implicit, sliced, train
from sdekit.training.trainer import _fingerprint

DATA = GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], np.stack([np.eye(2) * 0.1] * 2))
POINTS = PointSet(torch.tensor([[-1.0, 0.3], [0.8, 0.8]], dtype=torch.float64))
K = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
BRIDGE = BridgeSDE(torch.tensor([2.0, 2.0], dtype=torch.float64))
VP_BY_HAND = AffineSDE(lambda t: -0.5 * (0.1 + 19.9 * t), lambda t: (0.1 + 19.9 * t).sqrt())


def correlated(inside=None):
    return CorrelatedSDE(inside or VPSDE(), K)


class Counted:
    def __init__(self, inside):
        self.inside, self.calls = inside, 0
        self.sde, self.predicts, self.prepare = inside.sde, inside.predicts, inside.prepare

    def __call__(self, x, t):
        return self.inside(x, t)

    def output(self, x, time, ready=None):
        self.calls += 1
        return self.inside.output(x, time, ready)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("make", [lambda: BRIDGE, lambda: VP_BY_HAND, lambda: AffineSDE(-2.0, 2.0, 0.5), correlated])
def test_a_budget_is_kept_where_a_grid_begins_below_T(make, name):
    """The analytic first step's evaluation serves the rule, whatever the process's mean."""
    sde = make()
    score = Counted(DATA.score(sde))
    x = sample(sde, score, (3, 2), name, nfe=20, seed=0, dtype=torch.float64)
    assert x.isfinite().all()
    plain = Counted(DATA.score(VPSDE()))
    sample(VPSDE(), plain, (3, 2), name, nfe=20, seed=0, dtype=torch.float64)
    assert score.calls <= 20
    assert abs(score.calls - plain.calls) <= 1  # whether a grid begins below T is the process's


def test_closures_of_two_networks_are_counted_on_a_process_with_a_mean():
    half = as_score(lambda x, t: 0 * x, BRIDGE, "x0")
    both = lambda x, t: 0.5 * half(x, t) + 0.5 * half(x, t)  # noqa: E731
    assert sample(BRIDGE, both, (2, 2), "heun", nfe=20, grid="karras", seed=0).isfinite().all()


@pytest.mark.parametrize(
    ("make", "score"),
    [
        (correlated, lambda: DATA.score(VPSDE())),
        (correlated, lambda: DATA.score(correlated(VESDE()))),
        (lambda: PoissonFlow(2), lambda: POINTS.score(HeatODE())),
        (lambda: PoissonFlow(2), lambda: POINTS.score(PoissonFlow(3))),
        (VPSDE, lambda: DATA.score(correlated())),
        (lambda: VP_BY_HAND, lambda: DATA.score(AffineSDE(VP_BY_HAND._F, VP_BY_HAND._g, 3.0))),
        (HeatODE, lambda: DATA.score(VPSDE())),
        (lambda: BRIDGE, lambda: DATA.score(BridgeSDE(torch.tensor([2.0, 2.5])))),
    ],
)
def test_a_score_of_another_noise_mean_or_end_is_refused(make, score):
    sde = make()
    for run in (
        lambda: sample(sde, score(), (4, 2), "ddim", steps=6, seed=0),
        lambda: ode_sample(sde, score(), (4, 2), seed=0),
        lambda: log_likelihood(sde, score(), torch.zeros(2, 2, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match="wrapped for another process"):
            run()


def test_equal_laws_are_one():
    assert law_of(correlated()) == law_of(correlated())
    assert law_of(PoissonFlow(float("inf"))) == law_of(VPSDE()) == law_of(VP_BY_HAND) == ()
    assert sample(correlated(), DATA.score(correlated()), (2, 2), "ddim", steps=4, seed=0).isfinite().all()
    prints = [_fingerprint(sde) for sde in (PoissonFlow(2), PoissonFlow(128), HeatODE(), correlated(), VPSDE(), BRIDGE)]
    assert len({str(p) for p in prints}) == len(prints)


@pytest.mark.parametrize("objective", [implicit, sliced, finite_difference])
@pytest.mark.parametrize("make", [correlated, lambda: PoissonFlow(2)])
def test_hyvarinens_identity_is_of_a_gradient(make, objective):
    """A model's score there is K grad log p, or a field: these objectives would train another one."""
    with pytest.raises(ValueError, match="is for processes of white Gaussian noise"):
        train(build("MLP", dim=2, width=8), make(), torch.zeros(8, 2), predicts="score", objective=objective(), steps=1)


def test_a_classifiers_gradient_is_no_score_there():
    for sde, score in ((correlated(), DATA.score(correlated())), (PoissonFlow(2), POINTS.score(PoissonFlow(2)))):
        with pytest.raises(ValueError, match="classifier guidance is for processes of white"):
            guidance.classifier_guidance(score, lambda x, t: x.sum(1), 1.0)
        assert sde.law()
    with pytest.raises(ValueError, match="two models are mixed under one process"):
        guidance.autoguidance(DATA.score(correlated()), DATA.score(VPSDE()), 2.0)


def test_a_users_noise_must_have_the_root():
    sde = correlated()
    x, grid = sde.prior_sample((2000, 2), seed=0, dtype=torch.float64), torch.linspace(1, 1e-3, 100)

    def run(noise, rule):
        return solve(sde.reverse(DATA.score(sde)), x, grid, rule, denoise=rule == "ancestral", noise=noise).x

    for rule, bare in (("ancestral", Noise(x, 1)), ("adaptive_sra1", BrownianPath(x, 1, start=1.0, end=1e-3))):
        with pytest.raises(ValueError, match=r"noise must have the process's root: Noise\(x, seed, root=sde.root\)"):
            run(bare, rule)
    out = run(Noise(x, 1, root=sde.root), "ancestral")
    assert float((out.T.cov() - torch.tensor([[1.1, -0.25], [-0.25, 0.1625]])).abs().max()) < 0.15


def test_what_is_made_of_white_noise_refuses_the_rest():
    for sde in (correlated(), PoissonFlow(2), AffineSDE(-2.0, 2.0, 0.5)):
        for run in (
            lambda sde=sde: CorrelatedSDE(sde, K),
            lambda sde=sde: posterior_score(sde, lambda x, t: -x, Observation(torch.zeros(1), torch.ones(1, 2), 1.0)),
            lambda sde=sde: annealed_sample(
                sde, lambda x, t: -x, Observation(torch.zeros(1), torch.ones(1, 2), 1.0), (2, 2)
            ),
        ):
            with pytest.raises(ValueError, match="white Gaussian noise|adds one of its own"):
                run()
    for sde in (correlated(), PoissonFlow(2)):
        with pytest.raises(ValueError, match="different noise, which a model is trained for"):
            as_score(lambda x, t: x, VPSDE(), "eps").under(sde)
    shifted = AffineSDE(-2.0, 2.0, 0.5)
    with pytest.raises(ValueError, match="sensitivity is for processes of mean alpha x_0"):
        sensitivity(shifted, "ddim", nfe=4)
    rule = replaced(RULES["ancestral"], torch.tensor([True, False]), torch.zeros(2), std=0.2)
    with pytest.raises(ValueError, match="replaced with std > 0 is for processes of white"):
        solve(correlated().reverse(lambda x, t: -x), torch.ones(2, 2), torch.linspace(1, 0.1, 4), rule, noise=None)


def test_a_flow_without_noise_stays_one():
    sde, x = PoissonFlow(2), torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="no reverse SDE, only a flow"):
        AskTell(sde, 80 * x, "ancestral", predicts="x0", nfe=6)
    with pytest.raises(ValueError, match="no reverse SDE, only a flow"):
        solve(sde, x, torch.linspace(0.1, 1, 5), "euler_maruyama")
    with pytest.raises(ValueError, match="is no diffusion, and has no transition"):
        sde.transition(0.1, 0.2)


def test_the_end_may_be_set_lower_as_our_messages_say():
    a = AffineSDE(-2.0, 2.0, 0.5)
    b = copy.deepcopy(a)
    b.T = 0.5
    for y, z in ((a.alpha(0.25), b.alpha(0.25)), (a.sigma(0.4), b.sigma(0.4)), (a.mean(0.5), b.mean(0.5))):
        torch.testing.assert_close(y, z, rtol=1e-14, atol=0)
    c = correlated(VESDE())
    c.T = 0.5
    want = torch.distributions.MultivariateNormal(torch.zeros(2).double(), float(c.sigma(0.5)) ** 2 * K)
    x = DATA.sample(3, seed=0, dtype=torch.float64)
    torch.testing.assert_close(c.prior_log_prob(x), want.log_prob(x))
    end = DATA.at(c, 0.5)
    out = log_likelihood(c, DATA.score(c), x, prior_log_prob=end.log_prob)
    torch.testing.assert_close(out.log_prob, DATA.at(c, c.t_min).log_prob(x), rtol=0, atol=1e-3)
    mean = a.mean(0.5)
    mean.mul_(0)
    assert float(a.mean(0.5)) != 0


def test_latents_of_correlated_noise_are_mixed_where_it_is_white():
    """Halfway between two data the latent has the prior's variance in the direction that all entries share."""
    d = 32
    k = 0.95 * torch.ones(d, d, dtype=torch.float64) + 0.05 * torch.eye(d, dtype=torch.float64)
    sde = CorrelatedSDE(VPSDE(), k)
    one = GaussianMixture(torch.zeros(1, d), k[None])
    a, b = (one.sample(300, seed=s, dtype=torch.float64) for s in (0, 1))
    mid = interpolate(sde, one.score(sde), a, b, [0.5], rtol=1e-3, atol=1e-3)[0]
    variance = float(mid.mean(1).var())
    assert abs(variance - float(k.mean())) < 0.3  # standard error .08; by the angle in x it is 4


def test_a_y_for_each_sample_is_not_mixed_up():
    y = torch.arange(8.0)[:, None].expand(8, 2)
    with pytest.raises(ValueError, match="data are shuffled: give it one y"):
        train(build("MLP", dim=2, width=8), BridgeSDE(y), torch.zeros(8, 2), steps=1, batch=8)
    with pytest.raises(ValueError, match="a marginal is of one: give it one y"):
        DATA.at(BridgeSDE(y[:2].double()), 0.5)


def test_wide_data_need_a_wide_reach():
    """y = 20 of data N(0, 100): exact with reach = inf, or as wide a unit_level. 5 binds, as its docstring says."""
    sde = VESDE(0.01, 500.0)
    data = GaussianMixture(np.zeros((1, 1)), [[[100.0]]])
    seen = Observation(torch.tensor([20.0], dtype=torch.float64), torch.eye(1, dtype=torch.float64), 1.0)
    wide = copy.deepcopy(sde)
    wide.unit_level = 10.0
    for process, options in ((sde, {"reach": float("inf")}), (wide, {})):
        score = posterior_score(process, data.score(process), seen, **options)
        x = sample(process, score, (400, 1), "heun", steps=80, grid="karras", seed=0, dtype=torch.float64)
        assert abs(float(x.mean()) - 2000 / 101) < 0.3
        assert abs(float(x.std()) - 0.995) < 0.2
