"""From a state at one time to the state at another: step rules, the fixed and the adaptive loop, other people's."""

from sdekit.solvers.solution import Solution, SolverError
from sdekit.solvers.solve import solve
from sdekit.solvers.steppers import StepRule, step_rule

__all__ = ["Solution", "SolverError", "StepRule", "solve", "step_rule"]
