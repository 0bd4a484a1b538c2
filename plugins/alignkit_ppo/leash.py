"""How far the policy may go from its reference: beyond that the stage ends, before the policy is ruined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alignkit.api import Context
from alignkit.checkpoint import save_artifact

_PATIENCE = 3
"""So many iterations in a row the KL may be out of bounds."""

_NEGATIVE = -1.0
"""A mean KL is never below 0; an estimate of it that is so far below has not been sampled from the policy that is scored."""

_NEAR = 0.5
"""From this share of the bound on, the weights are kept as long as they are within it."""


class Leash:
    """``stop``: the bound, nats per response. ``write`` writes the policy as it is now. ``beyond``: iterations in a row out of bounds."""

    def __init__(self, stop: float, context: Context, write: Callable[[Path], None]) -> None:
        self._stop, self._guard, self._write = stop, context.guard, write
        self._kept = context.folder / "candidates" / "within-kl-stop"
        self._start = context.start
        self.beyond = 0

    def look(self, iteration: int, kl: float) -> None:
        """Before iteration ``iteration`` learns anything, its rollout shows how far the policy is: ``kl``, nats per response."""
        if _NEGATIVE <= kl <= self._stop:
            self.beyond = 0
            if kl > _NEAR * self._stop:
                save_artifact(self._kept, self._write)
            return
        self.beyond += 1
        if self.beyond < _PATIENCE:
            return
        self.beyond = 0  # whoever goes on with other settings has as many again
        if kl < 0:
            text = (
                f"the KL to the reference is {kl:.3g} nats per response, and cannot be negative: what is sampled is not what is scored; "
                "look at temperature, at filters of the sampler, and at precision"
            )
        else:
            best = (
                f"the last weights from within the bound are in {self._kept}"
                if self._kept.is_dir()
                else f"it went there so fast that no weights from near the bound were kept; stage {self._start} is where it came from"
            )
            text = (
                f"the KL to the reference is {kl:.3g} nats per response, above kl.stop ({self._stop:g}) for {_PATIENCE} iterations; "
                f"{best}; raise kl.coef, lower learning_rate, set early_stop_kl, or raise kl.stop if this is what you want"
            )
        self._guard.tell("kl", f"stopping after iteration {iteration}: {text}", figure=kl)
        self._guard.stop(text)
