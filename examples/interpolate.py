"""Walk between two data along the probability flow: encode both, turn one latent into the other, decode."""

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from sdekit import VPSDE, GaussianMixture, interpolate, load_pretrained, round_trip_error

arc = torch.linspace(0, math.pi, 12)  # two moons, a dozen Gaussians each
upper = torch.stack([arc.cos() - 0.5, arc.sin() - 0.25], 1)
moons = GaussianMixture(1.5 * torch.cat([upper, -upper]), 0.02 * torch.eye(2).expand(24, 2, 2))
sde = VPSDE()
a = torch.tensor([[-2.2, 0.1], [-1.7, 0.7], [-0.8, 1.1], [0.1, 0.9]])
b = torch.tensor([[2.1, -0.4], [-0.6, -0.3], [1.8, -0.6], [0.6, -1.1]])
paths = interpolate(sde, moons.score(sde), a, b, torch.linspace(0, 1, 200), rtol=1e-4, atol=1e-4)
error = round_trip_error(sde, moons.score(sde), torch.cat([a, b]), rtol=1e-4, atol=1e-4)
print(f"moons: round-trip error {error.max():.1e}")

images = torch.tensor(load_digits().images[:12], dtype=torch.float32).reshape(2, 6, 1, 8, 8) / 8 - 1
model, score = load_pretrained("digits")
weights = torch.linspace(0, 1, 9)
rows = interpolate(model, score, *images, weights, rtol=1e-3, atol=1e-3, denoise=True)  # (9, 6, 1, 8, 8)
error = round_trip_error(model, score, images[0], rtol=1e-3, atol=1e-3)
print(f"digits: round-trip error {error.max():.1e}")

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=[1.25, 1], layout="constrained")
left.scatter(*moons.sample(3000, seed=0).T, s=3, color="0.85")
for path in paths.unbind(1):
    left.plot(*path[[0, -1]].T, ":", color="0.5", lw=1)
    left.scatter(*path.T, c=torch.linspace(0, 1, 200), cmap="plasma", s=6)
    left.scatter(*path[[0, -1]].T, c=[0, 1], cmap="plasma", s=60, edgecolor="k", zorder=3)
left.set(title="between two points: by the flow, and straight", aspect="equal", xticks=[], yticks=[])
picture = torch.nn.functional.pad(rows.clamp(-1, 1), (1, 1, 1, 1), value=-1.0)[:, :, 0]
right.imshow(picture.permute(1, 2, 0, 3).reshape(60, 90), cmap="gray_r", vmin=-1, vmax=1)
right.set(title="between two digits", xticks=[4.5, 44.5, 84.5], xticklabels=["w = 0", "1/2", "1"], yticks=[])
figure.savefig("interpolate.png", dpi=120)
