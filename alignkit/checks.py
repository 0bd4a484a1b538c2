"""What must hold in every run, checked where it costs next to nothing. A violation stops the run and names the likely causes.

``checks: off`` in the config leaves all of it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from alignkit.errors import RunError
from alignkit.interfaces import TokenBatch
from alignkit.types import TokenRow

if TYPE_CHECKING:
    from torch import Tensor

EXACT_NATS = 1e-4
"""How far two float32 computations of log-probabilities may lie apart, on average over tokens. Not at most: at a few places in a hundred
thousand a model amplifies what was rounded a hundredfold (docs/decisions/0027-ratio.md).
"""

ROUGH_NATS = 0.1
"""The same in bfloat16, where a model of 135M parameters is off by 0.04 when as little as the number of rows changes."""

_OFF = "to go on all the same, set checks: off"


def ratio_is_one(change: Tensor, *, exact: bool) -> None:
    """Before a rollout's first step nothing has been learnt: log-probabilities [n] less the rollout's are 0.

    ``exact``: they were recorded while sampling, or computed anew, in float32.
    """
    if not len(change):
        return
    off = float(change.abs().mean())
    if not off <= (EXACT_NATS if exact else ROUGH_NATS):
        raise RunError(
            f"the policy's log-probabilities differ by {off:.2g} nats a token from its own rollout's before anything was learnt from it; "
            "likely causes: dropout that is on, weights that changed between sampling and update, another temperature, "
            f"positions or padding that the model does not respect, or an engine with other weights; {_OFF}"
        )


def divergence_is_not_negative(k3: Tensor) -> None:
    """The k3 estimate of a KL is no less than 0 at any token."""
    if not bool((k3 >= -1e-6).all()):
        raise RunError(
            f"the k3 estimate of the KL to the reference is {float(k3.min()):.3g} at a token, and it cannot be negative; likely causes: "
            f"log-probabilities that are not finite, or figures of different tokens subtracted from each other; {_OFF}"
        )


def padding_changes_nothing(scores: Callable[[TokenBatch], Tensor], batch: TokenBatch, *, exact: bool) -> None:
    """A reward is the same with more padding: ``scores`` maps a batch to a figure [b] of each row."""
    import torch

    ids, mask, loss_mask = (torch.nn.functional.pad(x, (0, 8)) for x in (batch.ids, batch.mask, batch.loss_mask))
    wide = TokenBatch(ids, mask, loss_mask)
    with torch.no_grad():
        plain, padded = scores(batch), scores(wide)
    # A sum over wider rows rounds in another order: that much, relative to the size of the scores, is allowed.
    bound = (1e-4 if exact else 5e-2) * max(1.0, float(plain.abs().max()))
    off = float((plain - padded).abs().max())
    if not off <= bound:
        raise RunError(
            f"padding changes the reward model's scores by {off:.2g}; likely causes: an architecture that looks ahead, "
            f"or one that takes padding for text; {_OFF}"
        )


def end_of_turn_is_trained(rows: Sequence[TokenRow], stop_ids: Sequence[int]) -> None:
    """Some demonstration trains a stop token: from none of them the model would learn to stop."""
    stops = set(stop_ids)
    if rows and not any(mask and token in stops for row in rows for token, mask in zip(row.ids, row.loss_mask, strict=True)):
        raise RunError(
            "no demonstration trains the token that ends a turn, so the policy would never learn to stop; likely causes: "
            f"overlong: truncate that cuts every row (raise max_length), or data without a single finished turn; {_OFF}"
        )


def same_template(here: str, there: str, stage: str) -> None:
    """Two stages write a conversation in the same tokens."""
    if here != there:
        raise RunError(
            f"the chat template, special tokens or stop tokens are not those that stage {stage} was made with, so its figures are about "
            f"other tokens; likely causes: policy.chat_template was changed, or the stage's tokenizer files were; {_OFF}"
        )


def documents_are_apart(packed: Tensor, alone: Tensor, *, exact: bool) -> None:
    """Log-probabilities [n] of tokens in a packed row equal those of the same tokens in a row of their own."""
    off = float((packed - alone).abs().mean())
    if not off <= (EXACT_NATS if exact else ROUGH_NATS):
        raise RunError(
            f"packing changes log-probabilities by {off:.2g} nats a token: the model does not keep the documents of a row apart; "
            f"set packing: false for this architecture; {_OFF}"
        )
