"""PPO's update: what a rollout and its scores do to the policy and the critic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignkit import checks
from alignkit.api import Context, Metrics, Policy, RunError, Sample, ScoredRollout, State, Stateful, TokenBatch
from alignkit.average import WeightAverage
from alignkit.beside import Both, beside, one_after_another
from alignkit.data.collate import length_buckets
from alignkit.data.pretraining import PretrainingStream
from alignkit.guards.finite import finite_rows
from alignkit.learner import Learner, Share
from alignkit.models.trunk import shared_trunk
from alignkit.ops.advantages import gae, kl_penalized_rewards, penalize_missing_eos
from alignkit.ops.correction import bounded_weights, mismatch, sequence_weights, truncated_weights
from alignkit.ops.kl import adaptive_kl_coef, k1, k3, sequence_kl
from alignkit.ops.losses import clipped_policy_loss, clipped_share, clipped_value_loss, clipped_value_share
from alignkit.ops.masked import masked_mean, masked_sum, masked_whiten
from alignkit.ops.stats import explained_variance
from alignkit.seeds import derived_seed
from alignkit_ppo.experience import Experience, batch_rows
from alignkit_ppo.leash import Leash
from alignkit_ppo.pretraining import ptx_shares

if TYPE_CHECKING:
    from alignkit.models.scalar import ScalarModel
    from alignkit_ppo import CorrectionConfig, PPOConfig

_EARLY_STOP = 1.5
"""An iteration ends early at this many times ``early_stop_kl``, so that the setting names the KL that is wanted (Spinning Up's rule)."""


class PPO:
    """Policy, critic, frozen reference and the KL coefficient."""

    def __init__(self, config: PPOConfig, context: Context) -> None:
        assert context.plan is not None
        self._config = config
        self._context = context
        self._policy = context.load_policy(context.start, True)
        same = context.reference == context.start
        self._reference = self._policy.reference() if same else context.load_policy(context.reference, False)
        self._critic = _critic(config, context)
        others = (self._reference.module, self._critic.backbone)
        self._trunk = shared_trunk(self._policy.module, *others, exact=self._policy.exact)
        self._steps = config.epochs * config.minibatches  # of one iteration, unless it is stopped early
        iterations = context.plan.steps
        guard, warm = context.guard, iterations - config.critic_warmup
        self._policy_learner = Learner(self._policy.module, config, steps=warm * self._steps, guard=guard)
        self._critic_learner = Learner(self._critic, config.critic, steps=iterations * self._steps, guard=guard)
        self._average = WeightAverage(self._policy.module, config.ema) if config.ema else None
        ptx, codec = config.ptx, self._policy.codec
        self._pretraining = PretrainingStream(context, ptx.data, codec, max_length=ptx.max_length, name="ptx") if ptx else None
        self._kl_coef = config.kl.coef
        self._leash = Leash(config.kl.stop, context, self.save) if config.kl.stop else None
        self._iteration = 0

    @property
    def policy(self) -> Policy:
        """The policy being trained."""
        return self._policy

    def update(self, batch: ScoredRollout) -> Metrics:
        """Rewards, advantages, then ``epochs`` passes of ``minibatches`` steps."""
        with beside(next(self._policy.module.parameters()).device) as both:
            experience, metrics = self._prepare(batch, both)
            if self._leash:
                self._leash.look(self._iteration + 1, metrics["kl/sequence_nats"])
            steps = list(self._learn(experience, both, exact=batch.rollout.exact or self._policy.exact))
        metrics |= _over(steps) | {"policy/steps_count": float(sum("loss/policy" in step for step in steps))}
        self._policy.version += 1
        self._iteration += 1
        if self._config.kl.kind == "adaptive":
            kl = self._config.kl
            # After the step: the rewards of this iteration used the old coefficient.
            self._kl_coef = adaptive_kl_coef(
                self._kl_coef, metrics["kl/sequence_nats"], target=kl.target, horizon=kl.horizon, episodes=len(batch.scores)
            )
        return metrics

    @torch.no_grad()
    def _prepare(self, scored: ScoredRollout, both: Both = one_after_another) -> tuple[Experience, dict[str, float]]:
        rollout, config = scored.rollout, self._config
        values = [score.value for score in scored.scores]
        if all(value is None for value in values):
            raise RunError(f"no response of iteration {self._iteration + 1} was scored; the first reason: {scored.scores[0].reason}")
        has_score = torch.tensor([value is not None for value in values])
        score = torch.tensor([0.0 if value is None else value for value in values])
        sound = score.isfinite()
        score = torch.where(sound, score, 0.0)
        finished = torch.tensor([sample.finished for sample in rollout.samples])
        judged = penalize_missing_eos(score, finished, penalty=config.missing_eos_penalty)

        # A sample without a score is not an example of anything: none of its tokens counts.
        mask = rollout.batch.loss_mask & (has_score & sound)[:, None]
        batch = TokenBatch(rollout.batch.ids, rollout.batch.mask, mask)
        if self._trunk and self._trunk.fits(batch):
            batch = self._trunk.under(batch, self._each(batch, self._trunk.states))
        reference, critic = both(
            lambda: self._each(batch, lambda part: self._reference.score_tokens(part, temperature=config.temperature).logprobs),
            lambda: self._each(batch, self._critic.values),
        )
        recorded = torch.where(mask, rollout.logprobs, 0.0)
        # The sampler's own log-probabilities are the training forward's where both compute in float32.
        trust = rollout.exact and config.correction is None
        logprobs = recorded if trust else self._each(batch, self._logprobs)

        figures = {"log-probabilities": logprobs, "reference log-probabilities": reference, "values": critic}
        rows = {"rewards": sound, **{name: finite_rows(figure, mask) for name, figure in figures.items()}}
        dropped = self._dropped(rows, has_score, rollout.samples)
        has_score = has_score & ~dropped
        mask = mask & has_score[:, None]
        batch = replace(batch, loss_mask=mask)
        logprobs, reference, critic = (torch.where(has_score[:, None], figure, 0.0) for figure in figures.values())

        rewards = kl_penalized_rewards(judged, logprobs, reference, mask, coef=self._kl_coef)
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, center=False)
        advantages, returns = gae(rewards, critic, mask, gamma=config.gamma, lam=config.lam)
        whitened = masked_whiten(advantages, mask)
        if config.correction:
            # A weight is never negative, so weighting the loss of a token is weighting its advantage.
            whitened = whitened * _weights(config.correction, logprobs, recorded, mask)
        experience = Experience(batch, logprobs, critic, whitened, returns)
        token_k3 = k3(logprobs, reference, mask)
        if self._context.checks:
            checks.divergence_is_not_negative(token_k3)
        kl = sequence_kl(logprobs, reference, mask)[has_score]
        lengths = rollout.batch.loss_mask.sum(dim=1).float()
        spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
        metrics = {
            "reward/score_mean": float(score[has_score].mean()),
            "reward/score_std": float(score[has_score].std(correction=0)),
            "reward/total_mean": float((judged[has_score] - self._kl_coef * kl).mean()),
            "reward/masked_count": float((~has_score).sum()),
            "guard/dropped_samples": float(dropped.sum()),
            "kl/sequence_nats": float(kl.mean()),
            "kl/token_k1_nats": float(masked_mean(k1(logprobs, reference, mask), mask)),
            "kl/token_k3_nats": float(masked_mean(token_k3, mask)),
            "kl/coef": self._kl_coef,
            "response/length_tokens": float(lengths.mean()),
            "response/finished_share": float(finished.float().mean()),
            "critic/explained_variance": float(explained_variance(critic, returns, mask)),
            "critic/value_mean": float(masked_mean(critic, mask)),
            "critic/return_mean": float(masked_mean(returns, mask)),
            "critic/return_std": float(spread.sqrt()),
        }
        if not trust:
            metrics["rollout/mismatch_nats"] = self._mismatch(logprobs, recorded, mask)
        return experience, metrics | _mean_parts(scored)

    def _dropped(self, rows: Mapping[str, Tensor], has_score: Tensor, samples: Sequence[Sample]) -> Tensor:
        """Samples [b] with a score of which some figure is not finite. Raises ``RunError`` when they are too many to be an accident."""
        dropped = has_score & ~torch.stack(list(rows.values())).all(dim=0)
        if not bool(dropped.any()):
            return dropped
        names = [sample.id for sample, gone in zip(samples, dropped.tolist(), strict=True) if gone]
        found = ", ".join(name for name, sound in rows.items() if bool((has_score & ~sound).any()))
        share = len(names) / len(samples)
        if share > self._context.guard.config.dropped_share:
            raise RunError(
                f"iteration {self._iteration + 1}: {len(names)} of {len(samples)} responses have {found} that are not finite (the first is "
                f"{names[0]}), more than guard.dropped_share; look at the reward, learning_rate and precision (float32 overflows last)"
            )
        self._context.guard.tell(
            "dropped sample", f"{len(names)} of {len(samples)} responses are left out: their {found} are not finite", samples=names
        )
        return dropped

    def _mismatch(self, logprobs: Tensor, recorded: Tensor, mask: Tensor) -> float:
        """How far the sampler is from the trainer, nats per token; too far is worth a warning."""
        off = float(mismatch(logprobs, recorded, mask))
        if self._context.checks and off > checks.ROUGH_NATS:
            self._context.say(
                f"iteration {self._iteration + 1}: the sampler's log-probabilities are {off:.2f} nats per token off the trainer's; "
                "ratios and KL are right, but the responses are another policy's: set correction, or precision: float32"
            )
        return off

    def _logprobs(self, part: TokenBatch) -> Tensor:
        return self._policy.score_tokens(part, temperature=self._config.temperature).logprobs

    def _learn(self, experience: Experience, both: Both, *, exact: bool) -> Iterator[dict[str, float]]:
        """The figures of each minibatch's step; the steps that an early stop leaves out are skipped by both schedules."""
        warming = self._iteration < self._config.critic_warmup
        limit = self._config.early_stop_kl
        for done, index in enumerate(self._minibatches(len(experience)), start=1):
            minibatch = experience.rows(index)
            critic_step = partial(self._critic_step, minibatch)
            if warming:
                yield critic_step()
                continue
            policy_step = partial(self._policy_step, minibatch, check=self._context.checks and done == 1, exact=exact)
            policy, critic = both(policy_step, critic_step)
            if self._average and not policy["guard/skipped_steps"]:
                self._average.update()
            yield policy | critic | {"guard/skipped_steps": policy["guard/skipped_steps"] + critic["guard/skipped_steps"]}
            if limit is not None and policy["policy/kl_to_rollout_nats"] > _EARLY_STOP * limit:
                self._policy_learner.skip(self._steps - done)
                self._critic_learner.skip(self._steps - done)
                return

    def _policy_step(self, minibatch: Experience, *, check: bool, exact: bool) -> dict[str, float]:
        """One step of the policy, on the minibatch and, with PPO-ptx, on pretraining text: two gradients, one step."""
        config = self._config
        count = int(minibatch.mask.sum().clamp(min=1))
        largest = 0.0

        def loss(part: Experience) -> tuple[Tensor, Metrics]:
            nonlocal largest
            mask = part.mask
            tokens = self._policy.score_tokens(part.batch, temperature=config.temperature, entropy_gradient=config.entropy_coef > 0.0)
            new, entropy = tokens.logprobs.cpu(), tokens.entropy.cpu()
            terms = (part.old_logprobs, part.advantages, mask)
            change = torch.where(mask, new.detach() - part.old_logprobs, 0.0)
            if check:
                checks.ratio_is_one(change[mask], exact=exact)
            largest = max(largest, float(change.max().exp()))
            surrogate = clipped_policy_loss(new, *terms, clip=config.clip, tokens_in_minibatch=count)
            bonus = masked_sum(entropy, mask) / count
            return surrogate - config.entropy_coef * bonus if config.entropy_coef else surrogate, {
                "loss/policy": float(surrogate.detach()),
                "policy/entropy_nats": float(bonus.detach()),
                "policy/approx_kl_nats": float(masked_sum(0.5 * change**2, mask)) / count,
                "policy/kl_to_rollout_nats": float(masked_sum(k3(part.old_logprobs, new.detach(), mask), mask)) / count,
                "policy/clip_share": float(clipped_share(new.detach(), *terms, clip=config.clip, tokens_in_minibatch=count)),
                "policy/ratio_mean": float(masked_sum(change.exp(), mask)) / count,
            }

        ptx, stream = config.ptx, self._pretraining
        text = stream.take(ptx.ratio * len(minibatch)) if ptx and stream else []

        def split(tokens: int) -> list[Share]:
            shares: list[Share] = [partial(loss, part) for part in minibatch.microbatches(tokens)]
            return [*shares, *ptx_shares(self._policy, text, coef=ptx.coef, microbatch_tokens=tokens)] if ptx else shares

        return self._policy_learner.step(split) | {"policy/ratio_max": largest}

    def _critic_step(self, minibatch: Experience) -> dict[str, float]:
        """One step of the critic; its gradient is clipped by itself."""
        config = self._config.critic
        count = int(minibatch.mask.sum().clamp(min=1))

        def loss(part: Experience) -> tuple[Tensor, Metrics]:
            terms = (self._critic.values(part.batch).cpu(), part.old_values, part.returns, part.mask)
            error = clipped_value_loss(*terms, clip=config.clip, tokens_in_minibatch=count)
            metrics = {"loss/critic": float(error.detach())}
            if config.clip is not None:
                metrics["critic/clip_share"] = float(clipped_value_share(*terms, clip=config.clip, tokens_in_minibatch=count))
            return error, metrics

        figures = self._critic_learner.step(lambda tokens: [partial(loss, part) for part in minibatch.microbatches(tokens)])
        return {name.replace("optimizer/", "critic/"): value for name, value in figures.items()}

    def _minibatches(self, rows: int) -> Iterator[list[int]]:
        """Rows of each minibatch: a fresh permutation each epoch, a pure function of seed, iteration and epoch."""
        for epoch in range(self._config.epochs):
            generator = torch.Generator().manual_seed(derived_seed(self._context.seed, "ppo", self._iteration, epoch))
            for part in torch.randperm(rows, generator=generator).tensor_split(self._config.minibatches):
                yield part.tolist()

    def _each(self, batch: TokenBatch, figure: Callable[[TokenBatch], Tensor]) -> Tensor:
        """``figure`` [b t ...] of all rows, computed a microbatch at a time."""
        whole = torch.empty(0)
        for index in length_buckets(batch.mask.sum(dim=1).tolist(), self._config.microbatch_tokens):
            part = batch_rows(batch, index)
            found = figure(part).float().cpu()
            whole = whole if len(whole) else torch.zeros(*batch.ids.shape, *found.shape[2:])
            whole[index, : part.ids.shape[1]] = found
        return whole

    def _parts(self) -> Mapping[str, Stateful]:
        parts: dict[str, Stateful | None] = {
            "policy": self._policy_learner, "critic": self._critic_learner, "average": self._average, "pretraining": self._pretraining,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def state(self) -> State:
        """Both learners, the average, the place in the pretraining text, the KL's coefficient and count, and the iteration: permutations
        follow from it.
        """
        states = {name: part.state() for name, part in self._parts().items()}
        tensors = {f"{name}/{key}": tensor for name, state in states.items() for key, tensor in state.tensors.items()}
        values = {name: dict(state.values) for name, state in states.items()}
        beyond = self._leash.beyond if self._leash else 0
        return State(tensors, {**values, "kl_coef": self._kl_coef, "kl_beyond": beyond, "iteration": self._iteration})

    def load_state(self, state: State) -> None:
        """Continue from ``state``."""
        for name, part in self._parts().items():
            tensors = {key.removeprefix(f"{name}/"): tensor for key, tensor in state.tensors.items() if key.startswith(f"{name}/")}
            part.load_state(State(tensors, state.values[name]))
        self._kl_coef = state.values["kl_coef"]
        if self._leash:
            self._leash.beyond = state.values["kl_beyond"]
        self._iteration = self._policy.version = state.values["iteration"]

    def save(self, folder: Path) -> None:
        """Write the policy: with ``ema``, the average of its weights."""
        with self._average.in_place() if self._average else nullcontext():
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


def _weights(config: CorrectionConfig, logprobs: Tensor, recorded: Tensor, mask: Tensor) -> Tensor:
    if config.kind == "tis":
        return truncated_weights(logprobs, recorded, mask, high=config.high)
    weigh = bounded_weights if config.kind == "icepop" else sequence_weights
    return weigh(logprobs, recorded, mask, low=config.low, high=config.high)


def _over(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each figure's mean over the steps; of what is a maximum already, the maximum; of what is counted, the sum."""
    found = {name: [step[name] for step in steps if name in step] for name in {name: None for step in steps for name in step}}
    return {
        name: max(values) if name.endswith("_max") else sum(values) / (1 if name.startswith("guard/") else len(values))
        for name, values in found.items()
    }


def _mean_parts(scored: ScoredRollout) -> dict[str, float]:
    """Mean of each part that the scores were made of."""
    names = sorted({name for score in scored.scores for name in score.parts})
    having = {name: [score.parts[name] for score in scored.scores if name in score.parts] for name in names}
    return {f"reward/part.{name}_mean": sum(parts) / len(parts) for name, parts in having.items()}
