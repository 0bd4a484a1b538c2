"""An exponential moving average of weights, kept beside the weights that learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from alignkit.interfaces import State


class WeightAverage:
    """Of the trainable weights of ``module``: average = decay * average + (1 - decay) * weight, once a call; it starts at the weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now."""
        for name, weight in self._weights.items():
            self._averages[name].lerp_(weight, 1.0 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the module has the averages for its weights."""
        learning = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._fill(self._averages)
        try:
            yield
        finally:
            self._fill(learning)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])

    def state(self) -> State:
        """The averages."""
        return State(self._averages)

    def load_state(self, state: State) -> None:
        """Continue from ``state``."""
        for name, average in self._averages.items():
            average.copy_(state.tensors[name])
