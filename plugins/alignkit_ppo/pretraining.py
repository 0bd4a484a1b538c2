"""The pretraining half of PPO-ptx: every token of plain text, at temperature 1, into the policy's gradient; the critic is not touched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from alignkit.api import Metrics, Policy, TokenRow
from alignkit.data.collate import collate, length_buckets
from alignkit.learner import Share
from alignkit.ops.losses import nll_loss


def ptx_shares(policy: Policy, rows: Sequence[TokenRow], *, coef: float, microbatch_tokens: int) -> list[Share]:
    """``coef`` times the mean negative log-likelihood per token of ``rows``, a microbatch a share.

    The paper does not say whether its log-likelihood is summed or averaged; a mean over tokens, as PPO's own loss is here, makes
    ``coef`` independent of how much text there is.
    """
    trained = sum(sum(row.loss_mask) for row in rows)

    def loss(part: list[TokenRow]) -> tuple[Tensor, Metrics]:
        batch = collate(part)
        logprobs = policy.score_tokens(batch).logprobs
        nll = nll_loss(logprobs, batch.loss_mask.to(logprobs.device), tokens_in_step=trained)
        return coef * nll, {"loss/pretraining_nats": float(nll.detach())}

    return [partial(loss, [rows[i] for i in some]) for some in length_buckets([len(row) for row in rows], microbatch_tokens)]
