"""Layers that nobody trains, at the bottom of several models: what they compute is computed once for all of them, and for every epoch.

Adapters near the output leave the lower layers as they were, so policy, reference and critic have them in common, and no update changes
what they make of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.data.collate import collate, length_buckets
from alignkit.interfaces import Below, TokenBatch
from alignkit.models.attention import hidden_states
from alignkit.models.blocks import blocks, instead
from alignkit.models.causal_lm import autocast
from alignkit.types import TokenRow

_TOKENS = 8192  # of one forward without gradients
_MOST = 1 << 28
"""Numbers in the states that are kept, 1 GiB in float32. Of more, each forward computes its own."""


class Trunk:
    """The lowest ``depth`` layers of ``models``, which are frozen and equal; ``exact``: whether they compute in float32."""

    def __init__(self, models: tuple[Any, ...], depth: int, *, exact: bool) -> None:
        self._models = models
        self.depth = depth
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

        first, *rest = blocks(model)[self.depth :]
        device = next(model.parameters()).device
        with instead({first: keep, **dict.fromkeys(rest, _pass_through)}), autocast("float32" if self._exact else "bfloat16", device):
            _, line = hidden_states(model, batch)
        states: Tensor = found[0][line]
        return states

    def under(self, batch: TokenBatch, states: Tensor) -> TokenBatch:
        """The batch, with its ``states``: forwards of the models begin with them."""
        return replace(batch, below=Below(states, self._models, self.depth))


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


class Kept:
    """What a model's frozen layers make of rows that are read again and again: each epoch begins above them."""

    def __init__(self, trunk: Trunk | None, rows: Sequence[TokenRow]) -> None:
        self._trunk = trunk
        self._states: dict[tuple[int, ...], Tensor] = {}
        if trunk is None:
            return
        # Batches that follow from the rows alone: in another one a state is rounded differently, and a run that goes on makes them anew.
        for bucket in length_buckets([len(row) for row in rows], _TOKENS):
            some = [rows[i] for i in bucket]
            for row, states in zip(some, trunk.states(collate(some)), strict=True):
                self._states[row.ids] = states[: len(row)].clone()

    def under(self, batch: TokenBatch, documents: Sequence[Sequence[TokenRow]]) -> TokenBatch:
        """The batch, whose rows are ``documents`` one after the other, with their states; as it is where one of them is not known."""
        if self._trunk is None or any(row.ids not in self._states for row in chain(*documents)):
            return batch
        states = [torch.cat([self._states[row.ids] for row in one]) for one in documents]
        return self._trunk.under(batch, nn.utils.rnn.pad_sequence(states, batch_first=True))


def keep_states(model: Any, rows: Sequence[TokenRow], *, exact: bool, say: Callable[[str], None]) -> Kept:
    """Compute the frozen layers at the bottom of ``model`` once for all ``rows``; for none where there are no such layers, or where what
    they make of the rows is too much to keep.
    """
    trunk = shared_trunk(model, exact=exact)
    if trunk is None or not rows or sum(map(len, rows)) * int(model.config.hidden_size) > _MOST:
        return Kept(None, ())
    say(f"the lowest {trunk.depth} layers are frozen: what they make of {len(rows)} rows is computed once")
    return Kept(trunk, rows)


def _weights_below(model: Any, depth: int) -> dict[str, nn.Parameter]:
    """The weights of all but the layers from ``depth`` on, and the head."""
    above = {id(weight) for layer in blocks(model)[depth:] for weight in layer.parameters()}
    return {name: weight for name, weight in model.base_model.named_parameters() if id(weight) not in above}


def _pass_through(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x
