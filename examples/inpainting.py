"""The lower half of a digit from its upper half: draws of what it may be, and where nobody can know."""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from sdekit import Sampler, load_pretrained, sample
from sdekit.posterior import inpainting, posterior_sample, posterior_score, replaced
from sdekit.solvers.steppers import RULES

sde, score = load_pretrained("digits")  # knows nothing of halves: one unconditional model for every question
draws, std = 3, 0.2
truth = torch.tensor(load_digits().images[[0, 2, 4, 9]], dtype=torch.float32)[:, None] / 8 - 1
mask = torch.zeros(1, 8, 8, dtype=torch.bool)
mask[:, :4] = True
y = truth + std * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
each = y.repeat_interleave(draws, 0)  # every draw's own y
seen = inpainting(mask, each, std)  # y = A x_0 + std eps, A the upper half

found = posterior_sample(sde, score, seen, each.shape, particles=4, sampler="euler_maruyama", steps=20, seed=0)
dps = sample(sde, posterior_score(sde, score, seen, "dps"), each.shape, "ancestral", nfe=100, seed=0)
again = Sampler(replaced(RULES["ancestral"], mask, each, std=std), steps=100)  # puts in what is seen, at every step
methods = {"posterior_sample": found.x, "DPS": dps, "replacement": sample(sde, score, each.shape, again, seed=0)}

# Of right draws x, (x, y) are distributed as (x_0, y): the misfit |y - A x|/std is 1, but for chance.
for name, x in {"truth": truth.repeat_interleave(draws, 0), **methods}.items():
    print(f"{name}: misfit {((each - x)[:, mask] / std).square().mean().sqrt():.2f}, 1 is right")

# Where the draws differ, nobody can know: mean and variance over a digit's draws, of all their weighted particles.
w = found.weights.reshape(4, -1, 1, 1, 1).float() / draws
p = found.particles.reshape(4, -1, 1, 8, 8)
mean = (w * p).sum(1)
variance = (w * (p - mean[:, None]) ** 2).sum(1)
off = (truth - mean)[:, ~mask].square().mean().sqrt()
print(f"unseen half: unsure by {variance[:, ~mask].mean().sqrt():.2f}, off by {off:.2f}; effective particles "
      f"{found.ess.mean():.1f} of {found.weights.shape[1]}")  # fmt: skip

columns = {"truth": truth, "seen": y.where(mask, torch.tensor(torch.nan)), **methods, "unsure by": variance.sqrt()}
figure, axes = plt.subplots(1, 6, figsize=(12, 4.6), width_ratios=[1, 1, 3, 3, 3, 1], layout="constrained")
for axis, (name, x) in zip(axes, columns.items(), strict=True):
    tiles = torch.nn.functional.pad(x.reshape(4, -1, 8, 8), (1, 1, 1, 1), value=torch.nan)  # (4, draws, 10, 10)
    colours = {"cmap": "magma", "vmin": 0} if name == "unsure by" else {"cmap": "gray_r", "vmin": -1, "vmax": 1}
    axis.imshow(tiles.transpose(1, 2).reshape(40, -1), **colours)
    axis.set_facecolor("#dfe7ef")  # what nobody has seen
    axis.set(title=name, xticks=[], yticks=[])
figure.savefig("inpainting.png", dpi=120)
