"""Clipping of x_0: a score like any other, the same to the bit where nothing is clipped."""

import pickle

import pytest
import torch

from sdekit import SAMPLERS, VPSDE, as_score, dynamic_threshold, load_pretrained, ode_sample, sample, static_threshold
from tests.conftest import gaussian_score


def overshooting(sde, value):
    """A score that predicts x_0 = value whatever x."""
    value = torch.as_tensor(value, dtype=torch.float64)

    def score(x, t):
        return (sde.alpha(t) * value - x) / sde.sigma(t) ** 2

    return score


@pytest.mark.parametrize("wrap", [static_threshold, dynamic_threshold])
def test_inside_the_range_nothing_changes(sde, wrap):
    score = gaussian_score(sde, 0.5)
    x = 0.3 * torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (torch.tensor(0.3 * sde.T, dtype=torch.float64), torch.full((4,), 0.3 * sde.T, dtype=torch.float64)):
        assert torch.equal(wrap(sde, score, (-50.0, 50.0))(x, t), score(x, t))


def test_static_threshold_clips_x0(sde):
    values = torch.tensor([-3.0, -0.5, 0.5, 3.0], dtype=torch.float64)
    clipped = static_threshold(sde, overshooting(sde, values), (-1.0, 2.0))
    x = torch.ones(2, 4, dtype=torch.float64)
    t = 0.5 * sde.T
    torch.testing.assert_close(sde.denoise(x, t, clipped)[0], values.clamp(-1.0, 2.0), rtol=1e-6, atol=1e-6)


def test_dynamic_threshold_presses_each_sample_by_its_own_percentile():
    sde = VPSDE()
    values = torch.tensor([[0.1, -0.2, 0.3, 4.0], [0.1, -0.2, 0.3, 0.4], [1.0, -2.0, 3.0, 4.0]], dtype=torch.float64)
    x, t = torch.zeros(3, 4, dtype=torch.float64), 0.5
    whole = sde.denoise(x, t, dynamic_threshold(sde, overshooting(sde, values), (-1.0, 1.0), percentile=1.0))
    scale = values.abs().amax(1, keepdim=True).clamp_min(1.0)
    torch.testing.assert_close(whole, values / scale)
    # a percentile of 2/3 takes the third of four: .3, so nothing is pressed and 4 is clipped; 3 in the last sample
    part = sde.denoise(x, t, dynamic_threshold(sde, overshooting(sde, values), (-1.0, 1.0), percentile=0.7))
    torch.testing.assert_close(part[0], values[0].clamp(-1, 1))
    torch.testing.assert_close(part[1], values[1])
    torch.testing.assert_close(part[2], values[2].clamp(-3, 3) / 3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_a_clipped_score(name):
    """A score that overshoots the data ends inside the range."""
    sde = VPSDE()
    score = static_threshold(sde, overshooting(sde, 5.0), (-1.0, 1.0))
    x = sample(sde, score, (3, 2), name, steps=15, seed=0, dtype=torch.float64)
    torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=1e-6)


def test_the_pretrained_model_brings_its_range():
    sde, score = load_pretrained("digits")
    clipped = static_threshold(sde, score)
    assert clipped.data_range == (-1.0, 1.0)
    assert clipped.event == (1, 8, 8)
    assert clipped.device == score.device
    x = sample(sde, clipped, (2, *clipped.event), "dpmpp_2m", nfe=6, seed=0)  # without a corrector of what was said
    assert x.abs().max() <= 1 + 1e-5
    assert ode_sample(sde, dynamic_threshold(sde, score), (1, 1, 8, 8), seed=0, rtol=1e-2, atol=1e-2).isfinite().all()


def test_a_score_of_another_shape_is_refused():
    sde = VPSDE()
    wrapped = static_threshold(sde, lambda x, t: -x[:, :1], (-1.0, 1.0))
    with pytest.raises(ValueError, match=r"score must return x's shape \(3, 4\), got \(3, 1\)"):
        sample(sde, wrapped, (3, 4), nfe=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "data_range must be given"),
        ({"data_range": (1.0, -1.0)}, "low < high"),
        ({"data_range": 3.0}, "data_range must be a pair"),
        ({"data_range": (-1.0, 1.0), "percentile": 1.5}, r"percentile must lie in \(0, 1\]"),
    ],
)
def test_bad_input_is_named(arguments, message):
    sde = VPSDE()
    with pytest.raises(ValueError, match=message):
        dynamic_threshold(sde, gaussian_score(sde), **arguments)


def scored(x, t):
    return -x


@pytest.mark.parametrize("make", [static_threshold, dynamic_threshold])
def test_a_thresholded_score_pickles(make):
    sde, x = VPSDE(), torch.linspace(-3, 3, 8).reshape(2, 4)
    score = make(sde, scored, (-1.0, 1.0))
    assert torch.equal(pickle.loads(pickle.dumps(score))(x, 0.3), score(x, 0.3))


def test_a_range_that_is_never_reached_changes_nothing_whatever_process_is_named():
    """The prediction inside is of the process that its network was wrapped for, or carried over to."""
    sde, other = VPSDE(0.1, 20.0), VPSDE(0.1, 8.0)
    score = as_score(lambda x, t: 0.3 * x, other, "x0").under(sde)
    x = sde.prior_sample((3, 2), seed=0)
    draw = lambda s: sample(sde, s, x.shape, "ddim", nfe=6, x_T=x)  # noqa: E731
    assert torch.equal(draw(static_threshold(sde, score, (-1e6, 1e6))), draw(score))


@pytest.mark.parametrize("make", [static_threshold, dynamic_threshold])
def test_half_precision_overflows_nowhere(make):
    """PITFALL: of a score alpha/sigma^2 = 1e6 near the data, which float16 has not. x_0 is the exact one, clipped."""
    sde = VPSDE()
    wide = make(sde, gaussian_score(sde, 0.9), (-1.0, 1.0))
    x = torch.linspace(-2, 2, 24).reshape(2, 12)
    for t in (sde.t_min, 0.01, 0.5):
        out = make(sde, lambda x, t: gaussian_score(sde, 0.9)(x.float(), t).half(), (-1.0, 1.0))(x.half(), t)
        exact = wide(x.double(), t)
        assert out.dtype is torch.float16
        small = exact.abs() < 6e4
        assert torch.isfinite(out[small]).all()
        assert torch.allclose(out[small].double(), exact[small], rtol=5e-3, atol=5e-3 / float(sde.sigma(t)))
