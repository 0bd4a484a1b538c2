"""Layers that nobody trains, at the bottom of several models: what they compute is computed once for all of them, and for every epoch.

Adapters near the output leave the lower layers as they were, so policy, reference and critic have them in common, and no update changes
what they make of a text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.interfaces import Below, TokenBatch
from alignkit.models.attention import hidden_states
from alignkit.models.blocks import blocks, instead
from alignkit.models.causal_lm import autocast

_MOST = 1 << 28
"""Numbers in the states of a batch, 1 GiB in float32. Of more, each forward computes its own."""


class Trunk:
    """The lowest ``depth`` layers of ``models``, which are frozen and equal; ``exact``: whether they compute in float32."""

    def __init__(self, models: tuple[Any, ...], depth: int, *, exact: bool) -> None:
        self._models = models
        self._depth = depth
        self._exact = exact

    def fits(self, batch: TokenBatch) -> bool:
        """Whether the states of a batch are few enough to be kept."""
        return batch.ids.numel() * int(self._models[0].config.hidden_size) <= _MOST

    @torch.no_grad()
    def states(self, batch: TokenBatch) -> Tensor:
        """What the layers make of each place of the batch [b t d]; at padding any."""
        model = self._models[0]
        found: list[Tensor] = []

        def keep(x: Tensor, *_: Any, **__: Any) -> Tensor:
            found.append(x[0])
            return x

        first, *rest = blocks(model)[self._depth :]
        device = next(model.parameters()).device
        with instead({first: keep, **dict.fromkeys(rest, _pass_through)}), autocast("float32" if self._exact else "bfloat16", device):
            _, line = hidden_states(model, batch)
        states: Tensor = found[0][line]
        return states

    def under(self, batch: TokenBatch, states: Tensor) -> TokenBatch:
        """The batch, with its ``states``: forwards of the models begin with them."""
        return replace(batch, below=Below(states, self._models, self._depth))


def shared_trunk(model: Any, *others: Any, exact: bool) -> Trunk | None:
    """The frozen layers at the bottom of ``model``, and of those of the ``others`` that have the same; None where there are none.

    The others' weights become those of ``model``, so that they are in memory once.
    """
    layers = blocks(model)
    depth = next((i for i, layer in enumerate(layers) if any(weight.requires_grad for weight in layer.parameters())), 0)
    if not depth:
        return None
    own = _weights_below(model, depth)
    if any(weight.requires_grad for weight in own.values()):
        return None
    sharing = [model]
    for other in others:
        theirs = _weights_below(other, depth) if len(blocks(other)) == len(layers) else {}
        if theirs.keys() == own.keys() and all(torch.equal(weight, own[name]) for name, weight in theirs.items()):
            for name, weight in theirs.items():
                weight.data = own[name].data
            sharing.append(other)
    return Trunk(tuple(sharing), depth, exact=exact)


def _weights_below(model: Any, depth: int) -> dict[str, nn.Parameter]:
    """The weights of all but the layers from ``depth`` on, and the head."""
    above = {id(weight) for layer in blocks(model)[depth:] for weight in layer.parameters()}
    return {name: weight for name, weight in model.base_model.named_parameters() if id(weight) not in above}


def _pass_through(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x
