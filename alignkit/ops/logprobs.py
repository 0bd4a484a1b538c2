"""Log-probabilities of given tokens, in float32 whatever the model computes in (float64 stays float64)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Logits that exist at once, whatever the vocabulary: all of them where they are so many or fewer, else the second number at a time. In
# float32 that is 64 MB and 16 MB for a processor and its caches, and 512 MB for a GPU, which a small product leaves idle.
_KEPT = {"cpu": 1 << 24, "cuda": 1 << 27}
_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits [... v] / temperature) at ``tokens`` [...], nats."""
    return torch.log_softmax(_wide(logits) / temperature, dim=-1).gather(-1, tokens[..., None]).squeeze(-1)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy [...] of softmax(logits [... v] / temperature), nats."""
    logs = torch.log_softmax(_wide(logits) / temperature, dim=-1)
    return -(logs.exp() * logs).sum(dim=-1)


def selective_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n] of ``tokens`` [n] and entropies [n] from hidden states [n d] and a head ``weight`` [v d].

    Logits are made a few rows at a time, forward and backward, and never kept: that is what an ordinary head spends its memory on.
    Entropies have a gradient only when it is asked for; it costs as much as that of the log-probabilities.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _Selective.apply  # torch leaves it untyped
    return apply(hidden, weight, bias, tokens, temperature, entropy_gradient)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Selective(torch.autograd.Function):
    """The gradient of a log-probability to its logits is one-hot - softmax, over the temperature; that of an entropy is
    softmax * (mean logit - logit).

    A trained head needs them again in the backward pass: where all rows are one chunk they are kept, else made again. A frozen head needs
    them only to reach the hidden states, where they are known but for a factor of each row; so they are taken there at once, and the
    backward pass multiplies.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, *wants_head = ctx.needs_input_grad[:3]
        at_once = wants_hidden and not any(wants_head)
        ctx.types = hidden.dtype, weight.dtype
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            # Once for all chunks and for the backward pass: for a head, a cast is a pass over a large matrix.
            hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
            bias = None if bias is None else bias.to(weight.dtype)
        slopes = torch.empty_like(hidden, dtype=ctx.types[0]) if at_once else None
        entropy_slopes = torch.empty_like(slopes) if slopes is not None and entropy_gradient else None
        logprobs = torch.empty(tokens.shape, dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        chunks = list(_chunks(len(tokens), weight))
        kept: tuple[Tensor | None, Tensor | None] = None, None
        for rows in chunks:
            scaled = _logits(hidden[rows], weight, bias, temperature)
            mass = scaled.exp()
            total = mass.sum(dim=-1)
            logprobs[rows] = scaled.gather(1, tokens[rows, None]).squeeze(1) - total.log()
            # H = log Z - E[logit]: no tensor of log-probabilities.
            entropies[rows] = total.log() - torch.linalg.vecdot(scaled, mass) / total
            softmax = mass.div_(total[:, None]) if any(ctx.needs_input_grad[:3]) else mass
            if entropy_slopes is not None:
                entropy_slopes[rows] = _project(_entropy_slope(scaled, softmax), weight, ctx.types[0]) / temperature
            if slopes is not None:
                slopes[rows] = _project(_slope(softmax, tokens[rows]), weight, ctx.types[0]) / temperature
            elif any(wants_head) and len(chunks) == 1:
                kept = softmax, scaled if entropy_gradient else None
        ctx.save_for_backward(hidden, weight, bias, tokens, slopes, entropy_slopes, *kept)
        ctx.temperature, ctx.entropy_gradient = temperature, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, slopes, entropy_slopes, softmax, scaled = ctx.saved_tensors
        if slopes is not None:
            grad = slopes * grads[0][:, None]
            if entropy_slopes is not None:
                grad += entropy_slopes * grads[1][:, None]
            return grad.to(ctx.types[0]), None, None, None, None, None
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden, of_weight = ctx.types
        grad_hidden = torch.empty_like(hidden, dtype=of_hidden) if wants_hidden else None
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        for rows in _chunks(len(tokens), weight):
            if softmax is None:
                part = _logits(hidden[rows], weight, bias, ctx.temperature)
                chances = torch.softmax(part, dim=-1)
            else:
                part, chances = scaled, softmax
            factor = grads[0][rows, None] / ctx.temperature
            grad = (chances * -factor).scatter_add_(1, tokens[rows, None], factor)
            if ctx.entropy_gradient:
                grad += _entropy_slope(part, chances).mul_(grads[1][rows, None] / ctx.temperature)
            if grad_hidden is not None:
                grad_hidden[rows] = _project(grad, weight, of_hidden)
            if wants_weight:
                grad_weight = _added(grad_weight, grad.to(hidden.dtype).T, hidden[rows], of_weight)
            if wants_bias:
                grad_bias = grad.sum(dim=0) if grad_bias is None else grad_bias + grad.sum(dim=0)
        if not len(tokens):
            grad_weight = torch.zeros_like(weight, dtype=of_weight) if wants_weight else None
            grad_bias = torch.zeros_like(bias, dtype=of_weight) if wants_bias else None
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(of_weight), None, None, None


def _chunks(rows: int, weight: Tensor) -> Iterator[slice]:
    vocabulary, device = len(weight), weight.device.type
    size = max(rows, 1) if rows * vocabulary <= _KEPT[device] else max(_CHUNK[device] // vocabulary, 1)
    return (slice(start, start + size) for start in range(0, rows, size))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Logits / temperature, each row less its largest: so small log-probabilities keep their digits."""
    scaled = _wide(torch.nn.functional.linear(hidden, weight, bias))
    if temperature != 1.0:
        scaled = scaled / temperature
    return scaled.sub_(scaled.amax(dim=-1, keepdim=True))


def _added(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right, in place where it can be: for a head this is a large matrix, and each pass over it is felt."""
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)


def _slope(softmax: Tensor, tokens: Tensor) -> Tensor:
    """One-hot - softmax [n v], written over ``softmax``: how the tokens' log-probabilities change with their scaled logits."""
    return softmax.neg_().scatter_add_(1, tokens[:, None], torch.ones_like(softmax[:, :1]))


def _entropy_slope(scaled: Tensor, softmax: Tensor) -> Tensor:
    """softmax * (mean - logit) [n v]: how the entropies change with the scaled logits."""
    return softmax * ((softmax * scaled).sum(dim=-1, keepdim=True) - scaled)


def _project(slope: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """From logits [n v] back to hidden states [n d], in ``dtype``."""
    return (slope.to(weight.dtype) @ weight).to(dtype)
