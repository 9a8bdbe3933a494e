"""Latent diffusion: a VAE makes 8 numbers of 64 pixels, a diffusion learns their law, and guidance asks for digits.

The VAE's bound takes the latents' law for N(0, I), which it is not. With the diffusion's flow as the prior instead, the
same encoder and decoder have a better bound: log p(x) >= E_q[log p(x|z) + log p(z) - log q(z|x)], and the
importance-weighted estimate of the same model lies above both.
"""

import math
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from sdekit import VPSDE, Noise, as_score, guidance, log_likelihood, sample
from sdekit.training import build, load_data, train

digits = load_data("digits")
x, labels = digits.items.flatten(1), digits.labels
LATENT, STD, NONE = 8, 0.25, 10  # numbers of a latent; the decoder's standard deviation a pixel; the label for none


def perceptron(*sizes):
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def normal(y, mean, log_std):
    """log N(y; mean, std^2 I), (B,)."""
    return (-0.5 * ((y - mean) * (-log_std).exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(1)


def encode(x, eps):
    """A draw of q(z|x), and its log density."""
    mean, log_std = encoder(x).chunk(2, 1)
    z = mean + log_std.exp() * eps
    return z, normal(z, mean, log_std)


torch.manual_seed(0)
encoder, decoder = perceptron(64, 256, 256, 2 * LATENT), perceptron(LATENT, 256, 256, 64)
log_std = torch.tensor(math.log(STD))
weights = [*encoder.parameters(), *decoder.parameters()]
optimizer = torch.optim.Adam(weights, lr=2e-3)
for _ in range(1500):
    some = x[torch.randint(len(x), (256,))]
    z, log_q = encode(some, torch.randn(256, LATENT))
    bound = normal(some, decoder(z), log_std) + normal(z, 0.0, torch.zeros(())) - log_q  # the ELBO
    optimizer.zero_grad()
    (-bound.mean()).backward()
    optimizer.step()
with torch.no_grad():
    latents = encode(x, Noise(torch.empty(len(x), LATENT), 0).normal())[0]
centre, spread = latents.mean(0), latents.std(0)

sde = VPSDE()
network = train(build("MLP", dim=LATENT, width=128, layers=4, classes=NONE), sde, (latents - centre) / spread,
                labels=labels, predicts="v", steps=2500, batch=256, lr=2e-3).network  # fmt: skip
score = as_score(network, sde, predicts="v")


def terms(x, eps):
    """log p(x|z) - log q(z|x), and log p(z) as N(0, I) and as the diffusion's flow has it."""
    z, log_q = encode(x, eps)
    flow = log_likelihood(sde, score.given(NONE), (z - centre) / spread, rtol=1e-3, atol=1e-3)
    return normal(x, decoder(z), log_std) - log_q, normal(z, 0.0, torch.zeros(())), flow.log_prob - spread.log().sum()


with torch.no_grad():
    few = x[::18]  # 100 digits
    eps = Noise(torch.empty(8, len(few), LATENT), 1).normal()
    rest, plain, learned = (torch.stack(y) for y in zip(*(terms(few, e) for e in eps), strict=True))
bounds = {}
for name, prior in (("N(0, I)", plain), ("diffusion", learned)):
    bounds[name] = float((rest + prior).mean())
    weighted = float(((rest + prior).logsumexp(0) - math.log(len(eps))).mean())
    above = weighted - bounds[name]
    print(f"prior {name}: bound {bounds[name]:.2f} nats; the importance-weighted one is {above:.2f} above")
print(f"the diffusion gains {bounds['diffusion'] - bounds['N(0, I)']:.2f} nats")

judge = KNeighborsClassifier(1).fit(x, labels)
asked = torch.arange(10).repeat_interleave(20)
pictures = {}
for scale in (0.0, 1.0, 2.0):
    model = guidance.classifier_free(score, asked, NONE, scale)
    z = sample(sde, model, (200, LATENT), nfe=20, seed=0)
    with torch.no_grad():
        drawn = decoder(z * spread + centre)
    share = float((judge.predict(drawn) == asked.numpy()).mean())
    pictures[f"guidance {scale:g}: {share:.2f} right"] = drawn[::20]
    print(f"guidance {scale:g}: {share:.3f} of the decoded digits are what was asked for")
with torch.no_grad():
    back = decoder(encoder(x[:10]).chunk(2, 1)[0])
figure, axes = plt.subplots(5, 1, figsize=(9, 5.4), layout="constrained")
for ax, (name, y) in zip(axes, {"data": x[:10], "the VAE's reconstructions": back, **pictures}.items(), strict=True):
    tiles = torch.nn.functional.pad(y.reshape(10, 8, 8).clamp(-1, 1), (1, 1, 1, 1), value=-1.0)
    ax.imshow(tiles.permute(1, 0, 2).reshape(10, 100), cmap="gray_r", vmin=-1, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.set_title(name, fontsize=9)
figure.savefig("latent_diffusion.png", dpi=110)
