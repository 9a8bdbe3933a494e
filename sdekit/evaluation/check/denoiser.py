"""What holds of every true denoiser E[x_0|x_t], each a line."""

import math
import statistics

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdekit.evaluation.check.identify import allowed
from sdekit.evaluation.check.lines import verdict
from sdekit.evaluation.check.probe import Probe
from sdekit.evaluation.report import Line, Verdict
from sdekit.models.points import PointSet
from sdekit.noise.keyed import Noise

ROUGH = "the weights are not the averaged ones (EMA), or of other data, or too little trained"
_NOTHING = 1e-3  # of the trivial error: what an exact model of the data leaves, rounding
_POINTS = 2**31  # numbers in the differences of noisy samples and data, up to which the data's own model is asked


def _line(name: str, worst: float, warn: float, fail: float, text: str, remedy: str) -> Line:
    """A line on a number that should be small; the text says it as {}."""
    said = verdict(worst, warn, fail)
    return Line(name, said, worst, text.format(f"{worst:.2g}"), "" if said == "pass" else remedy)


def loss(probe: Probe, losses: Tensor) -> Line:
    """Against the trivial denoiser."""
    excess = losses.mean(1) / allowed(probe.model.predicts, probe)
    k = int(excess.argmax())
    worst, r = float(losses[k].mean()), float(probe.r[k])
    far, surely = float(excess[k]), float(losses[k].mean() - 4 * losses[k].std() / losses.shape[1] ** 0.5)
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
    best = torch.stack([probe.loss(own.output(probe.state(k), t), k).mean() for k, t in enumerate(probe.times)])
    k = int((best < 0.1).nonzero().max()) if bool((best < 0.1).any()) else 0  # above, all are near the mean
    least, ours = float(best[k]), float(losses[k].mean())
    by_heart = least < 0.1 and ours < 2 * least + 0.01
    text = (
        f"{ours:.2g} of the trivial error at sigma/alpha = {probe.r[k]:.3g}, where the exact model of these "
        f"{len(probe.data)} samples, which draws nothing else, has {least:.2g}"
    )
    remedy = "its samples will be these data: check it on data that it was not trained on, train less or on more"
    return Line("memory", "warn" if by_heart else "pass", ours, text, remedy if by_heart else "")


def conditions(probe: Probe, losses: Tensor) -> list[Line]:
    """Those given against those of other samples, of which the model should make less."""
    if getattr(probe.model, "conditions", None) is None:
        return []
    middle = [k for k in range(len(probe.r)) if 0.3 <= float(probe.r[k]) / probe.spread <= 5] or [len(probe.r) // 2]
    other = probe.with_others_conditions()
    there = torch.stack([probe.loss(other.denoised(k), k) for k in middle])
    off = ((there - losses[middle]) / losses[middle].mean(1, keepdim=True)).mean(0)
    gain, sure = float(off.mean()), float(off.mean() / off.std() * len(off) ** 0.5)
    if not bool(off.any()):
        return [Line("conditions", "pass", 0.0, "all samples have the same, which cannot be told from none")]
    fine = gain > 0.002 and sure > 4
    text = f"with another sample's conditions it errs {1 + gain:.3g} times as much"
    remedy = "these are the conditions of other samples (their order), or the network does not listen to them"
    return [Line("conditions", "pass" if fine else "fail", 1 + gain, text, "" if fine else remedy)]


def residual(probe: Probe, denoised: list[Tensor]) -> list[Line]:
    """What the residual has in common with what the model says, and its mean."""
    slopes, means = [], []
    n = len(probe.x0)
    for k, x_0 in enumerate(denoised):
        if 0.05 <= float(probe.r[k]) / probe.spread <= 3:  # below and above all networks say less than they might
            said, target = probe.said(k).double(), probe.target(k).double()
            each, unit = ((target - said) * said).flatten(1).mean(1), float(said.square().mean())
            slopes.append(max(0.0, abs(float(each.mean())) - 3 * float(each.std()) / n**0.5) / max(unit, 1e-12))
        rest = (probe.x0 - x_0).double().flatten(1)
        sure = rest.mean(0).square().mean() - rest.var(0).mean() / n  # of the mean's square, without bias
        size = float(rest.square().mean())
        known = size > _NOTHING * float(probe.trivial[k])
        means.append((math.sqrt(max(0.0, float(sure) / size)) if known else 0.0, k))
    worst, k = max(means)
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
            u, w = x.detach().requires_grad_(), torch.zeros_like(x, requires_grad=True)
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                D = probe.at_time(u, t, graph=True)
                (pulled,) = torch.autograd.grad(D, u, w, create_graph=True)  # J^T w, linear in w
                (pushed,) = torch.autograd.grad(pulled, w, v, retain_graph=True)  # J v
                (pulled,) = torch.autograd.grad(D, u, v)
            whole = float(pushed.double().square().sum() + pulled.double().square().sum())
            if whole < _NOTHING * float(v.square().sum()):  # next to no slope, and what there is is rounding
                continue
            skew.append((float((pushed - pulled).double().square().sum() / whole), k))
            alpha, sigma = (float(f) for f in probe.at(probe.times[k]))
            trace = sigma**2 / alpha * (v * pulled).double().flatten(1).sum(1).mean()
            left = (probe.x0[:n] - denoised[k][:n]).double().flatten(1).square()
            if float(left.mean()) > _NOTHING * float(probe.trivial[k]):
                ratio.append((float(left.sum(1).mean() / trace), k))
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
        times, k = max(ratio, key=lambda one: abs(math.log(max(one[0], 1e-6))))
        off = abs(math.log(max(times, 1e-6)))
        said = verdict(off, math.log(1.3), math.log(2.0))
        text = f"it errs {times:.3g} times as much as its own slope says, at {_at(probe, k)}"
        remedy = "it is surer (above 1) or less sure of itself than it may be: another prediction, factor or clock"
        found.append(Line("variance", said, times, text, "" if said == "pass" else remedy))
    return found


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
        centre = probe.sde.centre(x, s)
        later = probe.sde.place(float(a) * centre + float(b) * probe.sde.unit_noise(noise.normal), t)
        D, E = (
            d.double().flatten(1) - probe.mean.double().flatten()
            for d in (probe.denoised(k, x), probe.denoised(k + 2, later))
        )
        each = ((D - E) * E).sum(1)
        sure = max(0.0, abs(float(each.mean())) - 3 * float(each.std()) / len(x) ** 0.5)
        values.append(sure / float(probe.spread**2 * D.shape[1]))
    return _line(
        "levels", max(values), 0.03, 0.1,
        "denoisers of neighbouring levels disagree by {} of the data's variance, beyond chance",
        "the levels are not those that the network was trained on: the clock or the process; see its reading",
    )  # fmt: skip
