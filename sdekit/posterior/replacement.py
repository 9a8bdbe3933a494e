"""Inpainting by replacement: what is seen is put in anew after every step. Baselines: cheap, and not the posterior."""

from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.processes.law import require_gradient
from sdekit.solvers.steppers import StepRule, as_rule
from sdekit.system import expand


def replaced(rule: StepRule, mask: Tensor, y: Tensor, *, std: float = 0.0, repeats: int = 1) -> StepRule:
    """A rule that puts alpha_s y + sqrt(sigma_s^2 - (alpha_s std)^2) z where ``mask`` is True, after its step to s.

    So what was seen has the noise of x_s, also where y = x_0 + std eps has some of its own: then it is put in only
    while the level sigma_s/alpha_s is at least std (Song et al. 2021, appendix I.2; below, y says less than x does).
    ``repeats``: RePaint's (Lugmayr et al. 2022, algorithm 1): noise of the forward process leads from s back to t, and
    the step is taken again, so many times in all. ``mask``: bool, of one sample's shape; ``y``: like one sample or
    (B, *event). As a sampler: ``Sampler(replaced(RULES["ancestral"], mask, y), steps=250)``. The rule must be one
    without a history. What is not seen never learns all of what is, but with many repeats: :func:`posterior_sample`
    is for that. Raises ValueError or TypeError for arguments that are none of these.
    """
    rule, repeats = as_rule(rule), _checks.count(repeats, "repeats")
    std = _checks.positive(std, "std", zero=True)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where x is seen, got {getattr(mask, 'dtype', type(mask))}")
    y = torch.as_tensor(y)
    if mask.shape not in (y.shape, y.shape[1:]):
        raise ValueError(f"mask must have the shape of one sample of y, {tuple(y.shape)}, got {tuple(mask.shape)}")
    _checks.state(y[..., mask], "y")
    if rule.table is not None or rule.correction is not None:
        raise ValueError(
            "rule must be one without a history, such as ancestral or ddim: the past would be of another x"
        )

    def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
        if std:
            require_gradient(system.sde, "replaced with std > 0")
        if x.shape[1:] != mask.shape:
            raise ValueError(f"mask must have the shape of one sample, {tuple(x.shape[1:])}, got {tuple(mask.shape)}")
        if repeats > 1 and not _empty(state):
            raise ValueError("repeats > 1 needs a rule that begins each step afresh, such as ancestral, ddim or heun")
        n = system.at(s, x)
        spare = n.sigma**2 - (n.alpha * std) ** 2
        for left in reversed(range(repeats)):
            x, state = rule(system, x, t, s, noise, state)
            if spare >= 0:
                known = (n.alpha * y.to(x)).expand_as(x) + spare**0.5 * noise.normal()
                x = torch.where(mask.to(x.device), known, x)
            else:  # below the observation's own noise it says nothing new, and more trips would forget what it said
                break
            if left:
                a, b = (expand(c, x) for c in system.sde.transition(s, t))
                x = a * x + b * noise.normal()
        return x, state

    return StepRule(
        step, repeats * rule.evaluations, rule.order, rule.nodes, rule.begin, extra=repeats * rule.extra,
        weak_order=rule.weak_order, noisy=True, churn=rule.churn,
    )  # fmt: skip


def _empty(state: Any) -> bool:
    return state is None or (isinstance(state, tuple) and all(map(_empty, state)))
