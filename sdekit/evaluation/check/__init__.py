"""Whether a process, a score or a rule is what it is taken for, and what to do where it is not."""

from sdekit.evaluation.check.score import check_score

__all__ = ["check_score"]
