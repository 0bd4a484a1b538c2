"""What PPO learns from: a rollout with advantages and returns, in rows that can be dealt into minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from alignkit.api import TokenBatch
from alignkit.data.collate import length_buckets


@dataclass(frozen=True, slots=True)
class Experience:
    """One rollout, ready to learn from. All [b t]; ``batch.loss_mask`` is True at the response tokens that count."""

    batch: TokenBatch
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.batch.ids)

    @property
    def mask(self) -> Tensor:
        """True at the response tokens that count."""
        return self.batch.loss_mask

    def rows(self, index: Sequence[int]) -> Experience:
        """Some rows, without the columns that are padding in all of them."""
        columns = (self.old_logprobs, self.old_values, self.advantages, self.returns)
        width = _width(self.batch, index)
        return Experience(batch_rows(self.batch, index), *(x[list(index), :width] for x in columns))

    def microbatches(self, tokens: int) -> list[Experience]:
        """All rows, in parts of at most ``tokens`` tokens with their padding."""
        return [self.rows(index) for index in length_buckets(self.batch.mask.sum(dim=1).tolist(), tokens)]


def batch_rows(batch: TokenBatch, index: Sequence[int]) -> TokenBatch:
    """Some rows, without the columns that are padding in all of them."""
    width, chosen = _width(batch, index), list(index)
    below = batch.below and replace(batch.below, states=batch.below.states[chosen, :width])
    ids, mask, loss_mask = (x[chosen, :width] for x in (batch.ids, batch.mask, batch.loss_mask))
    return TokenBatch(ids, mask, loss_mask, below=below)


def _width(batch: TokenBatch, index: Sequence[int]) -> int:
    return int(batch.mask[list(index)].sum(dim=1).max())
