"""What a run was begun with: what of it may change when the run goes on, and what makes it another model."""

from collections.abc import Mapping, Sequence
from typing import Any

from sdekit import _checks

# What makes another model, or is of the beginning alone: these cannot change in a run.
FIXED = (
    "predicts", "time", "output", "process", "process_args", "network", "network_args", "sigma_data", "conditional",
    "init",
)  # fmt: skip
DIGEST = "data's digest"
_DATA = ("data", "items", DIGEST, "size", "channels", "overfit")  # all go by the name of the first

Settings = Mapping[str, Any]


def asked_for(change: Sequence[str], resume: bool) -> tuple[str, ...]:
    """``change`` as names. Raises TypeError for one string, ValueError where no run is resumed."""
    if isinstance(change, str):
        raise TypeError(f"change must be a list of names, as [{change!r}], got {change!r}")
    if change and not resume:
        raise ValueError("change is for a run that goes on: pass resume=True (--resume) too, or leave it out")
    return tuple(change)


def changes(then: Settings, now: Settings, change: Sequence[str], folder: str) -> list[str]:
    """What is ``now`` other than it was ``then``, in words, for the log. ValueError where ``change`` does not name it,
    or cannot.
    """
    may = {_name(key) for key in then.keys() | now.keys()} - set(FIXED)
    for name in change:
        if name in FIXED:
            raise ValueError(f"change cannot name {name}: {_ELSEWHERE.format(folder=folder)}")
        _checks.lookup(dict.fromkeys(may), name, "setting to change")
    other = sorted(key for key in then.keys() | now.keys() if _differ(then, now, key))
    refused = [key for key in other if _name(key) not in change]
    if not refused:
        return [_words(key, then.get(key), now.get(key), "{key} {now!r}, was {was!r}") for key in other]
    was = ", ".join(_words(key, then.get(key), now.get(key), "{key} = {was!r} (now {now!r})") for key in refused)
    fixed = sorted({key for key in refused if key in FIXED})
    if fixed:
        way = f"{', '.join(fixed)} cannot change in a run: {_ELSEWHERE.format(folder=folder)}"
    else:
        names = [*change, *dict.fromkeys(_name(key) for key in refused)]
        way = (
            f"go on with what is new by change={names} (--change {' '.join(names)}), resume it with the same, or "
            "choose another folder"
        )
    raise ValueError(f"{folder} holds a run with {was}; {way}")


_ELSEWHERE = "resume it with the same, or begin a run in another folder, from its weights by init={folder!r} (--init)"


def _differ(then: Settings, now: Settings, key: str) -> bool:
    """What a run of before had no word for is what is not set now."""
    if key not in then:
        return not (now[key] is None or now[key] is False)
    return bool(then[key] != now.get(key))


def _name(key: str) -> str:
    return _DATA[0] if key in _DATA else key


def _words(key: str, was: Any, now: Any, form: str) -> str:
    """A difference as ``form`` has it; fingerprints, which say nothing to anybody, as what they are of."""
    if key == DIGEST:
        return "other data"
    if key == "process" and isinstance(was, list) and isinstance(now, list):
        was, now = was[0], now[0] if was[0] != now[0] else f"{now[0]} with other numbers"
    return form.format(key=key, was=was, now=now)
