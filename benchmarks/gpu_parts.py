"""The parts of gpu.py: each a generator of rows, so that what was measured before a failure stays."""

import copy
import importlib.util
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_measure import NFE, SMALL, Setting, Watched, calls, elapsed, event, size
from network_overhead import MODELS, SCHEDULERS, both, evaluations, unet
from overhead_measure import bare
from torch import nn

from sdekit import SAMPLERS, VPSDE, as_score, sample
from sdekit.training.trainer import train

Row = dict[str, Any]


class UnavailableError(Exception):
    """A part that cannot run here, and what it needs."""


def share(s: Setting) -> Iterator[Row]:
    for shape in s.scale.shapes:
        network = Watched(s.unet(shape[1]), event if s.cuda else time.perf_counter)
        for name, run in calls(as_score(network, VPSDE(), "v"), shape, s).items():

            def measure(network: Watched = network, run: Callable[[], object] = run) -> tuple[float, float]:
                network.marks.clear()
                return s.seconds(run), sum(elapsed(*marks) for marks in network.marks)

            found = s.repeat(measure)
            whole, inside = (statistics.median(times) for times in zip(*found, strict=True))
            part = statistics.median(b / a for a, b in found)
            yield {
                "call": name, "shape": size(shape), "evaluations": len(network.marks), "ms": 1e3 * whole,
                "network_ms": 1e3 * inside, "share": part, "beside_ms": 1e3 * (whole - inside),
            }  # fmt: skip


def waits(s: Setting) -> Iterator[Row]:
    if not s.cuda:
        raise UnavailableError("needs cuda, whose sync debug mode tells of waits")
    shape = (4, 3, 16, 16)
    network = Watched(replace(s, scale=SMALL).unet(3), int)  # where the host waits does not depend on the network
    score = as_score(network, VPSDE(), "v")
    runs = {
        f"sample {name}": partial(sample, score.sde, score, shape, name, steps=10, seed=s.seed) for name in SAMPLERS
    }
    for name, run in (calls(score, shape, s) | runs).items():
        run()  # what is done once (kernels loaded, tables copied) is not of the loop
        found = caught(run, network)
        places = Counter(found)
        yield {
            "call": name, "evaluations": len(network.marks), "waits_in_loop": len(found),
            "where": ", ".join(f"{place} {n}" for place, n in places.most_common(5)),
        }  # fmt: skip


def caught(run: Callable[[], object], network: Watched) -> list[str]:
    """Where the host waited between the first and the last call of the network, and not in one: files and lines."""
    network.marks.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        network.mark = lambda: len(said)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    inside = {i for before, after in network.marks for i in range(before, after)}
    between = range(network.marks[0][1], network.marks[-1][0])
    found = [said[i] for i in between if i not in inside and "called a synchronizing" in str(said[i].message)]
    return [f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in found]


def diffusers_loops(s: Setting) -> Iterator[Row]:
    if importlib.util.find_spec("diffusers") is None:
        raise UnavailableError('diffusers is not installed: pip install -e ".[peers]"')
    small = s.scale is SMALL
    for kind in list(MODELS)[: 1 if small else 2]:
        model = unet(kind, s.seed).to(s.device)
        for batch in (1,) if small else (1, 16):
            x_T = s.normal((batch, 3, model.config.sample_size, model.config.sample_size))
            for name in SCHEDULERS:
                ours, theirs = both(model, name, x_T)
                counts = [evaluations(model, run) for run in (ours, theirs)]
                a, b, ratio = s.pair(ours, theirs)
                yield {
                    "network": kind, "batch": batch, "sampler": name, "evaluations": counts[0],
                    "their_evaluations": counts[1], "ms": 1e3 * a, "diffusers_ms": 1e3 * b, "ratio": ratio,
                }  # fmt: skip


def bf16(s: Setting) -> Iterator[Row]:
    for shape in s.scale.shapes:
        network = s.unet(shape[1])
        scores = [as_score(n, VPSDE(), "v") for n in (copy.deepcopy(network).bfloat16(), network)]
        ours, other = (
            partial(sample, score.sde, score, shape, "dpmpp_2m", nfe=NFE, seed=s.seed, dtype=torch.float32)
            for score in scores
        )
        x, reference = ours(), other()
        a, b, ratio = s.pair(ours, other)
        yield {
            "shape": size(shape), "state": str(x.dtype), "ms": 1e3 * a, "float32_ms": 1e3 * b, "ratio": ratio,
            "rms_difference": float((x - reference).square().mean().sqrt()),
            "rms_float32": float(reference.square().mean().sqrt()),
        }  # fmt: skip


def training(s: Setting) -> Iterator[Row]:
    shape = (s.scale.batch, *s.scale.shapes[0][1:])
    data, (short, long) = s.normal((4 * s.scale.batch, *shape[1:])), s.scale.training
    for narrow in (False, True):
        network = s.unet(shape[1])

        def run(steps: int, network: nn.Module = network, narrow: bool = narrow) -> None:
            train(network, VPSDE(), data, steps=steps, batch=shape[0], device=s.device, bf16=narrow, seed=s.seed)

        found = s.repeat(lambda run=run: [s.seconds(partial(run, steps)) for steps in (short, long)])
        step = statistics.median((b - a) / (long - short) for a, b in found)
        set_up = statistics.median(a - short * step for a, _ in found)
        yield {
            "autocast": "bfloat16" if narrow else "no", "batch": size(shape), "ms_a_step": 1e3 * step,
            "images_a_second": shape[0] / step, "set_up_ms": 1e3 * set_up,
        }  # fmt: skip


def memory(s: Setting) -> Iterator[Row]:
    if not s.cuda:
        raise UnavailableError("needs cuda, which counts the memory that it has in use")
    shape = (s.scale.batch, *s.scale.shapes[0][1:])
    network, x, t = s.unet(shape[1]), s.normal(shape), torch.full(shape[:1], 0.5, device=s.device)
    score = as_score(network, VPSDE(), "v")
    runs = calls(score, shape, s)
    runs["sample flow_unipc_3 20"] = partial(sample, score.sde, score, shape, "flow_unipc_3", nfe=NFE, seed=s.seed)
    alone, state = peak(torch.no_grad()(lambda: network(x, t)), s), x.numel() * x.element_size() / 2**20
    for name, run in runs.items():
        most = peak(run, s)
        yield {
            "call": name, "batch": size(shape), "MiB": most, "network_MiB": alone, "beside_MiB": most - alone,
            "states": (most - alone) / state,
        }  # fmt: skip


def peak(run: Callable[[], object], s: Setting) -> float:
    """MiB at most, over those before the run, which is the second."""
    run()
    s.wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    s.wait()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def overhead(s: Setting) -> Iterator[Row]:
    sde = VPSDE()
    for shape in s.scale.trivial:
        d = s.normal(shape)
        seen: list[int] = []
        score = as_score(lambda x, t, d=d, seen=seen: seen.append(1) or d, sde, "eps")
        for name, row in SAMPLERS.items():
            runs = [
                partial(sample, sde, score, shape, name, steps=n, seed=s.seed, device=s.device)
                for n in (s.scale.steps // 4, s.scale.steps)
            ]
            counts = []
            for run in runs:
                seen.clear()
                run()
                counts.append(len(seen))
            runs += [bare(d, n, n * row.stochastic) for n in counts]
            found = s.repeat(lambda runs=runs: [s.seconds(run) for run in runs])
            more = [(long - short, bare_long - bare_short) for short, long, bare_short, bare_long in found]
            yield {
                "sampler": name, "shape": size(shape), "evaluations": counts[1],
                "us": 1e6 * statistics.median(ours for ours, _ in more) / (counts[1] - counts[0]),
                "ratio": statistics.median(ours / other for ours, other in more),
            }  # fmt: skip


def compiled(s: Setting) -> Iterator[Row]:
    shape = s.scale.shapes[0]
    network = s.unet(shape[1])
    torch._dynamo.reset()
    fast = torch.compile(network, backend=s.scale.compiler)
    ours, other = (
        partial(sample, score.sde, score, shape, "dpmpp_2m", nfe=NFE, seed=s.seed)
        for score in (as_score(n, VPSDE(), "v") for n in (fast, network))
    )
    first = s.seconds(ours)
    a, b, ratio = s.pair(ours, other)
    yield {
        "what": f"network, {s.scale.compiler}", "shape": size(shape), "first_call_s": first, "ms": 1e3 * a,
        "eager_ms": 1e3 * b, "ratio": ratio,
    }  # fmt: skip
    score, x, t = as_score(network, VPSDE(), "v"), s.normal(shape), torch.tensor(0.5, dtype=torch.float64)
    torch._dynamo.reset()
    with torch.no_grad():
        told = torch._dynamo.explain(lambda x, t: score(x, t))(x, t)
    torch._dynamo.reset()
    reasons = sorted({str(reason.reason).splitlines()[0] for reason in told.break_reasons})
    yield {
        "what": "one score", "shape": size(shape), "graphs": told.graph_count, "breaks": told.graph_break_count,
        "reasons": "; ".join(reasons),
    }  # fmt: skip


# In the order of what is to be known first.
PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "share": share,
    "waits": waits,
    "diffusers": diffusers_loops,
    "bf16": bf16,
    "training": training,
    "memory": memory,
    "overhead": overhead,
    "compile": compiled,
}
