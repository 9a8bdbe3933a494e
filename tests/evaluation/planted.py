"""Rules with a mistake each, as others shipped them, and the same rules right."""

import math

import torch

from sdekit import step_rule
from sdekit.processes.kinds import Kind, express
from sdekit.solvers.steppers import RULES, StepRule


def third_order_multistep(factor=2.0):
    """DPM-Solver++(3M) as written, its first two steps by Runge-Kutta. PITFALL 6: the factor 2 of D2 left out."""

    @step_rule(order=3, weak_order=1, churn=0.0, extra=8)
    def step(system, x, t, s, noise, state):
        past = state or []
        n_t, n_s = system.at(t, x), system.at(s, x)
        m = system.predict(x, t)[0]
        past = [(n_t.lam, m), *past[:2]]
        if len(past) < 3:
            return RULES["rk4"](system, x, t, s, noise, None)[0], past
        (l0, m0), (l1, m1), (l2, m2) = past
        h = n_s.lam - l0
        r0, r1 = (l0 - l1) / h, (l1 - l2) / h
        d0, d1 = (m0 - m1) / r0, (m1 - m2) / r1
        first = d0 + r0 / (r0 + r1) * (d0 - d1)
        second = factor / (r0 + r1) * (d0 - d1)
        phi_1 = math.expm1(-h)
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        x_s = n_s.sigma / n_t.sigma * x - n_s.alpha * (phi_1 * m0 - phi_2 * first + phi_3 * second)
        return x_s, past

    return step


def second_order_multistep(wrong_level=False):
    """DPM-Solver++(2M). PITFALL 7: sigma_t for sigma_s in the ratio of the steps, which leaves order 1."""

    @step_rule(order=2, churn=0.0)
    def step(system, x, t, s, noise, state):
        n_t, n_s = system.at(t, x), system.at(s, x)
        m, h = system.predict(x, t)[0], n_s.lam - n_t.lam
        mean = m
        if state is not None:
            before, m_before = state
            ahead = math.log(n_s.alpha / (n_t.sigma if wrong_level else n_s.sigma)) - n_t.lam
            mean = m + (m - m_before) * ahead / (2 * (n_t.lam - before.lam))
        return n_s.sigma / n_t.sigma * x - n_s.alpha * math.expm1(-h) * mean, (n_t, m)

    return step


@step_rule(evaluations=2, order=2, churn=0.0)
def heun_wrong_under_x0(system, x, t, s, noise, state):
    """PITFALL 8: eps at s made of what the network says by the numbers of t; under eps-prediction there are none."""
    n_t, n_s = system.at(t, x), system.at(s, x)
    r_t, r_s, y = n_t.sigma / n_t.alpha, n_s.sigma / n_s.alpha, x / n_t.alpha
    d_t = system.predict(x, t)[1]
    x_s = (y + (r_s - r_t) * d_t) * n_s.alpha
    a, b = express(Kind(0.0, 1.0), n_s.said, n_t.alpha, n_t.sigma)
    d_s = a * system.model(x_s, n_s.time) + b * x_s
    return (y + (r_s - r_t) * (d_t + d_s) / 2) * n_s.alpha, state


def noise_without_drift(system, x, t, s, noise, state):
    """PITFALL 11: the flow's drift, and noise on top."""
    n = system.at(t, x)
    drift = n.f * x - n.g2 / 2 * system.score(x, n.time)
    return x + (s - t) * drift + system.diffusion(t) * noise.increment(t, s), state


def right_noise(system, x, t, s, noise, state):
    """Euler-Maruyama in one line, which draws where there is nothing to draw too."""
    return x + (s - t) * system.drift(x, t) + system.diffusion(t) * noise.increment(t, s), state


def too_much_noise(system, x, t, s, noise, state):
    return x + (s - t) * system.drift(x, t) + 2**0.5 * system.diffusion(t) * noise.increment(t, s), state


@step_rule(noisy=True)
def batch_langevin(system, x, t, s, noise, state):
    """PITFALL 12: Song et al. 2021, algorithm 5, with norms averaged over the batch."""
    n = system.at(t, x)
    score, z = system.score(x, n.time), noise.normal()
    norms = [y.reshape(len(y), -1).norm(dim=1).mean() for y in (z, score)]
    e = 2 * (0.16 * norms[0] / norms[1]) ** 2
    return x + e * score + (2 * e) ** 0.5 * z, state


def own_draws(system, x, t, s, noise, state):
    z = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(int(1e6 * t)))
    return x + (s - t) * system.drift(x, t) + system.diffusion(t) * abs(s - t) ** 0.5 * z, state


def euler(system, x, t, s, noise, state):
    return x + (s - t) * system.drift(x, t), state


def last_step_skipped():
    """PITFALL 9."""

    @step_rule(begin=lambda system, times, x: times[-1], churn=0.0)
    def step(system, x, t, s, noise, last):
        d = system.drift(x, t)
        return (x.clone() if s == last else x + (s - t) * d), last

    return step


def of_equal_steps():
    """PITFALL 5: the length of a step from the number of steps, whatever s is."""

    @step_rule(begin=lambda system, times, x: (times[-1] - times[0]) / (len(times) - 1), churn=0.0)
    def step(system, x, t, s, noise, h):
        return x + h * system.drift(x, t), h

    return step


def beyond_the_step(system, x, t, s, noise, state):
    return x + (s - t) * system.drift(x, min(t + 0.5 * (t - s), system.sde.T)), state


def in_place(system, x, t, s, noise, state):
    return x.add_(system.drift(x, t), alpha=s - t), state


def nothing_at_first(system, x, t, s, noise, state):
    """PITFALL 26."""
    d = system.drift(x, t)
    return x + (s - t) * (d if state is None else d + 0 * (d / (state - state))), d


def raises(system, x, t, s, noise, state):
    raise ZeroDivisionError("float division by zero")


def small_h_in_float32(system, x, t, s, noise, state):
    """PITFALL 24: differences of rounded numbers."""
    n_t, n_s = system.at(t, x), system.at(s, x)
    x_0, eps = system.predict(x, t)
    shift = torch.tensor(1e4, dtype=x.dtype)
    return (x + shift) - shift + (n_s.alpha - n_t.alpha) * x_0 + (n_s.sigma - n_t.sigma) * eps, state


@step_rule(churn=0.0)
def wild_at_first(system, x, t, s, noise, state):
    """Of order one, and useless where steps are long."""
    longer = 1 + 50 * (system.at(s, x).lam - system.at(t, x).lam) ** 2
    return x + (s - t) * longer * system.drift(x, t), state


@step_rule(noisy=True, churn=1.0)
def too_much_of_its_own(system, x, t, s, noise, state):
    """DDPM's ancestral step with a fifth more noise."""
    n_t, n_s = system.at(t, x), system.at(s, x)
    x_0, eps = system.predict(x, t)
    r = n_t.alpha * n_s.sigma / (n_s.alpha * n_t.sigma)
    return n_s.alpha * x_0 + n_s.sigma * r * eps + 1.2 * n_s.sigma * (1 - r**2) ** 0.5 * noise.normal(), state


# name -> (rule, the line that finds it)
PLANTED = {
    "6, a factor 2 in D2": (third_order_multistep(1.0), "order on VPSDE"),
    "7, a wrong sigma": (second_order_multistep(True), "order on VPSDE"),
    "8, wrong under x0": (heun_wrong_under_x0, "predictions"),
    "5, equal steps": (of_equal_steps(), "order on RectifiedFlow"),
    "9, the last step": (last_step_skipped(), "every step"),
    "11, noise without drift": (noise_without_drift, "law at churn 1"),
    "12, batch norms": (batch_langevin, "batch"),
    "noise by sqrt 2": (too_much_noise, "law at churn 1"),
    "own draws": (own_draws, "batch"),
    "15, outside the step": (beyond_the_step, "times"),
    "24, float32": (StepRule(small_h_in_float32, churn=0.0), "float32"),
    "26, two steps": (nothing_at_first, "runs"),
    "few steps": (wild_at_first, "few steps"),
    "own noise by a fifth": (too_much_of_its_own, "law at churn 0"),
    "in place": (in_place, "input"),
    "raises": (raises, "runs"),
    "Heun of one evaluation": (StepRule(RULES["heun"].step, 1, 2, weak_order=2), "evaluations"),
    "Euler of two": (StepRule(RULES["ddim"].step, 2, 1, churn=0.0), "evaluations"),
    "Heun of order 3": (StepRule(RULES["heun"].step, 2, 3, weak_order=2), "order on VPSDE"),
    "Euler of weak order 2": (StepRule(RULES["euler_maruyama"].step, 1, 1, weak_order=2), "law at churn 1"),
    "said to be noisy": (StepRule(euler, noisy=True), "noise"),
    "noise not said": (StepRule(RULES["ancestral"].step), "noise"),
}
