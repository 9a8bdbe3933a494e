"""Sets of any size in one batch: polygons of 2 to 5 corners, in no order, by one network.

A batch is padded to the largest set, and a mask says what is real: to the network, which lets no point look at the
padding, and to training, samplers and likelihood, to which each set is then what it would be alone.
"""

from itertools import permutations
from math import lgamma, log, pi

import matplotlib.pyplot as plt
import torch
from torch import nn

from sdekit import RectifiedFlow, as_score, log_likelihood, sample
from sdekit.training import train
from sdekit.training.networks import time_features

MOST, STD = 5, 0.1  # corners, and how far each lies from where it belongs
generator = torch.Generator().manual_seed(0)


def corners(n, angle):
    """(len(angle), n, 2): regular polygons about 0 in the unit circle."""
    phi = angle[:, None] + 2 * pi * torch.arange(n) / n
    return torch.stack([phi.cos(), phi.sin()], 2)


def polygons(sizes):
    """Sets of these sizes, at any angle, their corners in any order, padded; and the mask (B, MOST)."""
    mask = torch.arange(MOST) < sizes[:, None]
    x = torch.zeros(len(sizes), MOST, 2)
    for n in range(2, MOST + 1):
        rows = (sizes == n).nonzero()[:, 0]
        angle = 2 * pi * torch.rand(len(rows), generator=generator)
        order = torch.rand(len(rows), n, generator=generator).argsort(1)
        exact = corners(n, angle).gather(1, order[:, :, None].expand(-1, -1, 2))
        x[rows, :n] = exact + STD * torch.randn(exact.shape, generator=generator)
    return x, mask


def exact_log_prob(points):
    """log p of one set: the mean over all orders of its corners and over the angle, by a sum that is exact."""
    n = len(points)
    where = corners(n, 2 * pi * torch.arange(360) / 360 / n)  # a turn by one corner is another order
    off = (points[:, None, None] - where).square().sum(-1) / (-2 * STD**2)  # (point, angle, corner)
    orders = torch.tensor(list(permutations(range(n))))
    each = torch.stack([off[i][:, orders[:, i]] for i in range(n)]).sum(0)  # (angle, order)
    return each.flatten().logsumexp(0) - lgamma(n + 1) - log(360) - n * log(2 * pi * STD**2)


class Attention(nn.Module):
    """Points look at each other, but not at the padding; in whatever order they come."""

    def __init__(self, width=64, layers=2):
        super().__init__()
        self.first, self.time, self.last = nn.Linear(2, width), nn.Linear(32, width), nn.Linear(width, 2)
        how = {"dim_feedforward": 2 * width, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, **how) for _ in range(layers))

    def forward(self, x, t, mask):
        h = self.first(x) + self.time(time_features(t, 32))[:, None]
        for block in self.blocks:
            h = block(h, src_key_padding_mask=~mask)
        return self.last(h)


torch.manual_seed(0)
sde = RectifiedFlow()
data, real = polygons(torch.randint(2, MOST + 1, (8000,), generator=generator))
network = train(Attention(), sde, data, labels=real, mask=0, predicts="flow", steps=1200, batch=128, lr=3e-3).network
score = as_score(network, sde, "flow")

sizes = torch.arange(2, MOST + 1).repeat_interleave(8)
mask = torch.arange(MOST) < sizes[:, None]
x = sample(sde, score.given(mask), (len(sizes), MOST, 2), nfe=20, seed=0, mask=mask)
alone = sample(sde, score.given(mask[:1, :2]), (1, 2, 2), nfe=20, seed=0)
print(f"padded or not, a set differs by {float((x[0, :2] - alone[0]).abs().max()):.1e}")

held, mask_held = polygons(torch.arange(2, MOST + 1).repeat_interleave(16))
found = log_likelihood(sde, score.given(mask_held), held, mask=mask_held, rtol=1e-3, atol=1e-3).log_prob
for n in range(2, MOST + 1):
    rows = mask_held.sum(1) == n
    mine, truth = float(found[rows].mean()), sum(float(exact_log_prob(points[:n])) for points in held[rows]) / 16
    print(f"{n} corners: log p {mine:.2f} nats, {truth - mine:.2f} below the exact {truth:.2f}")

figure, axes = plt.subplots(MOST - 1, 8, figsize=(9, 4.8), layout="constrained")
for axis, points, n in zip(axes.flat, x, sizes, strict=True):
    points = points[:n]
    points = points[torch.atan2(points[:, 1], points[:, 0]).argsort()]
    axis.fill(*points.T, fc="#9ecae1", ec="#08519c", lw=1.5)
    axis.plot(*points.T, "o", color="#08519c", ms=4)
    axis.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal", xticks=[], yticks=[])
for axis, n in zip(axes[:, 0], range(2, MOST + 1), strict=True):
    axis.set_ylabel(f"{n} corners")
figure.savefig("sets.png", dpi=120)
