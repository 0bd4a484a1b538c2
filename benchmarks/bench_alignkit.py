"""alignkit's worker: a PPO iteration, an SFT or reward-model step, or a rollout, through the seams that the runner uses."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from alignkit.config.schema import GuardConfig
from alignkit.context import Context
from alignkit.guards.guard import Guard
from alignkit.interfaces import Rollout, ScoredRollout
from alignkit.journal import Journal
from alignkit.learner import Learner
from alignkit.memory import keep_freed_memory
from alignkit.models import causal_lm, kernels
from alignkit.models.config import TuningConfig
from alignkit.models.scalar import load_scalar
from alignkit.registry import find_plugins
from alignkit.tracking import EventLog
from alignkit.types import Plan, RankedRows, Score, TokenRow
from benchmarks.bench_engine import decode, prompt_rows, rollout
from benchmarks.bench_pipe import CLOCKS, Gate, serve, settings
from benchmarks.bench_work import Work

Step = Callable[..., Mapping[str, Any]]
FOREVER = 100_000
"""Steps that the schedules are made for: the benchmark stops long before."""


def main() -> None:
    """Build what the parent asked for, then do one step at a time."""
    told, gate = settings(), Gate()
    torch.set_num_threads(told["threads"])
    if told.get("memory_kept", True):
        keep_freed_memory()  # as the runner does
    for lever in told.get("patches", ()):
        module, _, name = lever.partition(":")
        getattr(importlib.import_module(module), name)()
    build = {"ppo": ppo, "sft": sft, "reward": reward, "generate": generate, "one_by_one": one_by_one}[told["task"]]
    step = build(Work(**told["work"]), told, CLOCKS[told["clock"]])
    gate.facts = {"versions": {"torch": torch.__version__}, "kernels": asdict(kernels.chosen())}
    serve(gate, step)


def ppo(work: Work, told: Mapping[str, Any], clock: Callable[[], float]) -> Step:
    """Rollout, scoring by a reward model of the policy's size, update."""
    from alignkit_ppo import CriticConfig, PPOConfig, build, plan

    config = PPOConfig(
        iterations=FOREVER, prompts=work.batch, max_new_tokens=work.response, epochs=work.epochs, minibatches=work.minibatches,
        decay="constant", critic=CriticConfig(decay="constant", clip=0.2),
    )  # fmt: skip
    optimizer = build(config, context(work, told, plan(config, work.batch)))
    judge = scorer(work, told)
    prompts, lengths = prompt_rows(work.prompts()), work.response_lengths()
    done = 0

    def step(check: bool = False) -> Mapping[str, Any]:
        nonlocal done
        begin = clock()
        drawn = rollout(optimizer.policy, prompts, lengths, step=done)
        rolled = clock()
        scores = tuple(Score(value) for value in judge(token_rows(drawn)))
        scored = clock()
        checked = logprob_error(optimizer.policy, drawn) if check else {}
        with first_learner_step(clock) as learning:
            start = clock()
            # Runs alignkit's own check that the first minibatch's ratio is 1.
            optimizer.update(ScoredRollout(drawn, scores))
            end = clock()
        done += 1
        parts = {"rollout": rolled - begin, "scoring": scored - rolled}
        if learning:
            parts |= {"forward": learning[0] - start, "update": end - learning[0]}
        return {"seconds": scored - begin + end - start, "parts": parts, "tokens": int(drawn.batch.loss_mask.sum()), **checked}

    return step


def sft(work: Work, told: Mapping[str, Any], clock: Callable[[], float]) -> Step:
    """One optimizer step on all demonstrations."""
    from alignkit_sft import SFTConfig, build, plan

    config = SFTConfig(epochs=FOREVER, batch=work.batch, decay="constant", packing=told.get("packing", False))
    optimizer = build(config, context(work, told, plan(config, work.batch)))

    def step(**other: Any) -> Mapping[str, Any]:
        rows = [
            TokenRow(f"row {i}", (*prompt, *response), (False,) * len(prompt) + (True,) * len(response))
            for i, (prompt, response) in enumerate(replace(work, **other).demonstrations())
        ]
        begin = clock()
        metrics = optimizer.update(rows)
        return {"seconds": clock() - begin, "tokens": int(metrics["data/trained_tokens"])}

    return step


def reward(work: Work, told: Mapping[str, Any], clock: Callable[[], float]) -> Step:
    """One optimizer step on all rankings."""
    from alignkit_reward_model import RewardModelConfig, build, plan

    config = RewardModelConfig(epochs=FOREVER, batch=work.batch, decay="constant", normalize="none")
    optimizer = build(config, context(work, told, plan(config, work.batch), ranked_rows(work)))

    def step(**other: Any) -> Mapping[str, Any]:
        rankings = ranked_rows(replace(work, **other))
        begin = clock()
        optimizer.update(rankings)
        return {"seconds": clock() - begin, "tokens": sum(len(one.rows) * (len(one.rows) - 1) // 2 for one in rankings)}

    return step


def generate(work: Work, told: Mapping[str, Any], clock: Callable[[], float]) -> Step:
    """A rollout, weights prepared for it as after an update. ``batch`` and ``lengths`` may be other ones for a step."""
    policy = load_policy(work, told, True)

    def step(check: bool = False, **other: Any) -> Mapping[str, Any]:
        now = replace(work, **other)
        prompts, lengths = prompt_rows(now.prompts()), now.response_lengths()
        policy.version += 1
        ready: list[float] = []
        begin = clock()
        drawn = rollout(policy, prompts, lengths, step=0, prepared=lambda: ready.append(clock()))
        end = clock()
        parts = {"prepare": ready[0] - begin, "decode": end - ready[0]}
        checked = logprob_error(policy, drawn) if check else {}
        return {"seconds": end - begin, "parts": parts, "tokens": int(drawn.batch.loss_mask.sum()), **checked}

    return step


def one_by_one(work: Work, told: Mapping[str, Any], clock: Callable[[], float]) -> Step:
    """The same responses, each alone in the decoder."""
    policy = load_policy(work, told, True)
    prompts, lengths = prompt_rows(work.prompts()), work.response_lengths()

    def step() -> Mapping[str, Any]:
        begin = clock()
        with policy.decoding() as model:
            drawn = [decode(model, [row], [length], step=0)[0] for row, length in zip(prompts, lengths, strict=True)]
        return {"seconds": clock() - begin, "tokens": sum(map(len, drawn))}

    return step


def context(work: Work, told: Mapping[str, Any], plan: Plan, rows: Sequence[RankedRows] = ()) -> Context:
    """A stage's surroundings in which every model is the work's."""
    folder, say = Path(tempfile.mkdtemp()), partial(print, flush=True)
    return Context(
        seed=work.seed, folder=folder, registry=find_plugins(),
        start=None, reference=None, plan=plan, rows=rows, checks=True,
        artifact=lambda stage: Path(work.model), load_policy=lambda stage, trainable: load_policy(work, told, trainable),
        load_scalar=lambda stage, trainable: load_scalar_model(work, told, trainable),
        journal=Journal(folder / "rewards.db"), guard=Guard("bench", GuardConfig(), "", say, EventLog(folder / "events.jsonl")), say=say,
    )  # fmt: skip


def load_policy(work: Work, told: Mapping[str, Any], trainable: bool) -> Any:
    return causal_lm.load(Path(work.model), tuning=tuning(told), precision=told["precision"], trainable=trainable, seed=0)


def load_scalar_model(work: Work, told: Mapping[str, Any], trainable: bool) -> Any:
    return load_scalar(Path(work.model), tuning=tuning(told), precision=told["precision"], trainable=trainable, seed=0)


def tuning(told: Mapping[str, Any]) -> TuningConfig:
    """All weights, or with ``top_layers`` adapters in so many of them."""
    layers = told.get("top_layers", 0)
    checkpointing = told.get("checkpointing", False)
    return TuningConfig(kind="lora" if layers else "full", top_layers=layers, activation_checkpointing=checkpointing)


def scorer(work: Work, told: Mapping[str, Any]) -> Callable[[list[TokenRow]], list[float]]:
    """A reward model that scores the very tokens that were drawn, as the peer's does."""
    from alignkit_reward_model.source import scores_of

    model = load_scalar_model(work, told, False)
    return lambda rows: scores_of(model, rows)


def token_rows(drawn: Rollout) -> list[TokenRow]:
    batch = drawn.batch
    counts = batch.mask.sum(dim=1).tolist()
    ids, marks = batch.ids.tolist(), batch.loss_mask.tolist()
    return [TokenRow(str(i), tuple(ids[i][:count]), tuple(marks[i][:count])) for i, count in enumerate(counts)]


def ranked_rows(work: Work) -> list[RankedRows]:
    """The first response of each prompt is the best one."""
    return [
        RankedRows(f"ranking {i}", tuple(response_row(ids, len(prompt)) for ids in group), tuple(range(1, work.k + 1)))
        for i, (prompt, group) in enumerate(zip(work.prompts(), work.rankings(), strict=True))
    ]


def response_row(ids: list[int], prompt: int) -> TokenRow:
    return TokenRow("", tuple(ids), (False,) * prompt + (True,) * (len(ids) - prompt))


@torch.no_grad()
def logprob_error(policy: Any, drawn: Rollout) -> dict[str, float]:
    """How far the recorded log-probabilities are from those of the training forward, nats."""
    scored = policy.score_tokens(drawn.batch).logprobs.cpu()
    return {"logprob_error": float((scored - drawn.logprobs)[drawn.batch.loss_mask].abs().max())}


@contextmanager
def first_learner_step(clock: Callable[[], float]) -> Iterator[list[float]]:
    """When the first optimizer step of what is inside begins: what comes before it is experience, what follows is learning."""
    plain, seen = Learner.step, list[float]()

    def timed(self: Learner, *args: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.append(clock())
        return plain(self, *args, **kwargs)

    with patch.object(Learner, "step", timed):
        yield seen


if __name__ == "__main__":
    main()
