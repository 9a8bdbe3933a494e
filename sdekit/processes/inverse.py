"""The time of a half log-SNR, of any process."""

import math
from typing import Any

import torch
from torch import Tensor

from sdekit.system import NOTHING, Time, float64


class Inverse:
    """lam -> t for many calls, as long as the process stays what it is: its table of times is made once.

    Between two times of the table Newton's method, with a bisection wherever it would leave them.
    """

    def __init__(self, sde: Any) -> None:
        self._sde, self._times = sde, sde.T * torch.logspace(-30, 0, 4096, dtype=torch.float64)
        levels = sde.half_log_snr(torch.cat([torch.zeros(1), self._times]))
        self._first, self._table, last = levels[0], levels[1:], levels[-1]
        self._last = torch.where(last < math.log(NOTHING), -math.inf, last)

    def __call__(self, lam: Time) -> Tensor:
        """t, float64. Raises ValueError where lam is not reached in [0, T]."""
        device = lam.device if isinstance(lam, Tensor) else torch.device("cpu")
        lam = torch.as_tensor(lam, dtype=torch.float64, device="cpu")
        sde, times, table, first, last = self._sde, self._times, self._table, self._first, self._last
        slack = 1e-9 * (1 + lam.abs().nan_to_num(0.0, 0.0))
        wrong = ~((lam <= first + slack) & (lam >= last - slack))  # so that NaN is wrong too
        if bool(wrong.any()):
            ends, got = f"[{float(last):g}, {float(first):g}]", float(lam[wrong].flatten()[0])
            raise ValueError(f"lam must lie in {ends}, the half log-SNR of {type(sde).__name__}, got {got:g}")
        i = torch.searchsorted(-table, -lam).clamp(1, len(times) - 1)
        low, high = times[i - 1], times[i]
        t = low + (high - low) * ((table[i - 1] - lam) / (table[i - 1] - table[i])).nan_to_num(0.5).clamp(0, 1)
        done = torch.zeros_like(t, dtype=torch.bool)
        for _ in range(100):
            # The slope only sets the pace, and a quotient has it to seven digits at a fraction of a derivative's cost.
            near = t * (1 - 1e-7)
            here, there = sde.half_log_snr(torch.stack([t, near]).flatten()).reshape(2, *t.shape)
            off = here - lam
            low, high = torch.where(off > 0, t, low), torch.where(off > 0, high, t)
            newton = t - off * (t - near) / (here - there)
            inside = (newton >= low) & (newton <= high)
            t = torch.where(done, t, torch.where(inside, newton, (low + high) / 2))
            done = done | (inside & (off.abs() < 1e-8)) | (high - low <= 1e-15 * high)
            if done.all():
                break
        t = torch.where(torch.isneginf(lam), sde.T, t)
        return t.to(device, float64(device))
