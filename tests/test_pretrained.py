"""The bundled model loads, says what it is, and draws digits."""

import pytest
import torch

from sdekit import VPSDE, sample
from sdekit.evaluation.metrics import frechet_distance, load_feature_extractor
from sdekit.pretrained import PRETRAINED, load_pretrained
from sdekit.training.digits import load_digits

# Measured 0.34 (three seeds of 400 samples: 0.34 ± 0.05); ten evaluations of DDIM have 2.1, of dpmpp_2m 0.58.
BOUND = 0.8


def test_the_model_says_what_it_draws():
    sde, score = load_pretrained("digits")
    assert isinstance(sde, VPSDE)
    assert score.event == (1, 8, 8)
    assert score.data_range == (-1.0, 1.0)
    x = torch.randn(2, *score.event, generator=torch.Generator().manual_seed(0))
    assert score(x, 0.5).shape == x.shape
    assert not score(x, 0.5).requires_grad


@pytest.mark.parametrize("name", PRETRAINED)
def test_every_bundled_file_is_small(name):
    from importlib import resources

    assert len((resources.files("sdekit") / "assets" / PRETRAINED[name]).read_bytes()) < 3e6


def test_an_unknown_name_comes_with_the_near_ones():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load_pretrained("digit")


def test_twenty_evaluations_draw_digits():
    pytest.importorskip("sklearn")
    sde, score = load_pretrained("digits")
    images = sample(sde, score, (600, *score.event), "dpmpp_2m", nfe=20, seed=0)
    extract = load_feature_extractor("digits")
    distance = frechet_distance(extract(images), extract(load_digits()[0]))
    assert distance < BOUND


def test_the_model_knows_the_digits_at_a_low_noise_level():
    """It removes noise better than the best linear denoiser of the data, which any broken time or scaling is not."""
    pytest.importorskip("sklearn")
    sde, score = load_pretrained("digits")
    images = load_digits()[0]
    flat = images.flatten(1).double()
    cov = torch.cov(flat.T)
    for t in (0.05, 0.1, 0.2):  # measured 0.59 of the linear one at 0.2, 0.51 at 0.1
        x = sde.perturb(images, t, seed=1)
        error = (sde.denoise(x, t, score) - images).square().sum((1, 2, 3)).mean()
        a, s = float(sde.alpha(t)), float(sde.sigma(t))
        linear = (cov - a**2 * cov @ torch.linalg.solve(a**2 * cov + s**2 * torch.eye(64).double(), cov)).trace()
        assert float(error) < 0.8 * float(linear)
