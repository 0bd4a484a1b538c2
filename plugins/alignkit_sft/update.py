"""The update of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alignkit.api import Context, Metrics, State, TokenRow
from alignkit.data.collate import collate, length_buckets
from alignkit.learner import Learner
from alignkit.ops.losses import nll_loss

if TYPE_CHECKING:
    from alignkit_sft import SFTConfig


class SFT:
    """Mean negative log-likelihood per trained token, over all tokens of the step."""

    def __init__(self, config: SFTConfig, context: Context) -> None:
        assert context.plan is not None
        self._policy = context.load_policy(context.start, True)
        self._learner = Learner(self._policy.module, config, steps=context.plan.steps)
        self._tokens = config.microbatch_tokens

    def update(self, batch: Sequence[TokenRow]) -> Metrics:
        """One step."""
        trained = _trained_tokens(batch)

        def loss(rows: list[TokenRow]) -> tuple[torch.Tensor, Metrics]:
            nll = self._nll(rows, trained)
            return nll, {"loss/nll_nats": float(nll.detach())}

        metrics = self._learner.step(partial(loss, rows) for rows in self._microbatches(batch))
        self._policy.version += 1
        return {**metrics, "data/trained_tokens": float(trained)}

    @torch.no_grad()
    def validate(self, batch: Sequence[TokenRow]) -> Metrics:
        """Mean negative log-likelihood per token over all rows."""
        trained = _trained_tokens(batch)
        return {"loss/nll_nats": sum(float(self._nll(rows, trained)) for rows in self._microbatches(batch))}

    def _nll(self, rows: list[TokenRow], trained: int) -> torch.Tensor:
        tokens = collate(rows)
        logprobs = self._policy.score_tokens(tokens).logprobs
        return nll_loss(logprobs, tokens.loss_mask.to(logprobs.device), tokens_in_step=trained)

    def _microbatches(self, batch: Sequence[TokenRow]) -> list[list[TokenRow]]:
        return [[batch[i] for i in bucket] for bucket in length_buckets([len(row) for row in batch], self._tokens)]

    def state(self) -> State:
        """Weights and moments."""
        return self._learner.state()

    def load_state(self, state: State) -> None:
        """Continue from ``state``."""
        self._learner.load_state(state)

    def save(self, folder: Path) -> None:
        """Write the policy."""
        self._policy.save(folder)


def _trained_tokens(rows: Sequence[TokenRow]) -> int:
    # Nothing predicts a row's first token, so it is never trained, whatever its mask says.
    return sum(sum(row.loss_mask[1:]) for row in rows)
