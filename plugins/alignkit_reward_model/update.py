"""Training of the reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.api import Context, DataError, Metrics, RankedRows, State, TokenBatch, TokenRow
from alignkit.checks import padding_changes_nothing
from alignkit.data.collate import collate, length_buckets
from alignkit.data.order import Order
from alignkit.files import write_json
from alignkit.learner import Learner
from alignkit.loops import offline
from alignkit.models.trunk import keep_states
from alignkit.ops.losses import kwise_loss
from alignkit.ops.stats import pair_accuracy
from alignkit_reward_model import RewardModelConfig, plan
from alignkit_reward_model.cross_validation import Fold, cross_validate, labeler_groups, split
from alignkit_reward_model.figures import accuracy_by_gap, accuracy_by_labeler, spread
from alignkit_reward_model.normalization import demonstration_rows, normalization, response_rows
from alignkit_reward_model.source import CHECKED_ROWS, scores_of


class RewardModel:
    """One forward a response; all pairs of a prompt in one batch element; mean over a prompt's pairs, then over prompts."""

    def __init__(self, config: RewardModelConfig, context: Context) -> None:
        assert context.plan is not None
        self._config, self._context = config, context
        self._model = context.load_scalar(context.start, True)
        peaks = {"head.": config.head_learning_rate}
        self._learner = Learner(self._model, config, steps=context.plan.steps, peaks=peaks, guard=context.guard)
        # Both may find that the data is not what they need, which is better known before the training than after it.
        self._groups = labeler_groups(context.rows, config.folds) if config.cross_validate == "labeler" else None
        self._demonstrations = demonstration_rows(config.demonstrations, context, self._model.codec) if config.demonstrations else []
        self._kept = keep_states(self._model.backbone, self._read_again(), exact=self._model.exact, say=context.say)
        self._validated: dict[str, Any] | None = None
        self._padding_to_check = context.checks

    def update(self, batch: Sequence[RankedRows]) -> Metrics:
        """One step."""
        useful = _useful(batch)
        if not useful:
            raise DataError(
                f"all rankings of a step are tied or weigh nothing (the first is {batch[0].id!r}); they say nothing about which is better"
            )
        if self._padding_to_check:
            padding_changes_nothing(self._model.scores, collate(useful[0].rows[:CHECKED_ROWS]), exact=self._model.exact)
            self._padding_to_check = False

        total = sum(ranking.weight for ranking in useful)

        def loss(rankings: list[RankedRows]) -> tuple[Tensor, Metrics]:
            scores, ranks = self._scores(rankings)
            weights = torch.tensor([ranking.weight for ranking in rankings])
            share = (self._loss(rankings, scores, ranks) * weights).sum() / total
            return share, {
                "loss/ranking_nats": float(share.detach()),
                "reward/accuracy": float(pair_accuracy(scores, ranks).sum()) / len(useful),
            }

        metrics = self._learner.step(lambda tokens: [partial(loss, rankings) for rankings in self._microbatches(useful, tokens)])
        return {**metrics, "data/tied_rankings": float(len(batch) - len(useful))}

    @torch.no_grad()
    def validate(self, batch: Sequence[RankedRows]) -> Metrics:
        """Loss and accuracy (ties in reward count as wrong), each a mean over a prompt's pairs and then over prompts, and what
        ``figures.py`` tells of all pairs and responses."""
        useful = _useful(batch)
        if not useful:
            raise DataError("all held-out rankings are tied or weigh nothing; they cannot tell a good reward model from a bad one")
        loss = 0.0
        scored: list[tuple[RankedRows, Tensor]] = []
        for rankings in self._microbatches(useful, self._config.microbatch_tokens):
            scores, ranks = self._scores(rankings)
            loss += float(self._loss(rankings, scores, ranks).sum())
            scored += [(ranking, row[: len(ranking.rows)]) for ranking, row in zip(rankings, scores, strict=True)]
        accuracies = {ranking.id: float(pair_accuracy(row[None], torch.tensor([ranking.ranks]))) for ranking, row in scored}
        return {
            "loss/ranking_nats": loss / len(useful),
            "reward/accuracy": sum(accuracies.values()) / len(useful),
            **accuracy_by_labeler(useful, accuracies),
            **accuracy_by_gap(scored),
            **spread(scored),
        }

    def _scores(self, rankings: Sequence[RankedRows]) -> tuple[Tensor, Tensor]:
        """Rewards and ranks [n k] of rankings, padded with rank 0; one forward a response."""
        width = max(len(ranking.rows) for ranking in rankings)
        flat = self._model.scores(self._collate([row for ranking in rankings for row in ranking.rows])).cpu()
        parts = torch.split(flat, [len(ranking.rows) for ranking in rankings])
        scores = torch.stack([torch.nn.functional.pad(part, (0, width - len(part))) for part in parts])
        ranks = torch.tensor([[*ranking.ranks, *(0,) * (width - len(ranking.ranks))] for ranking in rankings])
        return scores, ranks

    def _collate(self, rows: Sequence[TokenRow]) -> TokenBatch:
        return self._kept.under(collate(rows), [[row] for row in rows])

    def _read_again(self) -> list[TokenRow]:
        """The responses, where at least half of them are read more than once."""
        rows = [row for ranking in self._context.rows for row in ranking.rows]
        normalized = len(response_rows(self._context.rows)) if self._config.normalize == "standard" else 0
        return rows if self._config.epochs > 1 or normalized * 2 >= len(rows) else []

    def _loss(self, rankings: Sequence[RankedRows], scores: Tensor, ranks: Tensor) -> Tensor:
        """The loss of each ranking [n]."""
        soft = torch.tensor([float("nan") if ranking.preference is None else _of_better(ranking) for ranking in rankings])
        margin = torch.tensor([ranking.margin for ranking in rankings])
        return kwise_loss(scores, ranks, margin=margin, preference=soft, center=self._config.center)

    def _microbatches(self, rankings: Sequence[RankedRows], tokens: int) -> list[list[RankedRows]]:
        lengths = [max(map(len, ranking.rows)) for ranking in rankings]
        sizes = [len(ranking.rows) for ranking in rankings]
        return [[rankings[i] for i in bucket] for bucket in length_buckets(lengths, tokens, sizes)]

    def state(self) -> State:
        """Weights and moments."""
        return self._learner.state()

    def load_state(self, state: State) -> None:
        """Continue from ``state``."""
        self._learner.load_state(state)

    def save(self, folder: Path) -> None:
        """Write the reward model, with the normalisation that the config asks for, and what the cross-validation found."""
        choice = self._config.normalize
        if choice != "none":
            rows = self._demonstrations if choice == "demonstrations" else response_rows(self._context.rows)
            self._model.offset, self._model.gain = normalization(scores_of(self._model, rows, self._collate), scale=choice == "standard")
            goal = "demonstrations score 0 on average" if choice == "demonstrations" else "ranked responses have mean 0 and std 1"
            self._context.say(f"reward: less {self._model.offset:.3f}, times {self._model.gain:.3f}: {len(rows)} {goal}")
        try:
            self._model.save(folder)
        finally:
            # What is trained and validated is the bare score: training may go on from here.
            self._model.offset, self._model.gain = 0.0, 1.0
        if self._groups is not None:
            self._validated = self._validated or self._cross_validation(self._groups)
            write_json(folder / "cross_validation.json", self._validated)

    def _cross_validation(self, groups: Sequence[Sequence[str]]) -> dict[str, Any]:
        """One more model a fold, trained as this one was, on the rankings of all labelers but the fold's."""
        config = replace(self._config, cross_validate="none", normalize="none", demonstrations=None)

        def accuracies(fold: Fold) -> tuple[float, float]:
            steps = plan(config, len(fold.training))
            model = RewardModel(config, replace(self._context, plan=steps, rows=fold.training))
            order = Order(len(fold.training), self._context.seed, "cross-validation")
            offline(model, fold.training, order, steps, first=0, after=lambda step, metrics: None)
            same, other = (model.validate(rows)["reward/accuracy"] for rows in (fold.same, fold.other))
            self._context.say(f"reward: without {', '.join(fold.labelers)}: same labelers {same:.3f}, others {other:.3f}")
            return same, other

        return cross_validate([split(self._context.rows, labelers) for labelers in groups], accuracies)


def _useful(rankings: Sequence[RankedRows]) -> list[RankedRows]:
    """Those that prefer one response to another."""
    return [ranking for ranking in rankings if ranking.weight > 0 and len(set(ranking.ranks)) > 1]


def _of_better(ranking: RankedRows) -> float:
    """The soft label as the probability that the better-ranked response is the better one; it is given for the first response."""
    assert ranking.preference is not None
    return ranking.preference if ranking.ranks[0] < ranking.ranks[1] else 1.0 - ranking.preference
