"""Text to tokens and back. The chat template is applied here and nowhere else, and masks are made here and nowhere else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from alignkit.errors import DataError
from alignkit.types import Demonstration, Message, Prompt, RankedRows, Ranking, Sample, TokenRow

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For base models that have none: ChatML, the assistant's turn ended by the tokenizer's own end-of-sequence token, which needs no new
embedding. Where the tokenizer does not know ``<|im_start|>`` and ``<|im_end|>``, they are ordinary text."""


class TemplateCodec:
    """A tokenizer with its chat template. ``stop_ids``: ids that end a response, the one that is trained and appended first."""

    def __init__(self, tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        facts = {"template": tokenizer.chat_template, "special": tokenizer.special_tokens_map, "stop": stop_ids}
        self.template_hash = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids that end where the response begins."""
        if prompt.plain:
            return tuple(self.tokenizer(prompt.messages[0].content).input_ids)
        return self._tokens(self._render(prompt.messages, add_generation_prompt=True))

    def demonstration(self, demonstration: Demonstration) -> TokenRow:
        """The whole conversation; each assistant turn of the completion is trained, up to and including its end-of-turn token."""
        prompt = demonstration.prompt
        if prompt.plain:
            return self._plain(prompt, demonstration.completion[0].content)
        messages = (*prompt.messages, *demonstration.completion)
        turns = [i for i in range(len(prompt.messages), len(messages)) if messages[i].role == "assistant"]
        if not turns:
            raise DataError(f"demonstration {prompt.id!r} has no assistant turn in its completion, so nothing would be trained")
        ids = self._tokens(self._render(messages))
        mask = self._by_template(messages, ids, first=len(prompt.messages)) or self._by_prefix(messages, ids, turns)
        return TokenRow(prompt.id, ids, tuple(mask))

    def ranked(self, ranking: Ranking) -> RankedRows:
        """One row a response."""
        rows = tuple(self.sample(Sample(ranking.prompt, response)) for response in ranking.responses)
        return RankedRows(
            ranking.prompt.id, rows, ranking.ranks, ranking.labeler, ranking.weight, ranking.margin, ranking.preference
        )  # fmt: skip

    def sample(self, sample: Sample) -> TokenRow:
        """Prompt and response, always ended by the stop token: a reward is for the text as it stands, finished or not."""
        return self.demonstration(Demonstration(sample.prompt, (Message("assistant", sample.response),)))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of response tokens, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _plain(self, prompt: Prompt, completion: str) -> TokenRow:
        """Text continued. The boundary is where the tokens of prompt and of prompt + completion part: a merge may cross the border."""
        before = self.prompt(prompt)
        ids = tuple(self.tokenizer(prompt.messages[0].content + completion).input_ids)
        if ids[-1] not in self.stop_ids:
            ids = (*ids, self.stop_ids[0])
        shared = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        return TokenRow(prompt.id, ids, (False,) * shared + (True,) * (len(ids) - shared))

    def _by_template(self, messages: Sequence[Message], ids: tuple[int, ...], first: int) -> list[bool] | None:
        """The mask that a template's ``{% generation %}`` blocks give; None where it has none."""
        if "generation %}" not in self.tokenizer.chat_template.replace("- %}", " %}").replace("-%}", " %}"):
            return None
        out = self.tokenizer.apply_chat_template(
            _dicts(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )
        if tuple(out["input_ids"]) != ids:
            raise DataError("the chat template gives other tokens with its generation mask than without; its mask cannot be used")
        start = len(self._tokens(self._render(messages[:first], add_generation_prompt=False))) if first else 0
        return [bool(counts) and i >= start for i, counts in enumerate(out["assistant_masks"])]

    def _by_prefix(self, messages: Sequence[Message], ids: tuple[int, ...], turns: Sequence[int]) -> list[bool]:
        """Each turn lies between the rendering of all before it, with the generation prompt, and the rendering that includes it."""
        mask = [False] * len(ids)
        for turn in turns:
            start = _shared(self._tokens(self._render(messages[:turn], add_generation_prompt=True)), ids)
            end = _shared(self._tokens(self._render(messages[: turn + 1])), ids)
            # What the template prints after the end-of-turn token (a newline) is the next turn's affair.
            stops = [i for i in range(start, end) if ids[i] in self.stop_ids]
            stop = stops[-1] + 1 if stops else end
            mask[start:stop] = [True] * (stop - start)
        if not any(mask):
            raise DataError("the chat template leaves no trace of the assistant's turns; use one that renders them in order")
        return mask

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                "the data holds conversations, but the model's tokenizer has no chat template; "
                "set policy.chat_template: default, or name a file that holds one"
            )
        text: str = self.tokenizer.apply_chat_template(_dicts(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        return text

    def _tokens(self, text: str) -> tuple[int, ...]:
        # The template has written every special token already; the tokenizer would add a second BOS.
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)


def _dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
