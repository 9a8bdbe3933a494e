"""Ask a class-conditional model for each digit, ever more loudly: what guidance gains, and what it costs."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from sdekit import guidance, sample
from sdekit.training import load_checkpoint

sde, score = load_checkpoint(Path(__file__).parents[1] / "benchmarks" / "networks" / "eps_conditional.safetensors")
NONE, each, scales = 10, 40, (0.0, 1.0, 2.0, 4.0)  # label 10 stands for none: a tenth of its training had no other
labels = torch.arange(10).repeat_interleave(each)  # (400,), each sample's own; they go where the samples go

images, kinds = load_digits(return_X_y=True)
judge = KNeighborsClassifier(1).fit(images, kinds)  # which of 1797 real digits is nearest?


def spread(x, kinds):
    """Standard deviation within a class, over all classes and pixels: how much the images of one digit vary."""
    return torch.stack([x[kinds == k].var(0).mean() for k in range(10)]).mean().sqrt()


rows, shares, spreads = [], [], []
real = spread(torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(kinds))
for scale in scales:
    guided = guidance.classifier_free(score, labels, NONE, scale)  # none + scale (label - none), for any sampler
    x = sample(sde, guided, (len(labels), 1, 8, 8), nfe=20, seed=0)  # the same noise for every scale
    found = judge.predict(((x.flatten(1) + 1) * 8).numpy())
    rows.append(x[5::each, 0])  # one of each digit
    shares.append((found == labels.numpy()).mean())
    spreads.append(spread(x.flatten(1), labels) / real)
    print(f"scale {scale:g}: {shares[-1]:.3f} are what was asked for, spread {spreads[-1]:.2f} of the real digits'")

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.7), width_ratios=[2.6, 1], layout="constrained")
tiles = torch.nn.functional.pad(torch.stack(rows).clamp(-1, 1), (1, 1, 1, 1), value=-1.0)  # (4, 10, 10, 10)
left.imshow(tiles.permute(0, 2, 1, 3).reshape(40, 100), cmap="gray_r", vmin=-1, vmax=1)
left.set(title="asked for each digit, from the same noise at every scale", xticks=range(5, 100, 10),
         xticklabels=range(10), yticks=range(5, 40, 10), yticklabels=[f"scale {s:g}" for s in scales])  # fmt: skip
left.tick_params(length=0)
right.plot(scales, shares, "o-", label="are the digit asked for")
right.plot(scales, spreads, "s-", label="spread / real digits'")
right.axhline(1, color="0.6", lw=1, ls=":")
right.set(title="sharper, and more alike", xlabel="scale", xticks=scales, ylim=(0, 1.45))
right.legend(loc="lower right", fontsize=8)
figure.savefig("guidance.png", dpi=120)
