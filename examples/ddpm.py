"""DDPM from its table to its likelihood, in the order of the paper, with nothing but public names.

A thousand betas; L_simple; ancestral sampling, step by step; then DDIM on a subsequence of the same table, without
training anew; and the ELBO in bits, term by term. The U-Net is as small, and its training as short, as still draws
digits.
"""

import math

import matplotlib.pyplot as plt
import torch

from sdekit import BetaTable, as_score, sample, variational_bound
from sdekit.evaluation.metrics import frechet_distance, load_feature_extractor
from sdekit.training import build, load_data, train

digits = load_data("digits")  # (1797, 1, 8, 8) in [-1, 1], 17 levels
sde = BetaTable(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))  # alphas_cumprod is alpha^2
alpha, sigma = sde.alpha(1.0), sde.sigma(1.0)
print(f"after 1,000 steps: alpha = {float(alpha):.4f}, log-SNR = {2 * math.log(alpha / sigma):.1f}")

network = build("UNet", channels_in=1, width=16, multipliers=(1, 2), blocks=1)
trained = train(network, sde, digits.items, predicts="eps", times="table", steps=500, batch=64, lr=3e-3, ema=0.99)
score = as_score(trained.network, sde, predicts="eps")
first, last = trained.losses[:100].mean(), trained.losses[-100:].mean()
print(f"L_simple: {float(first):.3f} in the first hundred steps, {float(last):.3f} in the last")

N = 100
features = load_feature_extractor("digits")
real = features(digits.items)
chain = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000  # the table's own times, i/1000
drawn = {}
for name, sampler, times in (
    ("ancestral, 250 steps", "ancestral", chain[::4]),
    ("ancestral, 50 steps", "ancestral", chain[::20]),
    ("DDIM, 50 steps", "ddim", chain[::20]),
    ("DDIM, 10 steps", "ddim", chain[::100]),
):
    x = sample(sde, score, (N, 1, 8, 8), sampler, grid=times, seed=0)
    drawn[name] = x
    print(f"{name}: Fréchet distance {frechet_distance(features(x.clamp(-1, 1)), real):.2f}")

levels = ((digits.items[:16] + 1) * 8).round().long()
bound = variational_bound(sde, score, levels, levels=17, steps=1000, grid=chain, seed=0)
bits = {name: float(term.mean()) / (64 * math.log(2)) for name, term in
        (("prior", bound.prior), ("diffusion", bound.diffusion), ("reconstruction", bound.reconstruction))}  # fmt: skip
print(
    "ELBO: "
    + " + ".join(f"{value:.3f} ({name})" for name, value in bits.items())
    + f" = {sum(bits.values()):.3f} bits a pixel"
)

figure, axes = plt.subplots(1, 5, figsize=(15, 3.4), layout="constrained")
for ax, (name, x) in zip(axes, {"data": digits.items, **drawn}.items(), strict=True):
    tiles = torch.nn.functional.pad(x[:64, 0].reshape(8, 8, 8, 8).clamp(-1, 1), (1, 1, 1, 1), value=-1.0)
    ax.imshow(tiles.permute(0, 2, 1, 3).reshape(80, 80), cmap="gray_r", vmin=-1, vmax=1)
    ax.set(title=name, xticks=[], yticks=[])
figure.savefig("ddpm.png", dpi=110)
