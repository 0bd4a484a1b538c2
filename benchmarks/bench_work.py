"""What both sides work on, drawn from a seed with torch alone, which both environments have in the same version."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

Lengths = Literal["fixed", "lognormal", "spread"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One row's work, the same for both sides.

    ``batch``: episodes, demonstrations, or prompts with ``k`` responses each. Prompts have ``prompt``/2 to ``prompt`` tokens, and the first
    has ``prompt``. Responses have at most ``response``: all so many (fixed), lognormal with median 0.35 * ``response`` and sigma 0.6
    (lognormal), or evenly from a quarter of it to all of it (spread).
    """

    model: str
    batch: int
    prompt: int = 64
    response: int = 64
    lengths: Lengths = "lognormal"
    epochs: int = 1
    minibatches: int = 1
    k: int = 1
    vocabulary: int = 49152
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt."""
        import torch

        draws = torch.Generator().manual_seed(self.seed)
        lengths = torch.randint(max(1, self.prompt // 2), self.prompt + 1, (self.batch,), generator=draws)
        lengths[0] = self.prompt
        return [self._tokens(length, draws) for length in lengths.tolist()]

    def response_lengths(self) -> list[int]:
        """Tokens of each response, those of a prompt next to each other."""
        import torch

        count, most = self.batch * self.k, self.response
        if self.lengths == "fixed":
            return [most] * count
        if self.lengths == "spread":
            return [round(most * (0.25 + 0.75 * i / max(1, count - 1))) for i in range(count)]
        draws = torch.Generator().manual_seed(self.seed + 77)
        lengths = (torch.exp(torch.randn(count, generator=draws) * 0.6) * most * 0.35).long().clamp(min(4, most), most)
        return [int(length) for length in lengths]

    def responses(self) -> list[list[int]]:
        """Token ids of each response."""
        import torch

        draws = torch.Generator().manual_seed(self.seed + 1)
        return [self._tokens(length, draws) for length in self.response_lengths()]

    def demonstrations(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and response."""
        return list(zip(self.prompts(), self.responses(), strict=True))

    def rankings(self) -> list[list[list[int]]]:
        """For each prompt its ``k`` sequences (prompt and response), the best first."""
        responses = self.responses()
        groups = [responses[i : i + self.k] for i in range(0, len(responses), self.k)]
        return [[prompt + response for response in group] for prompt, group in zip(self.prompts(), groups, strict=True)]

    def comparisons(self) -> list[tuple[list[int], list[int]]]:
        """The same rankings as pairs, better and worse: all that is known to a trainer of pairs."""
        return [pair for ranked in self.rankings() for pair in itertools.combinations(ranked, 2)]

    def tokens(self) -> tuple[int, int]:
        """Tokens of prompts and of responses."""
        return sum(map(len, self.prompts())), sum(self.response_lengths())

    def _tokens(self, count: int, draws: Any) -> list[int]:
        import torch

        # Low ids are special tokens in most vocabularies; one of them would end a response in the peer.
        ids: list[int] = torch.randint(min(1000, self.vocabulary // 2), self.vocabulary, (count,), generator=draws).tolist()
        return ids
