"""Steps of AdamW that leave everything as it was where a gradient is not finite, and what becomes of a run then."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from sdekit.training.log import Log
from sdekit.training.state import states

CHECK_EVERY = 50  # steps between looks at losses and gradients: looking waits for the device


class Steps:
    """Steps of AdamW with gradients clipped to norm ``clip``; where that norm is not finite, none.

    Weights, moments and buffers are then what they were, to the bit. On a GPU the optimizer is told of it there, and
    the host does not wait (``fused``; complex weights have no such optimizer). ``weights``: those of floating or
    complex numbers; a frozen one has no gradient, and stays.
    """

    def __init__(
        self, network: nn.Module, lr: float, weight_decay: float, clip: float, fused: bool | None = None
    ) -> None:
        self.network, self.clip = network, clip
        self.weights = [w for w in network.parameters() if w.is_floating_point() or w.is_complex()]
        floating = [w.dtype for w in self.weights if w.is_floating_point()]
        if not floating:
            raise ValueError(f"network must have weights to train, {type(network).__name__} has none")
        self.dtype = floating[0]
        if not any(w.requires_grad for w in self.weights):
            raise ValueError(
                f"network {type(network).__name__} has no weight that requires a gradient (load_checkpoint's have "
                "none): call network.requires_grad_(True), or that of the layers that are to learn"
            )
        if fused is None:
            fused = all(w.device.type == "cuda" and w.is_floating_point() for w in self.weights)
        self.fused, self.buffered = fused, any(True for _ in network.buffers())
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, weight_decay=weight_decay, fused=fused or None)
        self._buffers: dict[str, Tensor] = {}

    def begin(self, lr: float) -> None:
        """Before the network is called: the step's rate; buffers are kept, which a call may change (batch norm)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.buffered:
            self._buffers = {name: b.clone() for name, b in self.network.named_buffers()}

    def take(self, loss: Tensor) -> Tensor:
        """The step down ``loss``; the gradient's norm before clipping, which is not finite where ``loss`` is not."""
        if not loss.requires_grad:
            raise ValueError(
                "the loss has no gradient to the network's weights: take no_grad or detach out of the network and the "
                "objective, or leave torch.no_grad"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward(loss.detach() * 0 + 1)  # 1, or NaN: the square of an error may overflow where its slope does not
        norm = nn.utils.clip_grad_norm_(self.weights, self.clip)
        if self.fused:
            good = norm.isfinite()
            self.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
            self.optimizer.step()
            self._restore(good)
        elif math.isfinite(norm):
            self.optimizer.step()
        else:
            self._restore(norm.isfinite())
        return norm

    def _restore(self, good: Tensor) -> None:
        """The buffers as they were before the step, unless it is ``good``."""
        for name, buffer in self.network.named_buffers() if self.buffered else ():
            if name in self._buffers:
                buffer.copy_(torch.where(good, buffer, self._buffers[name]))


class Look:
    """What a look at some steps' losses and norms says; ``done``: the steps before this call, ``last``: the run's."""

    def __init__(self, done: int, last: int, log: Log, folder: Path | None) -> None:
        self.done, self.last, self.log, self.folder = done, last, log, folder
        self.lost = 0  # the last so many steps, all skipped
        self.skipped = 0  # of all

    def at(self, step: int, losses: Tensor, norms: Tensor) -> float:
        """The mean of the losses that are finite, of the steps up to ``step``; skipped steps are said in the log.

        Raises FloatingPointError where nothing has been learnt for CHECK_EVERY steps, or in the whole call.
        """
        fine = torch.isfinite(norms)
        n, bad = len(losses), (~fine).nonzero().flatten().tolist()
        self.lost = self.lost + n if len(bad) == n else n - 1 - int(fine.nonzero()[-1])
        if self.lost >= CHECK_EVERY or (step == self.last == self.lost):
            what = self._hopeless(step, float(losses[-1]))
            self.log.say(step, what)
            raise FloatingPointError(what)
        self.skipped += len(bad)
        if bad:
            first = step - n + 1 + bad[0]
            self.log.say(step, f"{len(bad)} of the last {n} steps skipped: gradients not finite, first at step {first}")
        if step == self.last and self.skipped > 0.1 * (step - self.done):
            self.log.say(step, f"{self.skipped} of {step - self.done} steps were skipped: what is learnt is in doubt")
        return float(losses[torch.isfinite(losses)].mean())

    def _hopeless(self, step: int, loss: float) -> str:
        first = step - self.lost + 1
        saved = [] if self.folder is None else states(self.folder)
        way = ""
        if saved:
            way = f"; {saved[-1]} goes on with what you change by resume=True, change=['lr'] (--resume --change lr)"
        if not math.isfinite(loss):
            cause = "what the network says, or its loss, is not finite"
        else:
            cause = "the loss is, and torch.autograd.set_detect_anomaly(True) says where its gradient is not"
        if first == self.done + 1:
            advice = "look for it in the network and in the data"
        else:
            advice = "lower lr, clip harder or raise t_min, and look at the data"
        return (
            f"no step from step {first} to {step} has a finite gradient ({cause}; the last loss is {loss:g}): {advice}"
            f". The network holds the weights before step {first}, the last good ones{way}"
        )
