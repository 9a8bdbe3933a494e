"""The fixed-grid samplers by name: each a step rule, a noise level and a grid. No numerics here."""

from dataclasses import dataclass
from typing import Any

from sdekit import _checks
from sdekit.sampling.calibration import Calibration
from sdekit.solvers.solve import ADAPTIVE, ADAPTIVE_SDE
from sdekit.solvers.steppers import (
    RULES,
    StepRule,
    as_rule,
    at_end,
    chain,
    euler_maruyama,
    hamiltonian,
    langevin,
    repeat,
    stay,
)


@dataclass(frozen=True)
class Sampler:
    """A step rule under ``sde.reverse(score, churn)``.

    ``grid`` and ``steps`` are the defaults, where neither user nor process says otherwise.
    """

    rule: StepRule
    churn: float = 0.0
    grid: str = "uniform"
    steps: int = 50

    def __post_init__(self) -> None:
        if not isinstance(self.rule, StepRule):
            raise TypeError(f"rule must be a step rule, such as RULES['heun'] or one by step_rule, got {self.rule!r}")

    @property
    def stochastic(self) -> bool:
        """True where noise is drawn after the start."""
        return self.churn > 0 or self.rule.noisy


def predictor_corrector(
    predictor: str | StepRule = "euler_maruyama",
    corrector: str = "langevin",
    corrector_steps: int = 1,
    snr: float = 0.16,
) -> Sampler:
    """Predictor-corrector sampling: corrector steps at t, then one predictor step of the reverse SDE to s.

    Without a predictor the corrector's steps are those of s, the level that x is to be at next.
    """
    rule = _checks.lookup(RULES, predictor, "predictor") if isinstance(predictor, str) else as_rule(predictor)
    churn = 1.0 if rule.churn is None else 0.0  # a predictor with noise of its own takes none from the system
    made = {"langevin": langevin(snr), "hamiltonian": hamiltonian(snr), "none": stay}
    correct = repeat(_checks.lookup(made, corrector, "corrector"), _checks.count(corrector_steps, "corrector_steps"))
    if corrector != "none":
        rule = at_end(correct) if rule is stay else chain(correct, rule)
    elif rule is stay:
        raise ValueError("predictor and corrector are both 'none': nothing would move x; name one of them")
    return Sampler(rule, churn=churn, steps=1000)


# name -> what makes it. A new sampler is a new row; tests and benchmarks loop over these.
SAMPLERS: dict[str, Sampler] = {
    "euler_maruyama": Sampler(euler_maruyama, churn=1.0, steps=1000),
    "reverse_diffusion": Sampler(RULES["reverse_diffusion"], churn=1.0, steps=1000),
    "ancestral": Sampler(RULES["ancestral"], steps=1000),
    "heun_sde": Sampler(RULES["heun"], churn=1.0, steps=1000),
    "pc": predictor_corrector(),
    "annealed_langevin": predictor_corrector("none", corrector_steps=2),
    "dpmpp_2m_sde": Sampler(RULES["dpmpp_2m"], churn=1.0, grid="karras"),
    "dpmpp_3m_sde": Sampler(RULES["dpmpp_3m"], churn=1.0, grid="karras"),
    "sa_solver": Sampler(RULES["unipc_3"], churn=1.0, grid="karras"),
    "edm": Sampler(RULES["edm"], grid="karras"),
    "restart": Sampler(RULES["restart"], grid="karras"),
    "euler": Sampler(euler_maruyama, grid="inner_vp_1.5"),
    "heun": Sampler(RULES["heun"], grid="inner_log_snr"),
    "rk4": Sampler(RULES["rk4"], grid="inner_log_snr"),
    "ddim": Sampler(RULES["ddim"], grid="inner_quadratic"),
    "ipndm": Sampler(RULES["ipndm"], grid="inner_quadratic"),
    "deis": Sampler(RULES["deis"], grid="inner_karras"),
    "dpm_solver_2": Sampler(RULES["dpm_solver_2"], grid="inner_log_snr"),
    "dpm_solver_3": Sampler(RULES["dpm_solver_3"], grid="inner_log_snr"),
    "dpmpp_2s": Sampler(RULES["dpmpp_2s"], grid="inner_quadratic"),
    "dpmpp_2m": Sampler(RULES["dpmpp_2m"], grid="inner_cubic"),
    "dpmpp_3m": Sampler(RULES["dpmpp_3m"], grid="inner_cubic"),
    "unipc_2": Sampler(RULES["unipc_2"], grid="inner_cubic"),
    "unipc_3": Sampler(RULES["unipc_3"], grid="inner_cubic"),
    "v_3m": Sampler(RULES["v_3m"], grid="inner_quadratic"),
    "flow_3m": Sampler(RULES["flow_3m"], grid="inner_quadratic"),
    "flow_unipc_3": Sampler(RULES["flow_unipc_3"], grid="inner_quadratic"),
}


def as_sampler(sampler: Any) -> Sampler:
    """What a user may call a sampler, as one. Raises ValueError or TypeError for what is none."""
    if isinstance(sampler, Sampler):
        return sampler
    if isinstance(sampler, Calibration):
        return Sampler(sampler.rule)
    if not isinstance(sampler, str):
        return Sampler(as_rule(sampler))
    if sampler in (*ADAPTIVE, ADAPTIVE_SDE):
        use = "sde_sample" if sampler == ADAPTIVE_SDE else f"ode_sample(..., method={sampler!r})"
        raise ValueError(f"unknown sampler {sampler!r}: it has no fixed steps; use {use}")
    return _checks.lookup(SAMPLERS, sampler, "sampler")
