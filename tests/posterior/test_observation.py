"""Operators and their adjoints, what fits an observation, and whose y it is."""

import math

import pytest
import torch

from sdekit import VPSDE
from sdekit.batch import samples
from sdekit.posterior import Observation, blur, colourisation, downsample, inpainting, posterior_score
from tests.conftest import gaussian_score

EVENT = (3, 6, 4)
KERNEL = torch.tensor([[0.0, 0.2, 0.1], [0.3, 0.1, 0.05], [0.05, 0.2, 0.0]], dtype=torch.float64)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mask():
    return draw(*EVENT, seed=9) > 0.3


OBSERVED = {
    "inpainting": (lambda x: inpainting(mask(), x, 0.1), lambda x: x[:, mask()]),
    "colourisation": (
        lambda x: colourisation(torch.einsum("bchw,c->bhw", x, WEIGHTS.to(x))[:, None], 0.1, WEIGHTS.tolist()),
        lambda x: 0.3 * x[:, 0] + 0.6 * x[:, 1] + 0.1 * x[:, 2],
    ),
    "blur": (
        lambda x: blur(KERNEL, x, 0.1, padding="circular"),
        # y[i, j] = sum_ab k[a, b] x[i - a + 1, j - b + 1], a convolution
        lambda x: sum(KERNEL[a, b].to(x) * x.roll((a - 1, b - 1), (2, 3)) for a in range(3) for b in range(3)),
    ),
    "blur, reflected": (lambda x: blur(KERNEL, x, 0.1), None),
    "downsample": (
        lambda x: downsample(2, x[:, :, ::2, ::2], 0.1),
        lambda x: (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4,
    ),
    "matrix": (lambda x: Observation(draw(len(x), 5), draw(5, 72, seed=3), 0.1), None),
    "affine": (lambda x: Observation(x[:, 0], lambda x: 2 * x[:, 0] - x[:, 1] + 0.5, 0.1), None),
}
WEIGHTS = torch.tensor([0.3, 0.6, 0.1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("make", "formula"), OBSERVED.values(), ids=OBSERVED)
def test_operators_and_their_adjoints(make, formula, dtype):
    x, v = draw(4, *EVENT, dtype=dtype), draw(4, *EVENT, seed=1, dtype=dtype)
    observation = make(x)
    observation.check(x)
    assert observation.linear
    if formula is not None:
        torch.testing.assert_close(observation.of(x), formula(x).reshape(4, -1))
    w = draw(4, observation.entries, seed=2, dtype=dtype)
    back = observation.transpose(x)(w)
    assert back.shape == x.shape
    left, right = (observation.change(v) * w).sum(1), (v * back).reshape(4, -1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(observation.change(v), v.reshape(4, -1) @ observation.matrix(x).mT, rtol=1e-4, atol=1e-4)
    y, std = observation.values(x)
    assert y.dtype == std.dtype == dtype
    assert (std == 0.1).all()


def test_what_was_seen_follows_its_sample():
    y = torch.arange(5.0).reshape(5, 1)
    observation = Observation(y, torch.ones(1, 3), torch.linspace(0.1, 0.5, 5).reshape(5, 1))
    observation.check(torch.zeros(5, 3))
    with samples(torch.tensor([4, 1, 1]), 5):
        x = torch.zeros(3, 3)
        observation.check(x)
        seen, std = observation.values(x)
    assert seen[:, 0].tolist() == [4.0, 1.0, 1.0]
    torch.testing.assert_close(std[:, 0], torch.tensor([0.5, 0.2, 0.2]))
    shared = Observation(torch.tensor([1.0, 2.0]), torch.ones(2, 3), torch.tensor([0.1, 0.2]))
    shared.check(x)
    assert shared.values(x)[0].shape == (1, 2)


def test_a_wrong_adjoint_says_by_how_much():
    a = draw(2, 6)
    observation = Observation(draw(2), lambda x: x @ a.mT, 0.1, adjoint=lambda u: 1.25 * u @ a)
    with pytest.raises(ValueError, match=r"<A u, w> = .* <u, adjoint\(w\)> = .*, off by 20 %"):
        observation.check(draw(3, 6))
    Observation(draw(2), lambda x: x @ a.mT, 0.1, adjoint=lambda u: u @ a).check(draw(3, 6))
    other = Observation(draw(2), lambda x: x @ a.mT, 0.1, adjoint=lambda u: u @ draw(2, 6, seed=5))
    with pytest.raises(ValueError, match="adjoint is not A's"):
        posterior_score(VPSDE(), gaussian_score(VPSDE()), other)(draw(3, 6), 0.5)
    with pytest.raises(ValueError, match=r"adjoint must return x's shape \(2, 6\)"):
        Observation(draw(2), lambda x: x @ a.mT, 0.1, adjoint=lambda u: u).check(draw(3, 6))


def test_a_map_that_is_not_linear_is_known_as_such():
    observation = Observation(draw(6), lambda x: x**3, 0.1)
    observation.check(draw(2, 6))
    assert not observation.linear


X = draw(3, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inpainting(mask().long(), X, 0.1), "mask must be a bool tensor.*int64; convert with .bool"),
        (lambda: inpainting(mask(), draw(2, 3, 6, 5), 0.1), r"mask must have the shape of one sample.*\(3, 6, 4\)"),
        (lambda: inpainting(mask()[:1], draw(*EVENT), 0.1), "mask must have the shape of one sample"),
        (lambda: inpainting(torch.zeros(6, dtype=torch.bool), X, 0.1), "nothing is seen"),
        (lambda: inpainting(mask(), draw(*EVENT), 0.1).check(X), "mask must have the shape of one sample"),
        (lambda: Observation(draw(2), draw(2, 6), 0.0), "std must be finite and > 0, got 0.0.*small against the data"),
        (lambda: Observation(draw(2), draw(2, 6), -0.1), "std must be finite and > 0, got -0.1"),
        (lambda: Observation(draw(2), draw(2, 6), torch.tensor([0.1, 0.0])), "a smallest of 0"),
        (lambda: Observation(draw(2), draw(2, 6), math.nan), "std must be finite and > 0, got nan"),
        (lambda: Observation(draw(2), draw(2, 6), torch.ones(3)).check(X), r"std must be a number.*got \(3,\)"),
        (lambda: Observation(draw(2) * math.nan, draw(2, 6), 0.1), "y holds 2 non-finite values"),
        (lambda: Observation(torch.ones(2).long(), draw(2, 6), 0.1), "y must be a floating tensor"),
        (lambda: Observation(draw(2), draw(2), 0.1), r"A must be a callable or a finite matrix \(d_y, d\), got \(2,\)"),
        (lambda: Observation(draw(2), draw(2, 5), 0.1).check(X), "A has 5 columns, and x 6 entries"),
        (lambda: Observation(draw(4), draw(2, 6), 0.1).check(X), r"y must have the shape of A\(x\), \(2,\)"),
        (lambda: Observation(draw(4, 2), draw(2, 6), 0.1).check(X), "y was given for 4 samples, and x has 3"),
        (lambda: Observation(draw(2), lambda x: x[0], 0.1).check(X), r"A must return a floating tensor \(2, \*seen\)"),
        (lambda: Observation(draw(2), lambda x: 1.0, 0.1).check(X), "A must return a floating tensor.*got float"),
        (lambda: Observation(draw(2), draw(2, 6), 0.1, adjoint=3), "adjoint must be a callable"),
        (lambda: Observation(draw(2), lambda x: x[:, :2].detach(), 0.1).transpose(X), "A must be differentiable"),
        (lambda: blur(draw(2, 3), draw(*EVENT), 0.1), "kernel must be .* odd sides, got"),
        (lambda: blur(KERNEL, draw(*EVENT), 0.1, padding="same"), "unknown padding 'same'"),
        (lambda: blur(KERNEL, X, 0.1).check(X), r"x must be pictures \(B, C, H, W\)"),
        (lambda: downsample(4, draw(*EVENT), 0.1).check(draw(2, *EVENT)), "factor = 4 must divide"),
        (lambda: downsample(1, draw(*EVENT), 0.1), "factor must be at least 2"),
        (lambda: colourisation(draw(1, 6, 4), 0.1, [0.5, 0.5]).check(draw(2, *EVENT)), r"pictures \(B, 2, H, W\)"),
        (lambda: colourisation(draw(1, 6, 4), 0.1, [0.0, 0.0]), "weights must be"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("wrong", [lambda u: 2 * u, lambda u: 0 * u, lambda u: u.flip(-1)], ids=["2 u", "0", "flip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_adjoint_is_seen_on_pictures_too(wrong, dtype):
    """<A u, w> of independent draws is small beside |A u||w|, the more so the more entries there are: any passed."""
    x = torch.zeros(1, 3, 64, 64, dtype=dtype)
    with pytest.raises(ValueError, match="adjoint is not A's"):
        Observation(x[0], lambda x: x, 0.1, adjoint=wrong).check(x)
    Observation(x[0], lambda x: x, 0.1, adjoint=lambda u: u).check(x)
