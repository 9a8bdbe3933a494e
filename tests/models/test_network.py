"""Networks as scores: every parameterisation, the network's clock and dtype, and what is checked at the border."""

import math

import pytest
import torch
from torch import nn

from sdekit import SDE, VPSDE, as_score, pc_sample, sample
from sdekit.models.network import PREDICTIONS, prediction_target
from sdekit.processes.reverse import CountedScore
from tests.conftest import gaussian_score

X = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 2, 2)


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_every_prediction_gives_the_score(sde, predicts, per_sample):
    """A network that knows x_0 and eps exactly, in its own words; the score of a point mass is -eps/sigma."""
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64) * sde.T if per_sample else torch.tensor(0.4) * sde.T
    x0 = X.flip(0)
    mean, std = sde.marginal(x0, t)
    eps = (X - mean) / std
    score = as_score(lambda x, time: prediction_target(predicts, sde, x0, eps, t.double()), sde, predicts)
    torch.testing.assert_close(score(X, t), -eps / std, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(sde.denoise(X, t, score), x0, rtol=1e-8, atol=1e-8)


def test_prediction_targets_are_their_formulas():
    sde, x0, eps, t = VPSDE(), X, X.cos(), 0.3
    a, s = sde.alpha(t), sde.sigma(t)
    beta = 0.1 + 19.9 * t
    slopes = -beta / 2 * a, beta * a**2 / (2 * s)
    want = {"score": -eps / s, "eps": eps, "x0": x0, "v": a * eps - s * x0, "flow": slopes[0] * x0 + slopes[1] * eps}
    for predicts, value in want.items():
        torch.testing.assert_close(prediction_target(predicts, sde, x0, eps, torch.tensor(t).double()), value,
                                   rtol=1e-6, atol=1e-8)  # fmt: skip


def test_network_sees_its_own_clock_one_per_sample():
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    as_score(network, VPSDE(), "eps", time=lambda t: 999 * t)(X.float(), 0.5)
    as_score(network, VPSDE(), "eps")(X, torch.tensor([0.1, 0.2, 0.3]))
    assert seen[0].shape == (3,)
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == [499.5] * 3
    torch.testing.assert_close(seen[1], torch.tensor([0.1, 0.2, 0.3]).double())


class Net(nn.Module):
    """eps-prediction of N(0, 1) data under VP: eps = sigma x, in the weights' dtype."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, t):
        assert x.dtype == self.weight.dtype
        assert t.dtype == torch.float32
        return self.weight * x * VPSDE().sigma(t).to(x.dtype).reshape(-1, 1)


def test_bf16_network_under_a_float32_state():
    sde = VPSDE()
    score = as_score(Net().to(torch.bfloat16), sde, "eps")
    x = sample(sde, score, (4000, 1), "ddim", steps=100, seed=0)
    assert x.dtype == torch.float32
    assert abs(float(x.std()) - 1) < 6 / math.sqrt(8000) + 0.01
    assert pc_sample(sde, score, (3, 1), steps=5, seed=0, dtype=torch.float64).dtype == torch.float64


def test_zero_terminal_snr_is_refused():
    """PITFALL 4: x_0 = (x - sigma eps)/alpha would be infinite without a word."""

    class Rectified(SDE):
        def alpha(self, t):
            return 1 - t

        def sigma(self, t):
            return t

    with pytest.raises(ValueError, match=r"zero terminal SNR, alpha\(T\) = 0 at T = 1.*T = 0.999"):
        as_score(lambda x, t: x, Rectified(), "eps")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Rectified().reverse(lambda x, t: x)


def test_unknown_prediction_names_the_near_ones():
    with pytest.raises(ValueError, match="unknown prediction 'epsilon': did you mean 'eps'"):
        as_score(lambda x, t: x, VPSDE(), "epsilon")
    with pytest.raises(TypeError, match="network must be a callable"):
        as_score(3, VPSDE())
    with pytest.raises(ValueError, match=r"network must return x's shape \(3, 2, 2\), got \(3, 4\)"):
        as_score(lambda x, t: x.reshape(3, 4), VPSDE())(X, 0.5)


def test_nan_is_reported_with_its_time():
    """PITFALL 26: one bad evaluation among many, wherever in the window of checks it falls."""
    sde = VPSDE()
    good = gaussian_score(sde)
    for bad_call in (0, 5, 63, 64, 90):
        calls = []

        def score(x, t, bad_call=bad_call, calls=calls):
            calls.append(float(t))
            return good(x, t) * (math.nan if len(calls) - 1 == bad_call else 1.0)

        with pytest.raises(FloatingPointError, match="NaN or infinite values at t = ") as info:
            sample(sde, score, (4, 2), "euler_maruyama", steps=100, seed=0)
        assert f"t = {calls[bad_call]:g};" in str(info.value)
        assert len(calls) < bad_call + 65


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (lambda x, t: x[:, :1], ValueError, r"score must return .* x's shape \(4, 2\), got torch.float32 \(4, 1\)"),
        (lambda x, t: x.long(), ValueError, "floating tensor .* got torch.int64"),
        (lambda x, t: 1.0, ValueError, "got float"),
        (lambda x, t: x / 0, FloatingPointError, "at t = 1"),
        ("score", TypeError, "score must be a callable"),
    ],
)
def test_bad_scores_are_named(score, error, message):
    with pytest.raises(error, match=message):
        sample(VPSDE(), score, (4, 2), steps=3, seed=0, dtype=torch.float32)


def test_budget_is_hard():
    score = CountedScore(lambda x, t: x, budget=2)
    for _ in range(2):
        score(X, torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="nfe budget of 2"):
        score(X, torch.tensor(0.5))
    assert score.nfe == 2
