"""An exponential moving average of a network's weights."""

import copy
from collections.abc import Iterable
from itertools import chain, compress

import torch
from torch import Tensor, nn

from sdekit import _checks


class EMA:
    """Averaged weights  a <- d a + (1 - d) w,  d = min(decay, (1 + n)/(10 + n)) at the n-th update from 1.

    The warm-up forgets the random first weights within some ten updates whatever ``decay`` is, so a short run
    is not an average over its own start. ``network``: the averaged copy, in evaluation mode, without gradients.
    Raises ValueError unless 0 <= decay < 1.  Song et al. 2021, appendix G; Ho et al. 2020.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        self.decay = _checks.positive(decay, "ema", zero=True)
        if self.decay >= 1:
            raise ValueError(f"ema must be below 1, or the average never moves; got {decay:g}, try 0.999")
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.updates = 0
        self._mine: list[Tensor] = list(self.network.parameters())
        self._whole = [not (w.is_floating_point() or w.is_complex()) for w in self._mine]

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take the network's present weights into the average; buffers and weights of whole numbers are copied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine, its = self._mine, list[Tensor](network.parameters())
        pairs: Iterable[tuple[Tensor, Tensor]] = zip(self.network.buffers(), network.buffers(), strict=True)
        if any(self._whole):
            pairs = chain(pairs, compress(zip(mine, its, strict=True), self._whole))
            mine, its = ([w for w, whole in zip(side, self._whole, strict=True) if not whole] for side in (mine, its))
        torch._foreach_lerp_(mine, its, 1 - decay)
        for average, present in pairs:
            average.copy_(present)
