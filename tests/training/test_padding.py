"""Training on padded sets: noise and loss are of what is real."""

import pytest
import torch

from sdekit import VPSDE, BetaTable, as_score
from sdekit.batch import padded
from sdekit.training import denoising, explicit, finite_difference, implicit, sliced, train, variational
from sdekit.training.networks import seeded

SETS = torch.tensor([3, 1, 4, 2])[torch.arange(64) % 4]  # how many points each set has
REAL = torch.arange(4) < SETS[:, None]


class Points(torch.nn.Module):
    """Each point by itself, from its noisy place and the time; NaN where nothing is."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Linear(3, 2)
        self.seen = []

    def forward(self, x, t, real):
        self.seen.append((x.detach().clone(), real))
        out = self.layers(torch.cat([x, t.to(x)[:, None, None].expand(*x.shape[:2], 1)], 2))
        return torch.where(real[..., None], out, torch.nan)


@pytest.mark.parametrize(
    "objective",
    [denoising(), denoising("min_snr"), implicit(), sliced(), finite_difference(), explicit(lambda x, t: -x)],
    ids=["denoising", "min_snr", "implicit", "sliced", "finite_difference", "explicit"],
)
def test_the_loss_of_padded_sets_is_that_of_each_without_padding(objective):
    """Noise is 0 in the padding, and an item's loss is the mean over its own entries; what the network says of the
    padding, NaN, is nowhere.
    """
    x = torch.randn(64, 4, 2, generator=torch.Generator().manual_seed(1))
    network, sde = seeded(Points, 0, {}), VPSDE()
    losses = []

    def watched(score, x0, t, normal):
        draws = [normal() for _ in range(2)]
        assert all((z[~score.conditions.all[0][0]] == 0).all() for z in draws)
        loss = objective(score, x0, t, iter(draws).__next__)
        for i, real in enumerate(score.conditions.all[0][0]):
            alone = as_score(network, sde, score.predicts).given(torch.ones(1, int(real.sum()), dtype=torch.bool))
            mine = iter([z[i : i + 1, real] for z in draws])
            with padded(None):
                one = objective(alone, x0[i : i + 1, real], t[i : i + 1], mine.__next__)
            losses.append((float(loss[i].detach()), float(one.detach())))
        return loss

    trained = train(
        network, sde, torch.where(REAL[..., None], x, 9.0), labels=REAL, mask=0, predicts="v", objective=watched,
        steps=2, batch=8, device="cpu",
    )  # fmt: skip
    assert torch.isfinite(trained.losses).all()
    assert len(losses) == 16
    for got, alone in losses:
        assert got == pytest.approx(alone, rel=1e-4, abs=1e-5)
    for x_t, real in network.seen[:1]:
        assert (x_t[~real] == 0).all()


def test_a_score_of_padded_sets_is_learnt_as_without_padding():
    """Points of N(0, 0.25): a network of each point's own learns E[x_0|x_t] whatever lies in the padding."""
    x = 0.5 * torch.randn(64, 4, 2, generator=torch.Generator().manual_seed(1))
    found = []
    for filled in (0.0, 50.0):
        network = seeded(Points, 0, {})
        data = torch.where(REAL[..., None], x, filled)
        found.append(train(network, VPSDE(), data, labels=REAL, mask=0, steps=30, batch=16, lr=0.05, device="cpu"))
    assert torch.equal(found[0].losses, found[1].losses)
    assert all(
        torch.equal(a, b) for a, b in zip(found[0].network.parameters(), found[1].network.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": 1}, "mask = 1 names a condition, from 0, and the data have 1"),
        ({"mask": True}, "mask must be a whole number"),
        (
            {"mask": 0, "labels": torch.zeros(64, dtype=torch.int64), "label_drop": 0.0},
            "mask must be a tensor of torch.bool",
        ),
        ({"mask": 0, "objective": variational()}, "mask leaves some out"),
    ],
)
def test_masks_that_are_none(options, message):
    betas = BetaTable(torch.linspace(1e-4, 0.02, 1000))
    options = {"labels": REAL, "times": "table", **options}
    with pytest.raises((TypeError, ValueError), match=message):
        train(seeded(Points, 0, {}), betas, torch.zeros(64, 4, 2), steps=1, batch=8, device="cpu", **options)


@pytest.mark.parametrize("filled", [0.0, 999.0, torch.nan])
def test_what_lies_in_the_padding_is_no_part_of_the_data(filled, caplog):
    """Neither of their size, nor of whether they are finite."""
    x = 0.3 * torch.randn(64, 4, 2, generator=torch.Generator().manual_seed(1))
    data = torch.where(REAL[..., None], x, filled)
    with caplog.at_level("WARNING", "sdekit"):
        trained = train(seeded(Points, 0, {}), VPSDE(), data, labels=REAL, mask=0, steps=2, batch=8, device="cpu")
    assert torch.isfinite(trained.losses).all()
    assert caplog.messages == []
    sparse = torch.zeros(64, 60, dtype=torch.bool)
    sparse[:, 7] = True
    data = torch.where(sparse[..., None], x[:, :1], 0.0)
    train(seeded(Points, 0, {}), VPSDE(), data, labels=sparse, mask=0, steps=1, batch=8, device="cpu")
    assert caplog.messages == []
