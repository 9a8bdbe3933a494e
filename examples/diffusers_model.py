"""A network of diffusers in sdekit: few steps, a calibration, adaptive steps and likelihood."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from sdekit import calibrate, log_likelihood, ode_sample, sample
from sdekit.adapters.diffusers import from_diffusers

folder = Path(__file__).parents[1] / "benchmarks" / "networks" / "diffusers_unet"  # a small one, of 8 x 8 digits
unet = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False)
scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")

sde, score = from_diffusers(unet, scheduler)  # all that diffusers' config says: process, prediction, clock
x_T = sde.prior_sample((64, 1, 8, 8), seed=0)
exact = ode_sample(sde, score, x_T.shape, x_T=x_T, rtol=1e-3, atol=1e-3)  # where the network's own flow leads


def ddim(steps):
    """diffusers' own loop."""
    theirs, x = DDIMScheduler.from_config(scheduler.config), x_T
    theirs.set_timesteps(steps)
    for t in theirs.timesteps:
        with torch.no_grad():
            x = theirs.step(unet(x, t).sample, t, x).prev_sample
    return x


six = calibrate(sde, score, x_T.shape, nfe=6, noises=64, iterations=60, seed=1)
draws = {
    "diffusers' DDIM, 6 evaluations": ddim(6),
    "sdekit, 6 evaluations": sample(sde, score, x_T.shape, nfe=6, x_T=x_T),
    "sdekit, calibrated, 6": sample(sde, score, x_T.shape, six, x_T=x_T),
    "the network's exact flow": exact,
}
for name, x in list(draws.items())[:3]:
    print(f"{name}: {(x - exact).square().mean().sqrt():.3f} off the exact flow")
nats = log_likelihood(sde, score, exact[:8], divergence="hutchinson", probes=4, rtol=1e-2, atol=1e-2, seed=0)
print(f"log-likelihood of its own samples: {nats.corrected.mean():.1f} nats")

figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
for axis, (name, x) in zip(axes, draws.items(), strict=True):
    tiles = torch.nn.functional.pad(x[:16, 0], (1, 1, 1, 1)).reshape(4, 4, 10, 10)
    axis.imshow(tiles.transpose(1, 2).reshape(40, 40), cmap="gray", vmin=-1, vmax=1)
    axis.set_title(name, fontsize=10)
    axis.axis("off")
figure.savefig("diffusers_model.png", dpi=120)
