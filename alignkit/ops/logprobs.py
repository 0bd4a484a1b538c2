"""Log-probabilities of given tokens, in float32 whatever the model computes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Rows of logits that exist at once: 1024 rows of a 50,000-token vocabulary are 200 MB in float32.
_CHUNK = 1024


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits [... v] / temperature) at ``tokens`` [...], nats; at least float32."""
    scaled = _wide(logits) / temperature
    return scaled.gather(-1, tokens[..., None]).squeeze(-1) - scaled.logsumexp(dim=-1)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy [...] of softmax(logits [... v] / temperature), nats."""
    logs = torch.log_softmax(_wide(logits) / temperature, dim=-1)
    return -(logs.exp() * logs).sum(dim=-1)


def selective_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n] of ``tokens`` [n] and entropies [n] (no gradient) from hidden states [n d] and a head ``weight`` [v d].

    Logits are made a few rows at a time, forward and backward, and never kept: that is what an ordinary head spends its memory on.
    """
    logprobs, entropies = _Selective.apply(hidden, weight, bias, tokens, temperature)
    return logprobs, entropies


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Selective(torch.autograd.Function):
    """Recomputes each chunk's logits in the backward pass, where softmax - one-hot is their gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(tokens.shape, dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        for rows in torch.arange(len(tokens), device=hidden.device).split(_CHUNK):
            scaled = _logits(hidden[rows], weight, bias, temperature)
            total = scaled.logsumexp(dim=-1)
            logprobs[rows] = scaled.gather(1, tokens[rows, None]).squeeze(1) - total
            # H = log Z - E[logit]: one pass over the vocabulary, and no tensor of log-probabilities.
            entropies[rows] = total - (torch.softmax(scaled, dim=-1) * scaled).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, tokens)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        ctx.autocast = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias else None
        with torch.autocast(hidden.device.type, ctx.autocast, enabled=ctx.autocast is not None):
            for rows in torch.arange(len(tokens), device=hidden.device).split(_CHUNK):
                grad = torch.softmax(_logits(hidden[rows], weight, bias, ctx.temperature), dim=-1).neg_()
                grad[torch.arange(len(rows)), tokens[rows]] += 1.0
                grad *= grads[0][rows, None] / ctx.temperature
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad.to(hidden.dtype) @ weight.to(hidden.dtype)).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += (grad.to(hidden.dtype).T @ hidden[rows]).to(weight.dtype)
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0).to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    return _wide(torch.nn.functional.linear(hidden, weight, bias)) / temperature
