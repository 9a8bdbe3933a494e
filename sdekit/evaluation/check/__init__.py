"""Whether a process, a score or a rule is what it is taken for: a line for each thing looked at, and what to do."""

from sdekit.evaluation.check.process import check_process
from sdekit.evaluation.check.rule import check_rule
from sdekit.evaluation.check.score import check_score

__all__ = ["check_process", "check_rule", "check_score"]
