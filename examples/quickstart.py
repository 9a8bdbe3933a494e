"""Sample a Gaussian mixture three ways, score the samples with the exact likelihood, and draw them."""

import math

import matplotlib.pyplot as plt
import torch

from sdekit import VPSDE, GaussianMixture, log_likelihood, ode_sample, pc_sample, sample

angles = torch.arange(8) * math.pi / 4
data = GaussianMixture(2 * torch.stack([angles.cos(), angles.sin()], 1), 0.02 * torch.eye(2).expand(8, 2, 2))
sde, n = VPSDE(), 2000
score = data.score(sde)  # closed form; as_score(network, sde, predicts="eps") for a trained one

draws = {
    "dpmpp_2m, 20 evaluations": sample(sde, score, (n, 2), "dpmpp_2m", nfe=20, seed=0),
    "adaptive flow, tolerance 1e-5": ode_sample(sde, score, (n, 2), seed=0),
    "predictor-corrector, 500 steps": pc_sample(sde, score, (n, 2), steps=500, seed=0),
}
likelihood = log_likelihood(sde, score, data.sample(n, seed=1))
print(f"mean log-likelihood of data: {likelihood.log_prob.mean():.3f} nats, {likelihood.nfe} network evaluations")

figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharex=True, sharey=True, layout="constrained")
for axis, (name, x) in zip(axes, draws.items(), strict=True):
    axis.scatter(*x.T.numpy(), c=data.log_prob(x).numpy(), s=4, cmap="viridis", vmin=-8, vmax=0)
    axis.set(title=name, aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
figure.savefig("quickstart.png", dpi=120)
