"""From a request to its answers: which policy, how many tokens, who may ask, what is stored. HTTP is elsewhere, generation too."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from alignkit.api import Message, Prompt
from alignkit_serve.admission import Admission
from alignkit_serve.answers import Answers, Choice, Record
from alignkit_serve.engine import Capabilities, Encoded, Parameters, PromptError
from alignkit_serve.errors import ApiError, invalid, unavailable, unsupported
from alignkit_serve.redaction import Redact, unchanged
from alignkit_serve.roster import Roster, Serving
from alignkit_serve.schemas import ChatRequest, CompletionRequest, Sampled
from alignkit_serve.scribe import Scribe
from alignkit_serve.settings import Limits
from alignkit_serve.store import Store, annotators, new_id
from alignkit_serve.store.feedback import UNSTORED
from alignkit_serve.store.groups import Group, Origin
from alignkit_serve.store.inferences import Inference, prompt_sha256
from alignkit_serve.store.keys import KeyRecord

_SEED_BITS = 31

Turns = list[dict[str, str]]
"""A prompt as it is stored."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, as all endpoints put it."""

    endpoint: Literal["chat", "completions"]
    request: Sampled
    prompts: tuple[Prompt, ...]
    max_tokens: int | None
    top_logprobs: int | None
    metadata: dict[str, str]
    store: bool
    request_id: str
    key: KeyRecord | None


class Service:
    """All that a running server has: the store, who writes to it beside the server, the roster, who is in, and what is in progress.

    ``secret``: under which the names of end users are hashed before they are stored. ``redact``: what becomes of texts before they are.
    """

    def __init__(self, store: Store, scribe: Scribe, roster: Roster, limits: Limits, secret: bytes, redact: Redact = unchanged) -> None:
        self.store, self.scribe, self.roster, self.limits, self.redact = store, scribe, roster, limits, redact
        self.admission = Admission(limits)
        self.answers: set[Answers] = set()
        self._secret = secret

    async def begin(self, asked: Asked) -> Answers:
        """Answers to ``asked``, begun; whoever takes them calls ``cancel()`` when there is nobody left to read them.

        The policy stays loaded and the place taken until all of it is over, however that comes. Raises ``ApiError``.
        """
        request = asked.request
        with contextlib.ExitStack() as until_over:
            servings = [until_over.enter_context(self.roster.leased(name)) for name in self._names(request)]
            for serving in servings:
                self._check(asked, serving.engine.capabilities())
            prompts = [[await self._encoded(asked, serving, prompt) for serving in servings] for prompt in asked.prompts]
            count = len(servings) if len(servings) > 1 else request.n or 1
            tokens = sum(encoded.tokens or 0 for per_prompt in prompts for encoded in per_prompt)
            ticket = until_over.enter_context(self.admission.admitted(asked.key, count * len(prompts), tokens))
            kept = await asyncio.to_thread(self._kept, asked)
            choices, record = self._prepared(asked, servings, prompts, kept, count)
            answers = Answers(choices, record, self.store, self.admission, ticket, self.limits)
            taken = until_over.pop_all()

        def over() -> None:
            taken.close()
            self.answers.discard(answers)

        self.answers.add(answers)
        await answers.start(over)
        return answers

    async def drain(self) -> None:
        """Take no new work, let what is in progress finish for a while, and tell the rest that it is over."""
        self.admission.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.drain_seconds):
                while self.answers:
                    await asyncio.sleep(0.05)
        self.give_up()
        while self.answers:
            await asyncio.sleep(0.05)

    def give_up(self) -> None:
        """End what is in progress, and say why."""
        for answers in self.answers:
            answers.cancel(unavailable("draining", "the server stops; ask again when it is back", 5))

    def _names(self, request: Sampled) -> list[str]:
        """The versions that answer: one, or the two of a pair; which of them comes first is nobody's choice."""
        name = request.alignkit.policy or request.model
        if request.alignkit.ab == "off":
            return [name]
        if request.n not in (None, 1) or request.alignkit.policy:
            raise invalid("ab asks for two answers of two policies; leave out n and alignkit.policy", "alignkit.ab")
        candidate = self.roster.candidate()
        return [name, candidate.version.id if candidate else name]

    def _check(self, asked: Asked, can: Capabilities) -> None:
        request = asked.request
        if (request.n or 1) * len(asked.prompts) > self.limits.choices:
            raise invalid(
                f"{(request.n or 1) * len(asked.prompts)} answers were asked for; at most {self.limits.choices} are given at once", "n"
            )
        if asked.top_logprobs is not None and asked.top_logprobs > can.top_logprobs:
            raise unsupported(
                "logprobs", f"log-probabilities were asked for, and this engine gives those of {max(can.top_logprobs, 0)} tokens"
            )
        if request.top_k not in (None, 0, -1) and not can.top_k:
            raise unsupported("top_k", "this engine cannot leave out all but the likeliest tokens; use top_p")
        if request.alignkit.return_logprobs in ("behaviour", "both") and not can.behaviour_logprobs:
            raise unsupported("alignkit.return_logprobs", "this engine does not know the distribution that it draws from")
        if (request.alignkit.return_token_ids or request.return_token_ids) and not can.token_ids:
            raise unsupported("alignkit.return_token_ids", "this engine does not tell token ids")

        if can.vocabulary is not None and (beyond := [token for token, _ in request.biases() if token >= can.vocabulary]):
            raise invalid(f"logit_bias names the token {beyond[0]}; this policy has those from 0 to {can.vocabulary - 1}", "logit_bias")

    async def _encoded(self, asked: Asked, serving: Serving, prompt: Prompt) -> Encoded:
        param = "messages" if asked.endpoint == "chat" else "prompt"
        characters = sum(len(message.content) for message in prompt.messages)
        if characters > self.limits.prompt_characters:
            message = f"the prompt has {characters} characters; at most {self.limits.prompt_characters} are read"
            raise invalid(message, param, "context_length_exceeded")
        try:
            encoded = await asyncio.to_thread(serving.engine.encode, prompt)
        except PromptError as error:
            raise invalid(str(error), param, "invalid_prompt") from error
        room = serving.engine.capabilities().context_tokens
        if room is not None and encoded.tokens is not None and encoded.tokens + (asked.max_tokens or 1) > room:
            left = max(0, room - encoded.tokens)
            # Clients know it by OpenAI's words and by these; not all of them look at the code.
            words = f"{'' if left else 'the prompt is too long: '}this model's maximum context length is {room} tokens"
            message = f"{words}, and the prompt has {encoded.tokens}, which leaves {left} for an answer"
            asks = f", and {asked.max_tokens} were asked for" if asked.max_tokens else ""
            raise invalid(f"{message}{asks}", param, "context_length_exceeded")
        return encoded

    def _kept(self, asked: Asked) -> list[tuple[Turns, bool]]:
        """The prompts as they are stored, and whether that is not quite what was sent; none where nothing is."""
        sent = [_as_stored(prompt) for prompt in asked.prompts] if asked.store else []
        kept = [[{**message, "content": self.redact(message["content"])} for message in turns] for turns in sent]
        return [(turns, turns != before) for turns, before in zip(kept, sent, strict=True)]

    def _prepared(
        self,
        asked: Asked,
        servings: Sequence[Serving],
        prompts: Sequence[Sequence[Encoded]],
        kept_prompts: Sequence[tuple[Turns, bool]],
        count: int,
    ) -> tuple[list[Choice], Record]:
        request, extras = asked.request, asked.request.alignkit
        seed = request.seed if request.seed is not None else secrets.randbits(_SEED_BITS)
        choices, stored, groups, redacted = [], [], [], set()
        for number, encoded in enumerate(prompts):
            kept = "" if asked.store else UNSTORED
            id = new_id(f"chatcmpl-{kept}" if asked.endpoint == "chat" else f"cmpl-{kept}")
            order = list(range(count))
            if extras.ab == "pair":
                # Which policy stands in which slot is drawn: people prefer the first of two.
                random.Random(f"{seed}/{id}").shuffle(order)
            mine = []
            for slot, k in enumerate(order):
                serving = servings[k] if len(servings) > 1 else servings[0]
                parameters = self._parameters(asked, (seed, number * count + k))
                if k == 1 and len(servings) > 1 and extras.ab_temperature is not None:
                    parameters = replace(parameters, temperature=extras.ab_temperature)
                mine.append(
                    Choice(
                        index=number * count + slot,
                        id=new_id(f"cmp-{kept}"),
                        inference_id=id,
                        serving=serving,
                        prompt=encoded[k] if len(servings) > 1 else encoded[0],
                        parameters=parameters,
                        shown=not (extras.ab == "shadow" and k == 1),
                    )
                )
            choices += mine
            if asked.store:
                messages, changed = kept_prompts[number]
                inference = self._inference(asked, id, seed, messages, servings[0])
                stored.append(inference)
                if changed:
                    redacted.add(id)
                if count > 1:
                    groups.append(_group(inference, mine, extras.ab, seed, order))
        return choices, Record(tuple(stored), tuple(groups), self.redact, frozenset(redacted))

    def _parameters(self, asked: Asked, noise: tuple[int, int]) -> Parameters:
        request = asked.request
        return Parameters(
            max_tokens=asked.max_tokens or self.limits.default_max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(request.top_k or 0, 0),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=request.biases(),
            stop=request.stops(),
            top_logprobs=asked.top_logprobs or 0,
            noise=noise,
        )

    def _inference(self, asked: Asked, id: str, seed: int, messages: Turns, serving: Serving) -> Inference:
        request, extras = asked.request, asked.request.alignkit
        parameters = self._parameters(asked, (seed, 0))
        return Inference(
            id=id,
            endpoint=asked.endpoint,
            model=request.model,
            request_id=asked.request_id,
            api_key_id=asked.key.id if asked.key else None,
            episode_id=extras.episode_id,
            end_user_hmac=None if request.user is None else self.end_user(request.user),
            messages=messages,
            prompt_sha256=prompt_sha256(messages),
            params=_sampling(parameters, request.n or 1),
            metadata=asked.metadata,
            seed=seed,
            policy_version_id=serving.version.id,
            engine=serving.engine.name,
            consent_train=bool(extras.consent and extras.consent.train),
            consent_version=extras.consent.version if extras.consent else None,
            created_at=datetime.now(UTC),
        )

    def end_user(self, user: str) -> str:
        """The hash under which an end user is known here, by the name that their application has for them."""
        return annotators.end_user(self._secret, user)


def chat(request: ChatRequest, request_id: str, key: KeyRecord | None) -> Asked:
    """A chat request. Raises ``ApiError`` for what it may not hold."""
    request.refuse()
    return Asked(
        endpoint="chat",
        request=request,
        prompts=(Prompt("", request.conversation()),),
        max_tokens=request.tokens_wanted(),
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        metadata=dict(request.metadata or {}),
        store=request.store is not False,
        request_id=request_id,
        key=key,
    )


def continuation(request: CompletionRequest, request_id: str, key: KeyRecord | None) -> Asked:
    """A request to continue text. Raises ``ApiError`` for what it may not hold."""
    request.refuse()
    if request.alignkit.ab != "off":
        raise ApiError(400, "unsupported_value", "alignkit.ab is for chat", param="alignkit.ab")
    return Asked(
        endpoint="completions",
        request=request,
        prompts=request.prompts(),
        max_tokens=request.max_tokens or 16,  # OpenAI's default here
        top_logprobs=request.logprobs,
        metadata={},
        store=request.store is not False,
        request_id=request_id,
        key=key,
    )


def _as_stored(prompt: Prompt) -> Turns:
    messages: Sequence[Message] = prompt.messages
    return [{"role": "prompt" if prompt.plain else message.role, "content": message.content} for message in messages]


def _sampling(parameters: Parameters, n: int) -> dict[str, Any]:
    """What training must know of how the answers were drawn."""
    return {
        "n": n,
        "max_tokens": parameters.max_tokens,
        "temperature": parameters.temperature,
        "top_p": parameters.top_p,
        "top_k": parameters.top_k,
        "presence_penalty": parameters.presence_penalty,
        "frequency_penalty": parameters.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in parameters.logit_bias},
        "stop": list(parameters.stop),
    }


_ORIGINS: Mapping[str, Origin] = {"off": "n", "pair": "ab", "shadow": "shadow"}


def _group(inference: Inference, choices: Sequence[Choice], ab: str, seed: int, order: Sequence[int]) -> Group:
    return Group(
        id=new_id("grp-"),
        prompt_sha256=inference.prompt_sha256,
        origin=_ORIGINS[ab],
        presentation={"slots": list(order), "seed": seed},
        inference_id=inference.id,
        candidates=tuple((choice.id, slot) for slot, choice in enumerate(choices)),
    )
