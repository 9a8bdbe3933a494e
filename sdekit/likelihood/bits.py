"""Bits per dimension of discrete data through the probability flow: dequantised, and what that is a bound on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.likelihood.flow import log_likelihood
from sdekit.likelihood.quantization import Quantization
from sdekit.noise.keyed import Noise
from sdekit.processes.sde import SDE
from sdekit.system import Score, float64

_DEQUANTIZATIONS = ("uniform", "truncated_normal")


@dataclass(frozen=True)
class BitsPerDim:
    """``bits`` (B,): an upper bound, in expectation over the dequantisation, on -log2 P(x)/D.

    ``stderr`` and ``error`` (B,), in the same units: the probes' standard error (0 with exact divergence, NaN from a
    single probe), and what the solver, the prior and the truncation may be off by. The spread of the dequantisation,
    which the bound is the mean over, is in neither. ``nfe``: network evaluations.
    """

    bits: Tensor
    stderr: Tensor
    error: Tensor
    nfe: int


def bits_per_dim(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    levels: int = 256,
    data_range: tuple[float, float] = (-1.0, 1.0),
    dequantization: str = "uniform",
    samples: int = 1,
    divergence: str = "exact",
    probes: int = 1,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    ids: Sequence[int] | None = None,
) -> BitsPerDim:
    """-E log[ 1/K sum_k p(x_k)/q(x_k) ] / (D log 2) >= -log2 P(x)/D,  P(x) the integral of p over the bins of x.

    x, (B, *event), holds integer levels 0 ... levels - 1; their values span ``data_range``, and each has a bin of the
    distance between two (:class:`sdekit.likelihood.quantization.Quantization`: 256 levels on [-1, 1] are 8-bit images).
    The x_k are K = ``samples`` draws of q, which lies in the bin (Burda et al. 2016; -log K is theirs):

    "uniform": q = 1/bin^D, p the density at t = 0 (Theis et al. 2016; Ho et al. 2019, eq. 3): for a model that was
    trained on dequantised data. "truncated_normal": q is the process's own noise at t_min, cut off at the bin, and p
    the density at t_min (Zheng et al. 2023, section 4): for a model that was trained on the levels' values themselves;
    its P(x) is that of the marginal at t_min, a tight bound where sigma(t_min) is a third of a bin or so: a process may
    be given a later ``t_min`` for it. Of a score that is not exact, p is normalised but for the corrections of
    both ends, so that this is a bound up to ``error``.

    Other arguments as in :func:`log_likelihood`; ``dtype`` of the state. Raises TypeError for x that is not of
    integers, ValueError for levels out of range, an unknown dequantisation, and samples > 1 with Hutchinson's
    divergence: its noise in log p would raise the mean of p, and the result would bound nothing.
    """
    quantization = Quantization.of(levels, data_range)
    samples = _checks.count(samples, "samples")
    _checks.lookup(dict.fromkeys(_DEQUANTIZATIONS), dequantization, "dequantization")
    if samples > 1 and divergence != "exact":
        raise ValueError(
            f"samples > 1 needs divergence='exact', got samples={samples} with {divergence!r}: noise in log p would "
            "raise the mean of p, and the result would be no bound"
        )
    values = quantization.values(x, float64(x.device) if isinstance(x, Tensor) else None)
    dtype = _checks.floating(dtype) or torch.get_default_dtype()
    d, nfe = values[0].numel(), 0
    noise = Noise(values, seed, ids, purpose="dequantization")
    weights, errors = [], []
    for _ in range(samples):
        u = torch.special.ndtr(noise.normal())
        if dequantization == "uniform":
            point, log_q = values + quantization.bin * (u - 0.5), -d * math.log(quantization.bin)
        else:
            a = float(sde.alpha(sde.t_min))
            std = float(sde.sigma(sde.t_min)) / a
            cut = quantization.bin / 2 / std
            inside = math.erf(cut / math.sqrt(2))
            z = torch.special.ndtri((1 - inside) / 2 + u * inside).clamp(-cut, cut)
            point = a * (values + std * z)
            log_q = -(z.square() / 2).reshape(len(x), -1).sum(1) - d * (
                math.log(a * std) + math.log(2 * math.pi) / 2 + math.log(inside)
            )
        out = log_likelihood(
            sde, score, point.to(dtype), divergence=divergence, probes=probes, rtol=rtol, atol=atol, seed=seed, ids=ids
        )
        at_data = dequantization == "uniform"
        log_p = out.corrected if at_data else out.log_prob + out.prior_mismatch
        weights.append(log_p.to(values.dtype) - log_q)
        truncation = out.truncation_error if at_data else 0.0
        errors.append(out.solver_error + out.prior_error + truncation)
        nfe += out.nfe
    log_weights = torch.stack(weights)
    bound = torch.logsumexp(log_weights, 0) - math.log(samples)
    error = (log_weights.softmax(0) * torch.stack(errors).to(bound)).sum(0)
    unit = d * math.log(2)
    return BitsPerDim(-bound / unit, out.stderr.to(bound) / unit, error / unit, nfe)  # stderr: 0 of more than one draw
