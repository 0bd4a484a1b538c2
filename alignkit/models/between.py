"""What a step of decoding does between its products: a dozen operations on few numbers, which cost a GPU more than the products of a small
model do unless they are compiled into one call each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from alignkit.models import kernels


class Between(NamedTuple):
    """The operations, as they are or compiled."""

    rotated: Callable[[Tensor, Tensor, Tensor, int, int, torch.dtype], tuple[Tensor, Tensor, Tensor]]
    added_normed: Callable[[Tensor, Tensor, Tensor, float, torch.dtype], tuple[Tensor, Tensor]]
    gated: Callable[[Tensor], Tensor]


def between_products() -> Between:
    """As was chosen for this process."""
    return _between(kernels.chosen().fused)


def normed(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm. Its weight is not folded into those that follow: where a sequence amplifies rounding, sampler and trainer would part."""
    return (x * x.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()).mul_(weight).to(dtype)


def added_normed(x: Tensor, more: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum, and what the next products see of it."""
    x = more + x
    return x, normed(x, weight, epsilon, dtype)


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, key_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [n heads d] in ``dtype``; the first two are turned by their position. ``sin``'s first half has the other
    sign.

    Keys and values are ready to be stored row by row.
    """
    qkv = qkv.to(dtype).unflatten(1, (heads + 2 * key_heads, -1))
    half = cos.shape[-1] // 2
    qk = qkv[:, : heads + key_heads]
    qk = (qk * cos).addcmul_(torch.cat((qk[..., half:], qk[..., :half]), dim=-1), sin).to(dtype)
    return qk[:, :heads], qk[:, heads:].contiguous(), qkv[:, heads + key_heads :].contiguous()


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate).mul_(up)


@functools.cache
def _between(fused: bool) -> Between:
    if not fused:
        return Between(rotated, added_normed, gated)
    return Between(torch.compile(rotated), torch.compile(added_normed), torch.compile(gated))
