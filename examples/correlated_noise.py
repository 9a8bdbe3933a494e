"""Fields of a power-law spectrum under white and under correlated noise: which scales are drawn when."""

import math

import matplotlib.pyplot as plt
import torch

from sdekit import VPSDE, CorrelatedSDE, GaussianMixture, log_likelihood, sample

n, draws = 64, 4000
frequency = torch.fft.rfftfreq(n, 1 / n).double()  # 0 ... 32 periods on the ring


def covariance(power):
    """Of periodic fields with this spectrum, as a matrix."""
    row = torch.fft.irfft(power.to(torch.complex128), n=n)
    return torch.stack([row.roll(k) for k in range(n)])


def spectrum(x):
    """Mean squared Fourier coefficients."""
    return torch.fft.rfft(x).abs().square().mean(0) / n


power = 1 / (1 + (frequency / 2) ** 2) ** 1.5  # a Matern field's: large scales dominate
data = GaussianMixture(torch.zeros(1, n), covariance(power)[None])  # with its exact score
processes = {"white noise": VPSDE(), "noise of the data's own spectrum": CorrelatedSDE(VPSDE(), covariance(power))}
times = (0.05, 0.2, 0.5)
x_0 = data.sample(draws, seed=0, dtype=torch.float64)

figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for axis, (name, sde) in zip(axes, processes.items(), strict=False):
    axis.loglog(frequency[1:], power[1:], "k", lw=2, label="data")
    for t in times:
        # Signal over noise at each scale: white noise hides small scales first, the data's own all at once.
        signal = float(sde.alpha(t)) * x_0
        noise = sde.perturb(x_0, t, seed=1) - signal
        axis.loglog(frequency[1:], (spectrum(signal) / spectrum(noise))[1:], label=f"signal / noise, t = {t:g}")
    axis.axhline(1, color="0.6", lw=1, ls=":")
    axis.set(title=name, xlabel="periods on the ring", ylabel="power, or ratio of powers", ylim=(1e-5, 1e3))
    axis.legend(fontsize=8)

axes[2].loglog(frequency[1:], power[1:], "k", lw=2, label="data")
for (name, sde), style in zip(processes.items(), ("o", "s"), strict=True):
    x = sample(sde, data.score(sde), (draws, n), nfe=10, seed=0, dtype=torch.float64)
    off = float((spectrum(x) / power).log().abs().mean())
    found = log_likelihood(sde, data.score(sde), x_0[:50], rtol=1e-4, atol=1e-4)
    wrong = float((found.corrected - data.log_prob(x_0[:50])).abs().mean())
    print(f"{name}: samples' spectrum off by {100 * off:.1f} % in 10 evaluations, log p by {wrong:.4f} nats")
    axes[2].loglog(frequency[1:], spectrum(x)[1:], style, ms=4, mfc="none", label=f"samples, {name}")
floor = (2 / math.pi / draws) ** 0.5
print(f"what {draws} exact draws would be off by: {100 * floor:.1f} %")
axes[2].set(title="samples of both, 10 evaluations", xlabel="periods on the ring", ylabel="power")
axes[2].legend(fontsize=8)
figure.savefig("correlated_noise.png", dpi=120)
