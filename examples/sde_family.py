"""One data set, every amount of noise: churn 0 (the flow) to 1.5 has the same marginals, and other paths.

dx = [f x - (1 + churn^2)/2 g^2 score] dt + churn g dW, backwards in time. The score is exact, so what the marginals are
off by is the solver's and the number of samples'. Last, the reverse of the reverse: a path of the flow, run up again.
"""

import matplotlib.pyplot as plt
import torch

from sdekit import VPSDE, GaussianMixture, Noise, solve
from sdekit.sampling.grids import make_grid

sde = VPSDE()
data = GaussianMixture([[-1.2], [0.3], [1.1]], [[[0.02]], [[0.05]], [[0.01]]], [0.35, 0.4, 0.25])
score = data.score(sde)
CHURNS, TIMES, N = (0.0, 0.5, 1.0, 1.5), (1.0, 0.3, 0.1, 0.0), 20_000
grid = make_grid(sde, "karras", 400)
x_T = sde.prior_sample((N, 1), seed=0)


def cdf(t, x):
    """P(x_t <= x), exactly."""
    law = data.at(sde, max(t, sde.t_min))
    z = (x - law.means.T) / law.covs.flatten().sqrt()
    return (law.weights * torch.special.ndtr(z)).sum(1)


def off(x, t):
    """Kolmogorov-Smirnov: the largest difference of the samples' distribution function from the exact one."""
    y = x.flatten().double().sort().values
    exact, steps = cdf(t, y[:, None]), torch.arange(len(y) + 1) / len(y)
    return float(torch.maximum((exact - steps[:-1]).abs(), (exact - steps[1:]).abs()).max())


figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained", sharey="row")
for (path, law), churn in zip(axes.T, CHURNS, strict=True):
    run = solve(sde.reverse(score, churn), x_T, grid, "heun", noise=Noise(x_T, 1), keep=201)
    worst = max(off(x, float(t)) for t, x in zip(run.trajectory.t[20::20], run.trajectory.x[20::20], strict=True))
    print(f"churn {churn:g}: marginals off by {worst:.4f} at worst, of 10 times (chance: {1.63 / N**0.5:.4f})")
    path.plot(run.trajectory.t, run.trajectory.x[:, :12, 0], lw=0.7)
    path.set(title=f"churn {churn:g}", xlabel="t", ylim=(-3.2, 3.2), xlim=(1, 0))
    at = torch.linspace(-2.2, 2.2, 400)
    law.hist(run.x.flatten(), bins=120, range=(-2.2, 2.2), density=True, color="0.8")
    law.plot(at, data.at(sde, sde.t_min).log_prob(at[:, None]).exp(), lw=1.2)
    law.set(xlabel="$x_0$")
axes[0, 0].set_ylabel("12 paths from one and the same noise")
axes[1, 0].set_ylabel("samples, and the exact density")
figure.savefig("sde_family.png", dpi=110)

flow = sde.probability_flow(score)
down = solve(flow, x_T[:100].double(), [sde.T, sde.t_min], "adams", rtol=1e-8, atol=1e-8).x
up = solve(flow, down, [sde.t_min, sde.T], "adams", rtol=1e-8, atol=1e-8).x
print(f"the reverse of the reverse: the flow comes back to its noise within {float((up - x_T[:100]).abs().max()):.1e}")
