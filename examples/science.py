"""What may the parameters be, given what was measured? An epidemic's two rates, from ten noisy counts.

Simulation-based inference: draw parameters from the prior, simulate, and learn the score of p(parameters | counts) from
the pairs; a loop of one's own, ten lines. Then any count gets its posterior in twenty evaluations. What makes it
science is the check: over many simulations, the truth must lie in the 50 % and 90 % regions that often.
"""

import math
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch import nn

from sdekit import VPSDE, as_score, sample
from sdekit.training import EMA

DAYS, NOISE = 10, 0.05


def simulate(theta, noise):
    """The infected share at ten times of an SIR epidemic, with an error of measurement: theta (B, 2) -> (B, 10)."""
    infection, recovery = (0.5 * theta).exp().mul(torch.tensor([1.0, 0.35])).unbind(1)  # about 1 and 0.35 a day
    s, i, seen = torch.full_like(infection, 0.99), torch.full_like(infection, 0.01), []
    for _ in range(DAYS):
        for _ in range(20):  # Euler's steps of a tenth of a day
            new, healed = 0.1 * infection * s * i, 0.1 * recovery * i
            s, i = s - new, i + new - healed
        seen.append(i)
    return torch.stack(seen, 1) + NOISE * noise


class Conditional(nn.Module):
    """network(theta_t, t, counts)."""

    def __init__(self, width=128):
        super().__init__()
        sizes = [2 + DAYS + 3, width, width, width, 2]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x, t, counts):
        t = t[:, None]
        return self.layers(torch.cat([x, 5 * counts, t, torch.sin(math.pi * t), torch.cos(math.pi * t)], 1))


torch.manual_seed(0)
sde, network = VPSDE(), Conditional()
theta = torch.randn(50_000, 2)  # the prior, of logarithms of the rates
counts = simulate(theta, torch.randn(len(theta), DAYS))
average, optimizer, steps = EMA(network, 0.999), torch.optim.Adam(network.parameters(), lr=2e-3), 3000
for step in range(steps):
    optimizer.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * step / steps)) / 2
    some = torch.randint(len(theta), (512,))
    t = sde.t_min + (sde.T - sde.t_min) * torch.rand(512)
    eps = torch.randn(512, 2)
    alpha, sigma = (k(t)[:, None] for k in (sde.alpha, sde.sigma))
    v = alpha * eps - sigma * theta[some]
    loss = (network(sde.perturb(theta[some], t, noise=eps), t, counts[some]) - v).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update(network)

# Epidemics that it has not seen, and 200 draws of the posterior of each, in twenty evaluations.
E, DRAWS = 200, 200
truth = torch.randn(E, 2)
measured = simulate(truth, torch.randn(E, DAYS))
score = as_score(average.network, sde, predicts="v").given(measured.repeat_interleave(DRAWS, 0))
with torch.no_grad():
    draws = sample(sde, score, (E * DRAWS, 2), nfe=20, seed=0).reshape(E, DRAWS, 2)
rank = (draws < truth[:, None]).double().mean(1)  # (E, 2), even in [0, 1] where the posteriors are right
levels = torch.linspace(0.05, 0.95, 19)
covered = torch.stack([((rank - 0.5).abs() < level / 2).double().mean() for level in levels])
for level in (0.5, 0.9):
    inside = float(((rank - 0.5).abs() < level / 2).double().mean())
    chance = (level * (1 - level) / E / 2) ** 0.5
    print(f"the truth lies in the {level:.0%} interval in {inside:.3f} of {2 * E} cases (chance: {chance:.3f})")

# The posterior of one of them by quadrature on a grid, prior times likelihood: of the one that is told most about.
one = int(measured.amax(1).argsort()[-20])
axis = torch.linspace(-3, 3, 401)
mesh = torch.cartesian_prod(axis, axis)
log_p = -0.5 * ((simulate(mesh, torch.zeros(())) - measured[one]) / NOISE).square().sum(1) - 0.5 * mesh.square().sum(1)
p = log_p.softmax(0)
mean = (p[:, None] * mesh).sum(0)
std = (p[:, None] * (mesh - mean).square()).sum(0).sqrt()
off = ((draws[one].mean(0) - mean) / std).abs().max()
print(f"one epidemic: the mean is off by {float(off):.2f} standard deviations, "
      f"spreads by a factor of {float((draws[one].std(0) / std).log().abs().max().exp()):.2f}")  # fmt: skip

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
days = range(1, DAYS + 1)
left.plot(days, simulate(draws[one, :60], torch.zeros(())).T, color="tab:blue", lw=0.5, alpha=0.4)
left.plot(days, measured[one], "ko", ms=4, label="measured")
left.set(title="what draws of the posterior predict", xlabel="day", ylabel="infected share")
left.legend()
middle.contour(axis, axis, p.reshape(401, 401).T, colors="0.3", linewidths=0.9)
middle.plot(*draws[one].T, ".", ms=3, alpha=0.6, label="draws")
middle.plot(*truth[one], "r+", ms=12, mew=2, label="truth")
span = [(float(m - 5 * s), float(m + 5 * s)) for m, s in zip(mean, std, strict=True)]
middle.set(title="its posterior (lines: exact)", xlabel="log infection rate, scaled",
           ylabel="log recovery rate, scaled", xlim=span[0], ylim=span[1])  # fmt: skip
middle.legend()
right.plot([0, 1], [0, 1], color="0.6", lw=1)
right.plot(levels, covered, "o-", ms=3)
right.set(
    title=f"coverage, {E} epidemics", xlabel="central interval", ylabel="share that holds the truth", aspect="equal"
)
figure.savefig("science.png", dpi=110)
