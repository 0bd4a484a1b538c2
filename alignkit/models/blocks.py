"""The layers of a transformers model one above the other, and what they compute for a while instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def blocks(model: Any) -> list[Any]:
    """The layers, the lowest first; none where they are not found."""
    base, count = getattr(model, "base_model", None), getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    lists = [part for part in base.children() if isinstance(part, nn.ModuleList) and len(part) == count] if base is not None else []
    return list(lists[0]) if len(lists) == 1 else []


@contextmanager
def instead(forwards: Mapping[Any, Callable[..., Tensor]]) -> Iterator[None]:
    """Within, these layers compute something else."""
    try:
        for layer, forward in forwards.items():
            layer.forward = forward
        yield
    finally:
        for layer in forwards:
            del layer.forward
