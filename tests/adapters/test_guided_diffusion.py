"""guided-diffusion's networks: the mixture's E[eps|x] at the places of their table, a learned variance behind it."""

import enum
import itertools
import math
import types

import numpy as np
import pytest
import torch

from sdekit.adapters.guided_diffusion import from_guided_diffusion
from tests.adapters.exact import LABELS, agrees, predictions, samples, state

MeanType = enum.Enum("MeanType", ["PREVIOUS_X", "START_X", "EPSILON"])


def schedule(name, n):
    """Their betas, from the definition, in NumPy."""
    if name == "linear":
        return np.linspace(1000 / n * 1e-4, 1000 / n * 0.02, n)
    bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
    return np.array([min(1 - b / a, 0.999) for a, b in itertools.pairwise(bar)])


def bars(betas):
    """log abar at the places -1 ... N - 1."""
    return np.concatenate([[0.0], np.cumsum(np.log(1 - betas))])


class Model:
    """As their UNetModel: (x, timesteps, y=None), the places as any numbers, 2 C channels where it learned variance."""

    def __init__(self, betas, predicts="eps", learned=True, scale=1.0):
        self.log_bar, self.predicts, self.learned, self.scale = bars(betas), predicts, learned, scale

    def __call__(self, x, timesteps, y=None):
        places = timesteps.double() / self.scale
        bar = torch.from_numpy(np.exp(np.interp(places.numpy(), np.arange(-1, len(self.log_bar) - 1), self.log_bar)))
        x0, eps = predictions(x, bar.sqrt(), (1 - bar).sqrt(), y)
        out = {"eps": eps, "x0": x0}[self.predicts]
        return torch.cat([out, 7 * torch.ones_like(out)], 1) if self.learned else out


def levels(betas):
    bar = np.exp(bars(betas))
    return lambda t: (math.sqrt(bar[round(t * len(betas))]), math.sqrt(1 - bar[round(t * len(betas))]))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("name", "n"), [("linear", 1000), ("linear", 400), ("cosine", 1000)])
def test_the_score_is_exact(name, n, learned):
    betas = schedule(name, n)
    for given, options in ((name, {"steps": n}), (betas, {})):
        sde, score = from_guided_diffusion(Model(betas, learned=learned), given, **options)
        agrees(sde, score, levels(betas), [2 / n, 0.5, 1 - 1 / n])
    samples(sde, score)


def diffusion(betas, mean="EPSILON", **more):
    """What their create_gaussian_diffusion returns, as far as it is looked at."""
    return types.SimpleNamespace(betas=betas, model_mean_type=MeanType[mean], original_num_steps=len(betas), **more)


def test_their_diffusion_brings_everything():
    betas = schedule("linear", 500)
    for scale, rescale in ((1.0, False), (2.0, True)):
        model = Model(betas, "x0", scale=scale)
        sde, score = from_guided_diffusion(model, diffusion(betas, "START_X", rescale_timesteps=rescale))
        agrees(sde, score, levels(betas), [0.25])
        agrees(*from_guided_diffusion(model, betas, predicts="x0", rescale_timesteps=rescale), levels(betas), [0.25])


def test_the_places_are_whole_at_the_tables_times():
    told = []
    sde, score = from_guided_diffusion(lambda x, t: told.append(t[0].item()) or x)
    for i in range(1, 1001):
        score(state(1.0, 1.0).float(), float(sde.times[i - 1]))
    assert told == list(range(1000))


def test_labels_follow_their_samples():
    betas = schedule("linear", 1000)
    sde, score = from_guided_diffusion(Model(betas))
    agrees(sde, score.given(y=LABELS), levels(betas), [0.5], LABELS)
    agrees(sde, score.given(LABELS), levels(betas), [0.5], LABELS)


def test_bad_input_is_named():
    model, betas = Model(schedule("linear", 100)), schedule("linear", 100)
    with pytest.raises(ValueError, match="unknown beta schedule 'cosin': did you mean 'cosine'"):
        from_guided_diffusion(model, "cosin")
    respaced = diffusion(betas[::4])
    respaced.original_num_steps = 100
    with pytest.raises(ValueError, match="betas is a diffusion respaced to 25 of 100 steps.*timestep_respacing"):
        from_guided_diffusion(model, respaced)
    with pytest.raises(ValueError, match="unknown model_mean_type 'PREVIOUS_X': .*known are EPSILON, START_X"):
        from_guided_diffusion(model, diffusion(betas, "PREVIOUS_X"))
    with pytest.raises(ValueError, match="unknown prediction 'epsilon'"):
        from_guided_diffusion(model, predicts="epsilon")
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        from_guided_diffusion(model, steps=1)
    with pytest.raises(TypeError, match="network must be a callable"):
        from_guided_diffusion(None)
