"""The engine of this process: draws rollouts from a policy with the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignkit.data.collate import collate
from alignkit.interfaces import Policy, Rollout
from alignkit.models import kernels
from alignkit.rollout.decoder import Decoder, Event, Request
from alignkit.rollout.noise import noise_key
from alignkit.types import PromptRow, Sample, Sampling, TokenRow

MAX_ROWS = 128
"""Rows decoded at once: decoding is bound by reading the weights, so a wide batch costs little more than a narrow one."""


class LocalEngine:
    """Draws responses in this process. ``seed`` is the run's; the noise of a response depends on nothing but its place in the run."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def rollout(self, policy: Policy, prompts: Sequence[PromptRow], sampling: Sampling, *, samples_per_prompt: int, step: int) -> Rollout:
        """``samples_per_prompt`` responses to each prompt, a prompt's own next to each other."""
        asked = [(prompt, index) for prompt in prompts for index in range(samples_per_prompt)]
        with policy.decoding() as model:
            decoder = Decoder(model, max_rows=MAX_ROWS)
            numbers = [0] * len(asked)
            # Prompts of about one length come in together, the longest first.
            for i in sorted(range(len(asked)), key=lambda i: -len(asked[i][0].ids)):
                row, index = asked[i]
                numbers[i] = decoder.add(
                    Request(
                        ids=row.ids,
                        max_new_tokens=sampling.max_new_tokens,
                        temperature=sampling.temperature,
                        stop_ids=policy.codec.stop_ids,
                        noise_key=noise_key(self._seed, step, row.prompt.id, index),
                    )
                )
            drawn: dict[int, list[Event]] = {number: [] for number in numbers}
            while decoder.busy:
                for event in decoder.step():
                    drawn[event.request].append(event)
        rows, samples = [], []
        for number, (prompt, index) in zip(numbers, asked, strict=True):
            tokens = tuple(event.token for event in drawn[number])
            finished = drawn[number][-1].finished == "stop"
            rows.append(TokenRow(prompt.prompt.id, prompt.ids + tokens, (False,) * len(prompt.ids) + (True,) * len(tokens)))
            samples.append(Sample(prompt.prompt, policy.codec.decode(tokens), finished=finished, index=index))
        batch = collate(rows)
        logprobs = torch.zeros(batch.ids.shape)
        for i, number in enumerate(numbers):
            logprobs[i, batch.loss_mask[i]] = torch.tensor([event.logprob for event in drawn[number]])
        exact = policy.exact and kernels.chosen().exact
        return Rollout(tuple(samples), batch, logprobs, exact=exact, policy_version=policy.version)
