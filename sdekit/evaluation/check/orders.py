"""Lines on a rule's accuracy: its order on an exact flow, its law on Gaussian data, and what few steps do."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sdekit.evaluation.check.exact import MEAN, STD, Impulses, Known, normals, propagate, quantile, two_modes
from sdekit.evaluation.check.lines import table, verdict
from sdekit.evaluation.parts import Line
from sdekit.noise import Noise
from sdekit.processes.kinds import KINDS
from sdekit.processes.sde import SDE
from sdekit.solvers import solve
from sdekit.solvers.steppers import RULES, StepRule, ddim

ENDS = -2.5, 3.2  # half log-SNR where runs begin and end; restarts need 2.8
FLOW_STEPS = 20, 80, 160, 320
LAW_STEPS = 10, 40, 160, 320
NOISY_STEPS = 10, 40, 160, 640  # Langevin's steps are slow
_SHORT = 0.25  # of an order: sdekit's rules come within 0.15 of theirs at 320 steps, and most mistakes cost 1
_SHORT_LAW = 0.5  # errors of mean and spread change sign on their way
_ROUNDING = 1e-11
_LEVEL = 0.03  # of the spread, at which a rule with its own noise may level off, as Langevin's steps do
_SLOW = 0.15  # of the spread, in the most steps
_FEW = 20.0  # times the error of Euler or DDIM, whichever is larger: dpm_solver_2 comes to 10 in one step
_SAMPLES = 4000

Errors = Mapping[int, float]  # by the number of steps


def grid(sde: SDE, n: int) -> Tensor:
    """n steps, even in half log-SNR."""
    return sde.inverse_half_log_snr(torch.linspace(*ENDS, n + 1, dtype=torch.float64))


def flow(rule: StepRule, sde: SDE, n: int, predicts: str = "v", dtype: torch.dtype = torch.float64) -> Tensor:
    """What the rule makes of 32 quantiles of the mixture, less where its exact flow takes them; x_0's spread is 1."""
    times, u = grid(sde, n), torch.linspace(0.03, 0.97, 32, dtype=torch.float64)[:, None]
    start, wanted = (quantile(u, float(sde.alpha(t)), float(sde.sigma(t))) for t in (times[0], times[-1]))
    x = start.to(dtype)
    out = solve(sde.probability_flow(Known(two_modes, sde, predicts)), x, times, rule, noise=Noise(x, 0)).x
    return out.double() - wanted


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())


def law(rule: StepRule, sde: SDE, n: int, churn: float) -> tuple[float, float]:
    """(bias, bend): what the means and spreads of five entries are off by, in units of the spread, root mean square.

    Exact, by the response to every noise; where the rule is not affine on Gaussian data, bend > 0, by samples.
    """
    times, system = grid(sde, n), sde.reverse(Known(normals, sde), churn)

    def exact(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        return alpha * MEAN, (alpha**2 * STD**2 + sigma**2).sqrt()

    def run(x: Tensor, noise: Impulses | Noise) -> Tensor:
        return solve(system, x, times, rule, noise=noise).x  # type: ignore[arg-type]

    out = propagate(run, *exact(times[0]), n * max(1, rule.evaluations))
    mean, std = out.mean, out.std
    if out.bend > 1e-6:
        m, s = exact(times[0])
        x = m + s * Noise(torch.empty(_SAMPLES, len(m), dtype=torch.float64), 0, purpose="prior").normal()
        y = run(x, Noise(x, 0))
        mean, std = y.mean(0), y.std(0)
    m, s = exact(times[-1])
    return float((((mean - m) / s).square() + (std / s - 1).square()).mean().sqrt()), out.bend


def slope(errors: Errors) -> float:
    """The order between the two largest numbers of steps whose error is more than rounding; infinite where none is."""
    seen = [(n, e) for n, e in sorted(errors.items()) if e > _ROUNDING or math.isnan(e)]
    if len(seen) < 2:
        return math.inf
    (n, e), (m, f) = seen[-2:]
    return math.log(e / f) / math.log(m / n)


def order(rule: StepRule, sde: SDE, made: dict[str, Errors]) -> Line:
    """On the mixture's flow."""
    name = type(sde).__name__
    errors = made[f"flow of {name}"] = {n: rms(flow(rule, sde, n)) for n in FLOW_STEPS}
    measured = slope(errors)
    short = not measured >= rule.order - _SHORT
    text = f"{measured:.2f} on the mixture's flow, and {rule.order} is declared\n" + _errors(errors)
    more = f"it has order {round(measured)}: declare it" if rule.order + 0.6 < measured < math.inf else ""
    said = "fail" if short else "warn" if more else "pass"
    remedy = f"declare order = {round(measured)}, or look for a wrong factor, level or node" if short else more
    if not measured > 0.5:
        remedy = "it does not come to the flow: a step must lead from t to s by the drift between them"
    return Line(f"order on {name}", said, measured, text, remedy)  # type: ignore[arg-type]


def predictions(rule: StepRule, sde: SDE) -> Line:
    """The same x, or else the same order, whatever the network predicts."""
    ends = {kind: flow(rule, sde, 40, kind) for kind in KINDS}
    off = max(rms(x - ends["score"]) for x in ends.values())
    if off <= 1e-8:
        return Line("predictions", "pass", off, f"x is the same to {off:.2g} under {', '.join(KINDS)}")
    orders = {kind: slope({n: rms(flow(rule, sde, n, kind)) for n in FLOW_STEPS[-3:]}) for kind in KINDS}
    kind = min(orders, key=lambda k: orders[k])
    short = not orders[kind] >= rule.order - _SHORT
    text = "orders " + ", ".join(f"{y:.2f} under {k}" for k, y in orders.items())
    remedy = f"look at what it makes of a network that predicts {kind}: predict(x, t), or express, has x_0 and eps"
    return Line("predictions", "fail" if short else "pass", orders[kind], text, remedy if short else "")


def bias(rule: StepRule, sde: SDE, churn: float, made: dict[str, Errors]) -> Line:
    """The law at each number of steps: it must become right, at the rate that is declared."""
    name, each = f"law at churn {churn:g}", max(1, rule.evaluations // 4)
    claim = rule.weak_order if churn or rule.noisy else rule.order
    out = {
        n: law(rule, sde, n, churn)
        for n in sorted({max(4, n // each) for n in (NOISY_STEPS if rule.noisy else LAW_STEPS)})
    }
    errors = made[name] = {n: e for n, (e, _) in out.items()}
    *_, early, _, last = errors
    measured = max(slope(errors), slope({n: errors[n] for n in (early, last)}))
    error, bent = errors[last], max(b for _, b in out.values()) > 1e-6
    text = f"mean and spread are off by {error:.2g} of the spread in {last} steps; order {measured:.2f}\n" + _errors(
        errors
    )
    remedy = "noise of std nu sqrt(|h|) goes with a drift of -(g^2 + nu^2)/2 score, and a rule's own noise with its own"
    if bent:
        text = f"off by {error:.2g}, of {_SAMPLES} samples: the rule is not affine on Gaussian data\n" + _errors(errors)
        said = verdict(error, _SLOW, _SLOW)
    elif measured >= claim - _SHORT_LAW:
        said = verdict(error, _SLOW, math.inf)
        remedy = "right in the end, but slow: it wants more steps, or larger ones of its own"
    elif rule.noisy and error <= _LEVEL:
        said, text = "pass", text.replace(f"order {measured:.2f}", "it levels off there")
    else:
        said = "fail"
        if error <= _LEVEL:
            what = "weak_order" if churn or rule.noisy else "order"
            remedy = f"{what} = {claim} is declared, and {max(round(measured), 1)} is what it has"
    return Line(name, said, error, text, "" if said == "pass" else remedy)


def few(rule: StepRule, sde: SDE) -> Line:
    """One, two and three steps against the two simplest rules."""

    def error(r: StepRule, n: int) -> float:
        return law(r, sde, n, 0.0)[0] if rule.noisy else rms(flow(r, sde, n))

    simple = (RULES["euler_maruyama"], ddim(1.0 if rule.noisy else 0.0))
    rows = [(n, error(rule, n), max(error(r, n) for r in simple)) for n in (1, 2, 3)]
    ratio = max(ours / theirs for _, ours, theirs in rows)
    said = verdict(ratio, _FEW, 5 * _FEW)
    of = "bias of the law" if rule.noisy else "error"
    text = f"at most {ratio:.2g} times the {of} of Euler or DDIM\n" + table(["steps", of, "of these"], rows)
    return Line("few steps", said, ratio, text, "" if said == "pass" else "what does it do before it has a history?")


def _errors(errors: Errors) -> str:
    return table(["steps", "error"], list(errors.items()))
