"""Does check_score find what is wrong with a model, and leave right ones alone?

    pip install -e ".[benchmarks,diffusers]"
    python benchmarks/trust.py            # 53 planted mistakes, 24 right models: fifteen minutes on a thread
    python benchmarks/trust.py --quick    # does it run? three of each

Protocol: three models (the bundled digits model, which predicts v on the clock t of VPSDE(); the trained diffusers
U-Net of networks/, eps on a table's index; the exact score of a mixture in 8 dimensions), each with one mistake
planted, or two: what is said of its prediction, clock, factor, process, data or weights is not what it was made with.
``check_score`` sees 128 samples of the data (seed 0), nothing of the mistake. It is found where the report is not ok,
and named where the report says what would be right (the words are in the code). Of right models nothing may fail: the
bench of networks.py, each under its process and some under others, exact scores under every process and of every kind.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import networks
import torch
from overhead_measure import write
from tables import markdown
from trust_models import (
    Case,
    Parts,
    bundled,
    closed,
    digits,
    dropped,
    labels_of_others,
    mixture,
    normed,
    rough,
    scaled_linear,
    shifted,
    swapped,
    times,
    unet,
)

from sdekit import (
    SDE,
    VESDE,
    VPSDE,
    CosineVP,
    HeatODE,
    PointSet,
    RectifiedFlow,
    SubVPSDE,
    check_score,
)


class Planted(NamedTuple):
    """A mistake: in which model, what it is, what the report must say of it, and the model with it."""

    model: str
    mistake: str
    says: tuple[str, ...]  # one of these
    make: Callable[[], Case]


def common(model: str, parts: Callable[[], Parts], own: str, others: tuple[str, ...]) -> list[Planted]:
    """Mistakes that can be made with every network: ``own`` is what it predicts."""
    clock = ("clock t", "table's index", "clock 999 t", "clock 1000 t")
    mistakes: dict[str, tuple[tuple[str, ...], Callable[[Parts], Case]]] = {
        "clock times 1000": (clock, lambda p: p.case(clock=lambda t: 1000 * p.clock(t))),
        "clock over 1000": (clock, lambda p: p.case(clock=lambda t: p.clock(t) / 1000)),
        "clock reversed": (clock, lambda p: p.case(clock=lambda t: p.clock(p.sde.T - t))),
        "clock is log-SNR/4": (clock, lambda p: p.case(clock=lambda t: p.sde.half_log_snr(t) / 2)),
        "clock one step late": (("earlier", *clock), lambda p: shifted(p, 1)),
        "clock one step early": (("later", *clock), lambda p: shifted(p, -1)),
        "sign of the output": ((f"minus {own}",), lambda p: times(p, -1)),
        "output doubled": ((f"2 times {own}",), lambda p: times(p, 2)),
        "clock times 1000, and x0 for it": (
            (f"predicts {own} on the clock",), lambda p: p.case(clock=lambda t: 1000 * p.clock(t), predicts="x0")
        ),
    }  # fmt: skip
    for k in others:
        mistakes[f"taken for one that predicts {k}"] = (f"predicts {own}",), lambda p, k=k: p.case(predicts=k)
    return [Planted(model, name, says, partial(_made, make, parts)) for name, (says, make) in mistakes.items()]


def _made(make: Callable[[Parts], Case], parts: Callable[[], Parts]) -> Case:
    return make(parts())


def planted() -> list[Planted]:
    """All mistakes."""
    vp, ranged = ("VPSDE()",), ("data in [-1, 1]",)
    own: list[tuple[str, str, tuple[str, ...], Callable[[], Case]]] = [
        ("bundled", "process CosineVP", vp, lambda: bundled().case(sde=CosineVP())),
        ("bundled", "process HeatODE (input not scaled)", vp, lambda: bundled().case(sde=HeatODE())),
        ("bundled", "data in [0, 1]", ranged, lambda: bundled().case(data=(digits()[0] + 1) / 2)),
        ("bundled", "data in [0, 255]", ranged, lambda: bundled().case(data=(digits()[0] + 1) * 127.5)),
        ("bundled", "rows for columns", ("axes swapped",), lambda: bundled().case(data=digits()[0].mT.contiguous())),
        ("bundled", "black for white", ("times -1",), lambda: bundled().case(data=-digits()[0])),
        ("bundled", "last weights for averaged ones", ("EMA",), lambda: rough(bundled())),
        ("bundled", "dropout left on", ("eval()",), lambda: dropped(bundled())),
        ("diffusers U-Net", "betas of Stable Diffusion", vp, lambda: unet().case(sde=scaled_linear())),
        ("diffusers U-Net", "process HeatODE (input not scaled)", vp, lambda: unet().case(sde=HeatODE())),
        ("diffusers U-Net", "data in [0, 1], and v for eps", ranged,
         lambda: unet().case(data=(digits()[0] + 1) / 2, predicts="v")),
        ("diffusers U-Net", "batch statistics", ("eval()",), lambda: normed(unet())),
        ("mixture", "process CosineVP", vp, lambda: closed().case(sde=CosineVP())),
        ("mixture", "data doubled", ("times 0.5",), lambda: closed().case(data=2 * closed().data)),
        ("mixture", "latents not scaled", ("times 0.18215",), lambda: closed().case(data=closed().data / 0.18215)),
        ("mixture of three channels", "channels in another order", ("2, 1, 0",), swapped),
        ("eps_conditional", "labels of other samples", ("their order",), labels_of_others),
    ]  # fmt: skip
    return [
        *common("bundled", bundled, "v", ("eps", "x0", "flow")),
        *common("diffusers U-Net", unet, "eps", ("v", "x0", "score")),
        *common("mixture", closed, "eps", ("v", "flow", "score")),
        *(Planted(*one) for one in own),
    ]


def right() -> dict[str, Callable[[], Case]]:
    """Right models, by name."""

    def bench(name: str, under: SDE | None = None) -> Case:
        images, labels = digits()
        sde, score = networks.load(name, len(images))
        score = score.given(labels) if name == "eps_conditional" else score
        return (sde, score, images) if under is None else (under, score.under(under), images)

    def half() -> Case:
        parts = bundled()
        return parts.case(network=copy.deepcopy(parts.network).to(torch.bfloat16))

    def oracle(sde: SDE) -> Case:
        return sde, mixture().score(sde), closed().data

    found: dict[str, Callable[[], Case]] = {
        "bundled": lambda: bundled().case(),
        "bundled, in bfloat16": half,
        "diffusers U-Net": lambda: unet().case(),
        **{name: partial(bench, name) for name in (*networks.BENCH, *networks.OTHERS)},
        "eps_linear under HeatODE": lambda: bench("eps_linear", HeatODE()),
        "flow_shift under VPSDE": lambda: bench("flow_shift", VPSDE()),
        "points": lambda: (VPSDE(), PointSet(digits()[0]).score(VPSDE()), digits()[0]),
    }
    for process in (VPSDE(), SubVPSDE(), VESDE(), HeatODE(), RectifiedFlow(), CosineVP()):
        found[f"mixture under {type(process).__name__}"] = partial(oracle, process)
    for predicts in ("eps", "x0", "v", "flow", "score"):
        found[f"mixture, says {predicts}"] = lambda k=predicts: closed(k, SubVPSDE()).case()  # type: ignore[misc]
    return found


def measure(mistakes: list[Planted], models: dict[str, Callable[[], Case]]) -> list[dict[str, Any]]:
    """A row for each mistake and each right model."""
    rows = []
    everything = [*mistakes, *(Planted(name, "", (), make) for name, make in models.items())]
    for one in everything:
        sde, score, data = one.make()
        start = time.perf_counter()
        report = check_score(sde, score, data)
        spent = time.perf_counter() - start
        said = report.found or "; ".join(line.remedy for line in report.lines if line.verdict == "fail")
        failed = " ".join(line.name for line in report.lines if line.verdict == "fail")
        named = any(words in said for words in one.says)
        rows.append({
            "model": one.model, "mistake": one.mistake, "ok": report.ok, "failed": failed, "found": said,
            "named": int(named), "warned": " ".join(line.name for line in report.lines if line.verdict == "warn"),
        })  # fmt: skip
        print(f"{one.model:16} {one.mistake or 'right':36} {'ok' if report.ok else 'NOT ok':6} "
              f"{'named' if named else '':5} {spent:5.1f} s  {rows[-1]['found'][:110]}", flush=True)  # fmt: skip
    return rows


def summary(found: list[dict[str, Any]]) -> str:
    """In a line."""
    wrong = [row for row in found if row["mistake"]]
    fine = [row for row in found if not row["mistake"]]
    ok = ("True", True)
    caught = [row for row in wrong if row["ok"] not in ok]
    named = [row for row in caught if int(row["named"])]
    return (
        f"Of {len(wrong)} planted mistakes {len(caught)} are found and {len(named)} named right; of {len(fine)} right "
        f"models {sum(row['ok'] not in ok for row in fine)} are accused."
    )


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line for each mistake."""
    lines = []
    for row in found:
        if row["mistake"]:
            caught = "no" if row["ok"] in ("True", True) else "yes"
            lines.append([row["model"], row["mistake"], caught, "yes" if int(row["named"]) else "no", row["found"]])
    return markdown(["model", "mistake", "found", "named", "what the report says"], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    mistakes, models = planted(), right()
    if options.quick:
        mistakes, models = mistakes[:3], dict(list(models.items())[:3])
    found = measure(mistakes, models)
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "trust.csv", found)
    print(table(found))
    print(summary(found))


if __name__ == "__main__":
    main()
