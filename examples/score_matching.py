"""Five ways to learn a score, one mixture whose score is known: what each learns, and what a step costs.

Explicit score matching needs the score itself; implicit pays a divergence; sliced and finite differences estimate
that; denoising replaces it by what noise was added, and is what everybody uses. The same network, data and steps.
"""

import time

import matplotlib.pyplot as plt
import torch

from sdekit import VESDE, GaussianMixture, as_score
from sdekit.training import build, denoising, explicit, finite_difference, implicit, sliced, train

sde = VESDE(sigma_min=0.05, sigma_max=4.0)
data = GaussianMixture([[-1.5, -0.5], [1.2, -0.8], [0.2, 1.4]], torch.eye(2).repeat(3, 1, 1) * 0.08, [0.4, 0.3, 0.3])
exact, samples = data.score(sde), data.sample(20_000, seed=0).float()
LEVEL, WAYS = 0.4, {
    "explicit": explicit(exact), "denoising": denoising(), "implicit": implicit(),
    "sliced": sliced(), "finite differences": finite_difference(),
}  # fmt: skip
t = float(sde.inverse_half_log_snr(-torch.tensor(LEVEL).log()))
test = sde.perturb(data.sample(4000, seed=1).float(), t, seed=2)
truth = exact(test, t)

axis = torch.linspace(-3, 3, 21)
mesh = torch.cartesian_prod(axis, axis)
figure, axes = plt.subplots(2, 3, figsize=(12, 8), layout="constrained", sharex=True, sharey=True)
fields = {"exact": exact(mesh, t)}
for name, objective in WAYS.items():
    start = time.perf_counter()
    network = train(build("MLP", dim=2, width=64), sde, samples, predicts="eps", objective=objective, steps=700,
                    batch=256, lr=4e-3).network  # fmt: skip
    seconds = time.perf_counter() - start
    score = as_score(network, sde, predicts="eps")
    with torch.no_grad():
        error = float(((score(test, t) - truth).square().mean() / truth.square().mean()).sqrt())
        fields[f"{name}: off by {error:.1%}"] = score(mesh, t)
    print(f"{name}: score off by {error:.3f} of its size at sigma = {LEVEL:g}, {1000 * seconds / 700:.1f} ms a step")
for ax, (name, field) in zip(axes.flat, fields.items(), strict=True):
    ax.quiver(*mesh.T, *field.T, field.norm(dim=1), cmap="viridis", scale=90, width=0.004)
    ax.set(title=name, xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
figure.savefig("score_matching.png", dpi=110)
