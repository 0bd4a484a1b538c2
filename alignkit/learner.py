"""One optimizer step done right: microbatches whose losses already share one denominator, clipping, schedule, exact state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from alignkit.adamw import AdamWConfig
from alignkit.errors import RunError
from alignkit.interfaces import State
from alignkit.ops.schedule import schedule
from alignkit.types import Metrics

Share = Callable[[], tuple[Tensor, Metrics]]
"""One microbatch's share of a step's loss and metrics: sums divided by the *whole* step's counts."""


class Learner:
    """Trains the weights of ``module`` that require a gradient, with ``torch.optim.AdamW``, for ``steps`` steps.

    ``peaks``: peak learning rates, by the beginning of a weight's name, of weights that do not use the config's.
    """

    def __init__(self, module: nn.Module, config: AdamWConfig, *, steps: int, peaks: Mapping[str, float] | None = None) -> None:
        self._weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        if not self._weights:
            raise ValueError("the module has no trainable weight")
        self._config = config
        self._steps = steps
        self._step = 0
        self._adam = torch.optim.AdamW(
            [{"params": list(group.values()), "peak": peak} for peak, group in _by_peak(self._weights, config, peaks or {}).items()],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, shares: Iterable[Share]) -> dict[str, float]:
        """One step on the sum of the shares, each computed and differentiated before the next.

        A share is divided by the whole step's count already, so the result does not depend on how the step was split (a mean of
        means would). Returns the summed metrics with ``optimizer/grad_norm`` (before clipping) and ``optimizer/learning_rate``.
        Raises ``RunError`` when the gradient is not finite.
        """
        totals: dict[str, float] = {}
        for share in shares:
            loss, metrics = share()
            loss.backward()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value
        norm = self._clip()
        if not math.isfinite(norm):
            self._adam.zero_grad()
            raise RunError(
                f"the gradient is {norm} at step {self._step + 1}, and the weights were left as they are; "
                "look at the losses in metrics.jsonl, and lower learning_rate or lengthen warmup"
            )
        config = self._config
        factor = schedule(self._step, self._steps, warmup=config.warmup, decay=config.decay, floor=config.floor)
        for group in self._adam.param_groups:
            group["lr"] = group["peak"] * factor
        self._adam.step()
        self._adam.zero_grad()
        self._step += 1
        return {**totals, "optimizer/grad_norm": norm, "optimizer/learning_rate": config.learning_rate * factor}

    def _clip(self) -> float:
        """Scale the gradient to at most ``clip_norm``; returns the norm it had."""
        grads = [weight.grad for weight in self._weights.values() if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if norm > self._config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self._weights.values(), self._config.clip_norm, torch.tensor(norm))
        return norm

    def skip(self, steps: int) -> None:
        """Let the learning rate go on as if ``steps`` steps had been taken."""
        self._step += steps

    def state(self) -> State:
        """Trained weights, both moments and the step count; frozen weights are known from where the stage started."""
        tensors = {f"weight/{name}": weight.detach() for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            for key, value in self._adam.state[weight].items() if weight in self._adam.state else ():
                tensors[f"adam.{key}/{name}"] = value
        return State(tensors, {"step": self._step})

    def load_state(self, state: State) -> None:
        """Continue exactly where ``state`` was taken."""
        self._step = state.values["step"]
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in self._weights}
        for key, tensor in state.tensors.items():
            kind, name = key.split("/", 1)
            weight = self._weights[name]
            if kind == "weight":
                weight.data.copy_(tensor)
            else:
                moments[name][kind.removeprefix("adam.")] = tensor.clone()
        for name, weight in self._weights.items():
            if moments[name]:
                self._adam.state[weight] = moments[name]


def _by_peak(weights: Mapping[str, Tensor], config: AdamWConfig, peaks: Mapping[str, float]) -> dict[float, dict[str, Tensor]]:
    """The weights, grouped by their peak learning rate."""
    groups: dict[float, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        peak = next((rate for prefix, rate in peaks.items() if name.startswith(prefix)), config.learning_rate)
        groups.setdefault(peak, {})[name] = weight
    return groups
