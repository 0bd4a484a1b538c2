"""Attention of rows whose other layers never see padding, and pay only once for what rows have in common.

Linear layers, norms and the head work on one line of tokens; only attention puts it into rows. transformers hands attention to a
function that can be registered, so any architecture that goes through that interface runs this way, unchanged.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alignkit.errors import ModelError
from alignkit.interfaces import TokenBatch
from alignkit.models import kernels
from alignkit.models.blocks import blocks, instead
from alignkit.models.transfer import send

_NAME = "alignkit"
_OWN_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Attention(Protocol):
    """What the tokens of one forward look at."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """From query [n heads d], key and value [n key_heads d] of the tokens in line to what they gather [n heads d].

        ``window``: how many tokens back a token sees, itself included; None: all of its past.
        """


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of a batch stand: each once in a line [n], and in rows [r w] that may have their beginnings in common.

    ``tokens`` [n]: for each token in line, its place in the batch, row * t + column, the first one of several. ``positions`` [n]: how
    many tokens of its document precede it. ``rows`` [r w]: for each place in the rows of attention, one document each, its token in
    line; at padding any. ``first`` [n]: for each token in line, its place in those rows, row * w + column. ``line`` [b t]: for each
    place in the batch, its token in line; at padding any.
    """

    tokens: Tensor
    positions: Tensor
    rows: Tensor
    first: Tensor
    line: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Each token sees those before it in its row. Padding stands behind every real token, so that causality alone keeps it out."""
        width = self.rows.shape[1]
        q, k, v = (x.index_select(0, self.rows.flatten()).unflatten(0, self.rows.shape).transpose(1, 2) for x in (query, key, value))
        mask = None if window is None or window >= width else _band(width, window, query.device)
        on_cpu = query.device.type == "cpu"
        # In bfloat16 the backward pass of the CPU's attention takes several times as long as in float32. A GPU wants one type for all.
        q, k, v = (x.float() if on_cpu else x.to(value.dtype) for x in (q, k, v))
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
            )
        return out.to(query.dtype).transpose(1, 2).flatten(0, 1).index_select(0, self.first)

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        return Layout(*(send(x, device) for x in (self.tokens, self.positions, self.rows, self.first, self.line)))


PAST_BLOCK = 64
"""The width of a row's past is a multiple of this: the CPU adds up block by block, in the same order however wide other rows are."""


def attend_to_past(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """What one token a row, query [n heads d], gathers from keys and values [n key_heads t d] [n heads d].

    ``bias`` [n t], in the type of the keys: -inf where a row has nothing, or nothing that it may look at, else 0. t is a multiple of
    ``PAST_BLOCK``.
    """
    n, key_heads, width, d = keys.shape
    grouped = query.to(keys.dtype).unflatten(1, (key_heads, -1))
    if query.device.type != "cpu":
        out = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias[:, None, None], scale=scale)
        return out.flatten(1, 2)
    # Two plain products: for a single query, the CPU's fused attention takes several times as long.
    scale = d**-0.5 if scale is None else scale
    grouped = (grouped if scale == 1.0 else grouped * scale).flatten(0, 1)
    weights = torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2)).view(n, -1, width)
    weights = weights.add_(bias[:, None]).softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    weights, values = weights.view(n * key_heads, -1, width), values.flatten(0, 1)
    # In one product the library would cut the sum at places that depend on its length; an empty block adds exactly 0.
    gathered = torch.bmm(weights[..., :PAST_BLOCK], values[:, :PAST_BLOCK])
    for start in range(PAST_BLOCK, width, PAST_BLOCK):
        block = slice(start, start + PAST_BLOCK)
        gathered.baddbmm_(weights[..., block], values[:, block])
    return gathered.view(n, -1, d)


def lay_out(batch: TokenBatch) -> Layout:
    """The layout of a batch.

    What documents have in common at their beginning is put in line once: the system prompt of all, the prompt of several responses.
    A token's hidden state depends on what precedes it and on nothing else, so it is the same for all of them.
    """
    ids, mask = batch.ids.cpu(), batch.mask.cpu()
    count, width = mask.shape
    real = mask.flatten().nonzero().squeeze(1)  # document after document
    columns = (torch.arange(width).repeat(count) if batch.positions is None else batch.positions.cpu().flatten())[real]
    documents = (columns == 0).cumsum(0) - 1
    lengths = documents.bincount()
    # In alphabetical order, so that documents that begin alike come one after the other.
    texts = [text.tolist() for text in ids.flatten()[real].split(lengths.tolist())]
    order = torch.tensor(sorted(range(len(texts)), key=texts.__getitem__))
    row = order.argsort()[documents]  # [m]: of each real token

    shape = len(texts), int(lengths.max())
    in_rows = torch.full(shape, -1)
    in_rows[row, columns] = ids.flatten()[real]
    alike = torch.zeros(shape, dtype=torch.bool)
    alike[1:] = ((in_rows[1:] == in_rows[:-1]) & (in_rows[1:] >= 0)).long().cumprod(dim=1).bool()
    new = (in_rows >= 0) & ~alike
    # A place that is not new stands for the token that was new last, further up in its column.
    origin = torch.where(new, torch.arange(len(texts))[:, None], 0).cummax(dim=0).values
    rows = (new.flatten().cumsum(0) - 1).clamp_(min=0).view(shape).gather(0, origin)
    first = new.flatten().nonzero().squeeze(1)

    line = torch.zeros(count * width, dtype=torch.long)
    line[real] = rows[row, columns]
    places = torch.zeros(shape, dtype=torch.long)
    places[row, columns] = real
    return Layout(places.flatten()[first], first % shape[1], rows, first, line.view(count, width))


@dataclass(frozen=True, slots=True)
class Apart:
    """A batch whose documents share their linear layers and nothing else: no number of one depends on what is beside it, given products
    that do not either. ``tokens``, ``positions`` and ``line`` as in ``Layout``, document after document; ``lengths``: of each.
    """

    tokens: Tensor
    positions: Tensor
    line: Tensor
    lengths: tuple[int, ...]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Each document by itself: where attention cuts its sums depends on the width of what it is given."""
        documents = zip(query.split(self.lengths), key.split(self.lengths), value.split(self.lengths), strict=True)
        return torch.cat([_attend_causally(q, k, v, scale, window) for q, k, v in documents])


def lay_apart(batch: TokenBatch, device: torch.device) -> Apart:
    """The same tokens as in ``lay_out``, of rows that are one document each, with nothing shared."""
    places = batch.mask.flatten().nonzero().squeeze(1)
    line = torch.zeros(batch.mask.numel(), dtype=torch.long)
    line[places] = torch.arange(len(places))
    lengths = tuple(batch.mask.sum(dim=1).tolist())
    positions, line = places % batch.mask.shape[1], line.view(batch.mask.shape)
    return Apart(send(places, device), send(positions, device), send(line, device), lengths)


def _attend_causally(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """One document's tokens, [n heads d] each."""
    width = len(query)
    mask = None if window is None or window >= width else _band(width, window, query.device)
    dtype = torch.float32 if value.device.type == "cpu" else value.dtype
    q, k, v = (x.transpose(0, 1)[None].to(dtype) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out[0].transpose(0, 1).to(query.dtype)


def run(model: Any, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
    """Last hidden states [n d] of tokens in line, ``ids`` and ``positions`` [n]."""
    passed_through = ids.new_zeros(1, 1, 1, 1)  # transformers makes no mask where it is given one of four dimensions
    out = model.base_model(
        input_ids=ids[None], position_ids=positions[None], attention_mask=passed_through, use_cache=False, alignkit_attention=attention
    )
    states: Tensor = out.last_hidden_state[0]
    return states


def hidden_states(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Last hidden states [n d] of a batch's tokens in line, and where in it each place of the batch [b t] is found."""
    device = next(model.parameters()).device
    layout = lay_out(batch).to(device)
    ids, below = send(batch.ids, device).flatten()[layout.tokens], batch.below
    if below is None or all(model is not one for one in below.models):
        return run(model, ids, layout.positions, layout), layout.line
    known = below.states.to(device).flatten(0, 1)[layout.tokens][None]
    with instead(dict.fromkeys(blocks(model)[: below.depth], lambda *_, **__: known)):
        return run(model, ids, layout.positions, layout), layout.line


def prepare(model: Any) -> None:
    """Let a transformers model run this way; without an ``Attention`` it goes on as it did. Raises ``ModelError`` where it cannot."""
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(
            f"{type(model).__name__} does not hand its attention to transformers' attention interface, without which rows cannot be "
            "computed side by side; most architectures of transformers do (Llama, Qwen, GPT-2, Mistral, ...)"
        )
    beyond = [name for name in _OWN_LOGITS if getattr(model.config, name, None) not in (None, 1.0)]
    if beyond:
        raise ModelError(f"{type(model).__name__} changes its logits after the head ({', '.join(beyond)}), which alignkit does not compute")
    model.set_attn_implementation(_NAME)
    kernels.install(model)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls, with query, key and value [1 heads n d]."""
    attention: Attention | None = options.pop("alignkit_attention", None)
    if attention is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    beyond = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if beyond:
        raise ModelError(f"{type(module).__name__} needs attention with {', '.join(beyond)}, which alignkit does not compute")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention.attend(module.layer_idx, query, key, value, options.get("scaling"), options.get("sliding_window"))[None], None


def _band(width: int, window: int, device: torch.device) -> Tensor:
    """[t t] bool: a column sees itself and the ``window - 1`` before it."""
    back = torch.arange(width, device=device)[:, None] - torch.arange(width, device=device)
    return (back >= 0) & (back < window)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
