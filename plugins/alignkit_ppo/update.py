"""PPO's update: what a rollout and its scores do to the policy and the critic."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignkit.api import Context, Metrics, Policy, RunError, ScoredRollout, State, TokenBatch
from alignkit.data.collate import length_buckets
from alignkit.learner import Learner
from alignkit.ops.advantages import gae, kl_penalized_rewards, penalize_missing_eos
from alignkit.ops.kl import adaptive_kl_coef, k1, k3, sequence_kl
from alignkit.ops.losses import clipped_policy_loss, clipped_share, clipped_value_loss
from alignkit.ops.masked import masked_mean, masked_sum, masked_whiten
from alignkit.ops.stats import explained_variance

if TYPE_CHECKING:
    from alignkit.models.scalar import ScalarModel
    from alignkit_ppo import PPOConfig


@dataclass(frozen=True, slots=True)
class Experience:
    """One rollout, ready to learn from. All [b t]; ``batch.loss_mask`` is True at the response tokens that count."""

    batch: TokenBatch
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Sequence[int]) -> Experience:
        """Some rows, without the columns that are padding in all of them."""
        width = int(self.batch.mask[list(index)].sum(dim=1).max())

        def cut(x: Tensor) -> Tensor:
            return x[list(index), :width]

        batch = TokenBatch(cut(self.batch.ids), cut(self.batch.mask), cut(self.batch.loss_mask))
        return Experience(batch, *(cut(x) for x in (self.old_logprobs, self.old_values, self.advantages, self.returns)))


class PPO:
    """Policy, critic, frozen reference and the KL coefficient."""

    def __init__(self, config: PPOConfig, context: Context) -> None:
        assert context.plan is not None
        self._config = config
        self._seed = context.seed
        self._policy = context.load_policy(context.start, True)
        same = context.reference == context.start
        self._reference = self._policy.reference() if same else context.load_policy(context.reference, False)
        self._critic = _critic(config, context)
        steps = context.plan.steps * config.epochs * config.minibatches
        self._policy_learner = Learner(self._policy.module, config, steps=steps)
        self._critic_learner = Learner(self._critic, config.critic, steps=steps)
        self._kl_coef = config.kl.coef
        self._iteration = 0

    @property
    def policy(self) -> Policy:
        """The policy being trained."""
        return self._policy

    def update(self, batch: ScoredRollout) -> Metrics:
        """Rewards, advantages, then ``epochs`` passes of ``minibatches`` steps."""
        experience, metrics = self._prepare(batch)
        steps = [self._step(experience.rows(index)) for index in self._minibatches(len(batch.scores))]
        self._policy.version += 1
        self._iteration += 1
        metrics |= {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        if self._config.kl.kind == "adaptive":
            kl = self._config.kl
            # After the step: the rewards of this iteration used the old coefficient.
            self._kl_coef = adaptive_kl_coef(
                self._kl_coef, metrics["kl/sequence_nats"], target=kl.target, horizon=kl.horizon, episodes=len(batch.scores)
            )
        return metrics

    @torch.no_grad()
    def _prepare(self, scored: ScoredRollout) -> tuple[Experience, dict[str, float]]:
        rollout, config = scored.rollout, self._config
        values = [score.value for score in scored.scores]
        if all(value is None for value in values):
            raise RunError(f"no response of iteration {self._iteration + 1} was scored; the first reason: {scored.scores[0].reason}")
        has_score = torch.tensor([value is not None for value in values])
        score = torch.tensor([0.0 if value is None else value for value in values])
        finished = torch.tensor([sample.finished for sample in rollout.samples])
        judged = penalize_missing_eos(score, finished, penalty=config.missing_eos_penalty)

        # A sample without a score is not an example of anything: none of its tokens counts.
        mask = rollout.batch.loss_mask & has_score[:, None]
        batch = TokenBatch(rollout.batch.ids, rollout.batch.mask, mask)
        reference = self._each(batch, lambda part: self._reference.score_tokens(part, temperature=config.temperature).logprobs)
        critic = self._each(batch, self._critic.values)
        trained = rollout.logprobs if rollout.exact else self._each(batch, self._old_logprobs)
        logprobs = torch.where(mask, trained, 0.0)

        rewards = kl_penalized_rewards(judged, logprobs, reference, mask, coef=self._kl_coef)
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, center=False)
        advantages, returns = gae(rewards, critic, mask, gamma=config.gamma, lam=config.lam)
        experience = Experience(batch, logprobs, critic, masked_whiten(advantages, mask), returns)
        kl = sequence_kl(logprobs, reference, mask)[has_score]
        lengths = rollout.batch.loss_mask.sum(dim=1).float()
        metrics = {
            "reward/score_mean": float(score[has_score].mean()),
            "reward/score_std": float(score[has_score].std(correction=0)),
            "reward/total_mean": float((judged[has_score] - self._kl_coef * kl).mean()),
            "reward/masked_count": float((~has_score).sum()),
            "kl/sequence_nats": float(kl.mean()),
            "kl/token_k1_nats": float(masked_mean(k1(logprobs, reference, mask), mask)),
            "kl/token_k3_nats": float(masked_mean(k3(logprobs, reference, mask), mask)),
            "kl/coef": self._kl_coef,
            "response/length_tokens": float(lengths.mean()),
            "response/finished_share": float(finished.float().mean()),
            "critic/explained_variance": float(explained_variance(critic, returns, mask)),
            "critic/value_mean": float(masked_mean(critic, mask)),
        }
        return experience, metrics | _mean_parts(scored)

    def _old_logprobs(self, part: TokenBatch) -> Tensor:
        return self._policy.score_tokens(part, temperature=self._config.temperature).logprobs

    def _step(self, minibatch: Experience) -> dict[str, float]:
        """One step of the policy and one of the critic; each gradient is clipped by itself."""
        config = self._config
        mask = minibatch.batch.loss_mask
        count = int(mask.sum().clamp(min=1))

        def policy_loss(part: Experience) -> tuple[Tensor, Metrics]:
            inner = part.batch.loss_mask
            tokens = self._policy.score_tokens(part.batch, temperature=config.temperature)
            new, entropy = tokens.logprobs.cpu(), tokens.entropy.detach().cpu()
            terms = (part.old_logprobs, part.advantages, inner)
            loss = clipped_policy_loss(new, *terms, clip=config.clip, tokens_in_minibatch=count)
            change = torch.where(inner, new.detach() - part.old_logprobs, 0.0)
            return loss, {
                "loss/policy": float(loss.detach()),
                "policy/entropy_nats": float(masked_sum(entropy, inner)) / count,
                "policy/approx_kl_nats": float(masked_sum(0.5 * change**2, inner)) / count,
                "policy/clip_share": float(clipped_share(new.detach(), *terms, clip=config.clip, tokens_in_minibatch=count)),
                "policy/ratio_mean": float(masked_sum(change.exp(), inner)) / count,
            }

        def critic_loss(part: Experience) -> tuple[Tensor, Metrics]:
            values = self._critic.values(part.batch).cpu()
            loss = clipped_value_loss(
                values, part.old_values, part.returns, part.batch.loss_mask, clip=config.critic.clip, tokens_in_minibatch=count
            )
            return loss, {"loss/critic": float(loss.detach())}

        policy = self._policy_learner.step(partial(policy_loss, part) for part in _microbatches(minibatch, config.microbatch_tokens))
        critic = self._critic_learner.step(partial(critic_loss, part) for part in _microbatches(minibatch, config.critic.microbatch_tokens))
        return policy | {"loss/critic": critic["loss/critic"], "critic/grad_norm": critic["optimizer/grad_norm"]}

    def _minibatches(self, rows: int) -> Iterator[list[int]]:
        """Rows of each minibatch: a fresh permutation each epoch, a pure function of seed, iteration and epoch."""
        for epoch in range(self._config.epochs):
            digest = hashlib.blake2b(f"{self._seed}/ppo/{self._iteration}/{epoch}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            for part in torch.randperm(rows, generator=generator).tensor_split(self._config.minibatches):
                yield part.tolist()

    def _each(self, batch: TokenBatch, figure: Callable[[TokenBatch], Tensor]) -> Tensor:
        """``figure`` [b t] of all rows, computed a microbatch at a time."""
        whole = torch.zeros(batch.ids.shape)
        for index in length_buckets(batch.mask.sum(dim=1).tolist(), self._config.microbatch_tokens):
            width = int(batch.mask[index].sum(dim=1).max())
            part = TokenBatch(batch.ids[index, :width], batch.mask[index, :width], batch.loss_mask[index, :width])
            whole[index, :width] = figure(part).float().cpu()
        return whole

    def state(self) -> State:
        """Both learners, the KL coefficient and the iteration, from which permutations follow."""
        policy, critic = self._policy_learner.state(), self._critic_learner.state()
        tensors = {f"policy/{k}": v for k, v in policy.tensors.items()} | {f"critic/{k}": v for k, v in critic.tensors.items()}
        values = {"policy": policy.values, "critic": critic.values, "kl_coef": self._kl_coef, "iteration": self._iteration}
        return State(tensors, values)

    def load_state(self, state: State) -> None:
        """Continue from ``state``."""
        for name, learner in (("policy", self._policy_learner), ("critic", self._critic_learner)):
            tensors = {k.removeprefix(f"{name}/"): v for k, v in state.tensors.items() if k.startswith(f"{name}/")}
            learner.load_state(State(tensors, state.values[name]))
        self._kl_coef = state.values["kl_coef"]
        self._iteration = self._policy.version = state.values["iteration"]

    def save(self, folder: Path) -> None:
        """Write the policy."""
        self._policy.save(folder)


def _critic(config: PPOConfig, context: Context) -> ScalarModel:
    """From the reward model of a stage, as InstructGPT does, or on the policy's own backbone."""
    critic = context.load_scalar(config.critic.init or context.start, True)
    # From here on it predicts returns in the reward's own units: the scale goes into the head, where it can be learnt.
    with torch.no_grad():
        critic.head.bias.sub_(critic.offset).mul_(critic.gain)
        critic.head.weight.mul_(critic.gain)
    critic.offset, critic.gain = 0.0, 1.0
    return critic


def _microbatches(minibatch: Experience, tokens: int) -> list[Experience]:
    lengths = minibatch.batch.mask.sum(dim=1).tolist()
    return [minibatch.rows(index) for index in length_buckets(lengths, tokens)]


def _mean_parts(scored: ScoredRollout) -> dict[str, float]:
    """Mean of each part that the scores were made of."""
    names = sorted({name for score in scored.scores for name in score.parts})
    having = {name: [score.parts[name] for score in scored.scores if name in score.parts] for name in names}
    return {f"reward/part.{name}_mean": sum(parts) / len(parts) for name, parts in having.items()}
