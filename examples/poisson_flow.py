"""Charges in the plane: the field lines of PFGM++ from a far sphere to the data, for D = 1 to infinity.

The data are charges in a space of D more dimensions, of whose field only the distance r to the data's plane is left.
Here r = sigma sqrt(D), so that every D has the same levels; D -> infinity is diffusion, x = x_0 + sigma eps. The field
of a finite set is a formula, so that one sees that lines end where they must: on the data.
"""

import math

import matplotlib.pyplot as plt
import torch

from sdekit import HeatODE, PointSet, PoissonFlow, ode_sample, solve
from sdekit.sampling.grids import make_grid

angle = torch.arange(5, dtype=torch.float64) * 2 * math.pi / 5 + 0.3
points = torch.stack([angle.cos(), 0.6 * angle.sin()], 1) * torch.tensor([1.3, 1.0, 0.7, 1.1, 0.9]).double()[:, None]
charges = PointSet(points)
DIMENSIONS, N = (1.0, 8.0, 128.0, math.inf), 4000

figure, axes = plt.subplots(1, 4, figsize=(14, 4), layout="constrained", sharey=True)
for ax, D in zip(axes, DIMENSIONS, strict=True):
    flow = PoissonFlow(D, T=20.0)
    field = charges.score(flow)
    x = ode_sample(flow, field, (N, 2), rtol=1e-6, atol=1e-6, seed=0, dtype=torch.float64)
    near = torch.cdist(x, points)
    share = torch.bincount(near.argmin(1), minlength=len(points)) / N
    # The kernel's tail is as heavy at t_min: with D = 1 a few in ten thousand are still on their way.
    there = float((near.min(1).values < 0.01).double().mean())
    print(f"D = {D:g}: {there:.4f} of the samples are on a charge; each charge draws {float(share.min()):.3f} to "
          f"{float(share.max()):.3f} of them (even: {1 / len(points):.3f})")  # fmt: skip
    # Lines that begin evenly on a circle at one level: r is drawn upwards, x_1 to the right.
    start = torch.linspace(-3.0, 3.0, 41, dtype=torch.float64)
    x_T = torch.stack([start, 0.25 * torch.ones_like(start)], 1)
    level = 1.5
    grid = [t for t in make_grid(flow, "karras", 300).tolist() if t < level]
    run = solve(flow.probability_flow(field), x_T, [level, *grid], "heun", keep=150)
    ax.plot(run.trajectory.x[..., 0], run.trajectory.t, color="tab:blue", lw=0.6)
    ax.plot(points[:, 0], torch.zeros(len(points)), "o", color="tab:red", ms=5, clip_on=False)
    ax.set(
        title=f"D = {D:g}" if math.isfinite(D) else "D infinite: diffusion",
        xlabel="$x_1$",
        xlim=(-3, 3),
        ylim=(0, level),
    )
axes[0].set_ylabel(r"level $\sigma = r/\sqrt{D}$")
figure.savefig("poisson_flow.png", dpi=110)

many, heat = PoissonFlow(2.0**20), HeatODE()
x_T = heat.prior_sample((100, 2), seed=1, dtype=torch.float64)
ends = [
    solve(sde.probability_flow(charges.score(sde)), x_T, [sde.T, 0.5], "adams", rtol=1e-8, atol=1e-8).x
    for sde in (many, heat)
]
print(f"D = 2^20: at sigma = 0.5 the flow is within {float((ends[0] - ends[1]).abs().max()):.1e} of diffusion's")
