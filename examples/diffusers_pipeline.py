"""Our samplers inside a diffusers pipeline: one line, and the same images as a direct call."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from sdekit import calibrate, sample
from sdekit.adapters.diffusers import Scheduler, from_diffusers

folder = Path(__file__).parents[1] / "benchmarks" / "networks" / "diffusers_unet"  # a small one, of 8 x 8 digits
unet = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False)
pipe = DDPMPipeline(unet, DDPMScheduler.from_pretrained(folder / "scheduler"))
pipe.set_progress_bar_config(disable=True)
own = pipe.scheduler  # diffusers' DDPM


def images(steps):
    """(16, 8, 8), in [0, 1]."""
    made = pipe(16, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np").images
    return torch.from_numpy(made)[..., 0]


draws = {"its own scheduler, 8 steps": images(8)}
pipe.scheduler = Scheduler.from_config(own, sampler="unipc_2")
draws["unipc_2, 8 steps"] = images(8)
pipe.scheduler = Scheduler.from_config(own, sampler="sa_solver")
draws["sa_solver, 25 steps"] = images(25)
sde, score = from_diffusers(pipe.unet, own)
four = calibrate(sde, score, (16, 1, 8, 8), nfe=4, noises=64, iterations=60, seed=1)
pipe.scheduler = Scheduler.from_config(own, calibration=four)
draws["calibrated to the model, 4 steps"] = images(4)

noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # what the pipeline starts from
direct = sample(sde, score, noise.shape, four, x_T=noise * pipe.scheduler.init_noise_sigma)
apart = (draws["calibrated to the model, 4 steps"] - (direct[:, 0] / 2 + 0.5).clamp(0, 1)).abs().max()
print(f"pipeline and direct call differ by {apart:.1e}")

figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
for axis, (name, x) in zip(axes, draws.items(), strict=True):
    tiles = torch.nn.functional.pad(x, (1, 1, 1, 1), value=0.5).reshape(4, 4, 10, 10)
    axis.imshow(tiles.transpose(1, 2).reshape(40, 40), cmap="gray", vmin=0, vmax=1)
    axis.set_title(name, fontsize=10)
    axis.axis("off")
figure.savefig("diffusers_pipeline.png", dpi=120)
