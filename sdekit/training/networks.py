"""Small networks to train: a U-Net for images and an MLP for vectors. network(x (B, *event), t (B,)) -> like x. And a
classifier of noisy data.

Written here, since what is on offer (diffusers' UNet2DModel) needs a large package, wants sizes that halve evenly, and
takes its time in a convention of its own. Any other network (x, t) -> like x trains and samples as well.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdekit import _checks
from sdekit.processes.sde import SDE
from sdekit.system import NOTHING, expand, float64


def time_features(t: Tensor, size: int) -> Tensor:
    """sin and cos of w t, w geometric from 0.1 to 1000: (B,) -> (B, size), in float32 or wider.

    The range serves t in [0, 1] and t in [0, 80]. In bf16 the angle would keep three digits, so the
    caller casts the features, never the time. Vaswani et al. 2017, section 3.5; Ho et al. 2020.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    span = torch.linspace(math.log(0.1), math.log(1000.0), size // 2, dtype=t.dtype, device=t.device)
    angles = t[:, None] * span.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, size) in the weights' dtype: sinusoids, then two linear layers; of a class too, where it has any.

    A class adds a vector of its own between the layers. Number ``classes``, and no labels at all, stand for none of
    them: what a model learns there is the score without a condition, for classifier-free guidance (Ho & Salimans 2022).
    """

    def __init__(self, size: int, classes: int = 0) -> None:
        super().__init__()
        self.size, self.classes = size, _checks.count(classes, "classes", minimum=0)
        self.layers = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size), nn.SiLU())
        if classes:
            self.vectors = nn.Embedding(classes + 1, size)
            nn.init.zeros_(self.vectors.weight)

    def forward(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The embedding of t (B,) and labels (B,), int64."""
        h = self.layers[0](time_features(t, self.size).to(next(self.parameters()).dtype))
        if self.classes:
            labels = torch.full_like(t, self.classes, dtype=torch.int64) if labels is None else labels
            try:
                h = h + self.vectors(labels)
            except IndexError:  # on a CPU; to look at them first would make a device wait
                _checks.labels(labels, self.classes)
                raise
        elif labels is not None:
            raise ValueError("labels were given to a network without classes; build it with classes=")
        return self.layers[1:](h)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions under group norm, scaled and shifted by the time embedding; the identity at first."""

    def __init__(self, channels_in: int, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm_in, self.conv_in = _norm(channels_in), nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm_out, self.conv_out = _norm(channels), _zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.modulate = nn.Linear(embedding, 2 * channels)
        self.skip = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, channels_in, H, W) and (B, embedding) -> (B, channels, H, W)."""
        h = self.conv_in(functional.silu(self.norm_in(x)))
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        return self.skip(x) + self.conv_out(functional.silu(self.norm_out(h) * (1 + scale) + shift))


class Attention(nn.Module):
    """Self-attention over the pixels, one head per 32 channels; the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(h for h in range(1, max(1, channels // 32) + 1) if channels % h == 0)
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Like x."""
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)
        y = functional.scaled_dot_product_attention(*qkv.unbind(1))
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


class UNet(nn.Module):
    """A U-Net: residual blocks on every level, attention on the lowest, skip connections between the halves.

    ``network(x, t)``: x (B, channels_in, H, W) of any H, W >= 1 (a level halves and rounds up, and comes back to
    the size it left, so odd sizes work), t (B,) in float32; returns like x, zero before training.
    ``width``: channels of the first level; ``multipliers``: of every level, times ``width``;
    ``blocks``: residual blocks per level on the way down (one more on the way up, which takes the skip);
    ``classes``: how many kinds of data ``network(x, t, labels)`` is told of, see :class:`TimeEmbedding`.

    Raises TypeError or ValueError for sizes that are no whole numbers > 0. Ronneberger et al. 2015; Ho et al. 2020.
    """

    def __init__(
        self,
        channels_in: int = 1,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        classes: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("channels_in", channels_in), ("width", width), ("blocks", blocks)):
            _checks.count(value, name)
        channels = [width * _checks.count(m, "multipliers") for m in multipliers]
        if not channels:
            raise ValueError("multipliers must name at least one level, got none; try (1, 2)")
        self.arguments = {
            "channels_in": channels_in, "width": width, "multipliers": list(multipliers), "blocks": blocks,
            "classes": classes,
        }  # fmt: skip
        embedding = 4 * width
        self.time, self.classes = TimeEmbedding(embedding, classes), classes
        self.first = nn.Conv2d(channels_in, channels[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        below = channels[0]
        for c in channels:
            sizes = [below] + [c] * blocks
            self.down.append(nn.ModuleList(ResidualBlock(a, c, embedding) for a in sizes[:-1]))
            self.shrink.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
            below = c
        del self.shrink[-1]  # nothing lies below the last level
        self.middle = nn.ModuleList([ResidualBlock(below, below, embedding) for _ in range(2)])
        self.attention = Attention(below)
        for c in reversed(channels):
            sizes = [below + c] + [c] * blocks
            self.up.append(nn.ModuleList(ResidualBlock(a, c, embedding) for a in sizes))
            self.grow.append(nn.Conv2d(c, c, 3, padding=1))
            below = c
        del self.grow[-1]
        self.last = nn.Sequential(_norm(below), nn.SiLU(), _zeroed(nn.Conv2d(below, channels_in, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction, like x."""
        embedding = self.time(t, labels)
        h = self.first(x)
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                h = self.shrink[level - 1](h)
            for block in cast(nn.ModuleList, blocks):
                h = block(h, embedding)
            skips.append(h)
        h = self.middle[1](self.attention(self.middle[0](h, embedding)), embedding)
        for level, blocks in enumerate(self.up):
            skip = skips.pop()
            if level:
                h = self.grow[level - 1](functional.interpolate(h, size=skip.shape[-2:], mode="nearest"))
            h = torch.cat([h, skip], dim=1)
            for block in cast(nn.ModuleList, blocks):
                h = block(h, embedding)
        return self.last(h)


class MLP(nn.Module):
    """A multilayer perceptron with residual layers: x (B, dim), t (B,) in float32 -> like x, zero before training.

    Raises TypeError or ValueError for sizes that are no whole numbers > 0.
    """

    def __init__(self, dim: int = 1, width: int = 64, layers: int = 3, classes: int = 0) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("width", width), ("layers", layers)):
            _checks.count(value, name)
        self.arguments = {"dim": dim, "width": width, "layers": layers, "classes": classes}
        if width % 2:
            raise ValueError(f"width must be even, a sine and a cosine per frequency, got {width}")
        self.time, self.classes = TimeEmbedding(width, classes), classes
        self.first = nn.Linear(dim, width)
        self.layers = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.last = nn.Linear(width, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction, like x."""
        embedding, h = self.time(t, labels), self.first(x)
        for layer in self.layers:
            h = h + functional.silu(layer(torch.cat([h, embedding], dim=1)))
        return self.last(h)


class Classifier(nn.Module):
    """log p_t(labels|x): x (B, *event) of ``dim`` entries, t 0-d or (B,), labels (B,), int64 -> (B,) in x's dtype.

    The layers of an :class:`MLP`, and all classes alike before training. It is what
    :func:`sdekit.guidance.classifier_guidance` takes for ``log_prob``, with ``given=(labels,)``.
    Raises TypeError or ValueError for sizes that are no whole numbers > 0, and where labels are not given.
    """

    def __init__(self, dim: int = 1, classes: int = 2, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        inner = MLP(dim, width, layers)
        self.arguments = {**inner.arguments, "classes": _checks.count(classes, "classes")}
        self.time, self.first, self.layers = inner.time, inner.first, inner.layers
        self.last = nn.Linear(width, classes)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The log-probability of the labels."""
        if labels is None:
            raise ValueError("a classifier says log p(labels|x): give it labels, as guidance by given=(labels,)")
        embedding = self.time(t.expand(len(x)))
        h = self.first(x.flatten(1).to(embedding.dtype))
        for layer in self.layers:
            h = h + functional.silu(layer(torch.cat([h, embedding], dim=1)))
        log_p = self.last(h).log_softmax(1)
        try:
            return log_p.gather(1, labels[:, None])[:, 0].to(x.dtype)
        except RuntimeError:
            _checks.labels(labels, log_p.shape[1], none=False)
            raise


class Preconditioned(nn.Module):
    """A network in EDM's preconditioning, which predicts x_0:  c_skip y + c_out F(c_in y, log(r)/4), y = x/alpha,

    c_skip = d^2/(r^2 + d^2),  c_out = r d/sqrt(r^2 + d^2),  c_in = 1/sqrt(r^2 + d^2),  at the level r = sigma/alpha of
    any process, for data of standard deviation d = ``sigma_data``; where alpha = 0 F is told the level 1,000.
    Karras et al. 2022, eq. 7 and table 1.
    To be trained with predicts="x0", objective=denoising(edm(sigma_data)) of the same ``sigma_data``, under which F's
    own error has weight 1, and times="lognormal": the way for processes of alpha = 1, HeatODE and PoissonFlow.
    """

    def __init__(self, network: nn.Module, sde: SDE, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.network, self.sde, self.classes = network, sde, getattr(network, "classes", 0)
        self.sigma_data = _checks.positive(sigma_data, "sigma_data")

    def forward(self, x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """E[x_0 | x_t = x], like x."""
        time = t.to(float64(t.device))
        lam = self.sde.half_log_snr(time)
        lam = torch.where(lam < math.log(NOTHING), -math.log(1000.0), lam)
        a, s, d = self.sde.alpha(time), self.sde.sigma(time), self.sigma_data
        norm = (s * s + (a * d) ** 2).sqrt()
        skip, out, scale = (a * d * d / (norm * norm), s * d / norm, 1 / norm)  # of x = alpha y
        f = self.network(expand(scale, x) * x, (-lam / 4).to(t.dtype), *condition)
        return expand(skip, x) * x + expand(out, x) * f


NETWORKS: dict[str, type[nn.Module]] = {"UNet": UNet, "MLP": MLP}
BUILT = {**NETWORKS, "Classifier": Classifier}  # which predicts nothing that is like x


def build(name: str, *, seed: int = 0, **arguments: Any) -> nn.Module:
    """The network ``name`` of ``NETWORKS``, or a "Classifier", its first weights fixed by ``seed``.

    The global RNG is left as it was. Raises ValueError for an unknown name, or arguments that it does not take.
    """
    return seeded(_checks.lookup(BUILT, name, "network"), seed, arguments)


def seeded(make: type[nn.Module], seed: int, arguments: dict[str, Any]) -> nn.Module:
    """``make(**arguments)`` with its initial weights drawn from ``seed``."""
    unknown = sorted(set(arguments) - set(inspect.signature(make).parameters))
    if unknown:
        raise ValueError(f"{make.__name__} takes {', '.join(inspect.signature(make).parameters)}, not {unknown}")
    with torch.random.fork_rng(devices=[]):  # layers initialise themselves from the global generator
        torch.default_generator.manual_seed(_checks.count(seed, "seed", minimum=0))
        return make(**arguments)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(g for g in range(1, 9) if channels % g == 0), channels)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
