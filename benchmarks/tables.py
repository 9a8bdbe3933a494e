"""Tables of the pages and of what is printed."""

from collections.abc import Iterable


def markdown(header: Iterable[object], lines: Iterable[Iterable[object]]) -> str:
    first, *rest = ("| " + " | ".join(map(str, cells)) + " |" for cells in ([*header], *lines))
    return "\n".join([first, "|---" * len([*header]) + "|", *rest])
