"""The rollout engine of this process, with a length for each response instead of stop tokens: both sides then draw equally much."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from alignkit.data.collate import collate
from alignkit.interfaces import Policy, Rollout
from alignkit.models import kernels
from alignkit.models.decoding import Decoding
from alignkit.rollout.decoder import Decoder, Event, Request
from alignkit.rollout.engine import MAX_ROWS
from alignkit.rollout.noise import noise_key
from alignkit.types import Message, Prompt, PromptRow, Sample, TokenRow


def prompt_rows(prompts: Sequence[Sequence[int]]) -> list[PromptRow]:
    """Prompts of token ids; their text is never read."""
    return [PromptRow(Prompt(f"prompt {i}", (Message("user", ""),), plain=True), tuple(ids)) for i, ids in enumerate(prompts)]


def rollout(
    policy: Policy, prompts: Sequence[PromptRow], lengths: Sequence[int], *, step: int, prepared: Callable[[], None] = lambda: None
) -> Rollout:
    """One response to each prompt, of so many tokens: what ``LocalEngine`` does, but for the end of a response.

    ``prepared`` is called when the weights are ready to generate with.
    """
    with policy.decoding() as model:
        prepared()
        drawn = decode(model, prompts, lengths, step=step)
    rows = [
        TokenRow(row.prompt.id, row.ids + tuple(event.token for event in events), (False,) * len(row.ids) + (True,) * len(events))
        for row, events in zip(prompts, drawn, strict=True)
    ]
    samples = tuple(
        Sample(row.prompt, policy.codec.decode([event.token for event in events]), finished=True)
        for row, events in zip(prompts, drawn, strict=True)
    )
    batch = collate(rows)
    logprobs = torch.zeros(batch.ids.shape)
    for i, events in enumerate(drawn):
        logprobs[i, batch.loss_mask[i]] = torch.tensor([event.logprob for event in events])
    return Rollout(samples, batch, logprobs, exact=policy.exact and kernels.chosen().exact, policy_version=policy.version)


def decode(model: Decoding, prompts: Sequence[PromptRow], lengths: Sequence[int], *, step: int) -> list[list[Event]]:
    """The events of each response, all requests in one decoder."""
    decoder = Decoder(model, max_rows=MAX_ROWS)
    asked = [
        decoder.add(Request(row.ids, max_new_tokens=length, temperature=1.0, stop_ids=(), noise_key=noise_key(0, step, row.prompt.id, 0)))
        for row, length in zip(prompts, lengths, strict=True)
    ]
    drawn: dict[int, list[Event]] = {number: [] for number in asked}
    while decoder.busy:
        for event in decoder.step():
            drawn[event.request].append(event)
    return [drawn[number] for number in asked]
