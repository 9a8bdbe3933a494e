"""Three flows, one question: how many nats does each give the data?

NICE, additive coupling layers of volume one (Dinh et al. 2014); the continuous flow, their limit of infinitely many
thin layers, trained by its own likelihood (Chen et al. 2018); and the probability flow of a diffusion, which is such a
flow too, but trained by denoising, without ever being solved. On two moons, and NICE and the diffusion on digits.
"""

import math
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import nn

from sdekit import VPSDE, Noise, RectifiedFlow, as_score, bits_per_dim, load_pretrained, log_likelihood, ode_sample
from sdekit.training import build, load_data, train


class Nice(nn.Module):
    """z = exp(s) f(x): each layer of f adds to one half of x a function of the other, so that its determinant is 1."""

    def __init__(self, dim, layers, width):
        super().__init__()
        self.first = dim // 2
        sizes = [(self.first, dim - self.first) if k % 2 else (dim - self.first, self.first) for k in range(layers)]
        self.shifts = nn.ModuleList(
            nn.Sequential(nn.Linear(a, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, b))
            for a, b in sizes
        )
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        """The latent z."""
        a, b = x[:, : self.first], x[:, self.first :]
        for k, shift in enumerate(self.shifts):
            a, b = (a, b + shift(a)) if k % 2 else (a + shift(b), b)
        return torch.cat([a, b], 1) * self.scale.exp()

    def inverse(self, z):
        """x of a latent: the same layers backwards, with a minus."""
        z = z * (-self.scale).exp()
        a, b = z[:, : self.first], z[:, self.first :]
        for k, shift in reversed(list(enumerate(self.shifts))):
            a, b = (a, b - shift(a)) if k % 2 else (a - shift(b), b)
        return torch.cat([a, b], 1)

    def log_prob(self, x):
        """log N(z; 0, I) + log |det dz/dx|, (B,)."""
        z = self(x)
        return -0.5 * (z**2 + math.log(2 * math.pi)).sum(1) + self.scale.sum()


def fit(loss, weights, steps, lr):
    """Adam on a loss of the step's number, lr falling to 0; the seconds it took."""
    start, optimizer = time.perf_counter(), torch.optim.Adam(weights, lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    return time.perf_counter() - start


def moons(n, seed):
    """Two moons, standardised."""
    x = torch.from_numpy(make_moons(n, noise=0.06, random_state=seed)[0]).float()
    return (x - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])


def batch(x, step, size):
    """The items of a step."""
    return x[torch.arange(step * size, (step + 1) * size) % len(x)]


stations = []


def row(name, value, unit, seconds=None):
    stations.append(f"| {name} | {value:.3f} {unit} | {'' if seconds is None else f'{seconds:.0f} s'} |")
    print(f"{name}: {value:.3f} {unit}" + ("" if seconds is None else f", {seconds:.1f} s of training"))


torch.manual_seed(0)
data, held_out = moons(20000, 0), moons(1000, 1)
panels = {"data": held_out}

nice = Nice(2, 8, 64)
seconds = fit(lambda step: -nice.log_prob(batch(data, step, 256)).mean(), list(nice.parameters()), 1200, 4e-3)
with torch.no_grad():
    row("moons, NICE", float(nice.log_prob(held_out).mean()), "nats", seconds)
    panels["NICE"] = nice.inverse(Noise(held_out, 2).normal())
x, nice = held_out[:100].double(), nice.double()
jacobians = torch.func.vmap(torch.func.jacrev(lambda x: nice(x[None])[0]))(x)
by_hand = -0.5 * (nice(x) ** 2 + math.log(2 * math.pi)).sum(1) + torch.linalg.slogdet(jacobians)[1]
off = (by_hand - nice.log_prob(x)).abs().max().detach()
print(f"moons, NICE: log p differs from that of its Jacobian by {off:.1e}")

flow = RectifiedFlow()  # any network that says a velocity is a continuous flow
velocity = build("MLP", dim=2, width=64, layers=2)
ode = as_score(velocity, flow, predicts="flow")
likelihood = lambda x: log_likelihood(flow, ode, x, rtol=3e-2, atol=3e-2, differentiable=True).log_prob  # noqa: E731
seconds = fit(lambda step: -likelihood(batch(data, step, 256)).mean(), list(velocity.parameters()), 50, 1.5e-2)
row(
    "moons, continuous flow",
    float(log_likelihood(flow, ode, held_out, rtol=1e-3, atol=1e-3).log_prob.mean()),
    "nats",
    seconds,
)
panels["continuous flow"] = ode_sample(flow, ode, (1000, 2), rtol=1e-3, atol=1e-3, seed=2)

sde, start = VPSDE(), time.perf_counter()
trained = train(
    build("MLP", dim=2, width=128, layers=3), sde, data, predicts="v", steps=1500, batch=256, lr=4e-3
).network
score, seconds = as_score(trained, sde, predicts="v"), time.perf_counter() - start
row(
    "moons, diffusion's flow",
    float(log_likelihood(sde, score, held_out, rtol=1e-3, atol=1e-3).corrected.mean()),
    "nats",
    seconds,
)
panels["diffusion's flow"] = ode_sample(sde, score, (1000, 2), rtol=1e-3, atol=1e-3, seed=2)

digits = load_data("digits")
levels = ((digits.items + 1) * 8).round().flatten(1)  # (1797, 64), 0 ... 16
order = torch.randperm(len(levels), generator=torch.Generator().manual_seed(0))
some, others = levels[order[:1500]], levels[order[1500:]]


def smooth(y, seed):
    """Whole numbers made continuous by uniform noise, about standardised: the bound on the bits of the numbers."""
    return (y + torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) - 8.5) / 5


def bits(nice, y):
    """Bits a pixel, of y in levels: log p of what was divided by 5."""
    with torch.no_grad():
        nats = torch.stack([nice.log_prob(smooth(y, seed)) for seed in range(8)]).logsumexp(0) - math.log(8)
    return float((-nats + 64 * math.log(5)).mean()) / (64 * math.log(2))


pixels = Nice(64, 6, 128)
seconds = fit(
    lambda step: -pixels.log_prob(smooth(batch(some, step, 250), step)).mean() / 64,
    list(pixels.parameters()),
    700,
    2e-3,
)
row("digits, NICE", bits(pixels, some), "bits a pixel on what it saw", seconds)
row("digits, NICE", bits(pixels, others), "bits a pixel on others")
process, model = load_pretrained("digits")
process.t_min = float(process.inverse_half_log_snr(torch.tensor(24.0).log()))  # noise of a third of a level
found = bits_per_dim(
    process,
    model,
    levels[:32].reshape(-1, 1, 8, 8).long(),
    levels=17,
    data_range=(-1.0, 1.0),
    dtype=torch.float32,
    divergence="hutchinson",
    probes=2,
    rtol=1e-3,
    atol=1e-3,
    seed=0,
    dequantization="truncated_normal",
)
row("digits, diffusion's flow", float(found.bits.mean()), "bits a pixel on what it saw")
drawn = {
    "NICE": pixels.inverse(Noise(torch.empty(64, 64), 3).normal()).detach() * 5 + 8,
    "diffusion's flow": ode_sample(process, model, (64, 1, 8, 8), rtol=1e-2, atol=1e-2, seed=3).flatten(1) * 8 + 8,
}

figure, axes = plt.subplots(2, 4, figsize=(13, 6.6), layout="constrained")
for ax, (name, x) in zip(axes[0], panels.items(), strict=True):
    ax.plot(*x.T, ".", ms=1.5, alpha=0.5)
    ax.set(
        title=f"two moons: {name}", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xlabel="$x_1$", ylabel="$x_2$", aspect="equal"
    )
for ax in axes[1]:
    ax.axis("off")
for ax, (name, y) in zip(axes[1], {"data": levels[:64], **drawn}.items(), strict=False):
    tiles = torch.nn.functional.pad(y.reshape(8, 8, 8, 8), (1, 1, 1, 1)).clamp(0, 16)
    ax.imshow(tiles.permute(0, 2, 1, 3).reshape(80, 80), cmap="gray_r")
    ax.set(title=f"digits: {name}")
figure.savefig("nice.png", dpi=110)
print("\n".join(["", "| station | log p, or bits | training |", "|---|---|---|", *stations]))
