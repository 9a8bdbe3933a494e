"""Step rules: one step from t to s of any system, and what they are put together from."""

from sdekit.steppers.base import StepRule, as_rule, at_end, chain, repeat, stay, step_rule
from sdekit.steppers.drift import euler_maruyama, heun, reverse_diffusion, rk4
from sdekit.steppers.exponential import ddim, dpmpp_2m
from sdekit.steppers.langevin import langevin
from sdekit.steppers.multistep import multistep

__all__ = [
    "RULES",
    "StepRule",
    "as_rule",
    "at_end",
    "chain",
    "ddim",
    "dpmpp_2m",
    "euler_maruyama",
    "heun",
    "langevin",
    "multistep",
    "repeat",
    "reverse_diffusion",
    "rk4",
    "stay",
    "step_rule",
]

# The rules that go by a name in `solve` and as predictors. Order is that of the ODE (churn 0).
RULES: dict[str, StepRule] = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral": ddim(eta=1.0),
    "ddim": ddim(eta=0.0),
    "heun": heun,
    "rk4": rk4,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": multistep(3),
    "dpm_solver_3m": multistep(3, "eps"),
    "deis": multistep(3, "eps", "karras"),
    "unipc_2": multistep(2, corrector=True),
    "none": stay,
}
