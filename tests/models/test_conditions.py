"""Conditions: whatever the network takes besides x and t, each sample's own wherever the sample goes."""

import collections
import functools

import pytest
import torch

from sdekit import VPSDE, as_score, calibrate, log_likelihood, ode_sample, sample, sde_sample
from tests.conftest import gaussian_score

B = 5
LABELS = torch.tensor([0, 4, 1, 3, 2])
EMBEDDINGS = torch.linspace(-1, 1, B * 77 * 768).reshape(B, 77, 768).roll(1, 0)
SDE = VPSDE()


def eps(x, t, shift, std=0.5):
    """Of N(shift, std^2), shift (b,)."""
    a, s = SDE.alpha(t).to(x), SDE.sigma(t).to(x)
    a, s, m = (y.reshape(-1, *(1,) * (x.ndim - 1)) for y in (a, s, shift.to(x)))
    return s * (x - a * m) / (a**2 * std**2 + s**2)


def network(x, t, labels, *, context=None, scale=1.0, pooled=()):
    """A mean of each sample's own, of all that it is given; and a spread that takes some samples more steps."""
    shift = labels.double() * scale
    if context is not None:
        shift = shift + 10 * context.double().mean((1, 2))
    for part in pooled:
        shift = shift + part["vector"].double()
    return eps(x, t, shift, std=0.5)


def conditioned(rows=slice(None)):
    return as_score(network, SDE, "eps").given(
        LABELS[rows], context=EMBEDDINGS[rows], scale=0.5, pooled=({"vector": torch.arange(5.0)[rows]},)
    )


@pytest.mark.parametrize(
    "draw",
    [
        lambda score, shape, **kw: ode_sample(SDE, score, shape, method="adams", rtol=1e-4, atol=1e-4, **kw),
        lambda score, shape, **kw: ode_sample(SDE, score, shape, method="rk45", rtol=1e-4, atol=1e-4, **kw),
        lambda score, shape, **kw: sde_sample(SDE, score, shape, **kw),
        lambda score, shape, **kw: sample(SDE, score, shape, nfe=8, **kw),
    ],
    ids=["adams", "rk45", "adaptive_sra1", "dpmpp_2m"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_sample_is_what_it_is_alone(draw, wrapped):
    """PITFALLS 31 and 55, labels and embeddings (B, 77, 768), also through a user's closure."""

    def score(rows=slice(None)):
        one = conditioned(rows)
        return (lambda x, t: 2 * one(x, t) - one(x, t)) if wrapped else one

    x = draw(score(), (B, 3), seed=0, dtype=torch.float64)
    for i in range(B):
        alone = draw(score(slice(i, i + 1)), (1, 3), seed=0, ids=[i], dtype=torch.float64)
        torch.testing.assert_close(x[i : i + 1], alone, rtol=0, atol=1e-6)
    assert float(x.mean(1).diff().abs().max()) > 0.5  # the conditions tell


def test_likelihood_of_each_under_its_own_condition():
    x = torch.linspace(-1, 4, B * 3, dtype=torch.float64).reshape(B, 3)
    out = log_likelihood(SDE, conditioned(), x, rtol=1e-6, atol=1e-6)
    for i in range(B):
        alone = log_likelihood(SDE, conditioned(slice(i, i + 1)), x[i : i + 1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.log_prob[i : i + 1], alone.log_prob, rtol=0, atol=1e-6)


def test_calibration_gives_draw_i_the_conditions_of_sample_i_in_turn():
    """A network that says where a condition and its noise do not belong together: the noise carries its own number."""
    seen = []

    def labelled(x, t, labels):
        seen.append(len(labels))
        assert len(labels) == len(x)
        return eps(x, t, labels)

    made = calibrate(SDE, as_score(labelled, SDE, "eps").given(LABELS), (B, 2), nfe=5, noises=32, iterations=5, batch=8)
    assert set(seen) > {2, 8}
    assert made.error <= made.start_error
    shuffled = []

    def spy(x, t, labels):
        shuffled.append(labels)
        return eps(x, t, labels)

    calibrate(SDE, as_score(spy, SDE, "eps").given(LABELS), (B, 2), nfe=5, noises=8, iterations=1, batch=4)
    assert torch.equal(shuffled[0], LABELS[torch.arange(len(shuffled[0])) % B])


def test_others_are_passed_as_they_are():
    got = {}
    table, shared = torch.zeros(7, 3), torch.zeros(1, 4)

    def spy(x, t, labels, flag, *, ids, one, number):
        got.update(labels=labels, flag=flag, ids=ids, one=one, number=number)
        return x

    score = as_score(spy, SDE, "eps").given(LABELS, True, ids=table, one=shared, number=torch.tensor(2.5))
    ode_sample(SDE, score, (B, 2), rtol=1e-2, atol=1e-2, seed=0)
    assert got["flag"] is True
    assert got["ids"] is table
    assert got["one"] is shared
    assert float(got["number"]) == 2.5


def test_one_label_for_all_and_none():
    seen = []

    def spy(x, t, *labels):
        seen.append(labels)
        return x

    score = as_score(spy, SDE, "eps")
    x = torch.ones(3, 2)
    score.given(4)(x, 0.5)
    score.given(torch.tensor(4))(x, 0.5)
    score.given(4).given()(x, 0.5)
    score.given(None)(x, 0.5)
    assert [y.tolist() for (y,) in seen[:2]] == [[4, 4, 4]] * 2
    assert seen[2:] == [(), ()]


@pytest.mark.parametrize("condition", [torch.arange(4), torch.zeros(4, 77, 768)])
def test_conditions_of_another_batch_say_so_before_the_first_step(condition):
    calls = []

    def spy(x, t, condition):
        calls.append(1)
        return x

    score = as_score(spy, SDE, "eps").given(condition)
    message = r"conditions were given for 4 samples, and x has 3.*functools\.partial"
    for run in (
        lambda: sample(SDE, score, (3, 2), nfe=5, seed=0),
        lambda: ode_sample(SDE, score, (3, 2), seed=0),
        lambda: sde_sample(SDE, score, (3, 2), seed=0),
        lambda: log_likelihood(SDE, score, torch.ones(3, 2)),
        lambda: calibrate(SDE, score, (3, 2), nfe=5, noises=8),
        lambda: score(torch.ones(3, 2), 0.5),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    assert not calls
    shared = as_score(functools.partial(spy, condition=condition), SDE, "eps")
    assert sample(SDE, shared, (3, 2), nfe=5, seed=0).shape == (3, 2)


def test_conditions_do_not_leak_from_one_run_into_the_next():
    score = conditioned()
    first = ode_sample(SDE, score, (B, 3), seed=0, rtol=1e-2, atol=1e-2)
    sample(SDE, score, (B, 3), nfe=5, seed=1)
    assert torch.equal(ode_sample(SDE, score, (B, 3), seed=0, rtol=1e-2, atol=1e-2), first)
    plain = ode_sample(SDE, gaussian_score(SDE), (2, 3), seed=0)
    assert plain.shape == (2, 3)


def test_a_graph_made_again_has_the_conditions_that_it_had():
    """In the backward pass nobody is within the solver's loop any more."""
    x_T = SDE.prior_sample((B, 3), seed=0, dtype=torch.float64)
    slopes = []
    for differentiable in (True, "checkpoint"):
        leaf = x_T.clone().requires_grad_()
        x = ode_sample(
            SDE, conditioned(), x_T.shape, x_T=leaf, rtol=1e-3, atol=1e-3, differentiable=differentiable
        )  # fmt: skip
        slopes.append(torch.autograd.grad((x**3).sum(), leaf)[0])
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


def test_conditions_in_mappings_of_any_kind_follow_too():
    """Transformers' batches are no dicts."""
    batch = collections.UserDict({"labels": LABELS, "more": collections.OrderedDict(shift=torch.arange(5.0))})

    def network(x, t, batch):
        return eps(x, t, batch["labels"].double() + batch["more"]["shift"].double())

    def draw(batch, rows, ids):
        score = as_score(network, SDE, "eps").given(batch)
        return ode_sample(SDE, score, (rows, 2), rtol=1e-3, atol=1e-3, seed=0, ids=ids, dtype=torch.float64)

    x = draw(batch, B, None)
    for i in range(B):
        one = {"labels": LABELS[i : i + 1], "more": {"shift": torch.tensor([float(i)])}}
        torch.testing.assert_close(draw(one, 1, [i]), x[i : i + 1], rtol=0, atol=1e-6)
    assert torch.equal(batch["labels"], LABELS)  # the user's own is left alone
    arrays = as_score(lambda x, t, y: eps(x, t, y), SDE, "eps").given(LABELS.numpy())
    tensors = as_score(lambda x, t, y: eps(x, t, y), SDE, "eps").given(LABELS)
    assert torch.equal(sample(SDE, arrays, (B, 2), nfe=4, seed=0), sample(SDE, tensors, (B, 2), nfe=4, seed=0))
