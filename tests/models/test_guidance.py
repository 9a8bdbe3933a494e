"""Guidance against closed forms: exact conditional scores and likelihoods, every kind of prediction, every solver."""

import math
import pickle

import numpy as np
import pytest
import torch

from sdekit import (
    SAMPLERS,
    VPSDE,
    GaussianMixture,
    RectifiedFlow,
    as_score,
    calibrate,
    guidance,
    log_likelihood,
    ode_sample,
    sample,
    sde_sample,
)
from sdekit.processes.kinds import KINDS, Kind, express, kind_of
from sdekit.system import expand
from tests import oracle
from tests.processes.test_fokker_planck import random_mixture

SDE, FLOW = VPSDE(), RectifiedFlow()
LABELS = torch.tensor([0, 1])
STD = 0.5
MEANS = torch.tensor([-1.0, 2.0, 0.5, 0.0], dtype=torch.float64)  # of three classes, and of none


def gaussian(sde, predicts, calls=None):
    """A network of N(mean of the label, STD^2), of any kind of prediction, (x, t, labels)."""

    def network(x, t, labels):
        if calls is not None:
            calls.append(len(x))
        time = t.double()
        a, s = (expand(y, x) for y in (sde.alpha(time), sde.sigma(time)))
        m = expand(MEANS.to(x)[labels], x)
        x_0 = m + a * STD**2 * (x - a * m) / (a**2 * STD**2 + s**2)
        kind = kind_of(predicts, sde, time)
        a, b = express(kind, Kind(torch.ones_like(time), torch.zeros_like(time)), sde.alpha(time), sde.sigma(time))
        return expand(a, x) * x_0 + expand(b, x) * x

    return as_score(network, sde, predicts)


def exact(sde, x, t, mean):
    """The score of N(mean, STD^2) at t."""
    a, s = float(sde.alpha(t)), float(sde.sigma(t))
    return -(x - a * mean) / (a**2 * STD**2 + s**2)


def marginal_log_prob(mixture, sde, x, t):
    """log p_t at one time, or at each sample's."""
    if getattr(t, "ndim", 0):
        return torch.cat([mixture.at(sde, s).log_prob(y[None]) for y, s in zip(x, t, strict=True)])
    return mixture.at(sde, t).log_prob(x)


def observed(seed=5, d=2):
    """A mixture, y = A x + noise of it, and its exact posterior."""
    mixture, truth = random_mixture(seed, d)
    a, y, std = np.array([[1.0, -0.5]]), np.array([0.4]), 0.3
    return mixture, mixture.posterior(torch.from_numpy(a), y, std), truth.posterior(a, y, std)[0]


def guided_by_observation(sde):
    mixture, posterior, truth = observed()

    def log_prob(x, t):
        return marginal_log_prob(posterior, sde, x, t) - marginal_log_prob(mixture, sde, x, t)

    return guidance.classifier_guidance(mixture.score(sde), log_prob), posterior, truth


def test_a_classifier_with_the_exact_probability_gives_the_exact_conditional_score(sde):
    guided, posterior, _ = guided_by_observation(sde)
    x = sde.prior_sample((6, 2), seed=0, dtype=torch.float64)
    for cut in (1e-3, 0.1, 0.5, 0.95):
        t = sde.t_min + cut * (sde.T - sde.t_min)
        want = posterior.score(sde)(x, t)
        torch.testing.assert_close(guided(x, t), want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
    each = torch.linspace(sde.t_min, 0.9 * sde.T, 6, dtype=torch.float64)
    want = posterior.score(sde)(x, each)
    torch.testing.assert_close(guided(x, each), want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["unipc_2", "dpmpp_2m_sde"])
def test_samples_under_a_classifier_are_the_conditional_ones(name):
    """Kolmogorov-Smirnov along four directions, false alarm 2.5e-7 each. At scale 0 it fails by far."""
    guided, _, truth = guided_by_observation(SDE)
    n = 4000
    x = sample(SDE, guided, (n, 2), name, steps=60, seed=0, dtype=torch.float64, grid="vp_cubic").numpy()
    for u in ([1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, -0.6]):
        u = np.array(u)
        distance = oracle.ks_distance(x @ u, truth.projected_cdf(u, 1.0, 0.0))
        assert distance < oracle.ks_threshold(n, 2.5e-7)
    free = sample(SDE, observed()[0].score(SDE), (n, 2), name, steps=60, seed=0, grid="vp_cubic").double().numpy()
    u = np.array([0.8, -0.6])
    assert oracle.ks_distance(free @ u, truth.projected_cdf(u, 1.0, 0.0)) > 2 * oracle.ks_threshold(n, 2.5e-7)


def test_the_likelihood_under_a_classifier_is_the_conditional_one():
    guided, posterior, _ = guided_by_observation(SDE)
    x = posterior.sample(6, seed=1, dtype=torch.float64)
    out = log_likelihood(SDE, guided, x, rtol=1e-6, atol=1e-6)
    want = posterior.at(SDE, SDE.t_min).log_prob(x)
    # the prior at T is not p_T: that error is accounted for
    torch.testing.assert_close(out.log_prob + out.prior_mismatch, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("predicts", KINDS)
@pytest.mark.parametrize("make", [VPSDE, lambda: RectifiedFlow(shift=3.0)])
@pytest.mark.parametrize("together", [True, False])
def test_classifier_free_guidance_is_a_line_between_scores_in_every_kind(predicts, make, together):
    sde, labels, none = make(), torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3])
    score = gaussian(sde, predicts)
    guided = guidance.classifier_free(score, labels, none, 2.5, together=together)
    assert guided.predicts == predicts
    assert guided.network_calls == 2 - together
    x = sde.prior_sample((3, 2), seed=0, dtype=torch.float64)
    for t in (0.05, 0.5, 0.9):
        want = exact(sde, x, t, 2.5 * MEANS[labels][:, None] - 1.5 * MEANS[3])
        torch.testing.assert_close(guided(x, t), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(guided(x, torch.full((3,), t).double()), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_scale_one_is_the_conditional_model_to_the_bit(name):
    labels, none = torch.tensor([0, 1]), torch.tensor([3, 3])
    calls = []
    score = gaussian(SDE, "v", calls)
    draw = lambda s: sample(SDE, s, (2, 3), name, steps=12, grid="karras", seed=0)  # noqa: E731
    want, count = draw(score.given(labels)), len(calls)
    for make in (guidance.classifier_free, guidance.apg, guidance.cfg_zero_star):
        calls.clear()
        assert torch.equal(draw(make(score, labels, none, 1.0)), want)
        assert calls == count * [2]
    assert torch.equal(draw(guidance.classifier_free(score, labels, none, 0.0)), draw(score.given(none)))
    assert torch.equal(draw(guidance.autoguidance(score.given(labels), score.given(none), 1.0)), want)


GUIDED = {
    "classifier_free": lambda s, c, u: guidance.classifier_free(s, c, u, 2.0),
    "two calls": lambda s, c, u: guidance.classifier_free(s, c, u, 2.0, together=False),
    "interval": lambda s, c, u: guidance.classifier_free(s, c, u, 2.0, interval=(0.2, 4.0)),
    "rescale": lambda s, c, u: guidance.classifier_free(s, c, u, 2.0, rescale=0.7, kind="x0"),
    "apg": lambda s, c, u: guidance.apg(s, c, u, 2.0, norm=1.0, parallel=0.5),
    "cfg_zero_star": lambda s, c, u: guidance.cfg_zero_star(s, c, u, 2.0, zero_above=20.0),
    "autoguidance": lambda s, c, u: guidance.autoguidance(s.given(c), s.given(u), 2.0, interval=(0.2, 4.0)),
    "classifier": lambda s, c, u: guidance.classifier_guidance(
        s.given(c), lambda x, t, y: -((x.mean(1) - MEANS[y]) ** 2), 0.3, given=(u,)
    ),
}
DRAWS = {
    **{
        name: lambda s, shape, name=name, **kw: sample(SDE, s, shape, name, steps=8, **kw)
        for name in ("ancestral", "sa_solver", "dpmpp_2m", "heun", "edm", "pc")
    },
    "adams": lambda s, shape, **kw: ode_sample(SDE, s, shape, rtol=1e-4, atol=1e-4, **kw),
    "rk45": lambda s, shape, **kw: ode_sample(SDE, s, shape, method="rk45", rtol=1e-4, atol=1e-4, **kw),
    "sra1": lambda s, shape, **kw: sde_sample(SDE, s, shape, rtol=0.5, atol=0.5, **kw),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("make", GUIDED.values(), ids=GUIDED)
def test_a_guided_sample_is_what_it_is_alone(make, draw):
    """Conditions follow their samples; nothing is normalised over the batch."""
    labels, none = torch.tensor([0, 1, 2, 1]), torch.tensor([3, 0, 3, 2])
    score = gaussian(SDE, "v")
    x = draw(make(score, labels, none), (4, 3), seed=0, dtype=torch.float64)
    for i in (1, 3):
        one = make(score, labels[i : i + 1], none[i : i + 1])
        alone = draw(one, (1, 3), seed=0, ids=[i], dtype=torch.float64)
        torch.testing.assert_close(x[i : i + 1], alone, rtol=0, atol=1e-6)
    assert float((x[1] - x[3]).abs().max()) > 1e-2


@pytest.mark.parametrize("make", GUIDED.values(), ids=GUIDED)
def test_calls_of_guidance_are_counted_and_budgets_hold(make):
    labels, none, calls = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3]), []
    guided = make(gaussian(SDE, "eps", calls), labels, none)
    for name in ("ddim", "unipc_3", "heun", "restart"):
        calls.clear()
        grid = {"grid": "karras"} if name == "restart" else {}
        sample(SDE, guided, (3, 2), name, nfe=40, seed=0, **grid)
        assert len(calls) <= 40
        assert len(calls) > 15 / guided.network_calls
    system = SDE.probability_flow(guided)
    calls.clear()
    x = SDE.prior_sample((3, 2), seed=0)
    for t in (1.0, 0.4, 0.05, 1e-3):
        system.drift(x, t)
    silent = 1 if make is GUIDED["cfg_zero_star"] else 0  # an evaluation is one, also where no network is called
    assert system.nfe == len(calls) + silent
    assert system.model.rows == sum(calls) + 3 * silent


@pytest.mark.parametrize("predicts", ["x0", "v", "flow"])
def test_guidance_starts_where_alpha_is_0(predicts):
    """Flow matching at scale w on Gaussians of one spread: exact, N(m_u + w (m_c - m_u), STD^2), from T = 1."""
    sde = RectifiedFlow()
    labels, none = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3])
    guided = guidance.classifier_free(gaussian(sde, predicts), labels, none, 2.0)
    x_T = sde.prior_sample((3, 2), seed=0, dtype=torch.float64)
    # to t = 0 the flow takes x_T to mean + STD x_T
    x = ode_sample(sde, guided, x_T.shape, x_T=x_T, rtol=1e-8, atol=1e-8)
    want = 2 * MEANS[labels][:, None] - MEANS[3] + STD * x_T
    torch.testing.assert_close(x, want, rtol=0, atol=1e-5)
    fixed = sample(sde, guided, x_T.shape, "flow_unipc_3", steps=40, grid="uniform", x_T=x_T)
    torch.testing.assert_close(fixed, want, rtol=0, atol=1e-2)
    apg = guidance.apg(gaussian(sde, predicts), labels, none, 2.0)
    assert sample(sde, apg, (3, 2), "flow_unipc_3", steps=8, grid="uniform", seed=0).isfinite().all()


def test_likelihood_and_calibration_of_guidance():
    labels, none = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3])
    guided = guidance.classifier_free(gaussian(SDE, "eps"), labels, none, 1.5)
    mean = 1.5 * MEANS[labels] - 0.5 * MEANS[3]
    x = mean[:, None] + torch.tensor([[0.1, -0.2]], dtype=torch.float64)
    out = log_likelihood(SDE, guided, x, rtol=1e-7, atol=1e-7)
    want = -0.5 * ((x - mean[:, None]) ** 2).sum(1) / STD**2 - 2 * math.log(STD * math.sqrt(2 * math.pi))
    torch.testing.assert_close(out.corrected, want, rtol=0, atol=1e-4)
    made = calibrate(SDE, guided, (3, 2), nfe=5, noises=8, iterations=2, batch=4)
    assert sample(SDE, guided, (3, 2), made, seed=0).isfinite().all()
    apart = guidance.classifier_free(gaussian(SDE, "eps"), labels, none, 1.5, together=False)
    assert calibrate(SDE, apart, (3, 2), nfe=10, noises=8, iterations=2, batch=4).nfe == 5


def test_gradients_through_guidance():
    labels, none = torch.tensor([0, 1]), torch.tensor([3, 3])
    for make in GUIDED.values():
        guided = make(gaussian(SDE, "v"), labels, none)
        slopes = []
        for differentiable in (True, "checkpoint"):
            x_T = SDE.prior_sample((2, 2), seed=0, dtype=torch.float64).requires_grad_()
            x = sample(SDE, guided, (2, 2), "ddim", steps=5, grid="karras", x_T=x_T, differentiable=differentiable)
            slopes.append(torch.autograd.grad(x.square().sum(), x_T)[0])
        torch.testing.assert_close(*slopes)
        with torch.inference_mode():
            assert sample(SDE, guided, (2, 2), "ddim", steps=5, seed=0).isfinite().all()


def test_the_interval_is_one_of_noise_levels():
    labels, none, calls = torch.tensor([0, 1]), torch.tensor([3, 3]), []
    score = gaussian(SDE, "eps", calls)
    guided = guidance.classifier_free(score, labels, none, 3.0, interval=(0.5, 2.0), together=False)
    full = guidance.classifier_free(score, labels, none, 3.0, together=False)
    x = torch.ones(2, 2, dtype=torch.float64)
    times = SDE.inverse_half_log_snr(-torch.tensor([0.4, 0.6, 1.9, 2.1], dtype=torch.float64).log())
    for t, inside in zip(times, (False, True, True, False), strict=True):
        calls.clear()
        out = guided(x, t)
        assert len(calls) == 1 + inside
        assert torch.equal(out, (full if inside else score.given(labels))(x, t))
    mixed = guided(x, times[:2])
    torch.testing.assert_close(mixed[0], score.given(labels)(x, times[0])[0])
    torch.testing.assert_close(mixed[1], full(x, times[1])[1])


def prediction(score, kind, x, t):
    """A score in a kind, (B, n)."""
    lv = [torch.as_tensor(y, dtype=torch.float64) for y in (SDE.alpha(t), SDE.sigma(t))]
    time = torch.tensor(t, dtype=torch.float64)
    a, b = express(kind_of(kind, SDE, time), kind_of("score", SDE, time), *lv)
    return a * score(x, t) + b * x


@pytest.mark.parametrize("predicts", KINDS)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_what_is_not_linear_acts_in_the_kind_that_it_says(predicts, kind):
    """PITFALLS 43: the same result whatever the network predicts, by the published formula in that kind."""
    labels, none, w, t = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3]), 3.0, 0.3
    score = gaussian(SDE, predicts)
    x = SDE.prior_sample((3, 4), seed=0, dtype=torch.float64)
    c, u = (prediction(score.given(y), kind, x, t) for y in (labels, none))
    line = u + w * (c - u)
    ratio = c.std(1, keepdim=True) / line.std(1, keepdim=True)
    rescaled = guidance.classifier_free(score, labels, none, w, rescale=0.7, kind=kind)
    torch.testing.assert_close(prediction(rescaled, kind, x, t), line * (0.7 * ratio + 0.3), rtol=1e-6, atol=1e-6)
    d = c - u
    d = d * (0.5 / d.norm(dim=1, keepdim=True)).clamp_max(1.0)
    along = (d * c).sum(1, keepdim=True) / (c * c).sum(1, keepdim=True) * c
    want = c + (w - 1) * (d - along + 0.25 * along)
    projected = guidance.apg(score, labels, none, w, norm=0.5, parallel=0.25, kind=kind)
    torch.testing.assert_close(prediction(projected, kind, x, t), want, rtol=1e-6, atol=1e-6)
    s = (c * u).sum(1, keepdim=True) / (u * u).sum(1, keepdim=True)
    starred = guidance.cfg_zero_star(score, labels, none, w, kind=kind)
    torch.testing.assert_close(prediction(starred, kind, x, t), s * u + w * (c - s * u), rtol=1e-6, atol=1e-6)
    level = float(SDE.sigma(t) / SDE.alpha(t))
    silent = guidance.cfg_zero_star(score, labels, none, w, kind=kind, zero_above=0.9 * level)
    torch.testing.assert_close(prediction(silent, kind, x, t), torch.zeros_like(x), rtol=0, atol=1e-9)


def test_autoguidance_between_kinds_processes_and_plain_scores():
    labels, none = torch.tensor([0, 1]), torch.tensor([3, 3])
    x, t = SDE.prior_sample((2, 2), seed=0, dtype=torch.float64), 0.4
    want = exact(SDE, x, t, 2 * MEANS[labels][:, None] - MEANS[3])
    strong = gaussian(SDE, "v").given(labels)
    others = [gaussian(SDE, kind).given(none) for kind in KINDS]
    others.append(gaussian(VPSDE(), "eps").given(none))
    others.append(lambda x, t: exact(SDE, x, float(t), MEANS[3]))
    for weak in others:
        guided = guidance.autoguidance(strong, weak, 2.0)
        assert guided.predicts == "v"
        torch.testing.assert_close(guided(x, t), want, rtol=1e-5, atol=1e-5)
        sample(SDE, guided, (2, 2), nfe=10, seed=0)
    plain = guidance.autoguidance(lambda x, t: exact(SDE, x, float(t), MEANS[labels][:, None]), others[-1], 2.0)
    torch.testing.assert_close(plain(x, t), want)
    system = SDE.probability_flow(plain)
    system.drift(x, t)
    assert system.nfe == 2
    first = guidance.autoguidance(others[-1], strong, 2.0)  # the first says a score
    torch.testing.assert_close(first(x, t), exact(SDE, x, t, 2 * MEANS[3] - MEANS[labels][:, None]))


def test_conditions_of_other_shapes_take_two_calls():
    calls = []

    def network(x, t, labels=None, *, scale=1.0):
        calls.append(len(x))
        return x if labels is None else scale * x * labels[:, None]

    score = as_score(network, SDE, "eps")
    x = torch.ones(3, 2)
    guided = guidance.classifier_free(score, (torch.tensor([1, 2, 3]),), None, 2.0)
    assert guided.network_calls == 2
    system = SDE.probability_flow(guided)
    torch.testing.assert_close(system.model(x, system.at(0.5, x).time), 2 * x * torch.tensor([[1], [2], [3]]) - x)
    assert calls == [3, 3]
    assert system.nfe == 2
    with pytest.raises(ValueError, match="same shapes to go into one call"):
        guidance.classifier_free(score, 1, None, 2.0, together=True)
    one = guidance.classifier_free(score, {"labels": torch.tensor([1, 2, 3])}, {"labels": torch.tensor([0])}, 2.0)
    assert one.network_calls == 1
    torch.testing.assert_close(one.output(x, torch.tensor(0.5)), 2 * x * torch.tensor([[1], [2], [3]]))
    assert guidance.classifier_free(score, 1, 0, 2.0).network_calls == 1
    assert guidance.classifier_free(score, (1, 2), (1,), 2.0).network_calls == 2
    assert guidance.classifier_free(score, score.given(1, scale=2.0), score.given(0, scale=1.0), 2.0).network_calls == 2


@pytest.mark.parametrize("make", [g for name, g in GUIDED.items() if name != "classifier"])
def test_guidance_pickles_and_tells_what_its_network_tells(make):
    score = as_score(pickled_network, SDE, "eps")
    score.event, score.data_range = (2,), (-1.0, 1.0)
    guided = make(score, torch.tensor([0, 1]), torch.tensor([3, 3]))
    assert (guided.event, guided.data_range, guided.device) == ((2,), (-1.0, 1.0), None)
    x = torch.linspace(-3, 3, 4).reshape(2, 2)
    assert torch.equal(pickle.loads(pickle.dumps(guided))(x, 0.3), guided(x, 0.3))


def pickled_network(x, t, labels):
    return x * labels[:, None]


def net():
    return gaussian(SDE, "eps")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guidance.classifier_free(net(), 0, 3, math.inf), "scale must be a finite number, got inf"),
        (lambda: guidance.classifier_free(net(), 0, 3, "2"), "scale must be a finite number, got '2'"),
        (lambda: guidance.autoguidance(net(), net(), math.nan), "scale must be a finite number"),
        (lambda: guidance.classifier_guidance(net(), lambda x, t: x, math.nan), "scale must be a finite number"),
        (lambda: guidance.classifier_guidance(net(), 3.0), "log_prob must be a callable"),
        (lambda: guidance.classifier_free(lambda x, t: x, 0, 3, 2.0), "made by as_score.*autoguidance"),
        (lambda: guidance.classifier_free(net(), 0, 3, 2.0, interval=(2.0, 1.0)), "0 <= low < high, got"),
        (lambda: guidance.classifier_free(net(), 0, 3, 2.0, interval=3.0), "interval must be a pair"),
        (lambda: guidance.classifier_free(net(), 0, 3, 2.0, rescale=1.5), r"rescale must lie in \[0, 1\], got 1.5"),
        (lambda: guidance.classifier_free(net(), 0, 3, 2.0, kind="x0"), "kind = 'x0' is of rescale"),
        (lambda: guidance.classifier_free(net(), 0, 3, 2.0, together=2), "together must be True, False or None"),
        (lambda: guidance.apg(net(), 0, 3, 2.0, kind="x_0"), "unknown kind 'x_0': did you mean 'x0'"),
        (lambda: guidance.apg(net(), 0, 3, 2.0, norm=-1.0), "norm must be a finite number > 0"),
        (lambda: guidance.autoguidance(lambda x, t: x, lambda x, t: x, 2.0, interval=(1, 2)), "need a process"),
        (lambda: sample(SDE, guidance.classifier_free(net(), LABELS, 3, 2.0), (3, 2), nfe=5), "given for 2 samples"),
        (
            lambda: guidance.classifier_guidance(net().given(0), lambda x, t: x)(torch.ones(3, 2), 0.5),
            r"one number a sample, shape \(3,\), got \(3, 2\)",
        ),
        (
            lambda: guidance.classifier_guidance(net().given(0), lambda x, t: x.detach().sum(1))(torch.ones(3, 2), 0.5),
            "log_prob must be differentiable",
        ),
        (
            lambda: sample(
                FLOW, guidance.classifier_guidance(gaussian(FLOW, "v").given(0), lambda x, t: x.sum(1)), (3, 2),
                "flow_3m", steps=5, grid="uniform",
            ),
            "log_prob says nothing of x_0 at T = 1, where alpha = 0",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_mixture_as_the_model_inside():
    """A class of a mixture by its exact probability: the score of that component alone."""
    mixture, truth = random_mixture(11, 2)
    one = GaussianMixture(truth.m[:1], truth.covs[:1])
    guided = guidance.classifier_guidance(
        mixture.score(SDE), lambda x, t: marginal_log_prob(one, SDE, x, t) - marginal_log_prob(mixture, SDE, x, t)
    )
    x = SDE.prior_sample((5, 2), seed=2, dtype=torch.float64)
    torch.testing.assert_close(guided(x, 0.2), one.score(SDE)(x, 0.2), rtol=1e-6, atol=1e-6)


def test_half_precision_sums_over_large_images_do_not_overflow():
    sde = VPSDE()
    score = as_score(lambda x, t, label: 0.5 * x + 0.1 * label.reshape(-1, 1, 1, 1).to(x), sde, "eps")
    x = torch.randn(1, 4, 160, 160, generator=torch.Generator().manual_seed(0))
    labels = torch.ones(1), torch.zeros(1)
    for make in (guidance.apg, guidance.cfg_zero_star):
        model = make(score, *labels, 3.0)
        exact = model(x.double(), 0.5)
        got = model(x.half(), 0.5)
        assert torch.isfinite(got).all()
        assert float((got.double() - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_one_call_is_of_two_conditions_of_models_that_are_wrapped_alike():
    sde = VPSDE()

    def network(x, t, label):
        return 0.5 * x + label.reshape(-1, 1).to(x)

    c = as_score(network, sde, "eps").given(torch.ones(2))
    u = as_score(network, sde, "x0").given(torch.zeros(2))
    x = torch.ones(2, 3, dtype=torch.float64)
    base = as_score(network, sde, "eps")
    found = guidance.classifier_free(base, c, u, 2.0)(x, 0.5)
    assert torch.allclose(found, u(x, 0.5) + 2 * (c(x, 0.5) - u(x, 0.5)))
    with pytest.raises(ValueError, match="wrapped alike"):
        guidance.classifier_free(base, c, u, 2.0, together=True)


def test_a_budget_holds_where_later_evaluations_call_more():
    """The closure is found out in the middle: what was spent by then is spent."""
    sde, calls = VPSDE(), []
    one = as_score(lambda x, t: (calls.append(1), 0.5 * x)[1], sde, "eps")

    def closure(x, t):
        level = float(sde.sigma(t) / sde.alpha(t))
        return one(x, t) if level > 0.5 else (one(x, t) + one(x, t)) / 2

    sample(sde, closure, (2, 3), "dpmpp_2m", nfe=20, grid="karras", seed=0)
    assert len(calls) <= 20
