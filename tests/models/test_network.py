"""Networks as scores: every parameterisation, the network's clock and dtype, and what is checked at the border."""

import copy
import dataclasses
import math
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn

from sdekit import (
    SDE,
    VPSDE,
    CosineVP,
    GaussianMixture,
    RectifiedFlow,
    as_score,
    calibrate,
    encode,
    log_likelihood,
    ode_sample,
    pc_sample,
    sample,
)
from sdekit.models.network import prediction_target
from sdekit.processes.counted import Counted, Moment, as_model
from sdekit.processes.kinds import KINDS
from tests.conftest import gaussian_score

X = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 2, 2)


@pytest.mark.parametrize("predicts", KINDS)
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

    sde = Rectified()
    message = r"zero terminal SNR, alpha\(T\) = 0 at T = 1.*predicts (eps|score) says nothing.*T = 0.999.*predicts v"
    for score in (as_score(lambda x, t: x, sde, "eps"), as_score(lambda x, t: x, sde), lambda x, t: x):
        for run in (
            lambda s=score: sample(sde, s, (2, 2), nfe=5, seed=0),
            lambda s=score: ode_sample(sde, s, (2, 2), seed=0),
            lambda s=score: log_likelihood(sde, s, torch.ones(2, 2)),
            lambda s=score: encode(sde, s, torch.ones(2, 2)),
            lambda s=score: calibrate(sde, s, (2, 2), nfe=5, noises=4),
        ):
            with pytest.raises(ValueError, match=message):
                run()
        below = torch.tensor([0.9, 0.5, 0.1])  # where there is signal it serves
        assert torch.isfinite(sample(sde, score, (2, 2), grid=below, seed=0)).all()


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
        (lambda x, t: x / 0, FloatingPointError, r"NaN or infinite values at t = 0\.6"),
        ("score", TypeError, "score must be a callable"),
    ],
)
def test_bad_scores_are_named(score, error, message):
    with pytest.raises(error, match=message):
        sample(VPSDE(), score, (4, 2), steps=3, seed=0, dtype=torch.float32)


def test_budget_is_hard():
    model = Counted(as_model(lambda x, t: x, VPSDE()), budget=2)
    moment = Moment(torch.tensor(0.5), None, 1.0, 0.0)
    for _ in range(2):
        model(X, moment)
    with pytest.raises(RuntimeError, match="nfe budget of 2"):
        model(X, moment)
    assert model.nfe == 2


class Outcome(NamedTuple):
    """As diffusers' classes are: fields by name, key and index."""

    sample: torch.Tensor
    extra: int = 0


@dataclasses.dataclass
class Answer:
    sample: torch.Tensor
    logits: int = 0


OUTPUTS = {
    "attribute": (lambda y: Answer(y), "sample"),
    "named tuple": (lambda y: Outcome(y), "sample"),
    "key": (lambda y: {"sample": y, "aux": None}, "sample"),
    "index": (lambda y: (None, y), 1),
    "callable": (lambda y: {"a": {"b": y}}, lambda out: out["a"]["b"]),
    "mean": (lambda y: torch.cat([y, y.abs()], 1), "mean"),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_the_prediction_is_taken_out_of_what_the_network_returns(form):
    """PITFALL 34."""
    sde, (wrap, output) = VPSDE(), OUTPUTS[form]
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    plain = sample(sde, as_score(lambda x, t: 0.3 * x, sde, "eps"), x.shape, nfe=5, x_T=x)
    wrapped = as_score(lambda x, t: wrap(0.3 * x), sde, "eps", output=output)
    assert torch.equal(sample(sde, wrapped, x.shape, nfe=5, x_T=x), plain)


@pytest.mark.parametrize(
    ("network", "output", "message"),
    [
        (
            lambda x, t: (x, None),
            None,
            r"returned a tuple of 2 entries; say where .* as_score\(\.\.\., output=\.\.\.\)",
        ),
        (lambda x, t: Outcome(x), None, "a Outcome of sample, extra; say where"),
        (lambda x, t: {"sample": x}, None, "a dict of 'sample'; say where"),
        (lambda x, t: Answer(x), None, "a Answer with sample, logits; say where"),
        (lambda x, t: Answer(x), "samples", "output='samples' is not in .* a Answer with sample, logits"),
        (lambda x, t: {"sample": x}, "x", "output='x' is not in .* a dict of 'sample'"),
        (lambda x, t: (x,), 1, "output=1 is not in .* a tuple of 1 entries"),
        (
            lambda x, t: torch.cat([x, x], 1),
            None,
            r'twice the channels are a mean and a learned variance.*output="mean"',
        ),
        (lambda x, t: None, None, "a NoneType; say where"),
    ],
)
def test_what_a_network_returned_is_described(network, output, message):
    sde, x = VPSDE(), torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=message):
        sample(sde, as_score(network, sde, "eps", output=output), x.shape, nfe=5, x_T=x)
    with pytest.raises(TypeError, match="output must be an attribute, a key, an index or a callable, got 1.5"):
        as_score(network, sde, "eps", output=1.5)
    with pytest.raises(TypeError, match="x must be a floating tensor, got torch.int64"):
        as_score(lambda x, t: x, sde, "eps")(torch.ones(2, 3, dtype=torch.int64), 0.5)


@pytest.mark.parametrize("run", ["fixed", "adaptive", "by hand"])
def test_an_integer_clock_stays_one(run):
    """PITFALL 35: a table's index is no float."""
    seen, sde = [], VPSDE()

    def network(x, t):
        seen.append(t)
        return 0.1 * x

    score = as_score(network, sde, "eps", time=lambda t: (999 * t).round().long())
    if run == "fixed":
        sample(sde, score, (3, 2), nfe=5, seed=0, dtype=torch.bfloat16)
    elif run == "adaptive":
        ode_sample(sde, score, (3, 2), rtol=0.1, atol=0.1, seed=0)
    else:
        score(torch.ones(3, 2), 0.5)
    assert {t.dtype for t in seen} == {torch.int64}
    assert {t.shape for t in seen} == {(3,)} | ({(k,) for k in (1, 2)} & {t.shape for t in seen})


def clock(t):
    return 999 * t


def middle(out):
    return out[0]


def linear(x, t, *labels):
    return (0.3 * x,)


def test_scores_are_pickled():
    """PITFALL 36: a spawned worker gets its model as a pickle."""
    sde, x = VPSDE(), torch.ones(2, 2)
    for score in (
        as_score(linear, sde, "eps", time=clock, output=middle).given(torch.tensor([1, 2])),
        as_score(linear, sde, "v", output=0),
        GaussianMixture(torch.zeros(1, 2), torch.eye(2)[None]).score(sde),
    ):
        again = pickle.loads(pickle.dumps(score))
        assert torch.equal(again(x, 0.5), score(x, 0.5))
        assert torch.equal(copy.deepcopy(score)(x, 0.5), score(x, 0.5))
    for name, arguments in {
        "time": {"time": lambda t: t},
        "output": {"output": lambda out: out},
    }.items():
        score = as_score(linear, sde, "eps", **{"output": 0, **arguments})
        with pytest.raises(
            pickle.PicklingError, match=f"{name} is a lambda .* cannot be pickled; give as_score a func"
        ):
            pickle.dumps(score)
        copy.deepcopy(score)  # which needs no name
        copy.copy(score)


def test_no_graph_break_per_evaluation():
    """PITFALL 39: none in a score, nor in what a step of a solver asks for."""
    explain, sde, x = torch._dynamo.explain, VPSDE(), torch.ones(4, 2)
    score = as_score(lambda x, t: 0.3 * x * t[:, None], sde, "eps", time=clock)
    system = sde.probability_flow(score)
    system.prepare([1.0, 0.5], x)
    for evaluate in (
        lambda x: score(x, 0.5),
        lambda x: score(x, torch.full((4,), 0.5)),
        lambda x: system.model(x, system.at(0.5, x).time),
    ):
        torch._dynamo.reset()
        evaluate(x)
        assert explain(evaluate)(x).graph_break_count == 0


def test_a_model_of_an_equal_process_is_at_home():
    fast = VPSDE(0.1, 20.0)
    score = as_score(lambda x, t: 0.3 * x, fast, "x0")
    x = fast.prior_sample((3, 2), seed=0, dtype=torch.float64)
    same = as_score(lambda x, t: 0.3 * x, VPSDE(), "x0")
    assert torch.equal(sample(fast, same, x.shape, nfe=7, x_T=x), sample(fast, score, x.shape, nfe=7, x_T=x))


def test_what_was_wrapped_for_another_process_is_not_carried_over_to_alpha_0():
    """Nor to anywhere else, but by score.under(sde)."""
    one, other, x = RectifiedFlow(1.0), RectifiedFlow(3.0), torch.ones(2, 3)
    for sde, score in (
        (other, as_score(lambda x, t: 0.3 * x, one, "v")),
        (CosineVP(), as_score(lambda x, t: 0.3 * x, one, "flow")),
        (one, as_score(lambda x, t: 0.3 * x, VPSDE(), "v")),
    ):
        for run in (
            lambda sde=sde, s=score: sample(sde, s, x.shape, "ddim", nfe=5, seed=0),
            lambda sde=sde, s=score: ode_sample(sde, s, x.shape, seed=0),
            lambda sde=sde, s=score: log_likelihood(sde, s, x),
        ):
            with pytest.raises(ValueError, match=r"wrapped for another process.*score.under\(sde\)"):
                run()
    same = as_score(lambda x, t: 0.3 * x, RectifiedFlow(3.0), "v")
    assert torch.isfinite(sample(other, same, x.shape, nfe=5, seed=0)).all()


@pytest.mark.parametrize("inference", [False, True])
def test_a_network_that_changes_its_input_changes_no_state(inference):
    """nn.ReLU(inplace=True) as a first layer, or x.mul_: the state that the solver goes on with stays what it was."""
    sde = VPSDE()

    def clean(x, t):
        return 0.3 * x.clamp_min(-0.5)

    def in_place(x, t):
        return x.clamp_min_(-0.5).mul_(0.3)

    with torch.inference_mode(inference):
        x = [sample(sde, as_score(f, sde, predicts="eps"), (5, 3), "heun", nfe=9, seed=0) for f in (clean, in_place)]
    assert torch.equal(*x)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(torch.int64, "got torch.int64"), (torch.bool, "got torch.bool"), (torch.complex64, "view_as_real")],
)
def test_what_is_no_floating_number_is_refused(dtype, message):
    """PITFALL: whole numbers, truths and complex ones were cast to x's dtype in silence."""
    score = as_score(lambda x, t: x.to(dtype), VPSDE(), predicts="eps")
    with pytest.raises(ValueError, match=f"floating numbers, .*{message}"):
        sample(VPSDE(), score, (2, 3), nfe=5, seed=0)
    if dtype is torch.complex64:
        with pytest.raises(TypeError, match="view_as_real"):
            sample(VPSDE(), score, (2, 3), nfe=5, x_T=torch.zeros(2, 3, dtype=dtype))
