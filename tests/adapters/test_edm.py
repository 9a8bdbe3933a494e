"""EDM's denoisers: the mixture's E[x_0|x] in a network that is called as theirs are."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sdekit.adapters.edm import from_edm
from tests.adapters.exact import LABELS, B, agrees, predictions, samples, state


class Precond(nn.Module):
    """As EDMPrecond: rows of labels or none, sigma of any shape, nothing but x_0."""

    def __init__(self, label_dim=0, sigma_min=0, sigma_max=float("inf")):
        super().__init__()
        self.label_dim, self.sigma_min, self.sigma_max = label_dim, sigma_min, sigma_max

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        self.told = (x.dtype, force_fp32)
        sigma = sigma.reshape(-1)
        if self.label_dim == 0 or class_labels is None:
            return predictions(x, 1.0, sigma)[0]
        rows = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        assert rows.shape == (len(x), self.label_dim)
        return predictions(x, 1.0, sigma, rows.argmax(1))[0]


def test_the_score_is_exact():
    sde, score = from_edm(Precond())
    assert (sde.t_min, sde.T) == (0.002, 80.0)
    agrees(sde, score, lambda t: (1.0, t), [0.05, 0.7, 9.0])
    for sampler in ("unipc_2", "edm", "ddim"):
        samples(sde, score, sampler)


@pytest.mark.parametrize(
    ("network", "options", "ends"),
    [
        (Precond(sigma_min=0.02, sigma_max=100), {}, (0.02, 80.0)),
        (Precond(sigma_min=0.01, sigma_max=50.0), {}, (0.01, 50.0)),
        (Precond(sigma_min=0.02, sigma_max=100), {"sigma_max": 100}, (0.02, 100.0)),
        (lambda x, sigma: predictions(x, 1.0, sigma)[0], {"sigma_min": 0.01}, (0.01, 80.0)),
    ],
    ids=["ve", "narrow", "asked", "function"],
)
def test_levels_are_what_network_and_sampler_agree_on(network, options, ends):
    sde, score = from_edm(network, **options)
    assert (sde.t_min, sde.T) == ends
    agrees(sde, score, lambda t: (1.0, t), [1.0])
    samples(sde, score)


def test_labels_become_rows_and_follow_their_samples():
    rows = nn.functional.one_hot(LABELS, 3).float()
    for labels in (LABELS, rows):
        sde, score = from_edm(Precond(3), class_labels=labels)
        agrees(sde, score, lambda t: (1.0, t), [0.3], LABELS)
    agrees(sde, from_edm(Precond(3))[1].given(class_labels=1), lambda t: (1.0, t), [0.3], torch.ones(B).long())
    agrees(sde, score.given(), lambda t: (1.0, t), [0.3])
    network = Precond()
    from_edm(network)[1].given(force_fp32=True)(state(1.0, 2.0), 2.0)
    assert network.told[1]


def test_a_network_of_float16_weights_gets_its_state_in_float32():
    network = Precond()
    network.weight = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    for each in (network, copy.deepcopy(network)):
        sde, score = from_edm(each)
        score(state(1.0, 80.0).float(), 80.0)
        assert each.told[0] is torch.float32
    assert pickle.loads(pickle.dumps(score)).sde.T == sde.T == 80.0


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="network must be a denoiser.*got dict"):
        from_edm({"ema": Precond()})
    with pytest.raises(TypeError, match="the class Precond"):
        from_edm(Precond)
    with pytest.raises(ValueError, match="sigma_min must be smaller than sigma_max, got 90 and 80"):
        from_edm(Precond(), sigma_min=90)
    with pytest.raises(ValueError, match="sigma_max must be a finite number > 0, got inf"):
        from_edm(Precond(), sigma_max=float("inf"))
    with pytest.raises(ValueError, match="class_labels were given, and the network has no classes"):
        from_edm(Precond(), class_labels=LABELS)[1](state(1.0, 1.0), 1.0)
