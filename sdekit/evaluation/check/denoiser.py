"""What holds of every true denoiser E[x_0|x_t], each a line."""

import math
import statistics

import torch
from scipy.special import fdtrc
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdekit.batch import samples
from sdekit.evaluation.check.identify import allowed
from sdekit.evaluation.check.lines import verdict
from sdekit.evaluation.check.probe import Probe, chance, flat
from sdekit.evaluation.parts import Line, Verdict
from sdekit.models.conditions import mapped
from sdekit.models.points import PointSet
from sdekit.noise.keyed import Noise

ROUGH = "the weights are not the averaged ones (EMA), or of other data, or too little trained"
_NOTHING = 1e-3  # of the trivial error: what an exact model of the data leaves, rounding
_POINTS = 2**29  # numbers in the differences of noisy samples and data, up to which the data's own model is asked


def _line(name: str, worst: float, warn: float, fail: float, text: str, remedy: str) -> Line:
    """A line on a number that should be small; the text says it as {}."""
    said = verdict(worst, warn, fail)
    return Line(name, said, worst, text.format(f"{worst:.2g}"), "" if said == "pass" else remedy)


def loss(probe: Probe, losses: Tensor) -> Line:
    """Against the trivial denoiser."""
    excess = losses.mean(1) / allowed(probe.model.predicts, probe)
    k = int(excess.argmax())
    worst, r = float(losses[k].mean()), float(probe.r[k])
    far, surely = float(excess[k]), worst - chance(losses[k], 4)
    said: Verdict = "pass" if far <= 1 or surely < 1 else "fail"
    text = (
        f"at worst {worst:.3g} of the trivial denoiser's squared error, at sigma/alpha = {r:.3g} "
        f"(geometric mean {float(losses.mean(1).log().mean().exp()):.3g})"
    )
    remedy = (
        "it denoises worse than a formula of the data's mean and spread: see the line on its reading, else train it"
    )
    return Line("loss", said, worst, text, "" if said == "pass" else remedy)


def memory(probe: Probe, losses: Tensor) -> Line:
    """Against the data's own posterior mean, the least that any function errs on these very data."""
    numbers = len(probe.x0) * probe.data.numel()
    if numbers > _POINTS:
        return Line(
            "memory", "pass", math.nan, f"{len(probe.data)} samples are too many to compare with their own model"
        )
    own = PointSet(probe.data).score(probe.sde)
    states = [probe.state(k) for k in range(len(probe.r))]
    with probe.of(probe.x0):
        best = torch.stack([probe.loss(own.output(states[k], t), k).mean() for k, t in enumerate(probe.times)])
    k = int((best < 0.1).nonzero().max()) if bool((best < 0.1).any()) else 0  # above, all are near the mean
    least, ours = float(best[k]), float(losses[k].mean())
    by_heart = least < 0.1 and ours < 2 * least + 0.01
    text = (
        f"{ours:.2g} of the trivial error at sigma/alpha = {probe.r[k]:.3g}, where the exact model of these "
        f"{len(probe.data)} samples, which draws nothing else, has {least:.2g}"
    )
    remedy = "its samples will be these data: check it on data that it was not trained on, train less or on more"
    return Line("memory", "warn" if by_heart else "pass", ours, text, remedy if by_heart else "")


def conditions(probe: Probe, denoised: list[Tensor], losses: Tensor) -> list[Line]:
    """Those given against those of other samples: what the model makes of them it must gain by them,

    E|x_0 - D'|^2 - E|x_0 - D|^2 = E|D' - D|^2  for D with a sample's own and D' with another's; 0 where both are.
    """
    if getattr(probe.model, "conditions", None) is None:
        return []
    middle = [k for k in range(len(probe.r)) if 0.3 <= float(probe.r[k]) / probe.spread <= 5] or [len(probe.r) // 2]
    other = probe.with_others_conditions()
    gains, moves = [], []
    for k in middle:
        there = other.denoised(k)
        unit = losses[k].mean()
        gains.append((probe.loss(there, k) - losses[k]) / unit)
        moves.append(probe.fold(flat(there - denoised[k]).square().mean(1)).cpu() / float(probe.trivial[k]) / unit)
    gain, move = torch.stack(gains).mean(0), torch.stack(moves).mean(0)
    due = float(move.mean())
    if due == 0 and all(torch.equal(a, b) for a, b in zip(_given(probe), _given(other), strict=True)):
        return [Line("conditions", "pass", 1.0, "all samples have the same, which cannot be told from none")]
    if due == 0:
        remedy = "the network does not listen to them: see what it does with its arguments"
        return [Line("conditions", "fail", 1.0, "with another sample's conditions nothing changes", remedy)]
    off = gain - 0.5 * move
    fine = float(off.mean()) > -chance(off, 4)
    number = 1 + float(gain.mean())
    text = f"with another sample's conditions it errs {number:.3g} times as much; it acts as if that were {1 + due:.3g}"
    remedy = "these are the conditions of other samples (their order)"
    return [Line("conditions", "pass" if fine else "fail", number, text, "" if fine else remedy)]


def _given(probe: Probe) -> list[Tensor]:
    """The tensors among the conditions of the samples."""
    found: list[Tensor] = []
    with samples(probe.asked, len(probe.data)):
        mapped(found.append, probe.model.conditions.of(probe.x0))  # type: ignore[attr-defined]
    return found


def residual(probe: Probe, denoised: list[Tensor]) -> list[Line]:
    """What the residual has in common with what the model says, and its mean."""
    slopes, means = [], []
    for k, x_0 in enumerate(denoised):
        if 0.05 <= float(probe.r[k]) / probe.spread <= 3:  # below and above all networks say less than they might
            said, target = flat(probe.said(k)), flat(probe.target(k))
            each, unit = probe.fold(((target - said) * said).mean(1)), float(said.square().mean())
            slopes.append(max(0.0, abs(float(each.mean())) - chance(each, 3)) / max(unit, 1e-12))
        rest = probe.fold(flat(probe.x0 - x_0))
        known = not float(rest.square().mean()) <= _NOTHING * float(probe.trivial[k])
        means.append(_mean(rest) if known else 0.0)
    worst, k = max((mean, k) for k, mean in enumerate(means))
    return [
        _line(
            "slope", statistics.median(slopes or [0.0]), 0.05, 0.15,
            "what is left has {} of what the model says in it, beyond chance, in the median of levels",
            "the output is too large or too small: a factor, another prediction, or conditions of other samples",
        ),
        _line("mean", worst, 0.11, 0.15, f"the mean of what is left is {{}} of its size, at {_at(probe, k)}", ROUGH),
    ]  # fmt: skip


def _at(probe: Probe, k: int) -> str:
    return f"sigma/alpha = {probe.r[k]:.3g}"


def _mean(rest: Tensor) -> float:
    """The size of the mean of vectors (n, d), of theirs, without what chance adds; 0 where it may be chance at all.

    n |mean|^2 is about tr C/h times chi^2 of h = (tr C)^2/tr C^2 degrees of freedom (Satterthwaite 1946).
    """
    n, whole = len(rest), float(rest.square().sum(1).mean())
    off = rest - rest.mean(0)
    small = off if off.shape[1] <= n else off.mT
    trace, square = float(off.square().sum()) / (n - 1), float((small.mT @ small).square().sum()) / (n - 1) ** 2
    found = float(rest.mean(0).square().sum())
    h = trace**2 / max(square, 1e-300)
    if fdtrc(h, h * (n - 1), n * found / max(trace, 1e-300)) > 1e-5:
        return 0.0
    return math.sqrt(max(0.0, found - trace / n) / whole)


def slopes(probe: Probe, denoised: list[Tensor], seed: int) -> list[Line]:
    """The Jacobian of D by two vectors a sample: its symmetry, and its trace against the residual's size."""
    if probe.sde.root is not None or not probe.sde.diffuses:  # there D is no plain gradient
        return []
    middle = [k for k in range(len(probe.r)) if 0.2 <= float(probe.r[k]) / probe.spread <= 2][:3] or [len(probe.r) // 2]
    skew, ratio, n = [], [], min(32, len(probe.x0))
    try:
        for k in middle:
            x, t = probe.state(k)[:n], float(probe.times[k])
            noise = Noise(x, seed, purpose="slopes")
            v = noise.normal()
            parts = [_jacobian(probe, x, v, t, rows) for rows in torch.arange(n).split(probe.batch)]
            pushed, pulled = (flat(torch.cat(part)) for part in zip(*parts, strict=True))
            whole = float(pushed.square().sum() + pulled.square().sum())
            if whole < _NOTHING * float(v.square().sum()):  # next to no slope, and what there is is rounding
                continue
            skew.append((float((pushed - pulled).square().sum()) / whole, k))
            alpha, sigma = (float(f) for f in probe.at(probe.times[k]))
            due = probe.fold(sigma**2 / alpha * (flat(v) * pulled).sum(1))
            left = probe.fold(flat(probe.x0[:n] - denoised[k][:n]).square().sum(1))
            if float(left.mean()) > _NOTHING * float(probe.trivial[k]) * pulled.shape[1]:
                ratio.append((*_ratio(left, due), k))
    except RuntimeError as error:
        text = f"no derivative in x: {error}"
        return [
            Line("jacobian", "warn", math.nan, text, "likelihoods and gradient guidance need one: take no_grad out")
        ]
    found = []
    if skew:
        worst, k = max(skew)
        found.append(_line(
            "symmetric", worst, 0.2, 0.5, f"{{}} of the Jacobian, of a gradient, is not symmetric, at {_at(probe, k)}",
            "the likelihood is still that of the flow; where it is half or more, this is no score: see its reading",
        ))  # fmt: skip
    if ratio:  # else the model knows the data by heart, and nothing is left
        off, times, k = max(ratio)
        said = verdict(off, math.log(1.3), math.log(2.0))
        text = f"it errs {times:.3g} times as much as its own slope says, at {_at(probe, k)}"
        remedy = "it is surer (above 1) or less sure of itself than it may be: another prediction, factor or clock"
        found.append(Line("variance", said, times, text, "" if said == "pass" else remedy))
    return found


def _jacobian(probe: Probe, x: Tensor, v: Tensor, t: float, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(J v, J' v) of D at these of the first samples: a call's, since graphs take memory."""
    part = slice(int(rows[0]), int(rows[-1]) + 1)
    u, w = x[part].detach().requires_grad_(), torch.zeros_like(x[part], requires_grad=True)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        D = probe.at_time(u, t, part.start, graph=True)
        (pulled,) = torch.autograd.grad(D, u, w, create_graph=True)  # J' w, linear in w
        (pushed,) = torch.autograd.grad(pulled, w, v[part], retain_graph=True)
        (pulled,) = torch.autograd.grad(D, u, v[part])
    return pushed, pulled


def _ratio(left: Tensor, due: Tensor) -> tuple[float, float]:
    """How far the mean of what is left is from what is due, |log| of their ratio, beyond chance; and the ratio."""
    off, trace = float((left - due).mean()), max(float(due.mean()), 1e-12)
    sure = 1 + math.copysign(max(0.0, abs(off) - chance(left - due, 4)), off) / trace
    return abs(math.log(max(sure, 1e-6))), float(left.mean()) / trace


def consistency(probe: Probe, seed: int) -> Line:
    """E[D(x_s, s)|x_t] = D(x_t, t): the difference is orthogonal to D(x_t, t)."""
    if not probe.sde.diffuses:
        return Line("levels", "pass", math.nan, "this process has no transitions from one level to another")
    values = []
    noise = Noise(probe.x0, seed, purpose="levels")
    for k in range(2, len(probe.r) - 2, 2):
        s, t = probe.times[k], probe.times[k + 2]
        x = probe.state(k)
        a, b = probe.sde.transition(s, t)
        y = float(a) * probe.centre(x, s) + float(b) * probe.sde.unit_noise(noise.normal)
        with probe.of(x):
            y = probe.sde.place(y, t)
        D, E = (flat(d - probe.mean) for d in (probe.denoised(k, x), probe.denoised(k + 2, y)))
        each = probe.fold(((D - E) * E).sum(1))
        sure = max(0.0, abs(float(each.mean())) - chance(each, 4))
        values.append(sure / float(probe.spread**2 * D.shape[1]))
    return _line(
        "levels", max(values), 0.03, 0.1,
        "denoisers of neighbouring levels disagree by {} of the data's variance, beyond chance",
        "the levels are not those that the network was trained on: the clock or the process; see its reading",
    )  # fmt: skip
