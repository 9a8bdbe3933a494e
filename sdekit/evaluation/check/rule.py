"""Whether a step rule is what it says: order, law, and what it does to evaluations, times and samples."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sdekit import _checks
from sdekit.evaluation.check import habits, orders
from sdekit.evaluation.check.lines import attempt
from sdekit.evaluation.parts import Figure, Line
from sdekit.evaluation.report import Report
from sdekit.processes import VPSDE, RectifiedFlow
from sdekit.sampling.samplers import SAMPLERS, Sampler, as_sampler
from sdekit.solvers.steppers import RULES, StepRule

_CHURNS = (0.0, 0.5, 1.0)


def check_rule(
    rule: str | StepRule | Sampler | Callable[..., Any], *, churn: float | None = None, seed: int = 0
) -> Report:
    """Look at a step rule, one's own above all, against closed forms: no network and no data are needed.

    ``rule``: a name in RULES or SAMPLERS, a step rule, a Sampler, or a plain function, which counts as a rule of one
    evaluation and order one. ``churn``: the amount of noise to look at beside 0; 0.5 and 1 unless given, a Sampler's
    own too, of a rule that takes the system's; one with its own amount is looked at as it is. ``seed``: of the noise in
    the lines that draw some.

    Lines: "runs", "evaluations", "times" (within each step), "every step" (moves x), "input" (stays what it was),
    "batch" (sample i, alone and in a batch), "noise" (drawn where it is declared). Of a rule without noise of its own
    "order on VPSDE" and "order on RectifiedFlow", on the flow of two Gaussians in one dimension, exact by its
    quantiles, in 20 to 320 steps: 0.25 too few fails; and "predictions", the same of a network that predicts score,
    eps, x0, v or flow. "float32". "law at churn c": mean and spread on Gaussian data in 10 to 320 steps (640 for a rule
    with noise of its own), exactly, by the response to every noise: an order 0.5 too low fails, unless a rule with
    noise of its own levels off within 3 % of the spread. "few steps": one, two and three, with at most 20 times the
    error of Euler or DDIM, whichever is larger. A rule that asks no network has the lines to "batch" alone. What raises
    is a line that fails, with the message.

    Raises ValueError or TypeError for what is no rule, and for a churn that the rule refuses.
    """
    if isinstance(rule, str):
        row = as_sampler(_checks.lookup({**SAMPLERS, **RULES}, rule, "rule"))
        name = rule
    else:
        row = as_sampler(rule)
        name = _called(row.rule)
    made = row.rule
    churns = [0.0]
    if churn is not None:
        churns.append(_checks.positive(churn, "churn"))
        if made.churn not in (None, churn):
            raise ValueError(f"this rule has its own noise, and takes churn = 0 or {made.churn:g}, not {churn:g}")
    elif made.churn is None:
        churns = sorted({*_CHURNS, row.churn})
    errors: dict[str, orders.Errors] = {}
    lines = tuple(_lines(made, churns, seed, errors))
    settings = {
        "rule": name, **habits.declared(made), "churns": churns, "processes": "VPSDE, RectifiedFlow",
        "half log-SNR": list(orders.ENDS), "seed": seed,
    }  # fmt: skip
    titles = {"flow": "Distance to the exact flow", "law": "Bias of mean and spread on Gaussian data"}
    figures = []
    for start, title in titles.items():
        curves = {key: ([*map(float, e)], [*e.values()]) for key, e in errors.items() if key.startswith(start)}
        if curves:
            figures.append(Figure(title, "steps", "error, in units of the data's spread", curves, "xy"))
    return Report(f"check_rule: {name}", lines, settings, tuple(figures))


def _called(rule: StepRule) -> str:
    """The function's name; of a ``step`` within a function that makes rules, that one's."""
    outer, _, name = getattr(rule.step, "__qualname__", "rule").rpartition(".<locals>.")
    return outer.rpartition(".")[2] if name == "step" and outer else name


def _lines(rule: StepRule, churns: list[float], seed: int, errors: dict[str, orders.Errors]) -> Iterator[Line]:
    sde, other = VPSDE(), RectifiedFlow()
    runs: list[habits.Run] = []

    def ran() -> Line:
        runs.extend(habits.watch(rule, sde, n, churn, seed) for churn in churns for n in (7, 12))
        return habits.runs_through(runs)

    called = "a rule is called as rule(system, x, t, s, noise, state), returns (x, state), and at first state is None"
    yield (first := attempt("runs", ran, called))
    if first.verdict == "fail":
        return
    yield attempt("evaluations", lambda: habits.evaluations(runs))
    yield attempt("times", lambda: habits.times(runs, sde.T))
    idle = rule.evaluations == 0 and not any(run.nfe for run in runs)
    if not idle:
        yield attempt("every step", lambda: habits.movement(runs))
    yield attempt("input", lambda: habits.untouched(runs))
    yield attempt("batch", lambda: habits.batch(rule, sde, churns, seed))
    if idle:
        return
    yield (drawn := attempt("noise", lambda: habits.noise(runs, sde, seed)))
    if not rule.noisy:
        for process in (sde, other):
            yield attempt(f"order on {type(process).__name__}", partial(orders.order, rule, process, errors))
        yield attempt("predictions", lambda: orders.predictions(rule, sde))
    yield attempt("float32", lambda: habits.float32(rule, sde))
    for churn in churns if drawn.verdict != "warn" else [0.0]:
        yield attempt(f"law at churn {churn:g}", partial(orders.bias, rule, sde, churn, errors))
    yield attempt("few steps", lambda: orders.few(rule, sde))
