"""Charges and their field lines: PFGM++ from a far sphere to the data, for D = 1 to infinity.

The data are charges in a space of D more dimensions, of whose field only the distance r to the data's plane is left.
Here r = sigma sqrt(D), so that every D has the same levels; D -> infinity is diffusion, x = x_0 + sigma eps. The field
of a finite set is a formula, so that one sees that lines end where they must: on the data.
"""

import math

import matplotlib.pyplot as plt
import torch
from scipy import stats

from sdekit import HeatODE, PointSet, PoissonFlow, ode_sample, solve
from sdekit.sampling.grids import make_grid

points = torch.tensor([[-1.3], [-0.2], [0.1], [1.2]], dtype=torch.float64)
charges = PointSet(points)
DIMENSIONS, N, LEVEL = (1.0, 4.0, 128.0, math.inf), 4000, 3.0

figure, axes = plt.subplots(1, 4, figsize=(14, 4), layout="constrained", sharey=True)
for ax, D in zip(axes, DIMENSIONS, strict=True):
    flow = PoissonFlow(D, T=20.0)
    field = charges.score(flow)
    x = ode_sample(flow, field, (N, 1), rtol=1e-6, atol=1e-6, seed=0, dtype=torch.float64)
    near = torch.cdist(x, points)
    share = torch.bincount(near.argmin(1), minlength=len(points)) / N
    # The kernel's tail is as heavy at t_min: with D = 1 a few in ten thousand are still on their way.
    there = float((near.min(1).values < 0.01).double().mean())
    print(f"D = {D:g}: {there:.4f} of the samples are on a charge; each charge draws {float(share.min()):.3f} to "
          f"{float(share.max()):.3f} of them (even: {1 / len(points):.3f})")  # fmt: skip
    # Lines that a fiftieth of the probability lies between, from the prior at T; drawn where sigma < 3.
    u = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    x_T = flow.T * torch.from_numpy(stats.t(D).ppf(u) if math.isfinite(D) else stats.norm.ppf(u))[:, None]
    run = solve(flow.probability_flow(field), x_T, make_grid(flow, "karras", 400), "heun", keep=401)
    seen = run.trajectory.t < LEVEL
    ax.plot(run.trajectory.x[seen, :, 0], run.trajectory.t[seen], color="tab:blue", lw=0.6)
    ax.plot(points[:, 0], torch.zeros(len(points)), "o", color="tab:red", ms=5, clip_on=False)
    title = f"D = {D:g}" if math.isfinite(D) else "D infinite: diffusion"
    ax.set(title=title, xlabel="x", xlim=(-9, 9), ylim=(0, LEVEL))
axes[0].set_ylabel(r"level $\sigma = r/\sqrt{D}$")
figure.savefig("poisson_flow.png", dpi=110)

many, heat = PoissonFlow(2.0**20), HeatODE()
x_T = heat.prior_sample((100, 1), seed=1, dtype=torch.float64)
ends = [
    solve(sde.probability_flow(charges.score(sde)), x_T, [sde.T, 0.5], "adams", rtol=1e-8, atol=1e-8).x
    for sde in (many, heat)
]
print(f"D = 2^20: at sigma = 0.5 the flow is within {float((ends[0] - ends[1]).abs().max()):.1e} of diffusion's")
