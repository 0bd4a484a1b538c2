"""Training of the reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignkit.api import Context, DataError, Metrics, RankedRows, State
from alignkit.data.collate import collate, length_buckets
from alignkit.learner import Learner
from alignkit.ops.losses import kwise_loss
from alignkit.ops.stats import pair_accuracy

if TYPE_CHECKING:
    from alignkit_reward_model import RewardModelConfig


class RewardModel:
    """One forward a response; all pairs of a prompt in one batch element; mean over a prompt's pairs, then over prompts."""

    def __init__(self, config: RewardModelConfig, context: Context) -> None:
        assert context.plan is not None
        self._config = config
        self._model = context.load_scalar(context.start, True)
        self._learner = Learner(self._model, config, steps=context.plan.steps, peaks={"head.": config.head_learning_rate})
        self._scored = _RunningMoments()

    def update(self, batch: Sequence[RankedRows]) -> Metrics:
        """One step."""
        useful = _useful(batch)
        if not useful:
            raise DataError(
                f"all rankings of a step are tied or weigh nothing (the first is {batch[0].id!r}); they say nothing about which is better"
            )

        total = sum(ranking.weight for ranking in useful)

        def loss(rankings: list[RankedRows]) -> tuple[Tensor, Metrics]:
            scores, ranks = self._scores(rankings)
            weights = torch.tensor([ranking.weight for ranking in rankings])
            share = (self._loss(rankings, scores, ranks) * weights).sum() / total
            self._scored.add(scores.detach()[ranks > 0])
            return share, {
                "loss/ranking_nats": float(share.detach()),
                "reward/accuracy": float(pair_accuracy(scores, ranks).sum()) / len(useful),
            }

        metrics = self._learner.step(partial(loss, rankings) for rankings in self._microbatches(useful))
        return {**metrics, "data/tied_rankings": float(len(batch) - len(useful))}

    @torch.no_grad()
    def validate(self, batch: Sequence[RankedRows]) -> Metrics:
        """Loss, accuracy (ties in reward count as wrong) and the spread of rewards over all rankings."""
        useful = _useful(batch)
        if not useful:
            raise DataError("all held-out rankings are tied or weigh nothing; they cannot tell a good reward model from a bad one")
        loss = accuracy = 0.0
        rewards: list[Tensor] = []
        for rankings in self._microbatches(useful):
            scores, ranks = self._scores(rankings)
            loss += float(self._loss(rankings, scores, ranks).sum())
            accuracy += float(pair_accuracy(scores, ranks).sum())
            rewards.append(scores[ranks > 0])
        spread = torch.cat(rewards)
        return {
            "loss/ranking_nats": loss / len(useful),
            "reward/accuracy": accuracy / len(useful),
            "reward/score_mean": float(spread.mean()),
            "reward/score_std": float(spread.std(correction=0)),
        }

    def _scores(self, rankings: Sequence[RankedRows]) -> tuple[Tensor, Tensor]:
        """Rewards and ranks [n k] of rankings, padded with rank 0; one forward a response."""
        width = max(len(ranking.rows) for ranking in rankings)
        flat = self._model.scores(collate([row for ranking in rankings for row in ranking.rows])).cpu()
        parts = torch.split(flat, [len(ranking.rows) for ranking in rankings])
        scores = torch.stack([torch.nn.functional.pad(part, (0, width - len(part))) for part in parts])
        ranks = torch.tensor([[*ranking.ranks, *(0,) * (width - len(ranking.ranks))] for ranking in rankings])
        return scores, ranks

    def _loss(self, rankings: Sequence[RankedRows], scores: Tensor, ranks: Tensor) -> Tensor:
        """The loss of each ranking [n]."""
        soft = torch.tensor([float("nan") if ranking.preference is None else _of_better(ranking) for ranking in rankings])
        margin = torch.tensor([ranking.margin for ranking in rankings])
        return kwise_loss(scores, ranks, margin=margin, preference=soft, center=self._config.center)

    def _microbatches(self, rankings: Sequence[RankedRows]) -> list[list[RankedRows]]:
        lengths = [max(map(len, ranking.rows)) for ranking in rankings]
        sizes = [len(ranking.rows) for ranking in rankings]
        return [[rankings[i] for i in bucket] for bucket in length_buckets(lengths, self._config.microbatch_tokens, sizes)]

    def state(self) -> State:
        """Weights, moments of the learner, and the running figures of the scores."""
        learner = self._learner.state()
        return State(learner.tensors, {"learner": learner.values, "scored": self._scored.values()})

    def load_state(self, state: State) -> None:
        """Continue from ``state``."""
        self._learner.load_state(State(state.tensors, state.values["learner"]))
        self._scored = _RunningMoments(**state.values["scored"])

    def save(self, folder: Path) -> None:
        """Write the reward model, with the normalisation that the config asks for."""
        if self._config.normalize == "standard":
            self._model.offset, self._model.gain = self._scored.mean, 1.0 / self._scored.std
        self._model.save(folder)


@dataclass(slots=True)
class _RunningMoments:
    """Mean and spread of the scores seen while training, the recent ones counting most: early scores are of another model."""

    mean: float = 0.0
    square: float = 0.0
    weight: float = 0.0

    def add(self, scores: Tensor) -> None:
        """Take the scores of one microbatch."""
        keep = 0.99 ** len(scores)
        self.weight = keep * self.weight + (1.0 - keep)
        share = (1.0 - keep) / self.weight
        self.mean += share * (float(scores.mean()) - self.mean)
        self.square += share * (float((scores**2).mean()) - self.square)

    @property
    def std(self) -> float:
        """Spread; never so small that dividing by it would blow noise up."""
        return math.sqrt(max(self.square - self.mean**2, 1e-6))

    def values(self) -> dict[str, float]:
        """For the checkpoint."""
        return asdict(self)


def _useful(rankings: Sequence[RankedRows]) -> list[RankedRows]:
    """Those that prefer one response to another."""
    return [ranking for ranking in rankings if ranking.weight > 0 and len(set(ranking.ranks)) > 1]


def _of_better(ranking: RankedRows) -> float:
    """The soft label as the probability that the better-ranked response is the better one; it is given for the first response."""
    assert ranking.preference is not None
    return ranking.preference if ranking.ranks[0] < ranking.ranks[1] else 1.0 - ranking.preference
