"""Whether a process or a rule is what it says: a line for each thing that was looked at, and what to do."""

from sdekit.evaluation.check.process import check_process
from sdekit.evaluation.check.rule import check_rule

__all__ = ["check_process", "check_rule"]
