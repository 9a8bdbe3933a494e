"""What takes gradients works in inference mode to the bit, or says in a line why it cannot."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from sdekit import VPSDE, as_score, log_likelihood, ode_sample, pc_sample, sample, sample_with_log_prob, sde_sample
from sdekit.models.guidance import classifier_guidance
from sdekit.posterior import Observation, annealed_sample, posterior_sample, posterior_score
from sdekit.training import implicit, sliced

SDE, SHAPE = VPSDE(), (4, 3)
X = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


class Net(nn.Module):
    """A small network that multiplies by its time, as a gradient has to remember."""

    def __init__(self, outputs):
        super().__init__()
        draw = torch.Generator().manual_seed(outputs)
        self.a, self.b = (nn.Parameter(torch.randn(n, generator=draw).double() / 3) for n in ((3, 9), (9, outputs)))

    def forward(self, x, t, c=0.0):
        t, c = (y[:, None] if isinstance(y, torch.Tensor) and y.ndim else y for y in (t, c))
        return torch.tanh((x * t + c) @ self.a) @ self.b


class Parts:
    """A network, a classifier, conditions and what was observed; those named by ``inside`` are of inference mode."""

    def __init__(self, *inside):
        def made(name, make):
            with torch.inference_mode() if name in inside else nullcontext():
                return make()

        self.score = as_score(made("network", lambda: Net(3)), SDE, predicts="v")
        self.classifier = made("classifier", lambda: Net(5))
        self.labels = made("labels", lambda: torch.arange(4))
        self.given = made("given", lambda: torch.linspace(0, 1, 4, dtype=torch.float64))
        self.A = made("A", lambda: torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 1.0]], dtype=torch.float64))
        self.y, self.std = made("y", lambda: (torch.ones(4, 2, dtype=torch.float64), torch.tensor(0.3)))

    def classified(self):
        def log_prob(x, t, kind):
            return self.classifier(x, t).log_softmax(1).gather(1, kind[:, None])[:, 0]

        return classifier_guidance(self.score, log_prob, 2.0, given=self.labels)

    def observed(self, A=None, adjoint=None):
        return Observation(self.y, self.A if A is None else A, self.std, adjoint)

    def posterior(self, method="mmps", **how):
        return posterior_score(SDE, self.score, self.observed(**how), method)


def by_matrix(parts):
    return parts.posterior(A=lambda x: x @ parts.A.mT, adjoint=lambda u: u @ parts.A)


MODELS = {
    "plain": lambda p: p.score,
    "given": lambda p: p.score.given(p.given),
    "classifier": Parts.classified,
    **{m: lambda p, m=m: p.posterior(m) for m in ("mmps", "tmpd", "pigdm", "dps")},
    "callable": lambda p: p.posterior(A=lambda x: x @ p.A.mT),
    "adjoint": by_matrix,
    "bent": lambda p: p.posterior("dps", A=lambda x: torch.tanh(x @ p.A.mT)),
}
TOLERANCE = {"rtol": 1e-1, "atol": 1e-1}
DRAWS = {
    "one time": lambda s: s(X, 0.4),
    "times": lambda s: s(X, torch.tensor([0.1, 0.2, 0.5, 0.9])),
    "sample": lambda s: sample(SDE, s, SHAPE, nfe=4, seed=0, dtype=torch.float64),
    "ode": lambda s: ode_sample(SDE, s, SHAPE, seed=0, dtype=torch.float64, **TOLERANCE),
    "ode by scipy": lambda s: ode_sample(SDE, s, SHAPE, method="scipy:RK23", x_T=X, **TOLERANCE),
    "sde": lambda s: sde_sample(SDE, s, SHAPE, seed=0, dtype=torch.float64, rtol=1.0, atol=1.0),
    "pc": lambda s: pc_sample(SDE, s, SHAPE, steps=2, seed=0, dtype=torch.float64),
    "exact": lambda s: log_likelihood(SDE, s, X, **TOLERANCE).corrected,
    "hutchinson": lambda s: log_likelihood(SDE, s, X, divergence="hutchinson", probes=2, seed=0, **TOLERANCE).log_prob,
    "with log_prob": lambda s: (
        sample_with_log_prob(SDE, s, SHAPE, seed=0, dtype=torch.float64, **TOLERANCE)[1].log_prob
    ),
}


def found(mode, make, parts):
    with MODES[mode]():
        return make(parts)


SLOW = ("ode by scipy", "with log_prob", "hutchinson")  # these differentiate where others do: two models are enough
PAIRS = [(m, d) for m in MODELS for d in DRAWS if d not in SLOW or m in ("plain", "mmps")]


@pytest.mark.parametrize(("model", "draw"), PAIRS)
def test_inference_mode_changes_no_bit(model, draw):
    """Of what was made outside, and of the conditions, y, A's matrix and std that were made within."""
    within = ["labels", "given", "y", *(["A"] if model in ("mmps", "tmpd", "pigdm", "dps") else [])]
    expected = found("no_grad", lambda p: DRAWS[draw](MODELS[model](p)), Parts())
    for mode, parts in (("no_grad", Parts(*within)), ("inference", Parts()), ("inference", Parts(*within))):
        assert torch.equal(found(mode, lambda p: DRAWS[draw](MODELS[model](p)), parts), expected)


SAMPLERS = {
    "particles": lambda p: posterior_sample(
        SDE, p.score, p.observed(), SHAPE, particles=2, steps=3, seed=0, dtype=torch.float64
    ).x,
    "particles, bent": lambda p: posterior_sample(
        SDE, p.score, p.observed(A=lambda x: x.tanh() @ p.A.mT), SHAPE, method="dps", particles=2, steps=3, seed=0,
        dtype=torch.float64,
    ).x,
    "annealed, bent": lambda p: annealed_sample(
        SDE, p.score, p.observed(A=lambda x: x.tanh() @ p.A.mT), SHAPE, levels=2, steps=2, proposals=2, seed=0,
        dtype=torch.float64,
    ).x,
    "implicit": lambda p: implicit()(p.score, X, torch.full((4,), 0.3, dtype=torch.float64), lambda: X.flip(0)),
    "sliced": lambda p: sliced()(p.score, X, torch.full((4,), 0.3, dtype=torch.float64), lambda: X.flip(0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_and_objectives_that_differentiate(name):
    expected = found("no_grad", SAMPLERS[name], Parts())
    for mode in MODES:
        assert torch.equal(found(mode, SAMPLERS[name], Parts()), expected)
        assert torch.equal(found(mode, SAMPLERS[name], Parts("y")), expected)


WHY = "^{} holds tensors that were made in torch.inference_mode, .*: make it outside, or under torch.no_grad$"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("inside", "named", "model", "draw"),
    [
        *(("network", "score", m, "sample") for m in MODELS if m not in ("plain", "given", "classifier")),
        *(("network", "score", "plain", d) for d in ("exact", "hutchinson", "with log_prob")),
        *(("classifier", "log_prob", "classifier", d) for d in ("one time", "sample", "ode", "exact")),
        ("A", "A", "callable", "sample"),
        ("A", "A", "bent", "times"),
        ("A", "adjoint", "adjoint", "exact"),
    ],
)
def test_what_has_no_gradient_says_why(inside, named, model, draw, mode):
    parts = Parts(inside)
    if named == "adjoint":  # A itself is asked first where a gradient goes through both
        A = parts.A.clone()
        parts.posterior = lambda **how: Parts.posterior(parts, A=lambda x: x @ A.mT, adjoint=how["adjoint"])
    with pytest.raises(ValueError, match=WHY.format(named)):
        found(mode, lambda p: DRAWS[draw](MODELS[model](p)), parts)


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_inference_mode_are_fine_where_no_gradient_is_taken(mode):
    for inside, model, draw in (("network", "plain", "sample"), ("network", "classifier", "ode")):
        expected = found("no_grad", lambda p, m=model, d=draw: DRAWS[d](MODELS[m](p)), Parts())
        got = found(mode, lambda p, m=model, d=draw: DRAWS[d](MODELS[m](p)), Parts(inside))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [implicit, sliced])
def test_objectives_say_why_too(make, mode):
    t = torch.full((4,), 0.3, dtype=torch.float64)
    with pytest.raises(ValueError, match=WHY.format("score")):
        found(mode, lambda p: make()(p.score, X, t, lambda: X), Parts("network"))
