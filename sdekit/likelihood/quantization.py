"""Discrete data as numbers: which value a level stands for, and the bin around it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.system import float64


@dataclass(frozen=True)
class Quantization:
    """``levels`` equal steps from ``low`` to ``high``: level k stands for low + k bin, bin = (high - low)/(levels - 1).

    256 levels on [-1, 1] are 8-bit images as DDPM has them (Ho et al. 2020, section 3.3). A level's bin is
    +-bin/2 around its value. Raises ValueError for levels < 2 and unless low < high, both finite; TypeError for
    levels that are no whole number.
    """

    levels: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _checks.count(self.levels, "levels", minimum=2)
        try:
            ok = math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high
        except TypeError:
            ok = False
        if not ok:
            raise ValueError(f"data_range must be two finite numbers low < high, got {(self.low, self.high)!r}")

    @classmethod
    def of(cls, levels: int, data_range: tuple[float, float]) -> "Quantization":
        """The quantization of the arguments ``levels`` and ``data_range`` = (low, high)."""
        try:
            low, high = data_range
        except (TypeError, ValueError):
            raise ValueError(f"data_range must be two finite numbers low < high, got {data_range!r}") from None
        return cls(levels, low, high)

    @property
    def bin(self) -> float:
        """The distance between neighbouring levels, and the width of a bin."""
        return (self.high - self.low) / (self.levels - 1)

    def check(self, x: Tensor) -> Tensor:
        """x as int64. TypeError unless it is of integers, ValueError unless (B, *event) levels 0 ... levels - 1."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor of integer levels, got {type(x).__name__}; use torch.as_tensor")
        if x.is_floating_point() or x.is_complex() or x.dtype is torch.bool:
            raise TypeError(
                f"x must hold integer levels 0 ... {self.levels - 1}, got {x.dtype}: a bound in bits is of "
                "discrete data; pass the integer levels themselves (torch.uint8, torch.int64), before any scaling"
            )
        if x.ndim == 0 or x.numel() == 0:
            raise ValueError(f"x must have shape (B, *event), not empty, got {tuple(x.shape)}")
        k = x.long()
        first, last = int(k.min()), int(k.max())
        if first < 0 or last >= self.levels:
            raise ValueError(f"x must hold levels 0 ... {self.levels - 1}, got {first} ... {last}; set levels=")
        return k

    def values(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """low + x bin, like x, in ``dtype`` (default: torch's default dtype); checks x."""
        k = self.check(x)
        dtype = _checks.floating(dtype) or torch.get_default_dtype()
        return (self.low + k.to(float64(k.device)) * self.bin).to(dtype)  # rounded once
