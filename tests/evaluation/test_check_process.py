"""check_process: right processes are not accused, and every planted mistake is found by the line that should."""

import math
import re

import numpy as np
import pytest
import torch

from sdekit import (
    SDE,
    VESDE,
    VPSDE,
    AffineSDE,
    BetaTable,
    BridgeSDE,
    CorrelatedSDE,
    CosineVP,
    HeatODE,
    ItoSDE,
    PoissonFlow,
    RectifiedFlow,
    SigmaTable,
)
from sdekit.evaluation.check import check_process
from sdekit.evaluation.check.ends import Data, noise, t_min, terminal
from sdekit.evaluation.check.process import _lines
from tests.conftest import PROCESSES


class Cosine(SDE):
    """The README's, stopped before its SNR is 0."""

    T = 0.99

    def alpha(self, t):
        return torch.cos(torch.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(torch.pi / 2 * t)


class AsInTheReadme(Cosine):
    """alpha(T) is 0 but for rounding."""

    T = 1.0


K = torch.tensor([[1.0, 0.5], [0.5, 2.0]])
Y = torch.tensor([1.0, -2.0])
RIGHT = {
    **{name: make for name, make in PROCESSES.items() if name not in ("heat_squared", "flow", "cosine")},
    "readme": AsInTheReadme,
    "rectified": lambda: RectifiedFlow(3.0),
    "cosine to 0": CosineVP,
    "betas": lambda: BetaTable(torch.linspace(1e-4, 0.02, 1000)),
    "betas to 0": lambda: BetaTable(torch.cat([torch.linspace(1e-4, 0.02, 999), torch.ones(1)])),
    "sigmas": lambda: SigmaTable(torch.logspace(-2, 1.7, 20)),
    "poisson": PoissonFlow,
    "affine": lambda: AffineSDE(-0.5, 1.0, 0.3, T=8.0),
    "varying": lambda: AffineSDE(lambda t: -t, lambda t: (2 * t + 0.1) ** 0.5, T=4.0),
    "bridge": lambda: BridgeSDE(Y),
    "correlated": lambda: CorrelatedSDE(VPSDE(), K),
    "filter": lambda: CorrelatedSDE(VPSDE(), root=lambda x: 2 * x),
}


def failing(report, verdict="fail"):
    return [line.name for line in report.lines if line.verdict == verdict]


def lines_of(sde):
    return _lines(sde, Data.of(None, 0.0, 1.0, None), torch.float32, 0, [])


@pytest.mark.parametrize("name", RIGHT)
def test_right_processes_are_not_accused(name):
    report = check_process(RIGHT[name]())
    assert report.count("pass") == len(report.lines), str(report)
    assert ("kernel spread" in {line.name for line in report.lines}) == (name != "poisson")
    assert len(report.figures) == 2 + (name != "poisson")
    assert all(math.isfinite(v) for f in report.figures for x, y in f.curves.values() for v in (*x, *y))


class ForgottenTwo(VESDE):
    """PITFALL 2."""

    def diffusion(self, t):
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min) ** 0.5


class BetaForBetaHalf(VPSDE):
    """PITFALL 1."""

    def drift(self, x, t):
        return 2 * super().drift(x, t)


class VarianceAsDiffusion(VPSDE):
    def diffusion(self, t):
        return self.beta_min + t * (self.beta_max - self.beta_min)


class AnotherDrift(Cosine):
    def drift(self, x, t):
        return -x


class OfItsOwnMean(VPSDE):
    def drift(self, x, t):
        return super().drift(x, t) + 0.3


class Bent(VPSDE):
    def drift(self, x, t):
        return super().drift(x, t) + 0.1 * torch.tanh(x)


class Backwards(SDE):
    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1 - t + 1e-3


class RootOfNegative(SDE):
    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return (t - 0.5).sqrt()


class Cut(Cosine):
    def sigma(self, t):
        return torch.from_numpy(np.atleast_1d(np.sin(np.pi / 2 * t.detach().numpy()))).reshape(t.shape)


class Rows(SDE):
    """A table's rows, looked up."""

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return 50 * (1e-3 + (1000 * t).floor() / 1000)


class Broken(SDE):
    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return torch.where(t > 0.5, 50.5 * t, 50 * t)


class OfTheBatch(Cosine):
    def alpha(self, t):
        return super().alpha(t) / t.max()


class OnePrior(VESDE):
    def prior_sample(self, shape, **options):
        return super().prior_sample(shape, **options) / self.sigma_max


class Short(VPSDE):
    T = 0.3


class Late(VPSDE):
    t_min = 0.1


class FromZero(VPSDE):
    t_min = 0.0


class Unfinished(SDE):
    def alpha(self, t):
        return 1 - t


class ByMath(SDE):
    def alpha(self, t):
        return math.cos(t)

    def sigma(self, t):
        return math.sin(t)


@pytest.mark.parametrize(
    ("wrong", "line", "words"),
    [
        (ForgottenTwo, "kernel spread", "off by 0.29 of it"),
        (BetaForBetaHalf, "kernel mean", "off by 0.99 of it"),
        (VarianceAsDiffusion, "kernel spread", "leave them out, and they are derived"),
        (AnotherDrift, "kernel mean", "f x and g of this alpha and sigma"),
        (OfItsOwnMean, "kernel mean", "off by 0.09"),
        (Bent, "kernel mean", r"not of the form f\(t\) x"),
        (Backwards, "snr", "is time reversed"),
        (Backwards, "diffusion", "g\\^2 < 0 at t"),
        (RootOfNegative, "levels", "sigma = nan at t = 0.001"),
        (Cut, "slope", "misses 1 of the change of log sigma"),
        (Rows, "jumps", "interpolate a table"),
        (Broken, "jumps", "of log sigma, at t = 0.5"),
        (OfTheBatch, "levels", "no max, mean or shape of t"),
        (OnePrior, "prior", "spread 0.01998 in units"),
        (Short, "prior mismatch", "more noise at T"),
        (Late, "t_min", "set t_min = 0.000916, where sigma/alpha is 0.01"),
        (FromZero, "interval", "0 < t_min < T"),
        (Unfinished, "levels", r"raised NotImplementedError: Unfinished needs a method sigma\(self, t\)"),
        (ByMath, "levels", "torch operations"),
    ],
)
def test_a_planted_mistake_is_found_by_its_line(wrong, line, words):
    found = next(found for found in lines_of(wrong()) if found.name == line)  # no further, to save time
    assert found.verdict == "fail", found
    assert re.search(words, str(found)), found


@pytest.mark.parametrize(("factor", "found"), [(1.03, True), (0.97, True), (1.002, False)])
def test_power(factor, found):
    """Diffusion off by three per cent fails, and by two in a thousand it does not: exact moments, no draws."""

    class Off(VESDE):
        def diffusion(self, t):
            return factor * super().diffusion(t)

    report = check_process(Off())
    assert (failing(report) == ["kernel spread"]) == found
    assert report["kernel spread"].number == pytest.approx(abs(factor - 1), abs=3e-4)


def test_the_prior_is_what_makes_the_mismatch():
    """KL(N(alpha m, alpha^2 s^2 + sigma^2) | N(0, sigma^2)), by torch's own."""
    sde, mean, std = VESDE(sigma_max=3.0), 1.5, 0.7
    normal = torch.distributions.Normal
    law = normal(torch.tensor(mean, dtype=torch.float64), math.hypot(std, 3.0))
    wanted = float(torch.distributions.kl_divergence(law, normal(0.0, 3.0)))
    report = check_process(sde, mean=mean, std=std, shape=(1, 3, 4))
    line = report["prior mismatch"]
    assert line.number == pytest.approx(wanted, rel=1e-5)
    assert f"{12 * wanted:.2g} an event" in line.text
    assert report["terminal snr"].number == pytest.approx((0.7 / 3) ** 2, rel=1e-6)


def test_of_data_the_mean_and_spread_of_each_entry_count():
    sde, scale = VPSDE(), torch.tensor([0.1, 1.0, 20.0])
    x = scale * torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) + 2
    report = check_process(sde, data=x)
    r2 = float((sde.alpha(1.0) / sde.sigma(1.0)) ** 2)
    m, s = x.double().mean(0), x.double().std(0, correction=0)
    wanted = float((r2 * (m**2 + s**2) - torch.log1p(r2 * s**2)).mean() / 2)
    assert report["prior mismatch"].number == pytest.approx(wanted, rel=1e-6)
    assert report.settings["event"] == [3]
    assert report.settings["spread of the data"] == pytest.approx(float(s.square().mean().sqrt()))


@pytest.mark.parametrize(
    ("sde", "options"),
    [
        (VPSDE, {"dtype": torch.float16}),
        (VPSDE, {"std": 1e-3}),
        (Late, {}),
        (lambda: HeatODE(T=800.0), {"std": 0.01, "mean": 0.02}),
    ],
)
def test_the_t_min_that_is_advised_passes(sde, options):
    data = Data.of(None, options.get("mean", 0.0), options.get("std", 1.0), None)
    better, dtype = sde(), options.get("dtype", torch.float32)
    line = t_min(better, data, dtype)
    assert line.verdict != "pass"
    better.t_min = float(line.remedy.split("t_min = ")[1].split(",")[0])
    assert t_min(better, data, dtype).verdict == "pass"


def test_where_no_t_min_will_do_it_says_so():
    assert "keep x in float32" in t_min(VPSDE(), Data.of(None, 0.0, 1.0, None), torch.bfloat16).remedy
    assert "keeps sigma/alpha = 0.01 at t = 0" in t_min(VESDE(), Data.of(None, 0.0, 0.01, None), torch.float32).remedy
    for sde in (RectifiedFlow(), AsInTheReadme()):
        line = terminal(sde, Data.of(None, 0.0, 1.0, None))
        assert line.verdict == "pass"
        assert line.number < 1e-24
        assert "must predict v, x0 or flow" in line.text


def test_processes_with_noise_and_means_of_their_own():
    """L by what it does, where the event is known; a y for each sample, with the batch."""
    report = check_process(CorrelatedSDE(VPSDE(), K), shape=(4, 2))
    assert report.ok
    assert report["noise"].verdict == "pass"
    r2 = float(VPSDE().alpha(1.0) ** 2)  # of L^-1 x
    trace = float(torch.linalg.inv(K.double()).diagonal().square().sum())
    assert report["prior mismatch"].number == pytest.approx(r2**2 * trace / 8, rel=0.2)
    flipped = {"root": lambda x: 2 * x.flip(-1), "inverse": lambda x: 2 * x}
    with pytest.raises(ValueError, match="inverse is not root's"):
        noise(CorrelatedSDE(VPSDE(), **flipped), (4, 2), 0)
    assert noise(CorrelatedSDE(VPSDE(), root=lambda x: x - x.mean()), (4, 2), 0).verdict == "fail"
    assert noise(CorrelatedSDE(VPSDE(), root=lambda x: x**2), (4, 2), 0).verdict == "fail"
    each = BridgeSDE(torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)))
    assert check_process(each, shape=(4, 2, 3)).ok
    with pytest.raises(ValueError, match=r"a mean for each sample, or of an event: give shape = \(B, \*event\)"):
        check_process(each)


def test_bad_input_is_named():
    class Geometric(ItoSDE):
        pass

    for sde, words in ((VPSDE, "not its class"), (3, "must be a process"), (Geometric(), "has no alpha and sigma")):
        with pytest.raises(TypeError, match=words):
            check_process(sde)
    alone = type("Alone", (), {"alpha": Cosine.alpha, "sigma": Cosine.sigma})()
    with pytest.raises(TypeError, match="Alone has alpha and sigma alone: subclass sdekit.SDE"):
        check_process(alone)
    for options, words in (
        ({"std": 0.0}, "std must be a finite number > 0"),
        ({"mean": math.nan}, "mean must be a finite number"),
        ({"data": torch.ones(3, 2)}, "at least two samples that differ"),
        ({"shape": (0, 2)}, "shape must be"),
    ):
        with pytest.raises(ValueError, match=words):
            check_process(VPSDE(), **options)
    with pytest.raises(TypeError, match="dtype must be floating"):
        check_process(VPSDE(), dtype=torch.int64)
