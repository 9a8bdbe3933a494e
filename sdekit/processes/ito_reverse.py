"""The reverse family of a process that is given by drift and diffusion, and its score."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sdekit import _checks
from sdekit.processes.counted import Counted, Moment, as_model
from sdekit.processes.reverse import batch_time
from sdekit.system import NOISE_TYPES, Score, System, Time, as_time


class ItoReverse(System):
    """dx = [drift - (1 + churn^2)/2 (div(G G') + G G' score)] dt + churn G dW,  dt < 0, of an ItoSDE.

    Every ``churn`` >= 0 has the marginals p_t: 1 is the reverse SDE (Anderson 1982; Song et al. 2021, appendix A, eq.
    16), 0 the probability flow. ``solve`` takes it by any rule on drift and diffusion, and the flow by "rk45" too.
    ``sense``: "ito" for euler_maruyama, milstein, torchsde:euler and torchsde:milstein; "stratonovich", whose drift is
    in decreasing time larger by churn^2/2 sum_k (G_k . grad) G_k, for heun and torchsde's others; where G does not
    depend on x they are one, else a rule of the other sense is refused. ``score(x, t)``: t is 0-d or (B,).
    Raises ValueError for churn < 0 and for a model that predicts another kind or was wrapped for another process.
    """

    def __init__(self, sde: Any, score: Score, churn: float = 1.0, *, sense: str = "ito") -> None:
        self.churn = _checks.positive(churn, "churn", zero=True)
        self.sense = _checks.lookup({s: s for s in ("ito", "stratonovich")}, sense, "sense")
        _checks.lookup(NOISE_TYPES, sde.noise_type, "noise_type")
        self.sde, self.model, self.noise_type = sde, Counted(as_model(score, sde)), sde.noise_type
        model = self.model.model
        if model.predicts != "score" or not (model.sde is sde or type(model.sde) is type(sde)):
            raise ValueError(
                f"{type(sde).__name__} has no alpha and sigma, so its model must predict its own score; this one "
                f"predicts {model.predicts} of {type(model.sde).__name__}: as_score(network, process), or any (x, t)"
            )

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """Network evaluations so far, counted at the network."""
        return self.model.nfe

    @property
    def network_calls(self) -> int:  # type: ignore[override]
        """Those of one evaluation, at most, as far as is known."""
        return self.model.network_calls

    @property
    def backwards_only(self) -> bool:  # type: ignore[override]
        """With noise the family's marginals are p_t in decreasing time only; the flow runs both ways."""
        return self.churn > 0

    @property
    def interval(self) -> tuple[float, float]:
        """[t_min, T]: nearer to the data the score may be singular."""
        return self.sde.t_min, self.sde.T

    def prepare(self, times: Sequence[float], x: Tensor) -> None:
        """Conditions that do not fit x say so before the first step."""
        self.model.model.prepare((), x)

    def settle(self) -> None:
        """Raise what the evaluations since the last check did wrong."""
        self.model.check()

    def at(self, t: Time, x: Tensor) -> Any:
        """There is no alpha and sigma: raises TypeError."""
        raise TypeError(
            f"{type(self.sde).__name__} has no alpha and sigma, which this step rule or denoising needs: use a rule on "
            "drift and diffusion, such as euler_maruyama or milstein, or rk45 for the flow"
        )

    def score(self, x: Tensor, t: Time) -> Tensor:
        """The score at x and t, in x's dtype; one evaluation."""
        time = as_time(t, self.sde.T)
        return self.model(x, Moment(batch_time(time, x) if time.ndim else time, None, 1.0, 0.0))

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """drift - (1 + churn^2)/2 (div(G G') + G G' score), in its sense; one evaluation."""
        pull = self.sde.divergence(x, t) + self.sde.squared(x, t, self.score(x, t))
        out = self.sde.drift(x, t) - (1 + self.churn**2) / 2 * pull
        return out if self.sense == "ito" else out + self.churn**2 * self.sde.stratonovich(x, t)

    def diffusion(self, *args: Any) -> Any:
        """churn G, of the arguments and the shape that go with the process's noise type."""
        return self.churn * self.sde.diffusion(*args)
