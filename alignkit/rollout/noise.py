"""Counter-based sampling noise: one uniform a token, a pure function of where the token stands.

The noise of a response is the same alone or in a batch, in any order, on one process or eight, before or after a restart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.seeds import derived_seed

_BLOCK = 256
_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, as a signed 64-bit integer: the step of splitmix64
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def noise_key(seed: int, step: int, prompt_id: str, index: int) -> int:
    """The 63-bit key of one response: a hash of run seed, step, prompt and the sample's index among the prompt's."""
    return derived_seed(seed, step, index, prompt_id)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for each (key [n] int64, position [n] int64), float64: splitmix64's finaliser (Steele et al. 2014)."""
    z = keys + (positions + 1) * _GOLDEN  # int64 wraps around, as splitmix64 wants
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() / float(1 << 53)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift right; int64's own shift keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def draw(logits: Tensor, uniform: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [n] by inverse CDF from softmax(logits [n v] / temperature [n]), and their log-probabilities [n] float32, nats.

    First the block of tokens that the uniform falls into, then the token: a running sum over blocks and over one block, not over all.
    """
    scaled = logits.float() / temperature[:, None]
    scaled -= scaled.amax(dim=-1, keepdim=True)
    short = -scaled.shape[-1] % _BLOCK
    blocks = torch.nn.functional.pad(scaled.exp(), (0, short)).unflatten(1, (-1, _BLOCK))
    # Added up in float64: a float32 sum over 50,000 tokens is off by more than the rarest token's share.
    ends = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = ends[:, -1]
    wanted = (uniform * total)[:, None]
    block = torch.searchsorted(ends, wanted, right=True).clamp_(max=ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(dim=-1, dtype=torch.float64)
    token = block * _BLOCK + torch.searchsorted(inside, wanted - before, right=True).clamp_(max=_BLOCK - 1)
    token = token.clamp_(max=logits.shape[-1] - 1)
    return token.squeeze(1), (scaled.gather(1, token).squeeze(1).double() - total.log()).float()
