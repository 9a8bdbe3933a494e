"""The smallest new process, new step rule and new guidance, each used at once and checked against a closed form."""

import torch

from sdekit import SDE, VPSDE, GaussianMixture, sample, step_rule


class Cosine(SDE):
    """A process: alpha and sigma, on [0, 1] unless it says otherwise."""

    def alpha(self, t):
        return torch.cos(torch.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(torch.pi / 2 * t)


@step_rule(evaluations=2, order=2)
def midpoint(system, x, t, s, noise, state):
    """A step rule: from x at t to x at s, using drift (and diffusion and noise, for an SDE)."""
    middle = t + (s - t) / 2
    return x + (s - t) * system.drift(x + (middle - t) * system.drift(x, t), middle), state


def guided(score, condition, weight):
    """A guidance: score -> score. Classifier-free guidance is (1 + w) s(x|y) - w s(x)."""
    return lambda x, t: (1 + weight) * condition(x, t) - weight * score(x, t)


data = GaussianMixture([[-1.0], [1.0]], [[[0.04]], [[0.04]]])
right = GaussianMixture([[1.0]], [[[0.04]]])

sde = Cosine()
x = sample(sde, data.score(sde), (4000, 1), midpoint, steps=40, grid="karras", seed=0)
print(f"new process, new rule: std {x.std():.3f}, exact {(1 + 0.04) ** 0.5:.3f}")

sde = VPSDE()
for weight in (0.0, 1.0):
    x = sample(sde, guided(data.score(sde), right.score(sde), weight), (4000, 1), "dpmpp_2m", nfe=40, seed=0)
    print(f"guided to the right mode, weight {weight}: mean {x.mean():.3f}, std {x.std():.3f} (exact at 0: 1, 0.2)")
