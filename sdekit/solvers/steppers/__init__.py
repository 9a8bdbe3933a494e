"""Step rules: one step from t to s of any system, and what they are put together from."""

from sdekit.solvers.steppers.base import StepRule, as_rule, at_end, chain, repeat, stay, step_rule
from sdekit.solvers.steppers.ddim import ddim
from sdekit.solvers.steppers.drift import euler_maruyama, heun, milstein, reverse_diffusion, rk4, sra1
from sdekit.solvers.steppers.langevin import hamiltonian, langevin, smld
from sdekit.solvers.steppers.multistep import multistep
from sdekit.solvers.steppers.singlestep import edm, restart, singlestep

__all__ = [
    "RULES",
    "StepRule",
    "as_rule",
    "at_end",
    "chain",
    "ddim",
    "edm",
    "euler_maruyama",
    "hamiltonian",
    "heun",
    "langevin",
    "milstein",
    "multistep",
    "repeat",
    "restart",
    "reverse_diffusion",
    "rk4",
    "singlestep",
    "smld",
    "sra1",
    "stay",
    "step_rule",
]

# The rules that go by a name in `solve` and as predictors. Order is that of the ODE (churn 0).
RULES: dict[str, StepRule] = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "milstein": milstein,
    "heun": heun,
    "rk4": rk4,
    "sra1": sra1,
    "ddim": ddim(eta=0.0),
    "ancestral": ddim(eta=1.0),
    # Multistep: the exact integral of the polynomial, variable steps, and a start that keeps the order throughout.
    # iPNDM (Zhang & Chen 2023) weighs all steps as equal, so it is of order 2, whatever the number of predictions.
    "ipndm": multistep(3, "eps", "step", freeze=True),
    "deis": multistep(3, "eps"),  # Zhang & Chen 2023, eq. 15, in log rho; DPM-Solver's order 3 as a multistep method
    "dpmpp_2m": multistep(2, freeze=True),  # Lu et al. 2022b, algorithm 2
    "dpmpp_3m": multistep(3),  # Lu et al. 2022b, appendix; published order 2: a factor 2 missing in D2, a low start
    "unipc_2": multistep(2, corrector=True, freeze=True),  # Zhao et al. 2023, its corrector by exact integrals
    "unipc_3": multistep(3, corrector=True),
    "v_3m": multistep(3, "v", "flow"),  # ours: in the angle's prediction (Salimans & Ho 2022, eq. 8), same clock
    "flow_3m": multistep(3, "flow", "flow"),  # ours: Adams-Bashforth on the rectified flow (Liu et al. 2023)
    "flow_unipc_3": multistep(3, "flow", "flow", corrector=True),  # the same with UniPC's corrector: Adams-Moulton
    # Single-step: Lu et al. 2022a, algorithms 1 and 2; 2022b, algorithm 1 (r = 1/2); Karras et al. 2022, algorithm 2;
    # Xu et al. 2023, algorithm 1.
    "dpm_solver_2": singlestep([(1 / 2, (0,)), (1.0, (1,))], 2),
    "dpm_solver_3": singlestep([(1 / 3, (0,)), (2 / 3, (0, 1)), (1.0, (0, 2))], 3),
    "dpmpp_2s": singlestep([(1 / 2, (0,)), (1.0, (1,))], 2, "x0"),
    "edm": edm(),
    "restart": restart(),
    "none": stay,
}
