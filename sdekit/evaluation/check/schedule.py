"""Lines on alpha and sigma: finite, smooth, differentiable, and a noise level that grows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdekit.evaluation.check.lines import verdict
from sdekit.evaluation.parts import Line
from sdekit.processes.sde import SDE

_POINTS = torch.tensor([0.5 - math.sqrt(0.15), 0.5, 0.5 + math.sqrt(0.15)], dtype=torch.float64)  # Gauss's on [0, 1]
_WEIGHTS = torch.tensor([5.0, 8.0, 5.0], dtype=torch.float64) / 18


def visited(sde: SDE) -> Tensor:
    """Three thousand times from t_min to T: even ones, and as many that crowd at either end."""
    low, T = float(sde.t_min), float(sde.T)
    even = torch.linspace(low, T, 1025, dtype=torch.float64)
    early = torch.logspace(math.log10(low), math.log10(T), 1025, dtype=torch.float64)
    late = T - (T - low) * torch.logspace(-6, 0, 1025, dtype=torch.float64)
    times = torch.cat([early, late, even]).clamp(low, T).sort().values
    apart = times.diff() > 1e-8 * times[1:]
    inner = times[1:][apart]
    return torch.cat([times[:1], inner[inner < T * (1 - 1e-8)], times.new_tensor([T])])


def interval(sde: SDE) -> Line:
    """0 < t_min < T."""
    low, T = float(sde.t_min), float(sde.T)
    ok = 0 < low < T < math.inf
    remedy = "" if ok else "set the class attributes T and t_min, 0 < t_min < T"
    return Line("interval", "pass" if ok else "fail", low, f"[t_min, T] = [{low:g}, {T:g}]", remedy)


def levels(sde: SDE, times: Tensor) -> Line:
    """Finite, of the right sign, entry by entry."""
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    wrong = ~(torch.isfinite(alpha) & torch.isfinite(sigma) & (alpha >= 0) & (sigma > 0))
    wrong[:-1] |= alpha[:-1] == 0
    if bool(wrong.any()):
        k = int(wrong.int().argmax())
        said = f"alpha = {float(alpha[k]):g} and sigma = {float(sigma[k]):g} at t = {float(times[k]):g}"
        remedy = "alpha must be finite and > 0 (0 at T alone), and sigma finite and > 0, from t_min to T"
        return Line("levels", "fail", float(wrong.double().mean()), said, remedy)
    some, off = times[:: len(times) // 8], 0.0
    for f in (sde.alpha, sde.sigma):
        alone = torch.stack([f(float(t)) for t in some])
        off = max(off, float((f(some) - alone).abs().max() / alone.abs().max()))
    ends = [f"{name} from {float(y[0]):.4g} to {float(y[-1]):.4g}" for name, y in (("alpha", alpha), ("sigma", sigma))]
    return Line(
        "levels", verdict(off, 1e-9, 1e-9), off,
        f"{', '.join(ends)}; many times at once and one by one agree to {off:.2g}",
        "" if off <= 1e-9 else "alpha(t)[i] must be a function of t[i] alone: no max, mean or shape of t",
    )  # fmt: skip


def jumps(sde: SDE, times: Tensor) -> Line:
    """The cell where slope and difference disagree most is followed down: there a kink goes away, and a jump stays."""
    worst, at, which = 0.0, 0.0, ""
    for name, f in _curves(sde, times).items():
        off, change = _disagreement(f, times)
        k = int(off.argmax())
        low, high = times[k], times[k + 1]
        while float(high - low) > 1e-12 * float(high):
            cells = torch.lerp(low, high, torch.linspace(0, 1, 9, dtype=torch.float64))
            i = int(f(cells).diff().abs().argmax())
            low, high = cells[i], cells[i + 1]
        jump = float((f(high) - f(low)).abs() / change.sum().clamp_min(1e-9))
        if jump > worst:
            worst, at, which = jump, float(high), name
    bad = worst > 1e-5
    text = f"the largest is {worst:.2g} of the whole change" + (f": of {which}, at t = {at:.6g}" if bad else "")
    remedy = "alpha and sigma must be continuous: interpolate a table instead of looking its rows up" if bad else ""
    return Line("jumps", "fail" if bad else "pass", worst, text, remedy)


def slope(sde: SDE, times: Tensor) -> Line:
    """The integral of autodiff's slope against differences."""
    off, name = 0.0, "alpha"
    for curve, f in _curves(sde, times).items():
        apart, change = _disagreement(f, times)
        share = float(apart.sum() / change.sum().clamp_min(1e-9))
        if not share <= off:
            off, name = share, curve
    said = verdict(off, 0.01, 0.05)
    remedy = "the graph from t is cut or flat somewhere: no .item(), .detach(), NumPy, rounding or table row on the way"
    text = f"automatic differentiation misses {off:.2g} of the change of {name}"
    return Line("slope", said, off, text, "" if said == "pass" else remedy)


def snr(sde: SDE, times: Tensor) -> Line:
    """log(alpha/sigma) falls."""
    lam = sde.half_log_snr(times)
    rise = lam.diff()
    wrong = ~(rise < 0)
    if not bool(wrong.any()):
        ends = f"log(alpha/sigma) falls from {float(lam[0]):.4g} to {float(lam[-1]):.4g}"
        return Line("snr", "pass", float(rise.max()), ends)
    first = float(times[int(wrong.int().argmax())])
    text = f"log(alpha/sigma) does not fall at {int(wrong.sum())} of {len(rise)} times, the first t = {first:.4g}"
    remedy = "sigma/alpha must grow with t: is time reversed (t = 0 is the data), or are alpha and sigma swapped?"
    return Line("snr", "fail", float(rise.nan_to_num(math.inf).max()), text, remedy)


def diffusion(sde: SDE, times: Tensor) -> Line:
    """g^2 is finite and not negative."""
    at = times[sde.alpha(times) > 0]
    g2 = torch.minimum(sde.diffusion(at) ** 2, sde.coefficients(at).g2)
    least, most = float(g2.min()), float(g2.max())
    ok = least >= 0 and most < math.inf
    text = f"g^2 is {least:.4g} at least and {most:.4g} at most"
    return Line("diffusion", "pass" if ok else "fail", least, text, "" if ok else "g^2 must be finite and >= 0")


def _curves(sde: SDE, times: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    most = float(sde.alpha(times).abs().max())
    return {"alpha": lambda t: sde.alpha(t) / most, "log sigma": lambda t: sde.sigma(t).log()}


def _disagreement(f: Callable[[Tensor], Tensor], times: Tensor) -> tuple[Tensor, Tensor]:
    """|difference - integral of the slope| and |difference| in every cell, (N - 1,)."""
    cells = times.diff()
    at = (times[:-1, None] + cells[:, None] * _POINTS).reshape(-1).requires_grad_()
    with torch.enable_grad():
        y = f(at)
        slopes = torch.autograd.grad(y.sum(), at)[0] if y.requires_grad else torch.zeros_like(at)
    change = f(times).detach().diff()
    made = cells * (slopes.reshape(-1, 3) * _WEIGHTS).sum(1)
    return (change - made).abs(), change.abs()
