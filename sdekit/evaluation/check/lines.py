"""How lines are made: by a look that may raise, and by a number against what would be too much."""

import math
from collections.abc import Callable, Sequence

from sdekit.evaluation.parts import Line, Verdict


def attempt(name: str, look: Callable[[], Line], remedy: str = "") -> Line:
    """The line that a look makes; one that fails, with the message, where it raises: a check reports, it does not end.

    ``remedy``: what to do about that.
    """
    try:
        return look()
    except Exception as error:  # whatever a user's process or rule raises is what the line has to say
        return Line(name, "fail", math.nan, f"raised {type(error).__name__}: {error}", remedy)


def verdict(number: float, warn: float, fail: float) -> Verdict:
    """A number above ``fail``, or NaN, fails; one above ``warn`` warns."""
    return "pass" if number <= warn else "warn" if number <= fail else "fail"


def table(header: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """Numbers in columns, below each other."""
    cells = [[f"{value:.4g}" for value in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(header, *cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *cells]
    )
