"""What a step rule is, and the ways to compose them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from sdekit import _checks

# (system, x, t, s, noise, state) -> (x at s, state)
Step: TypeAlias = Callable[[Any, Tensor, float, float, Any, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class StepRule:
    """One step from t to s:  ``x, state = rule(system, x, t, s, noise, state)``.

    ``system`` has drift(x, t), add_drift(x, t, h, at) and diffusion_at(x, t); a reverse system has also
    predict(x, t) -> (x0, eps), score(x, time) and at(t, x), the process at t. t and s are Python floats, in either
    direction. ``model(x, node.time)`` is what the network itself says, and ``express`` (:mod:`sdekit.processes.kinds`)
    makes of it any kind of prediction.
    ``noise`` has normal(), increment(t, s) and increment_and_integral(t, s), and was told of the step by the loop
    (``enter``): as many draws as a rule likes, all of them that step's own. ``state`` is None at first and whatever
    the rule returned after; it is handed on from step to step and used once, since rules may change it in place.
    (Where ``system.replayed`` a step is taken again, once for each of its evaluations, from copies of the state whose
    tensors are not copied: these a rule must then leave as they were.)

    ``evaluations``: network evaluations of one step, at most; ``extra``: those that a whole run adds, whatever its
    steps. ``order``: of the global error on an ODE; ``weak_order``: of mean and covariance with additive noise.
    ``noisy``: the rule draws noise of its own, even where the system's churn is 0. ``churn``: of a rule that has its
    own amount of noise, the only one besides 0 that it takes from a system; None where it does what the system says.
    ``sense``: "ito" or "stratonovich", the sense of dW where the diffusion depends on x; None where it does not say.
    ``nodes``: the fractions of [t, s] besides the ends at which the rule looks at the process, so that
    their coefficients are tabulated too (elsewhere they are computed on the spot, which is slower).
    ``begin(system, times, x)``: makes the first state from the whole grid and the first x, where None is not enough.
    ``finish(system, x, t, state)``: E[x_0|x] at the last time, one evaluation, where history improves on it.
    ``table(system, levels)``: of a multistep rule, its numbers as a function of the grid; calibration tunes them.
    ``correction(state)``: what the evaluation of the last step said of the step before: corrected minus predicted x
    there, or None before there is one. A free estimate of the local error. Where ``begin`` made a
    state, a loop that wants corrections asks before its first step too, and gets None: a rule may write over what a
    correction needs unless it was asked.
    """

    step: Step
    evaluations: int = 1
    order: int = 1
    nodes: tuple[float, ...] = ()
    begin: Callable[[Any, list[float], Tensor], Any] = lambda system, times, x: None
    extra: int = 0
    weak_order: int = 1
    noisy: bool = False
    churn: float | None = None
    sense: str | None = None
    finish: Callable[[Any, Tensor, float, Any], Tensor] = lambda system, x, t, state: system.denoise(x, t)
    correction: Callable[[Any], Tensor | None] | None = None
    table: Any = None

    def __call__(self, system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
        """Take the step: (x at s, state)."""
        return self.step(system, x, t, s, noise, state)

    def check(self, system: Any) -> None:
        """Raise ValueError for a system whose churn this rule would ignore, without noise, or of another sense."""
        if (self.noisy or system.churn) and not system.diffuses:
            raise ValueError(
                "this process has no reverse SDE, only a flow, and this rule draws noise: take one without, such as "
                "unipc_2, ddim or heun"
            )
        if self.sense:
            system.require_sense(
                self.sense, "milstein (Ito)" if self.sense == "stratonovich" else "heun (Stratonovich)"
            )
        if self.churn is not None and system.backwards_only and system.churn != self.churn:
            raise ValueError(
                f"this rule has its own noise ({'some' if self.noisy else 'none'}), and would ignore the system's "
                f"churn = {system.churn:g}: give it churn = 0 (sde.probability_flow(score))"
                f"{f' or {self.churn:g}' * bool(self.churn)}, or take another rule"
            )


def step_rule(evaluations: int = 1, order: int = 1, **kwargs: Any) -> Callable[[Step], StepRule]:
    """Decorator: make a function a step rule; the arguments are those of :class:`StepRule`."""
    return lambda step: StepRule(step, evaluations, order, **kwargs)


def as_rule(rule: StepRule | Step) -> StepRule:
    """A step rule as it is; a plain function as a rule of one evaluation and order one."""
    if isinstance(rule, StepRule):
        return rule
    if not callable(rule):
        raise TypeError(f"a step rule must be a callable (system, x, t, s, noise, state), got {rule!r}")
    return StepRule(rule)


@step_rule(evaluations=0)
def stay(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
    """x_s = x_t. As a predictor it leaves the work to the corrector: annealed Langevin dynamics."""
    return x, state


def chain(first: StepRule, second: StepRule) -> StepRule:
    """Two rules on the same interval, one after the other: ``chain(corrector, predictor)`` is
    predictor-corrector sampling (Song et al. 2021, algorithm 1). Each keeps a state of its own.
    """

    def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
        a, b = state
        x, a = first(system, x, t, s, noise, a)
        x, b = second(system, x, t, s, noise, b)
        return x, (a, b)

    return StepRule(
        step,
        first.evaluations + second.evaluations,
        second.order,
        first.nodes + second.nodes,
        lambda system, times, x: (first.begin(system, times, x), second.begin(system, times, x)),
        extra=first.extra + second.extra,
        noisy=first.noisy or second.noisy,
        churn=second.churn if first.churn is None else first.churn,
    )


def repeat(rule: StepRule, times: int) -> StepRule:
    """The same rule on the same interval several times over; for correctors, which stay at t."""
    times = _checks.count(times, "times")

    def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
        for _ in range(times):
            x, state = rule(system, x, t, s, noise, state)
        return x, state

    return StepRule(
        step, times * rule.evaluations, rule.order, rule.nodes, rule.begin, extra=times * rule.extra,
        noisy=rule.noisy, churn=rule.churn,
    )  # fmt: skip


def at_end(rule: StepRule) -> StepRule:
    """A corrector at s instead of t."""

    def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
        return rule(system, x, s, s, noise, state)

    return StepRule(
        step, rule.evaluations, rule.order, rule.nodes, rule.begin, extra=rule.extra, noisy=rule.noisy,
        churn=rule.churn,
    )  # fmt: skip
