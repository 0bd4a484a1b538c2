"""One optimizer step done right: microbatches whose losses already share one denominator, clipping, schedule, exact state.

A step that cannot be taken, because its loss or gradient is not finite, changes nothing. One that does not fit into memory is done again in
smaller microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alignkit.adamw import AdamWConfig
from alignkit.errors import RunError
from alignkit.guards.memory import attempt, release, torch_draws
from alignkit.interfaces import State
from alignkit.ops.schedule import schedule
from alignkit.types import Metrics

if TYPE_CHECKING:
    from alignkit.guards.guard import Guard

Share = Callable[[], tuple[Tensor, Metrics]]
"""One microbatch's share of a step's loss and metrics: sums divided by the *whole* step's counts."""

Split = Callable[[int], Iterable[Share]]
"""A whole step as microbatches of at most so many tokens; asked again, with fewer, where memory does not suffice."""


class Learner:
    """Trains the weights of ``module`` that require a gradient, with ``torch.optim.AdamW``, for ``steps`` steps.

    ``peaks``: peak learning rates, by the beginning of a weight's name, of weights that do not use the config's.
    ``guard``: the stage's (``context.guard``), which may slow all of its learners down, and is told what happens here.
    """

    def __init__(
        self,
        module: nn.Module,
        config: AdamWConfig,
        *,
        steps: int,
        peaks: Mapping[str, float] | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        if not self._weights:
            raise ValueError("the module has no trainable weight")
        self._config = config
        self._guard = guard
        self._steps = steps
        self._step = 0
        self._microbatch_tokens = config.microbatch_tokens
        self._adam = torch.optim.AdamW(
            [{"params": list(group.values()), "peak": peak} for peak, group in _by_peak(self._weights, config, peaks or {}).items()],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, split: Split) -> dict[str, float]:
        """One step on the sum of the shares, each computed and differentiated before the next.

        A share is divided by the whole step's count already, so the result does not depend on how the step was split (a mean of
        means would). Returns the summed metrics with ``optimizer/grad_norm`` (before clipping), ``optimizer/learning_rate``, and
        ``guard/skipped_steps``: 1 when loss or gradient was not finite. Then weights, moments and schedule are as they were.
        Raises ``RunError`` when a single row does not fit into memory.
        """
        loss, totals = self._differentiate(split)
        norm = self._clip()
        config = self._config
        factor = schedule(self._step, self._steps, warmup=config.warmup, decay=config.decay, floor=config.floor)
        factor *= self._guard.rate if self._guard else 1.0
        taken = math.isfinite(norm) and math.isfinite(loss)
        if taken:
            for group in self._adam.param_groups:
                group["lr"] = group["peak"] * factor
            self._adam.step()
            self._step += 1
        self._adam.zero_grad()
        return {
            **totals,
            "optimizer/grad_norm": norm,
            "optimizer/learning_rate": config.learning_rate * factor,
            "guard/skipped_steps": 0.0 if taken else 1.0,
        }

    def _differentiate(self, split: Split) -> tuple[float, dict[str, float]]:
        """Loss and metrics of the whole step, whose gradient is in the weights; in smaller microbatches from here on if it has to be."""
        draw_again = torch_draws()
        while (done := attempt(lambda: _backward(split(self._microbatch_tokens)))) is None:
            self._adam.zero_grad()
            release()
            self._halve(split)
            draw_again()
        return done

    def _halve(self, split: Split) -> None:
        """Lower the microbatch's tokens until there are more microbatches. Raises ``RunError`` when every row is one already."""
        before, parts = self._microbatch_tokens, len(list(split(self._microbatch_tokens)))
        while len(list(split(self._microbatch_tokens))) == parts:
            if self._microbatch_tokens == 1:
                raise RunError(
                    f"out of memory at step {self._step + 1}, with a single row in a microbatch; shorten the rows (max_length, "
                    "max_new_tokens), train adapters (policy.tuning: {kind: lora}), or take a smaller model or a larger machine"
                )
            self._microbatch_tokens //= 2
        if self._guard:
            self._guard.tell(
                "out of memory",
                f"out of memory: microbatches have {self._microbatch_tokens} tokens from here on, not {before}; the batch is the same",
                tokens=self._microbatch_tokens,
            )

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
        """Trained weights, both moments, the step count and the size of microbatches; frozen weights are known from the stage's start."""
        tensors = {f"weight/{name}": weight.detach() for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            for key, value in self._adam.state[weight].items() if weight in self._adam.state else ():
                tensors[f"adam.{key}/{name}"] = value
        return State(tensors, {"step": self._step, "microbatch_tokens": self._microbatch_tokens})

    def load_state(self, state: State) -> None:
        """Continue exactly where ``state`` was taken."""
        self._step = state.values["step"]
        # What did not fit does not fit after a restart either, and another split rounds differently.
        self._microbatch_tokens = min(self._config.microbatch_tokens, state.values["microbatch_tokens"])
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


def _backward(shares: Iterable[Share]) -> tuple[float, dict[str, float]]:
    """Loss and metrics, summed over the shares; their gradients are added up in the weights."""
    total, totals = 0.0, dict[str, float]()
    for share in shares:
        loss, metrics = share()
        loss.backward()
        total += float(loss.detach())
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value
    return total, totals


def _by_peak(weights: Mapping[str, Tensor], config: AdamWConfig, peaks: Mapping[str, float]) -> dict[float, dict[str, Tensor]]:
    """The weights, grouped by their peak learning rate."""
    groups: dict[float, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        peak = next((rate for prefix, rate in peaks.items() if name.startswith(prefix)), config.learning_rate)
        groups.setdefault(peak, {})[name] = weight
    return groups
