"""How alignkit computes each entry of a file of golden numbers: one function an entry, from its inputs to its expected figures.

A function takes the entry's inputs as tensors of one float type (nested lists of numbers: tensors; masks and ranks are read from them)
and its params, and returns figures by the names that the entry expects. Figures that alignkit has no function for are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from alignkit.data.collate import pack
from alignkit.ops.advantages import gae, kl_penalized_rewards, penalize_missing_eos
from alignkit.ops.correction import bounded_weights, geometric_mean_weight, importance_weights, mismatch, truncated_weights
from alignkit.ops.kl import adaptive_kl_coef, k1, k2, k3, sequence_kl
from alignkit.ops.logprobs import entropy, selective_logprobs, token_logprobs
from alignkit.ops.losses import (
    better_pairs,
    clipped_policy_loss,
    clipped_share,
    clipped_value_loss,
    clipped_value_share,
    kwise_loss,
    nll_loss,
    score_index,
)
from alignkit.ops.masked import masked_mean, masked_whiten
from alignkit.ops.schedule import schedule
from alignkit.ops.stats import explained_variance, pair_accuracy
from alignkit.types import TokenRow

Inputs = Mapping[str, Tensor]
Params = Mapping[str, Any]
Figures = dict[str, Any]


def whitening(x: Inputs, params: Params) -> Figures:
    mask = x["mask"].bool()
    mean = masked_mean(x["x"], mask)
    return {
        "mean": mean,
        "var_biased": masked_mean((x["x"] - mean) ** 2, mask),
        "whiten": masked_whiten(x["x"], mask, eps=params["eps"]),
        "whiten_no_shift": masked_whiten(x["x"], mask, center=False, eps=params["eps"]),
    }


def kl_estimators(x: Inputs, params: Params) -> Figures:
    inputs = x["logp"], x["ref_logp"], x["mask"].bool()
    return {
        "k1": k1(*inputs),
        "k2": k2(*inputs),
        "k3": k3(*inputs),
        "seq_kl_k1": sequence_kl(*inputs),
        "mean_seq_kl_k1": sequence_kl(*inputs).mean(),
        "mean_token_kl_k1": masked_mean(k1(*inputs), inputs[2]),
    }


def rewards(x: Inputs, params: Params) -> Figures:
    judged = penalize_missing_eos(x["scores"], x["has_eos"].bool(), penalty=params["missing_eos_subtract"])
    inputs = x["logp"], x["ref_logp"], x["mask"].bool()
    return {
        "rewards": kl_penalized_rewards(x["scores"], *inputs, coef=params["beta"]),
        "rewards_missing_eos_subtract": kl_penalized_rewards(judged, *inputs, coef=params["beta"]),
    }


def advantages(x: Inputs, params: Params) -> Figures:
    mask, values = x["mask"].bool(), x["values"]
    plain, returns = gae(x["rewards"], values, mask, gamma=params["gamma"], lam=params["lam"])
    other, other_returns = gae(x["rewards"], values, mask, gamma=params["alt_gamma"], lam=params["alt_lam"])
    whitened = masked_whiten(x["rewards"], mask, center=False)
    from_whitened, returns_from_whitened = gae(whitened, values, mask, gamma=params["gamma"], lam=params["lam"])
    return {
        "advantages": plain,
        "returns": returns,
        "advantages_whitened": masked_whiten(plain, mask),
        "alt_advantages": other,
        "alt_returns": other_returns,
        "whitened_rewards": whitened,
        "advantages_from_whitened_rewards": from_whitened,
        "returns_from_whitened_rewards": returns_from_whitened,
    }


def policy_loss(x: Inputs, params: Params) -> Figures:
    new, old, mask = x["new_logp"].requires_grad_(), x["old_logp"], x["mask"].bool()
    options = {"clip": params["cliprange"], "tokens_in_minibatch": int(mask.sum())}
    loss = clipped_policy_loss(new, old, x["advantages"], mask, **options)
    ratio = torch.where(mask, new - old, 0.0).exp()
    return {
        "loss": loss,
        "grad_new_logp": torch.autograd.grad(loss, new)[0],
        "clipfrac": clipped_share(new, old, x["advantages"], mask, **options),
        "mean_ratio": masked_mean(ratio, mask),
        "approx_kl_k1": masked_mean(k1(old, new, mask), mask),
        "approx_kl_k2": masked_mean(k2(old, new, mask), mask),
        "approx_kl_k3": masked_mean(k3(old, new, mask), mask),
        "loss_big": clipped_policy_loss(x["new_logp_big"], old, x["advantages"], mask, **options),
        "clipfrac_big": clipped_share(x["new_logp_big"], old, x["advantages"], mask, **options),
    }


def value_loss(x: Inputs, params: Params) -> Figures:
    values, old, returns, mask = x["vpred"].requires_grad_(), x["old_values"], x["returns"], x["mask"].bool()
    count = int(mask.sum())
    loss = clipped_value_loss(values, old, returns, mask, clip=params["cliprange_value"], tokens_in_minibatch=count)
    return {
        "loss": loss,
        "grad_vpred": torch.autograd.grad(loss, values)[0],
        "unclipped": clipped_value_loss(values, old, returns, mask, clip=None, tokens_in_minibatch=count),
        "clipfrac": clipped_value_share(values, old, returns, mask, clip=params["cliprange_value"], tokens_in_minibatch=count),
        "explained_var_centered": explained_variance(values, returns, mask),
    }


def adaptive_kl(x: Inputs, params: Params) -> Figures:
    coefs, coef = [], params["init"]
    for kl in x["kl_sequence"].tolist():
        coef = adaptive_kl_coef(coef, kl, target=params["target"], horizon=params["horizon"], episodes=params["n_steps"])
        coefs.append(coef)
    return {"values": coefs}


def correction(x: Inputs, params: Params) -> Figures:
    old, sampled, mask = x["old_logp"], x["rollout_logp"], x["mask"].bool()
    low, high = params["icepop"]
    cut = truncated_weights(old, sampled, mask, high=params["tis_max"])
    bounded = bounded_weights(old, sampled, mask, low=low, high=high)

    def loss(weights: Tensor) -> Tensor:
        gains = torch.where(mask, x["advantages"], 0.0) * weights
        return clipped_policy_loss(x["new_logp"], old, gains, mask, clip=params["cliprange"], tokens_in_minibatch=int(mask.sum()))

    geometric = geometric_mean_weight(old, sampled, mask)
    return {
        "w": importance_weights(old, sampled, mask),
        "tis": cut,
        "icepop": bounded,
        "seq_geo_mean": geometric,
        "seq_ratio": geometric ** mask.sum(dim=1),
        "loss_tis": loss(cut),
        "loss_icepop": loss(bounded),
        "mismatch_kl_k1": masked_mean(k1(sampled, old, mask), mask),
        "mismatch_kl_k3": masked_mean(k3(sampled, old, mask), mask),
        "mean_abs_logp_diff": mismatch(old, sampled, mask),
    }


def packing(x: Inputs, params: Params) -> Figures:
    rows = [TokenRow(str(i), (7,) * length, (True,) * length) for i, length in enumerate(x["packed_lengths"].long().tolist())]
    batch = pack([rows])
    assert batch.positions is not None
    return {"packed_position_ids": batch.positions[0], "packed_label_is_masked": (~batch.loss_mask[0]).double()}


def logprobs(x: Inputs, params: Params) -> Figures:
    logits, tokens = x["logits"][:, :-1], x["input_ids"][:, 1:].long()
    temperature = params["temperature"]
    # The same from a head: hidden states that are the logits already, and a head that copies them.
    copying = torch.eye(logits.shape[-1], dtype=logits.dtype)
    by_head, its_entropy = selective_logprobs(logits.flatten(0, 1), copying, tokens.flatten(), temperature=temperature)
    assert torch.allclose(by_head.view_as(tokens), token_logprobs(logits, tokens, temperature=temperature), atol=1e-5)
    assert torch.allclose(its_entropy.view_as(tokens), entropy(logits, temperature=temperature), atol=1e-5)
    return {
        "logp_t1": token_logprobs(logits, tokens),
        "logp_t07": token_logprobs(logits, tokens, temperature=temperature),
        "entropy_t1": entropy(logits),
        "entropy_t07": entropy(logits, temperature=temperature),
    }


def sft_loss(x: Inputs, params: Params) -> Figures:
    labels = x["labels"][:, 1:].long()
    mask = labels >= 0
    scores = token_logprobs(x["logits"][:, :-1], labels.clamp(min=0))
    count = int(mask.sum())
    return {
        "loss": nll_loss(scores, mask, tokens_in_step=count),
        "num_items": count,
        "per_row_count": mask.sum(dim=1),
        "per_microbatch_contribution": [nll_loss(row, kept, tokens_in_step=count) for row, kept in zip(scores, mask, strict=True)],
    }


def pairwise(x: Inputs, params: Params) -> Figures:
    chosen, rejected = x["chosen"].requires_grad_(), x["rejected"].requires_grad_()
    both = torch.stack([chosen, rejected], dim=1)
    ranks = torch.tensor([[1, 2]]).expand(len(both), 2)
    loss = kwise_loss(both, ranks).mean()
    grads = torch.autograd.grad(loss, (chosen, rejected))
    return {
        "loss": loss,
        "per_pair": kwise_loss(both, ranks),
        "grad_chosen": grads[0],
        "grad_rejected": grads[1],
        "loss_margin": kwise_loss(both, ranks, margin=x["margin"]).mean(),
        "loss_centered": kwise_loss(both, ranks, center=params["center"]).mean(),
        "accuracy": pair_accuracy(both, ranks).mean(),
    }


def kwise(x: Inputs, params: Params) -> Figures:
    scores = x["rewards"].requires_grad_()
    ranks = x["ranks"].long()
    losses, pairs = kwise_loss(scores, ranks), better_pairs(ranks).sum(dim=(1, 2))
    return {
        "per_prompt": losses,
        "loss": losses.mean(),
        "grad_rewards": torch.autograd.grad(losses.mean(), scores, retain_graph=True)[0],
        "n_pairs": pairs,
        "first_prompt_sum_over_pairs": losses[0] * pairs[0],
    }


def score_places(x: Inputs, params: Params) -> Figures:
    return {"index": score_index(x["attention_mask"].bool())}


def schedules(x: Inputs, params: Params) -> Figures:
    steps, total, floor = x["step"].long().tolist(), params["total"], params["min_ratio"]
    return {
        "cosine_to_10pct": [schedule(step, total, warmup=0.0, decay="cosine", floor=floor) for step in steps],
        "linear_to_zero": [schedule(step, total, warmup=0.0, decay="linear", floor=0.0) for step in steps],
        # "Over 10 iterations" is the paper's, not the file's.
        "instructgpt_ppo_warmup": [schedule(step, 10, warmup=1.0, decay="constant", floor=floor) for step in steps],
    }


def kl_gradients(x: Inputs, params: Params) -> Figures:
    """What each estimator's gradient is, averaged exactly over a small vocabulary."""
    logits = x["logits"].requires_grad_()
    p, q = logits.log_softmax(-1), x["ref_logits"].log_softmax(-1)
    every = torch.ones_like(p, dtype=torch.bool)
    chance = p.detach().exp()

    def gradient(of: Tensor) -> Tensor:
        return torch.autograd.grad(of, logits, retain_graph=True)[0]

    return {
        "kl": (chance * k1(p, q, every)).sum(),
        "true_reverse_kl_grad": gradient((p.exp() * k1(p, q, every)).sum()),
        "true_forward_kl_grad": gradient((q.exp() * k1(q, p, every)).sum()),
        "k1_in_reward": gradient((chance * k1(p, q, every).detach() * p).sum()),
        "k1_in_loss": gradient((chance * k1(p, q, every)).sum()),
        "k2_in_loss": gradient((chance * k2(p, q, every)).sum()),
        "k3_in_loss": gradient((chance * k3(p, q, every)).sum()),
        "k3_in_reward": gradient((chance * k3(p, q, every).detach() * p).sum()),
    }


COMPUTED: Mapping[str, Callable[[Inputs, Params], Figures]] = {
    "masked_whiten": whitening,
    "kl_estimators": kl_estimators,
    "kl_penalized_rewards": rewards,
    "gae": advantages,
    "ppo_policy_loss": policy_loss,
    "value_loss": value_loss,
    "adaptive_kl": adaptive_kl,
    "rollout_correction": correction,
    "position_ids_and_packing": packing,
    "logprobs_from_logits": logprobs,
    "sft_loss_accumulation": sft_loss,
    "rm_pairwise": pairwise,
    "rm_kwise": kwise,
    "rm_score_index": score_places,
    "lr_schedules": schedules,
    "kl_gradient_toy": kl_gradients,
}
"""The entries that alignkit has functions for."""


def _unlike_when_ragged(x: Inputs) -> bool:
    return not bool(x["mask"].bool().all())


def _unlike_when_rows_differ(x: Inputs) -> bool:
    counts = (x["labels"][:, 1:] >= 0).sum(dim=1)
    return len(set(counts.tolist())) > 1


def _unlike_when_ties_differ(x: Inputs) -> bool:
    return len(set(better_pairs(x["ranks"].long()).sum(dim=(1, 2)).tolist())) > 1


WRONG: Mapping[tuple[str, str], tuple[str, Callable[[Inputs], bool]]] = {
    ("kl_penalized_rewards", "VARIANT_rewards_trl_p1"): ("rewards", _unlike_when_ragged),
    ("gae", "VARIANT_trl_p1_advantages"): ("advantages", _unlike_when_ragged),
    ("ppo_policy_loss", "VARIANT_trl_unmasked_approx_kl"): ("approx_kl_k2", _unlike_when_ragged),
    ("sft_loss_accumulation", "BUG_mean_of_row_means"): ("loss", _unlike_when_rows_differ),
    ("rm_kwise", "VARIANT_mean_over_all_pairs"): ("loss", _unlike_when_ties_differ),
}
"""What another reference or a known bug yields, the figure of ours that it must not be, and when the two can be told apart."""


def as_tensors(inputs: Mapping[str, Any], groups: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """An entry's inputs; "@group/name" points into the file's own."""
    found = {name: groups[value[1:]] if isinstance(value, str) else value for name, value in inputs.items()}
    return {name: torch.tensor(value, dtype=dtype) for name, value in found.items()}


def as_tensor(figure: Any) -> Tensor:
    """A computed figure, ready to be compared."""
    if isinstance(figure, Tensor):
        return figure.detach().double()
    return torch.tensor([float(part) for part in figure] if isinstance(figure, list) else float(figure), dtype=torch.float64)
