"""The update of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignkit.api import Codec, Context, Metrics, State, TokenBatch, TokenRow
from alignkit.checks import documents_are_apart, end_of_turn_is_trained
from alignkit.data.collate import best_fit, collate, length_buckets, pack
from alignkit.data.pretraining import PretrainingStream
from alignkit.learner import Learner
from alignkit.models.dropout import dropping, residual_dropouts
from alignkit.models.trunk import keep_states
from alignkit.ops.losses import nll_loss
from alignkit.seeds import derived_seed

if TYPE_CHECKING:
    from alignkit_sft import PretrainConfig, SFTConfig


class SFT:
    """Mean negative log-likelihood per trained token, over all tokens of the step."""

    def __init__(self, config: SFTConfig, context: Context) -> None:
        assert context.plan is not None
        self._config = config
        self._seed = context.seed
        self._policy = context.load_policy(context.start, True)
        self._learner = Learner(self._policy.module, config, steps=context.plan.steps, guard=context.guard)
        self._dropouts = residual_dropouts(self._policy.module) if config.dropout else []
        self._pretraining = _Share(config.pretrain, context, self._policy.codec, context.plan.rows) if config.pretrain else None
        # What is dropped differs from epoch to epoch, and so does what frozen layers make of a text.
        read_again = context.rows if config.epochs > 1 and not self._dropouts else ()
        self._kept = keep_states(self._policy.module, read_again, exact=self._policy.exact, say=context.say)
        self._isolation_to_check = context.checks and config.packing
        self._step = 0
        if context.checks:
            end_of_turn_is_trained(context.rows, self._policy.codec.stop_ids)

    def update(self, batch: Sequence[TokenRow]) -> Metrics:
        """One step."""
        rows = [*batch, *(self._pretraining.take(self._step) if self._pretraining else ())]
        trained = _trained_tokens(rows)

        def loss(part: TokenBatch) -> tuple[Tensor, Metrics]:
            with self._dropout(part):
                nll = self._nll(part, trained)
            return nll, {"loss/nll_nats": float(nll.detach())}

        if self._isolation_to_check:
            self._check_isolation(rows)
        metrics = self._learner.step(lambda tokens: [partial(loss, part) for part in self._microbatches(rows, tokens)])
        self._step += 1
        self._policy.version += 1
        return {**metrics, "data/trained_tokens": float(trained), "data/pretraining_rows": float(len(rows) - len(batch))}

    @torch.no_grad()
    def validate(self, batch: Sequence[TokenRow]) -> Metrics:
        """Mean negative log-likelihood per token over all rows, without dropout."""
        trained = _trained_tokens(batch)
        return {"loss/nll_nats": sum(float(self._nll(part, trained)) for part in self._microbatches(batch, self._config.microbatch_tokens))}

    def _nll(self, part: TokenBatch, trained: int) -> Tensor:
        logprobs = self._policy.score_tokens(part).logprobs
        return nll_loss(logprobs, part.loss_mask.to(logprobs.device), tokens_in_step=trained)

    def _microbatches(self, rows: Sequence[TokenRow], tokens: int) -> list[TokenBatch]:
        if not self._config.packing:
            parts = [[rows[i] for i in some] for some in length_buckets([len(row) for row in rows], tokens)]
            return [self._kept.under(collate(part), [[row] for row in part]) for part in parts]
        # No wider than the longest row needs: attention costs the square of the width.
        bins = best_fit([len(row) for row in rows], max(map(len, rows)))
        lengths = [sum(len(rows[i]) for i in one) for one in bins]
        packed = [[[rows[i] for i in bins[b]] for b in some] for some in length_buckets(lengths, tokens)]
        return [self._kept.under(pack(part), part) for part in packed]

    def _dropout(self, part: TokenBatch) -> AbstractContextManager[None]:
        if not self._dropouts:
            return nullcontext()
        # What is dropped follows from the step and from the rows, so that an interrupted run goes on with the same draws.
        return dropping(self._dropouts, self._config.dropout, derived_seed(self._seed, "dropout", self._step, part.ids.sum().item()))

    @torch.no_grad()
    def _check_isolation(self, rows: Sequence[TokenRow]) -> None:
        """Score two documents in one row and by themselves, once."""
        first, second = min(rows, key=len), max(rows, key=len)
        both = pack([[first, second]])
        together = self._policy.score_tokens(both).logprobs[0]
        alone = [self._policy.score_tokens(pack([[row]])).logprobs[0] for row in (first, second)]
        scored = both.loss_mask[0].to(together.device)
        documents_are_apart(together[scored], torch.cat(alone)[scored], exact=self._policy.exact)
        self._isolation_to_check = False

    def state(self) -> State:
        """Weights and moments, the step, and the place in the pretraining text."""
        learner = self._learner.state()
        stream = dict(self._pretraining.stream.state().values) if self._pretraining else None
        return State(learner.tensors, {"learner": learner.values, "step": self._step, "pretraining": stream})

    def load_state(self, state: State) -> None:
        """Continue from ``state``."""
        self._learner.load_state(State(state.tensors, state.values["learner"]))
        self._step = self._policy.version = state.values["step"]
        if self._pretraining:
            self._pretraining.stream.load_state(State(values=state.values["pretraining"]))

    def save(self, folder: Path) -> None:
        """Write the policy."""
        self._policy.save(folder)


class _Share:
    """So many chunks of pretraining text a step that they are ``fraction`` of all rows: not at every step, but over steps."""

    def __init__(self, config: PretrainConfig, context: Context, codec: Codec, batch: int) -> None:
        self.stream = PretrainingStream(context, config.data, codec, max_length=config.max_length, name="pretraining")
        self._per_step = batch * config.fraction / (1.0 - config.fraction)

    def take(self, step: int) -> list[TokenRow]:
        """The chunks of a step, 0 being the first."""
        return self.stream.take(int((step + 1) * self._per_step) - int(step * self._per_step))


def _trained_tokens(rows: Sequence[TokenRow]) -> int:
    # Nothing predicts a row's first token, so it is never trained, whatever its mask says.
    return sum(sum(row.loss_mask[1:]) for row in rows)
