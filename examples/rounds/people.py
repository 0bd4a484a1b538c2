"""Simulated people: they read a server's answers and say over HTTP what they think of them, each with a taste and mistakes of their own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openai import OpenAI

Judge = Callable[[str, str], float]
"""What all of them follow, more or less: how good an answer to a prompt is, in [-1, 1]."""

TIED = 0.05
"""Answers closer than this are equally good to them."""


@dataclass(frozen=True)
class Person:
    """``slip`` of the answers they judge without looking; ``length`` is what a word more is worth to them, ``loud`` an exclamation mark."""

    name: str
    slip: float
    length: float = 0.0
    loud: float = 0.0

    def opinion(self, answer: str, judge: Callable[[str], float], noise: random.Random) -> float:
        """How good they find an answer."""
        if noise.random() < self.slip:
            return noise.uniform(-1.0, 1.0)
        return judge(answer) + self.length * len(answer.split()) + self.loud * answer.count("!")

    def ranking(self, answers: Sequence[str], judge: Callable[[str], float], noise: random.Random) -> list[list[int]]:
        """The answers' indices from the best to the worst, those that they cannot tell apart together."""
        found = [self.opinion(answer, judge, noise) for answer in answers]
        tiers: list[list[int]] = []
        for i in sorted(range(len(answers)), key=lambda i: -found[i]):
            if tiers and found[tiers[-1][0]] - found[i] < TIED:
                tiers[-1].append(i)
            else:
                tiers.append([i])
        return tiers


PEOPLE = (
    Person("careful", slip=0.02),
    Person("brief", slip=0.05, length=-0.01),
    Person("quiet", slip=0.08, loud=-0.3),
    Person("hasty", slip=0.2),
    Person("absent", slip=0.4),
)


@dataclass
class Visit:
    """One round of talk with the live policy. ``app`` asks as an application does; ``members`` judge, each with a key of their own."""

    app: OpenAI
    members: dict[Person, OpenAI]
    judge: Judge
    seed: int
    max_tokens: int
    temperature: float
    answers: int = 4
    overlap: float = 0.25

    def ask(self, prompt: str) -> Any:
        """Several answers to one prompt, whose author lets them be trained on."""
        consent = {"alignkit": {"consent": {"train": True, "version": "1"}}}
        options = {"n": self.answers, "max_tokens": self.max_tokens, "temperature": self.temperature}
        return self.app.completions.create(model="live", prompt=prompt, extra_body=consent, **options)

    def talk(self, prompt: str) -> int:
        """Ask, and let one person rank the answers, or now and then two; returns how many rankings the server has acknowledged."""
        noise = random.Random(f"{self.seed} {prompt}")
        found = self.ask(prompt)
        texts = [choice.text for choice in found.choices]
        ids = [choice.alignkit["completion_id"] for choice in found.choices]
        who = noise.sample(sorted(self.members, key=lambda person: person.name), 2 if noise.random() < self.overlap else 1)
        for person in who:
            tiers = person.ranking(texts, lambda answer: self.judge(prompt, answer), noise)
            said = {
                "kind": "ranking",
                "target_type": "group",
                "target_id": found.alignkit["group_id"],
                "value": [[ids[i] for i in tier] for tier in tiers],
            }
            key = {"Idempotency-Key": f"{self.seed}-{found.id}"}
            self.members[person].post("/feedback", body=said, cast_to=object, options={"headers": key})
        return len(who)
