"""Systems of one's own: a diffusion that depends on x, in both directions of time, Ito and Stratonovich.

Exact solutions on the same Brownian path, orders by regression, moments by quadrature.
"""

import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from sdekit import VPSDE, BrownianPath, Noise, System, solve
from sdekit.processes.reverse import Reverse
from sdekit.solvers.backends import GENERAL, METHODS
from sdekit.solvers.steppers import chain, heun, sra1
from tests.conftest import gaussian_score

FORWARD, BACKWARD = (0.0, 1.0), (1.0, 0.0)
COUNTS = (32, 64, 128, 256)
X = torch.linspace(0.5, 1.5, 1000, dtype=torch.float64)


class OrnsteinUhlenbeck(System):
    """dx = -x dt + 0.7 dW."""

    def drift(self, x, t):
        return -x

    def diffusion(self, t):
        return 0.7

    def exact(self, x, path, ends, stratonovich):
        """x_s = e^-h x + 0.7 (dW - J) on steps so short that the next term, of order 2 in all, is nothing."""
        for t, s in pairwise(np.linspace(*ends, 513).tolist()):
            dW, J = path.increment_and_integral(t, s)
            x = math.exp(t - s) * x + 0.7 * (dW - J)
        return x


class Geometric(System):
    """dx = 0.4 x dt + 0.6 x dW: with h = s - t, x exp(0.4 h - 0.18 |h| + 0.6 dW); Stratonovich's without the |h|."""

    noise_type = "diagonal"

    def drift(self, x, t):
        return 0.4 * x

    def diffusion(self, x, t):
        return 0.6 * x

    def exact(self, x, path, ends, stratonovich):
        h, dW = ends[1] - ends[0], path.increment(*ends)
        return x * torch.exp(0.4 * h - (0 if stratonovich else 0.18 * abs(h)) + 0.6 * dW)


class HyperbolicSine(System):
    """dx = (0.3 r + c x) dt + 0.5 r dW, r = sqrt(1 + x^2): Stratonovich's with c = 0 is sinh(asinh x + 0.3 h + 0.5 dW).

    g g' = 0.25 x: Ito's has that solution with c = 1/8 in increasing time, -1/8 in decreasing time.
    """

    noise_type = "diagonal"

    def __init__(self, c):
        self.c = c

    def drift(self, x, t):
        return 0.3 * (1 + x**2).sqrt() + self.c * x

    def diffusion(self, x, t):
        return 0.5 * (1 + x**2).sqrt()

    def exact(self, x, path, ends, stratonovich):
        return torch.sinh(torch.asinh(x) + 0.3 * (ends[1] - ends[0]) + 0.5 * path.increment(*ends))


# Strong order for diagonal noise, and whether in Stratonovich's sense. For additive noise every order is 1.
CLAIMS = {
    "euler_maruyama": (0.5, False),
    "milstein": (1.0, False),
    "rk4": (0.5, False),
    "heun": (1.0, True),
    "torchsde:euler": (0.5, False),
    "torchsde:milstein": (1.0, False),
    "torchsde:heun": (1.0, True),
    "torchsde:midpoint": (1.0, True),
    "torchsde:euler_heun": (1.0, True),
}


@functools.cache
def path():
    """One path on [0, 1], which remembers its increments: all methods ask for the same."""
    one = BrownianPath(X, 7, start=0.0, end=1.0)
    one.increment = functools.cache(one.increment)
    return one


@functools.cache
def exact(system, ends, stratonovich):
    return SYSTEMS[system](ends, stratonovich).exact(X, path(), ends, stratonovich)


SYSTEMS = {
    "additive": lambda ends, stratonovich: OrnsteinUhlenbeck(),
    "geometric": lambda ends, stratonovich: Geometric(),
    "sinh": lambda ends, stratonovich: HyperbolicSine(0.0 if stratonovich else math.copysign(0.125, ends[1] - ends[0])),
}


@pytest.mark.parametrize("ends", [FORWARD, BACKWARD])
@pytest.mark.parametrize(
    ("method", "system"), [(m, s) for m in CLAIMS for s in SYSTEMS if s != "sinh" or not m.startswith("torchsde")]
)
def test_strong_order_is_the_claim_on_one_path_refined(method, system, ends):
    """PITFALL 14: in both directions of time, within 0.15, against the exact solution on that path."""
    order, stratonovich = CLAIMS[method]
    errors = []
    for n in COUNTS:
        grid = torch.linspace(*ends, n + 1, dtype=torch.float64)
        x = solve(SYSTEMS[system](ends, stratonovich), X, grid, method, noise=path()).x
        errors.append(float((x - exact(system, ends, stratonovich)).square().mean().sqrt()))
    found = -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]
    assert found == pytest.approx(1.0 if system == "additive" else order, abs=0.15), errors


class Moving(Geometric):
    """dx = 0.4 x dt + sigma(t) x dW."""

    def diffusion(self, x, t):
        return sigma(t) * x


def sigma(t):
    return 0.5 + 0.3 * t


class Quadrature:
    """Gauss-Hermite nodes as increments: batch and weights are the product rule over all steps' nodes."""

    def __init__(self, steps, nodes=9):
        z, w = np.polynomial.hermite_e.hermegauss(nodes)
        w = w / w.sum()
        axes = np.meshgrid(*[np.arange(nodes)] * steps, indexing="ij")
        self.z = iter([torch.from_numpy(z[axis.ravel()]) for axis in axes])
        self.weights = torch.from_numpy(np.prod([w[axis.ravel()] for axis in axes], axis=0))

    def enter(self, t, s):
        pass

    def increment(self, t, s):
        return next(self.z) * abs(s - t) ** 0.5


def second_moment(constant, linear, square, v):
    """E[(c + l W + q W^2)^2] for W ~ N(0, v)."""
    return constant**2 + (linear**2 + 2 * constant * square) * v + 3 * square**2 * v**2


# x_s/x_t = c + l W + q W^2 of one step, each by hand from its formula.
FACTORS = {
    "euler_maruyama": lambda h, a, b: (1 + 0.4 * h, a, 0.0),
    "milstein": lambda h, a, b: (1 + 0.4 * h - a**2 * abs(h) / 2, a, a**2 / 2),
    "heun": lambda h, a, b: (1 + 0.4 * h + 0.08 * h**2, 0.2 * h * a + (a + b * (1 + 0.4 * h)) / 2, a * b / 2),
}


@pytest.mark.parametrize("grid", [(0.2, 0.5, 1.0), (1.0, 0.5, 0.2)])
@pytest.mark.parametrize("rule", FACTORS)
def test_moments_of_two_steps_are_those_of_the_formula(rule, grid):
    """Means and second moments without Monte-Carlo error, both ways in time, on a diffusion that depends on t too."""
    noise = Quadrature(len(grid) - 1)
    x = solve(Moving(), torch.ones_like(noise.weights), grid, rule, noise=noise).x
    first, second = 1.0, 1.0
    for t, s in pairwise(grid):
        c, b, q = FACTORS[rule](s - t, sigma(t), sigma(s))
        first *= c + q * abs(s - t)
        second *= second_moment(c, b, q, abs(s - t))
    assert float(noise.weights @ x) == pytest.approx(first, rel=1e-12)
    assert float(noise.weights @ x**2) == pytest.approx(second, rel=1e-12)


def test_stratonovich_goes_back_the_way_it_came_and_ito_does_not():
    grid = torch.linspace(0, 1, 257, dtype=torch.float64)
    for rule, there_and_back in (("heun", 1.0), ("milstein", math.exp(-0.36))):
        end = solve(Geometric(), X, grid, rule, noise=path()).x
        back = solve(Geometric(), end, grid.flip(0), rule, noise=path()).x
        torch.testing.assert_close(back, there_and_back * X, rtol=0.03, atol=0)


def test_milstein_takes_no_derivative_where_there_is_none_to_take():
    """Euler-Maruyama bit for bit on additive noise, and Euler on an ODE."""
    grid = torch.linspace(0, 1, 9)

    class Flow(Geometric):
        churn = 0.0

        def diffusion(self, x, t):
            raise AssertionError("an ODE has no diffusion to look at")

    for system in (OrnsteinUhlenbeck(), Flow()):
        one, other = (solve(system, X, grid, rule, noise=Noise(X, 1)).x for rule in ("milstein", "euler_maruyama"))
        assert torch.equal(one, other)


def test_every_rule_for_diagonal_noise_keeps_shape_dtype_and_gradient_modes():
    for method in CLAIMS:
        for shape in ((4,), (4, 3), (2, 2, 1)):
            x, grid = torch.ones(shape), torch.linspace(1, 0, 4)
            plain = solve(Geometric(), x, grid, method, noise=Noise(x, 0)).x
            assert (plain.dtype, plain.shape, plain.requires_grad) == (x.dtype, x.shape, False)
            with torch.inference_mode():
                x = torch.ones(shape)
                assert torch.equal(solve(Geometric(), x, grid, method, noise=Noise(x, 0)).x, plain)


class Coupled(System):
    """Two numbers and three noises, which do not commute."""

    noise_type = "general"

    def drift(self, x, t):
        a, b = x[:, 0], x[:, 1]
        return torch.stack([b - a * t, -torch.sin(a)], 1)

    def diffusion(self, x, t):
        a, b = x[:, 0], x[:, 1]
        rows = [torch.cos(b), a * t, 0.3 + 0 * a], [0.2 * b, torch.sin(a + b), -0.5 * a]
        return torch.stack([torch.stack(row, 1) for row in rows], 1)


def by_hand(x, grid, noise, stratonovich):
    """Euler-Maruyama, or Heun for Stratonovich's equation, written out in NumPy."""

    def f(a, b, t):
        return np.array([b - a * t, -np.sin(a)])

    def g(a, b, t):
        return np.array([[np.cos(b), a * t, 0.3], [0.2 * b, np.sin(a + b), -0.5 * a]])

    increments = []
    for t, s in pairwise(grid):
        noise.enter(t, s)
        increments.append(noise.increment(t, s).numpy())
    out = x.numpy().copy()
    for i, y in enumerate(out):
        for (t, s), dW in zip(pairwise(grid), increments, strict=True):
            h, w = s - t, dW[i]
            first = h * f(*y, t) + g(*y, t) @ w
            again = h * f(*(y + first), s) + g(*(y + first), s) @ w
            y += (first + again) / 2 if stratonovich else first
    return torch.from_numpy(out)


@pytest.mark.parametrize("grid", [(0.0, 0.3, 0.5, 1.0), (1.0, 0.4, 0.3, 0.0)])
@pytest.mark.parametrize("method", ["torchsde:euler", "torchsde:heun"])
def test_general_noise_is_that_of_a_plain_loop(method, grid):
    """On Noise and on a BrownianPath."""
    x, driving = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double(), torch.empty(5, 3).double()
    for make in (lambda: Noise(driving, 1), lambda: BrownianPath(driving, 1, start=0.0, end=1.0)):
        found = solve(Coupled(), x, grid, method, noise=make()).x
        torch.testing.assert_close(found, by_hand(x, grid, make(), method.endswith("heun")), rtol=1e-12, atol=1e-12)


def test_general_noise_is_drawn_in_the_diffusions_own_number(monkeypatch):
    """dx = (dW_1 + dW_2 + dW_3)/3 for every entry of any event, where no noise is given."""

    class Mean(System):
        noise_type = "general"

        def drift(self, x, t):
            return 0 * x

        def diffusion(self, x, t):
            return x.new_full((*x.shape, 3), 1 / 3)

    monkeypatch.setattr("secrets.randbits", lambda bits: 11)
    for event in ((), (2,), (2, 2)):
        x = solve(Mean(), torch.zeros(4, *event), [0.0, 0.5, 1.0], "torchsde:euler").x
        drawn = Noise(torch.empty(4, 3), 11)
        W = torch.zeros(4, 3)
        for t, s in ((0.0, 0.5), (0.5, 1.0)):
            drawn.enter(t, s)
            W += drawn.increment(t, s)
        torch.testing.assert_close(x.reshape(4, -1), W.mean(1, keepdim=True).expand(4, math.prod(event)))


@pytest.mark.parametrize("ends", [FORWARD, BACKWARD])
def test_torchsde_takes_one_step_an_interval_in_float32_too(ends):
    """Of 100 steps in float32 some once were two, with an increment too many and another path from there on."""
    x, grid = torch.ones(20), torch.linspace(*ends, 101)
    ours, theirs = (
        solve(OrnsteinUhlenbeck(), x, grid, method, noise=Noise(x, 1)).x
        for method in ("euler_maruyama", "torchsde:euler")
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("churn", [0.0, 1.0, 1.5])
def test_the_short_way_to_add_a_drift_is_that_drift(sde, churn):
    """x + h drift(at, t) of the reverse family, as of any system, at one evaluation and with neither tensor changed."""
    system = sde.reverse(gaussian_score(sde, 0.7), churn)
    x, y = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, given = 0.4 * sde.T, (x.clone(), y.clone())
    for at in (None, y):
        for h in (-0.3, 0.2):
            expected = System.add_drift(system, x, t, h, at)
            torch.testing.assert_close(
                expected, x + h * system.drift(x if at is None else at, t), rtol=1e-14, atol=1e-14
            )
            nfe = system.nfe
            torch.testing.assert_close(system.add_drift(x, t, h, at), expected, rtol=1e-12, atol=1e-12)
            assert system.nfe == nfe + 1
    assert torch.equal(x, given[0])
    assert torch.equal(y, given[1])


@pytest.mark.parametrize("rule", ["euler_maruyama", "milstein", "heun", "rk4", "sra1"])
def test_a_reverse_system_with_a_drift_of_its_own_is_solved_with_that(rule):
    class Pushed(Reverse):
        def drift(self, x, t):
            return super().drift(x, t) + 3.0

    sde = VPSDE()
    x = torch.zeros(4, dtype=torch.float64)
    grid = torch.linspace(sde.T, 0.9 * sde.T, 200)
    system = Pushed(sde, lambda x, t: torch.zeros_like(x), churn=0.0)
    slope = solve(system, x, grid, "rk45", rtol=1e-8, atol=1e-8).x
    torch.testing.assert_close(solve(system, x, grid, rule).x, slope, rtol=0.02, atol=0)
    assert float(slope[0]) < -0.1


class Misnamed(Geometric):
    noise_type = "diagnal"


class Forgotten(Geometric):
    noise_type = "additive"


class Superfluous(OrnsteinUhlenbeck):
    noise_type = "diagonal"


class Broadcasting(Geometric):
    def diffusion(self, x, t):
        return x[0]


class Number(Geometric):
    def diffusion(self, x, t):
        return 0.6


class Missing(System):
    def drift(self, x, t):
        return x


class Transposed(Coupled):
    def diffusion(self, x, t):
        return super().diffusion(x, t).mT


BAD = {
    "unknown noise_type": (Misnamed, "milstein", ValueError, "unknown noise_type 'diagnal': did you mean 'diagonal'"),
    "noise_type forgotten": (Forgotten, "heun", TypeError, r"'additive' means diffusion\(t\).*missing.*'t'"),
    "noise_type of too much": (Superfluous, "heun", TypeError, r"'diagonal' means diffusion\(x, t\), like x.*takes 2"),
    "shape that broadcasts": (Broadcasting, "milstein", ValueError, r"like x; got \(2,\) for x \(3, 2\)"),
    "number": (Number, "torchsde:milstein", ValueError, r"diffusion\(x, t\), like x; got float for x \(3, 2\)"),
    "no diffusion": (Missing, "rk4", NotImplementedError, r"Missing needs diffusion\(t\), a number or"),
    "sra1 on diagonal": (Geometric, "sra1", ValueError, "'diagonal'; use milstein .Ito. or heun .Stratonovich."),
    "adaptive_sra1 on diagonal": (Geometric, "adaptive_sra1", ValueError, "adaptive_sra1 takes additive noise"),
    "sra1 in a chain": (Geometric, chain(heun, sra1), ValueError, "sra1 takes additive noise, .*use milstein"),
    "score rule": (Geometric, "ddim", TypeError, r"needs a score: give it sde.reverse\(score\), not Geometric"),
    "general in a rule": (Coupled, "euler_maruyama", ValueError, "for general noise use torchsde:euler .Ito., or"),
    "general in an adaptive method": (Coupled, "rk45", ValueError, "for general noise use torchsde:euler .Ito., or"),
    "general in milstein": (Coupled, "torchsde:milstein", ValueError, "general noise use torchsde:euler .Ito., or"),
    "general transposed": (Transposed, "torchsde:euler", ValueError, r"event, m\); got \(3, 3, 2\) for x \(3, 2\)"),
    "diagonal in an ODE's": (Geometric, "rk45", ValueError, "rk45 integrates ODEs: it needs churn = 0"),
    "torchsde's others": (Geometric, "torchsde:srk", ValueError, "unknown method 'torchsde:srk'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_named(case):
    system, method, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        solve(system(), torch.ones(3, 2), [0.0, 0.5, 1.0], method)


def test_noise_of_another_shape_is_named():
    x = torch.ones(5, 2)
    with pytest.raises(ValueError, match=r"for a tensor \(5, 3\), as Noise\(x.new_empty\(5, 3\)\) is, not \(5, 2\)"):
        solve(Coupled(), x, [0.0, 1.0], "torchsde:euler", noise=Noise(x, 0))


def test_the_methods_that_messages_name_are_there():
    named = [word for word in GENERAL.replace(",", " ").split() if ":" in word]
    assert set(named) == {m for m in METHODS if m.startswith("torchsde:")} - {"torchsde:milstein"}
    x = torch.ones(3, 2)
    for method in named:
        assert bool(torch.isfinite(solve(Coupled(), x, [0.0, 0.1, 0.2], method).x).all())
