"""InceptionV3 as the FID is defined on it, with the names of pytorch-fid's weight file.

Szegedy et al. 2016, with the details of the original TensorFlow graph that Heusel et al. 2017 used: 1008 classes,
average pooling that does not count the padding, and max pooling in the last block. No weights come with the package.
"""

import os
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Pool = Callable[[Tensor], Tensor]
# name -> (channels out, kernel, stride, whether it pads to keep the size)
Layers = dict[str, tuple[int, int | tuple[int, int], int, bool]]


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=2)


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels: int, kernel: int | tuple[int, int], stride: int, pad: bool) -> None:
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Features of x."""
        return functional.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Chains of convolutions side by side, then a pooled branch; all concatenated over the channels.

    A chain's layers are branch_1, branch_2 ...; a layer's a and b forms read the same input and are concatenated.
    """

    def __init__(self, channels_in: int, chains: list[Layers], pool: Pool, projected: int | None = None) -> None:
        super().__init__()
        self.chains: list[list[list[str]]] = []
        self.pool, self.projected, self.channels = pool, projected, projected or channels_in
        for layers in chains:
            chain: list[list[str]] = []
            above = below = channels_in
            for name, layer in layers.items():
                if name.endswith("b") and chain and chain[-1][0] == name[:-1] + "a":
                    self.add_module(name, Convolution(above, *layer))
                    chain[-1].append(name)
                    below += layer[0]
                else:
                    above = below
                    self.add_module(name, Convolution(below, *layer))
                    chain.append([name])
                    below = layer[0]
            self.chains.append(chain)
            self.channels += below
        if projected is not None:
            self.branch_pool = Convolution(channels_in, projected, 1, 1, True)

    def forward(self, x: Tensor) -> Tensor:
        """Features of x."""
        outputs = []
        for chain in self.chains:
            h = x
            for names in chain:
                h = torch.cat([self.get_submodule(name)(h) for name in names], dim=1)
            outputs.append(h)
        pooled = self.pool(x)
        return torch.cat([*outputs, pooled if self.projected is None else self.branch_pool(pooled)], dim=1)


def _chain(branch: str, *layers: tuple[int, int | tuple[int, int]], stride: int = 1) -> Layers:
    """Layers branch_1 ... branch_n of (channels, kernel), padded; ``stride`` 2 is of the last, without padding."""
    names = [branch] if len(layers) == 1 else [f"{branch}_{i + 1}" for i in range(len(layers))]
    chain = {name: (channels, kernel, 1, True) for name, (channels, kernel) in zip(names, layers, strict=True)}
    if stride > 1:
        chain[names[-1]] = (*layers[-1], stride, False)
    return chain


def _fork(branch: str, *layers: tuple[int, int | tuple[int, int]]) -> Layers:
    """A chain that ends in two convolutions side by side, of kernels (1, 3) and (3, 1) and 384 channels."""
    last = len(layers) + 1
    ends: Layers = {f"{branch}_{last}a": (384, (1, 3), 1, True), f"{branch}_{last}b": (384, (3, 1), 1, True)}
    return {f"{branch}_{i + 1}": (*layer, 1, True) for i, layer in enumerate(layers)} | ends


def _block_a(channels: int, projected: int) -> Block:
    five, dbl = _chain("branch5x5", (48, 1), (64, 5)), _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))
    return Block(channels, [_chain("branch1x1", (64, 1)), five, dbl], _average, projected)


def _block_c(c: int) -> Block:
    seven = _chain("branch7x7", (c, 1), (c, (1, 7)), (192, (7, 1)))
    dbl = _chain("branch7x7dbl", (c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7)))
    return Block(768, [_chain("branch1x1", (192, 1)), seven, dbl], _average, 192)


def _block_e(channels: int, pool: Pool) -> Block:
    three, dbl = _fork("branch3x3", (384, 1)), _fork("branch3x3dbl", (448, 1), (384, 3))
    return Block(channels, [_chain("branch1x1", (320, 1)), three, dbl], pool, 192)


class InceptionV3(nn.Module):
    """images (N, 3, H, W) in [-1, 1] -> (N, 2048), the last pooled layer; resized to 299 x 299 bilinearly."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2, False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, 1, False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, 1, True)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1, 1, False)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, 1, False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        shrink = _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3), stride=2)
        self.Mixed_6a = Block(288, [_chain("branch3x3", (384, 3), stride=2), shrink], _halve)
        self.Mixed_6b, self.Mixed_6c = _block_c(128), _block_c(160)
        self.Mixed_6d, self.Mixed_6e = _block_c(160), _block_c(192)
        shrink = _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3), stride=2)
        self.Mixed_7a = Block(768, [_chain("branch3x3", (192, 1), (320, 3), stride=2), shrink], _halve)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, _average), _block_e(2048, _maximum)
        self.fc = nn.Linear(2048, 1008)  # in the weight file; the features do not pass it

    def forward(self, images: Tensor) -> Tensor:
        """The features, (N, 2048)."""
        x = functional.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
        x = _halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def load_inception(path: str | os.PathLike[str]) -> InceptionV3:
    """The network with pytorch-fid's weights, in evaluation mode.

    Raises FileNotFoundError for a missing file, ValueError for one whose tensors are not InceptionV3's.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no Inception weights at {os.fspath(path)}; pytorch-fid's pt_inception-2015-12-05-6726825d.pth is needed"
        )
    with torch.device("meta"):  # the weights are about to be replaced: draw none, and leave the global RNG alone
        network = InceptionV3()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith("num_batches_tracked")}
        network.load_state_dict(counters | dict(weights), strict=True, assign=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{os.fspath(path)} is not pytorch-fid's InceptionV3 (pt_inception-2015-12-05-6726825d.pth): {error!s:.500}"
        ) from error
    return network.float().eval().requires_grad_(False)
