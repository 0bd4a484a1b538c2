"""The engine of this process: draws rollouts from a policy with the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from alignkit.data.collate import collate
from alignkit.errors import RunError
from alignkit.guards.memory import attempt, release
from alignkit.interfaces import Policy, Rollout
from alignkit.models import kernels
from alignkit.rollout.decoder import Decoder, Event, Request
from alignkit.rollout.noise import noise_key
from alignkit.types import PromptRow, Sample, Sampling, TokenRow

if TYPE_CHECKING:
    from alignkit.guards.guard import Guard

MAX_ROWS = 128
"""Rows decoded at once: decoding is bound by reading the weights, so a wide batch costs little more than a narrow one."""


class LocalEngine:
    """Draws responses in this process. ``seed`` is the run's; the noise of a response depends on nothing but its place in the run.

    Where memory does not suffice, fewer are drawn at once from there on, which the ``guard`` tells.
    """

    def __init__(self, seed: int, guard: Guard | None = None) -> None:
        self._seed, self._guard, self._rows = seed, guard, MAX_ROWS

    def rollout(self, policy: Policy, prompts: Sequence[PromptRow], sampling: Sampling, *, samples_per_prompt: int, step: int) -> Rollout:
        """``samples_per_prompt`` responses to each prompt, a prompt's own next to each other.

        Raises ``RunError`` when a single one does not fit into memory.
        """
        asked = [(prompt, index) for prompt in prompts for index in range(samples_per_prompt)]
        requests = [
            Request(
                ids=row.ids,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                stop_ids=policy.codec.stop_ids,
                noise_key=noise_key(self._seed, step, row.prompt.id, index),
            )
            for row, index in asked
        ]
        while (drawn := attempt(lambda: self._draw(policy, requests))) is None:
            release()
            self._halve(len(requests))
        rows, samples = [], []
        for (prompt, index), events in zip(asked, drawn, strict=True):
            tokens = tuple(event.token for event in events)
            finished = events[-1].finished == "stop"
            rows.append(TokenRow(prompt.prompt.id, prompt.ids + tokens, (False,) * len(prompt.ids) + (True,) * len(tokens)))
            samples.append(Sample(prompt.prompt, policy.codec.decode(tokens), finished=finished, index=index))
        batch = collate(rows)
        logprobs = torch.zeros(batch.ids.shape)
        for i, events in enumerate(drawn):
            logprobs[i, batch.loss_mask[i]] = torch.tensor([event.logprob for event in events])
        exact = policy.exact and kernels.chosen().exact
        return Rollout(tuple(samples), batch, logprobs, exact=exact, policy_version=policy.version)

    def _draw(self, policy: Policy, requests: Sequence[Request]) -> list[list[Event]]:
        """The tokens of each request."""
        drawn: list[list[Event]] = [[] for _ in requests]
        with policy.decoding() as model:
            decoder = Decoder(model, max_rows=self._rows)
            # Prompts of about one length come in together, the longest first.
            order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
            places = {decoder.add(requests[i]): drawn[i] for i in order}
            while decoder.busy:
                for event in decoder.step():
                    places[event.request].append(event)
        return drawn

    def _halve(self, asked: int) -> None:
        """Draw half as many at once, of so many that are asked for. Raises ``RunError`` when it was one."""
        before = min(self._rows, asked)
        if before == 1:
            raise RunError(
                "out of memory while a single response was drawn; shorten it (max_length, max_new_tokens), or take a smaller model or a "
                "larger machine"
            )
        self._rows = before // 2
        if self._guard:
            self._guard.tell(
                "out of memory",
                f"out of memory: at most {self._rows} responses are drawn at once from here on, not {before}; the batch is the same",
                responses=self._rows,
            )
