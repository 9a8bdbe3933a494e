"""Ask for each digit, ever more loudly, in two ways: what guidance gains, and what it costs.

By conditions, of a model that was trained with labels; by a classifier of noisy digits, trained here in seconds, of one
that was not.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.neighbors import KNeighborsClassifier

from sdekit import guidance, load_pretrained, sample
from sdekit.training import build, classification, load_checkpoint, load_data, train

digits = load_data("digits")
NONE, each, scales = 10, 25, (0.0, 1.0, 2.0, 4.0)  # label 10 stands for none: a tenth of its training had no other
labels = torch.arange(10).repeat_interleave(each)  # (250,), each sample's own; they go where the samples go
judge = KNeighborsClassifier(1).fit(digits.items.flatten(1), digits.labels)  # which of 1797 real digits is nearest?

sde, score = load_checkpoint(Path(__file__).parents[1] / "benchmarks" / "networks" / "eps_conditional.safetensors")
plain, unconditional = load_pretrained("digits")
log_prob = build("Classifier", dim=64, classes=10, width=128)  # log p_t(label|x) of x with noise
log_prob = train(log_prob, plain, digits.items, labels=digits.labels, objective=classification(), label_drop=0.0,
                 steps=2000, lr=2e-3).network  # fmt: skip
WAYS = {
    "": (sde, lambda scale: guidance.classifier_free(score, labels, NONE, scale)),  # none + scale (label - none)
    "classifier, ": (plain, lambda w: guidance.classifier_guidance(unconditional, log_prob, w, given=(labels,))),
}


def spread(x, kinds):
    """Standard deviation within a class, over all classes and pixels: how much the images of one digit vary."""
    return torch.stack([x[kinds == k].var(0).mean() for k in range(10)]).mean().sqrt()


figure, axes = plt.subplots(2, 2, figsize=(12, 7.4), width_ratios=[2.6, 1], layout="constrained")
for (left, right), (way, (process, guided)) in zip(axes, WAYS.items(), strict=True):
    rows, shares, spreads = [], [], []
    for scale in scales:
        x = sample(process, guided(scale), (len(labels), 1, 8, 8), nfe=20, seed=0)  # the same noise for every scale
        rows.append(x[5::each, 0])  # one of each digit
        shares.append((judge.predict(x.flatten(1)) == labels.numpy()).mean())
        spreads.append(spread(x.flatten(1), labels) / spread(digits.items.flatten(1), digits.labels))
        print(f"{way}scale {scale:g}: {shares[-1]:.3f} are what was asked for, spread {spreads[-1]:.2f} of the real "
              "digits'")  # fmt: skip
    tiles = torch.nn.functional.pad(torch.stack(rows).clamp(-1, 1), (1, 1, 1, 1), value=-1.0)  # (4, 10, 10, 10)
    left.imshow(tiles.permute(0, 2, 1, 3).reshape(40, 100), cmap="gray_r", vmin=-1, vmax=1)
    left.set(title="a classifier guides an unconditional model" if way else "a conditional model guides itself",
             xticks=range(5, 100, 10), xticklabels=range(10), yticks=range(5, 40, 10),
             yticklabels=[f"scale {s:g}" for s in scales])  # fmt: skip
    left.tick_params(length=0)
    right.plot(scales, shares, "o-", label="are the digit asked for")
    right.plot(scales, spreads, "s-", label="spread / real digits'")
    right.axhline(1, color="0.6", lw=1, ls=":")
    right.set(title="sharper, and more alike", xlabel="scale", xticks=scales, ylim=(0, 1.45))
    right.legend(loc="lower right", fontsize=8)
figure.savefig("guidance.png", dpi=120)
