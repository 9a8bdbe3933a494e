"""Whether a score is that of the data under its process, and if not, what it is."""

import math

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.evaluation.check.denoiser import ROUGH, conditions, consistency, loss, memory, residual, slopes
from sdekit.evaluation.check.identify import Identified, identify
from sdekit.evaluation.check.probe import Probe, own_clock, told
from sdekit.evaluation.check.readings import OWN, Reading
from sdekit.evaluation.parts import Figure, Line, Verdict
from sdekit.evaluation.report import Report
from sdekit.models.conditions import mask_of_padding
from sdekit.processes.counted import as_model
from sdekit.processes.kinds import BLIND, zero_signal
from sdekit.processes.law import require_same
from sdekit.processes.sde import SDE
from sdekit.system import Score, shown

FEW = 32  # samples of data


def check_score(
    sde: SDE,
    score: Score,
    data: Tensor,
    *,
    samples: int = 128,
    batch: int = 64,
    seed: int = 0,
    search: bool = True,
) -> Report:
    """Whether a model is a score of data (N, *event) under a process; where it is not, what it seems to be.

    At ten noise levels r = sigma/alpha, from .01 to 10 times the data's spread s, ``samples`` of the data get noise,
    and the model's denoiser D(x, t) = E[x_0|x_t = x] is held to what holds of every true one:

    - it errs no more than the best that knows but mean and spread, |D - x_0|^2 <= s^2 r^2/(s^2 + r^2) a number;
    - what is left, x_0 - D, is orthogonal to what the model says, and has no mean;
    - its size is what D's own slope says: E|x_0 - D|^2 = (sigma^2/alpha) tr dD/dx  (Efron 2011, Meng et al. 2021);
    - dD/dx is symmetric, as that of a gradient;
    - E[D(x_s, s)|x_t] = D(x_t, t) for s < t (Tweedie at both levels; Daras et al. 2023, consistency);
    - finite at both ends, the same twice, the same alone and in a batch.

    ``search``: compare it with other readings of the same network: other predictions, their negatives and multiples,
    other clocks (off by one, 1000 t, reversed, log-SNR, sigma, ...), processes, and data of another range, sign or
    order of channels. What fits best is ``report.found``. Ten thousand samples' evaluations, some times that
    where nothing fits; without, two thousand.
    ``batch``: of a network call. Conditions are given as ever, ``score.given(labels)`` for the N samples of ``data``.
    It runs on the device and in the dtype of ``data``. Padded samples are not for it: take some of one size.

    Raises ValueError or TypeError for arguments that are no process, score or data, and for a score of another process;
    what goes wrong in the model itself is a line that fails.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # the Jacobian needs a gradient
            return check_score(sde, score, data.clone(), samples=samples, batch=batch, seed=seed, search=search)
    _checks.instance(sde)
    data = _checks.state(data, "data").detach()
    if len(data) < 2:
        raise ValueError(f"data must be samples (N, *event) with N of at least 2, got {tuple(data.shape)}")
    if (mask := mask_of_padding(score, data)) is not None:
        raise ValueError(
            f"data are padded, it seems, by the condition {shown(mask)}, and every entry is looked at here: give "
            "samples of one size, without padding (a mask of another kind passes as floating numbers)"
        )
    model = as_model(score, sde)
    probe = Probe(sde, model, data, _checks.count(samples, "samples", minimum=16), seed, _checks.count(batch, "batch"))
    require_same(model.sde, sde, probe.times)
    settings = {
        "process": type(sde).__name__, "predicts": model.predicts, "data": tuple(data.shape), "spread": probe.spread,
        "levels": [float(f"{r:.4g}") for r in probe.r], "samples": samples, "seed": seed,
    }  # fmt: skip
    title = f"check_score: a model that predicts {model.predicts}, under {type(sde).__name__}"
    denoised: list[Tensor] = []
    try:
        lines = _answers(probe)
        if all(line.verdict != "fail" for line in lines):
            denoised = [probe.denoised(k) for k in range(len(probe.r))]
    except Exception as error:  # of the user's network, whatever it be
        what = "look at what network(x, t) takes and returns: as_score(..., time=, output=), score.given(...)"
        lines = [Line("answers", "fail", math.nan, f"{type(error).__name__}: {error}", what)]
    figures, found = [], ""
    if denoised:
        losses = torch.stack([probe.loss(x_0, k) for k, x_0 in enumerate(denoised)])
        lines += [
            loss(probe, losses),
            memory(probe, losses),
            *conditions(probe, denoised, losses),
            *residual(probe, denoised),
            *slopes(probe, denoised, seed),
            consistency(probe, seed),
        ]
        figures.append(
            _figure({"the model": (probe.r, losses.mean(1)), "trivial": (probe.r, torch.ones(len(probe.r)))})
        )
    if search and all(line.verdict != "fail" for line in lines if line.name in ("repeatable", "alone")):
        identified = identify(probe)
        mean: Verdict = next((line.verdict for line in lines if line.name == "mean"), "pass")
        if identified.best.levels:  # else nobody got an answer, as the first line says
            line, found = _reading(identified, model.predicts, mean)
            lines.append(line)
        if identified.accused:
            r = identified.probe.r
            both = {"as given": identified.own, "read otherwise": identified.best}
            figures.append(_figure({name: (r, fit.losses.mean(1)) for name, fit in both.items()}))
    return Report(title, tuple(lines), settings, tuple(figures), found)


def _figure(curves: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    known = {name: (r[y.isfinite()].tolist(), y[y.isfinite()].tolist()) for name, (r, y) in curves.items()}
    return Figure("Error of the denoiser", "sigma/alpha", "of the trivial denoiser's", known, "xy")


def _answers(probe: Probe) -> list[Line]:
    """Finite at both ends, the same twice, no sample of another, and x left as it is."""
    sde, k, lines = probe.sde, len(probe.r) // 2, []
    bad = []
    for name, time in (("t_min", sde.t_min), *(("t", float(t)) for t in probe.times), ("T", sde.T)):
        out = probe.ask(probe.state(0, t=time)[:16], own_clock(probe.model, torch.tensor(time, dtype=torch.float64)))
        bad += [] if bool(torch.isfinite(out).all()) else [f"{name} = {time:g}"]
    lines.append(
        Line("finite", "fail", float(len(bad)), f"NaN or infinite at {' and '.join(bad)}", "raise t_min or lower T, or "
             "look for a division by 0 or an overflow of half precision in the network")
        if bad else Line("finite", "pass", 0.0, "finite from t_min to T")
    )  # fmt: skip
    x, t = probe.state(k)[:16], float(probe.times[k])
    given = x.clone()
    with probe.of(x):
        told(probe.model, given, own_clock(probe.model, probe.times[k]))
    lines.append(
        Line("input", "pass", 0.0, "the network leaves x as it is") if torch.equal(given, x) else
        Line("input", "fail", 1.0, "the network writes into x, which solvers go on with",
             "begin its forward with x = x.clone(), or take what it does in place out")
    )  # fmt: skip
    out = probe.at_time(x, t)
    size = float(out.double().square().mean().sqrt()) or 1.0
    again = float((probe.at_time(x, t) - out).double().abs().max()) / size
    lines.append(
        Line("repeatable", "pass" if again < 1e-3 else "fail", again, f"two calls differ by {again:.2g}",
             "" if again < 1e-3 else "the network draws random numbers: network.eval() turns dropout off")
    )  # fmt: skip
    alone = max(float((probe.at_time(x[i : i + 1], t, i) - out[i]).double().abs().max()) for i in (0, 5)) / size
    near = alone < 1e-2
    lines.append(
        Line("alone", "pass" if near else "fail", alone, f"a sample alone and in a batch differ by {alone:.2g}",
             "" if near else "samples of a batch see each other: network.eval() for batch norm; attention or a norm "
             "over the batch axis is a defect of the network")
    )  # fmt: skip
    if probe.model.predicts in BLIND and float(sde.alpha(sde.T)) == 0:
        said = zero_signal(sde, probe.model.predicts)
        lines.append(Line("start", "warn", sde.T, "no sampler can start from T", said))
    if len(probe.data) < FEW:
        lines.append(Line("data", "warn", float(len(probe.data)), f"{len(probe.data)} samples tell little but what is "
                          "grossly wrong", "give a hundred or more"))  # fmt: skip
    return lines


def _reading(found: Identified, name: str, mean: Verdict) -> tuple[Line, str]:
    """Whether another reading fits better than the model's own; ``mean``: the verdict on the residual's."""
    own, best = found.own, found.best
    slight = best.reading.clock.shift and own.loss < 1.1 * best.loss
    if mean != "pass" and (not found.accused or slight):  # rough weights err at every clock, and at some a bit less
        text = f"no other reading explains it, loss {own.loss:.3g}, but what is left has a mean"
        return Line("reading", mean, 1.0, text, ROUGH), ROUGH
    if not found.accused:
        text = f"of all readings its own fits best: {own.reading}, loss {own.loss:.3g}"
        if found.fits(own):
            return Line("reading", "pass", 1.0, text), ""
        remedy = "no prediction, clock, process or scale explains it: train longer, or it is of other data"
        return Line("reading", "warn", 1.0, text, remedy), ""
    left = best.beside(own)
    text = f"{best.reading}: loss {left:.3g}, and {own.loss:.3g} as given"
    others = [fit for fit in found.others if not torch.allclose(fit.losses, best.losses, rtol=1e-4, equal_nan=True)]
    same = [str(fit.reading).removeprefix("it predicts ") for fit in others[:3]]
    if same:
        more = f" and {len(others) - 3} others" if len(others) > 3 else ""
        text += f" (these data cannot tell that from: {'; '.join(same)}{more})"
    if not found.fits(best):
        text = f"nothing fits; nearest, {text}"
    return Line("reading", "fail", own.loss / left, text, _advice(best.reading, name)), str(best.reading)


def _advice(reading: Reading, name: str) -> str:
    """What to write instead."""
    said, rest = [], []
    if reading.predicts != name:
        said.append(f'predicts="{reading.predicts}"')
    if reading.clock != OWN:
        said.append(f"time={reading.clock.code}")
    if reading.factor != 1:
        said.append(f"output=lambda out: {reading.factor:.3g} * out")
    if reading.process is not None:
        rest.append(f"with sde = {reading.process.split(' (')[0]}")
    if reading.clock.shift:
        rest.append("where clock is the time= that it has")
    if reading.transform is not None:
        rest.append(f"bring the data to what it was trained on: {reading.transform.name}")
    call = [f"as_score({', '.join(['network', 'sde', *said])})"] if said or reading.process is not None else []
    return "; ".join([*call, *rest]) or "see what the network is given"
