"""alignkit otherwise: functions that are called in a worker before anything is built there, most of which take one lever out.

``python -m benchmarks.bench --levers`` runs those against alignkit as it is.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

import alignkit.models.attention as attention
import alignkit.models.decoding as decoding
import alignkit.ops.logprobs as logprobs
from alignkit.beside import one_after_another
from alignkit.interfaces import TokenBatch, TokenScores
from alignkit.models import causal_lm, kernels
from alignkit.models.trunk import Kept
from alignkit.rollout.cache import Cache
from alignkit.rollout.decoder import Decoder
from alignkit_ppo import update
from alignkit_reward_model import update as reward_model


def computed_padding() -> None:
    """Every place of the batch is computed, padding too, as rows side by side; nothing is shared."""

    def whole(batch: TokenBatch) -> attention.Layout:
        rows, width = batch.ids.shape
        places = torch.arange(rows * width)
        return attention.Layout(places, places % width, places.view(rows, width), places, places.view(rows, width))

    attention.lay_out = whole


def separate_beginnings() -> None:
    """Padding is left out, and a beginning is computed for each row that has it."""
    plain = attention.lay_out

    def apart(batch: TokenBatch) -> attention.Layout:
        # Ids that no two rows share make no common beginning; the ids themselves are read elsewhere.
        marked = batch.ids + torch.arange(len(batch.ids))[:, None] * (1 << 32)
        return plain(replace(batch, ids=marked))

    attention.lay_out = apart


def logits_everywhere() -> None:
    """Hidden states are projected onto the vocabulary at every token, scored or not."""
    plain = causal_lm.CausalPolicy.score_tokens

    def everywhere(self: Any, batch: TokenBatch, **options: Any) -> TokenScores:
        scores = plain(self, replace(batch, loss_mask=batch.mask), **options)
        return TokenScores(*(torch.where(batch.loss_mask, x, 0.0) for x in (scores.logprobs, scores.entropy)))

    _put(causal_lm.CausalPolicy, score_tokens=everywhere)


def logits_made_twice() -> None:
    """Logits are never kept from the forward to the backward pass."""
    logprobs._KEPT["cpu"] = 0


def loop_adamw() -> None:
    """AdamW weight by weight."""
    plain = torch.optim.AdamW

    def unfused(*weights: Any, **options: Any) -> torch.optim.AdamW:
        return plain(*weights, **{**options, "fused": False, "foreach": False})

    _put(torch.optim, AdamW=unfused)


def layers_computed_each_time() -> None:
    """Frozen layers are computed by every forward through them."""
    _put(update, shared_trunk=lambda *models, exact: None)


def nothing_kept() -> None:
    """What frozen layers make of a response is computed at each of its readings."""
    _put(reward_model, keep_states=lambda *_, **__: Kept(None, ()))


def one_model_at_a_time() -> None:
    """Policy and critic are computed one after the other, each on all threads."""
    _put(update, beside=lambda device: nullcontext(one_after_another))


def plain_weights() -> None:
    """Decoding multiplies as training does, whatever was found to be faster."""
    kernels.use(replace(kernels.chosen(), decode="torch", decode_bfloat16="torch"))


def keys_in_bfloat16() -> None:
    """Keys and values are kept in the type of the products."""

    def allocate(self: Cache, like: Any) -> None:
        _, heads, _, d = like.shape
        shape = self._layers, self._keys.shape[1], heads, self._keys.shape[3], d
        self._keys, self._values = like.new_zeros(shape), like.new_zeros(shape)

    _put(Cache, _allocate=allocate)


def products_of_a_server() -> None:
    """Decoding multiplies as ``alignkit serve`` does: what one is answered does not hang on who else asks."""
    kernels.use(kernels.for_serving())


def other_linear() -> None:
    """Linear layers in training through that library that was not found to be the faster one."""
    now = kernels.chosen()
    kernels.use(replace(now, linear="torch" if now.linear == "onednn" else "onednn"))


def general_forward() -> None:
    """Llama is generated through transformers' forward, as any architecture is."""
    decoding.LlamaForCausalLM = decoding.MistralForCausalLM = decoding.Qwen2ForCausalLM = type(None)


def rows_that_stay() -> None:
    """Rows that are done are decoded until the last one is."""
    plain = Decoder._remove

    def keep(self: Decoder, gone: Any) -> None:
        if all(row.drawn >= row.request.max_new_tokens for row in self._rows):
            plain(self, list(self._rows))

    _put(Decoder, _remove=keep)


def _put(owner: Any, **parts: Any) -> None:
    """Parts of a module or class in the place of its own, for as long as the worker lives."""
    for name, part in parts.items():
        setattr(owner, name, part)
