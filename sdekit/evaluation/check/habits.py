"""Lines on what a rule does besides being accurate: what it evaluates, where, and for whom."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdekit.evaluation.check.exact import Known, two_modes
from sdekit.evaluation.check.orders import flow, grid, rms
from sdekit.evaluation.parts import Line
from sdekit.noise import Noise
from sdekit.processes.sde import SDE
from sdekit.solvers import solve
from sdekit.solvers.steppers import StepRule


class _Watched(Noise):
    """Noise that knows which step asks, and how often."""

    def __init__(self, like: Tensor, seed: int, model: Known) -> None:
        self.steps: list[tuple[float, float, int]] = []  # t, s and how many evaluations there were before
        self.draws, self._model = 0, model
        super().__init__(like, seed)

    def enter(self, t: float, s: float) -> None:
        """A step begins."""
        self.steps.append((t, s, len(self._model.asked)))
        super().enter(t, s)

    def normal(self) -> Tensor:
        """A draw."""
        self.draws += 1
        return super().normal()


@dataclass(frozen=True)
class Run:
    """A run, watched."""

    rule: StepRule
    churn: float
    grid: list[float]
    x: Tensor
    nfe: int
    draws: int
    asked: list[tuple[float, float, float]]  # t, s of the step, and the time that the model was asked at
    still: list[tuple[float, float]]  # steps that left x as it was
    touched: bool  # whether the x that it was given is another now


def watch(rule: StepRule, sde: SDE, n: int, churn: float, seed: int, other: int = 0) -> Run:
    """n steps of a small batch; with ``other`` from the same start with other noise."""
    times, model = grid(sde, n), Known(two_modes, sde)
    x = sde.prior_sample((4, 3), t=float(times[0]), seed=seed, dtype=torch.float64)
    noise, before, states = _Watched(x, seed + other, model), x.clone(), [x.clone()]
    noise.steps.clear()
    out = solve(sde.reverse(model, churn), x, times, rule, noise=noise, callback=lambda k, s, y: states.append(y))
    asked = []
    ends = [*(count for _, _, count in noise.steps[1:]), len(model.asked)]
    for (t, s, first), last in zip(noise.steps, ends, strict=True):
        asked += [(t, s, u) for u in model.asked[first:last]]
    pairs = zip(times[:-1].tolist(), times[1:].tolist(), states[:-1], states[1:], strict=True)
    still = [(t, s) for t, s, a, b in pairs if torch.equal(a, b)]
    touched = not torch.equal(x, before)
    return Run(rule, churn, times.tolist(), out.x, out.nfe, noise.draws, asked, still, touched)


def runs_through(runs: list[Run]) -> Line:
    """They came to an end; what is not finite raises."""
    n = len(runs[0].grid) - 1
    return Line("runs", "pass", len(runs), f"{len(runs)} runs, of {n} steps and more, end with finite x")


def evaluations(runs: list[Run]) -> Line:
    """As many as declared, at most; and in no run at least one less in every step."""
    rule, off, text = runs[0].rule, 0, []
    for run in runs:
        n = len(run.grid) - 1
        most = n * rule.evaluations + rule.extra
        if run.nfe > most:
            off = max(off, run.nfe - most)
        elif run.nfe <= most - n:
            off = min(off, run.nfe - most) if off <= 0 else off
        text.append(f"{run.nfe} in {n} steps")
    said = ", ".join(dict.fromkeys(text))
    declared = f"evaluations = {rule.evaluations}" + (f" and extra = {rule.extra}" if rule.extra else "")
    remedy = "a budget nfe= is kept by what is declared: @step_rule(evaluations=..., extra=...)" if off else ""
    return Line("evaluations", "fail" if off else "pass", off, f"{said}, and {declared} is declared", remedy)


def times(runs: list[Run], T: float) -> Line:
    """Within the step; a rule with noise of its own may go up before it comes down."""
    slack, off, at = 1e-9 * T, 0.0, (0.0, 0.0, 0.0)
    for run in runs:
        for t, s, u in run.asked:
            top = T if run.rule.noisy else t
            beyond = max(u - top, s - u)
            if beyond > max(off, slack):
                off, at = beyond, (t, s, u)
    if not off:
        return Line("times", "pass", 0.0, "the network is asked within the step alone")
    t, s, u = at
    remedy = "a step from t to s may look at [s, t] alone: nothing else is sure to be there, or before t_min"
    return Line("times", "fail", off, f"the step from t = {t:.4g} to {s:.4g} asks the network at {u:.4g}", remedy)


def movement(runs: list[Run]) -> Line:
    """Every step moves x: a last one that does nothing is a mistake that no error shows (PITFALLS of others)."""
    still = [(run, t, s) for run in runs for t, s in run.still]
    if not still:
        return Line("every step", "pass", 0, "every step moves x")
    _, t, s = still[-1]
    last = " (the last)" if s == still[-1][0].grid[-1] else ""
    text = f"{len(still)} steps leave x as it was, such as that from t = {t:.4g} to {s:.4g}{last}"
    return Line("every step", "fail", len(still), text, "a step must lead from t to s; x at t is not x at s")


def untouched(runs: list[Run]) -> Line:
    """The start is the caller's own."""
    bad = sum(run.touched for run in runs)
    text = "the x that it is given is changed in place" if bad else "the x that it is given stays what it was"
    return Line(
        "input", "fail" if bad else "pass", bad, text, "the first x is the user's: begin with a new tensor" * bool(bad)
    )


def noise(runs: list[Run], sde: SDE, seed: int) -> Line:
    """Draws where, and only where, they are declared."""
    rule, still, moved = runs[0].rule, [r.draws for r in runs if not r.churn], [r.draws for r in runs if r.churn]
    text = f"{max(still)} draws at churn 0" + (f", {max(moved)} at churn {runs[-1].churn:g}" if moved else "")
    again = watch(rule, sde, len(runs[0].grid) - 1, 0.0, seed, other=1)
    matters = not torch.equal(again.x, runs[0].x)
    if matters and not rule.noisy:
        remedy = "it draws where the system has no noise: declare noisy=True, or multiply by system.diffusion"
        return Line("noise", "fail", max(still), text, remedy)
    if rule.noisy and not matters:
        return Line("noise", "fail", max(still), f"{text}; x is the same", "it is declared noisy, and is not")
    if moved and not max(moved):
        remedy = "under a reverse SDE its law is wrong, silently: declare churn=0.0, or add diffusion times increment"
        return Line("noise", "warn", 0, text, remedy)
    return Line("noise", "pass", max(still), text)


def batch(rule: StepRule, sde: SDE, churns: list[float], seed: int) -> Line:
    """A sample alone, in a batch, and among others."""
    grid_, off = grid(sde, 8), 0.0
    for churn in churns:
        x = sde.prior_sample((5, 3), t=float(grid_[0]), seed=seed, dtype=torch.float64)

        def run(ids: list[int], x: Tensor = x, churn: float = churn) -> Tensor:
            system = sde.reverse(Known(two_modes, sde), churn)
            return solve(system, x[ids].clone(), grid_, rule, noise=Noise(x[ids], seed, ids)).x

        whole = run([0, 1, 2, 3, 4])
        for ids in ([2], [3, 0], [4, 3, 2, 1, 0]):
            off = max(off, float(((run(ids) - whole[ids]).abs() / whole.abs().max()).max()))
    text = "the same bits alone and in a batch" if off == 0 else f"alone and in a batch x differs by {off:.2g} of it"
    remedy = (
        "no mean or norm over the batch may decide a step, and noise comes from noise.normal()" if off > 1e-9 else ""
    )
    return Line("batch", "fail" if off > 1e-9 else "pass", off, text, remedy)


def float32(rule: StepRule, sde: SDE) -> Line:
    """80 steps with states in float32 against float64."""
    off = rms(flow(rule, sde, 80, dtype=torch.float32) - flow(rule, sde, 80))
    bad = off > 1e-4
    remedy = "small differences of large numbers: compute coefficients in Python floats or float64" if bad else ""
    return Line("float32", "fail" if bad else "pass", off, f"80 steps in float32 end {off:.2g} from float64", remedy)


def declared(rule: StepRule) -> dict[str, Any]:
    """What a rule says of itself."""
    names = ("evaluations", "extra", "order", "weak_order", "noisy", "churn", "sense")
    return {name: getattr(rule, name) for name in names}
