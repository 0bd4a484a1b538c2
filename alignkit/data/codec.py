"""Text to tokens and back. The chat template is applied here and nowhere else, and masks are made here and nowhere else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import jinja2

from alignkit.errors import DataError, ModelError
from alignkit.types import Demonstration, Message, Prompt, RankedRows, Ranking, Sample, TokenRow

# Newlines stand inside expressions: transformers renders with trim_blocks, which swallows one that follows a block.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '<|im_end|>') + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For base models that have none: ChatML, the assistant's turn ended by the tokenizer's own end-of-sequence token, which needs no new
embedding. Where the tokenizer does not know ``<|im_start|>`` and ``<|im_end|>``, they are ordinary text."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class TemplateCodec:
    """A tokenizer with its chat template. ``stop_ids``: ids that end a response, the one that is appended to plain text first."""

    def __init__(self, tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self._template = _template(tokenizer)
        # What the tokenizer puts before any text: BOS, for some. What it puts after is left out, a prompt is there to be continued.
        letter = self._tokens("a")
        self._opening = tuple(takewhile(lambda i: i not in letter, tokenizer("a").input_ids))
        facts = {"template": self._template, "special": tokenizer.special_tokens_map, "stop": stop_ids}
        self.template_hash = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids that end where the response begins."""
        if prompt.plain:
            return self.text(prompt.messages[0].content)
        return self._tokens(self._render(prompt.messages, answer=True))

    def demonstration(self, demonstration: Demonstration) -> TokenRow:
        """The conversation up to its last trained token; each assistant turn of the completion is trained, its end-of-turn token included.

        Raises ``DataError`` where the chat template refuses the conversation, or where nothing would be trained.
        """
        prompt, completion = demonstration.prompt, demonstration.completion
        ids, mask = self._continuation(prompt, completion[0].content) if prompt.plain else self._conversation(prompt, completion)
        # Nothing comes before the first token, so nothing can predict it.
        if not any(mask[1:]):
            raise DataError("no token of it would be trained; it needs an assistant turn that the chat template prints")
        # Nothing learns from what follows the last trained token, and a reward is read at the last token: it must be the stop token.
        end = len(mask) - mask[::-1].index(True)
        return TokenRow(prompt.id, ids[:end], tuple(mask[:end]))

    def ranked(self, ranking: Ranking) -> RankedRows:
        """One row a response."""
        return RankedRows(
            id=ranking.prompt.id,
            rows=tuple(self.sample(Sample(ranking.prompt, response)) for response in ranking.responses),
            ranks=ranking.ranks,
            labeler=ranking.labeler,
            weight=ranking.weight,
            margin=ranking.margin,
            preference=ranking.preference,
        )

    def sample(self, sample: Sample) -> TokenRow:
        """Prompt and response, always ended by the stop token: a reward is for the text as it stands, finished or not."""
        return self.demonstration(Demonstration(sample.prompt, (Message("assistant", sample.response),)))

    def text(self, text: str) -> tuple[int, ...]:
        """Plain text after what the tokenizer puts before any text, which some texts bring along."""
        ids = self._tokens(text)
        return ids if ids[: len(self._opening)] == self._opening else self._opening + ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of response tokens, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def shown(self, ids: Sequence[int]) -> str:
        """The text of any tokens, special tokens included, for people to read."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _continuation(self, prompt: Prompt, completion: str) -> tuple[tuple[int, ...], list[bool]]:
        """Plain text, continued. The boundary is where the tokens of prompt and of prompt + completion part: a merge may cross it."""
        ids = self.text(prompt.messages[0].content + completion)
        start = _shared(self.prompt(prompt), ids)
        if start == len(ids) or ids[-1] not in self.stop_ids:
            ids = (*ids, self.stop_ids[0])
        return ids, [i >= start for i in range(len(ids))]

    def _conversation(self, prompt: Prompt, completion: Sequence[Message]) -> tuple[tuple[int, ...], list[bool]]:
        messages = (*prompt.messages, *completion)
        turns = [i for i in range(len(prompt.messages), len(messages)) if messages[i].role == "assistant"]
        ids = self._tokens(self._render(messages))
        blocks = self._blocks(messages, ids) if _GENERATION.search(self._template or "") else [True] * len(ids)
        mask = [False] * len(ids)
        for start, stop in self._spans(messages, ids, turns):
            mask[start:stop] = blocks[start:stop]
            # A template's blocks may leave the end-of-turn token out. It is trained all the same, with the turn that it ends.
            mask[stop] = blocks[stop] or start == stop or blocks[stop - 1]
        return ids, mask

    def _spans(self, messages: Sequence[Message], ids: tuple[int, ...], turns: Sequence[int]) -> list[tuple[int, int]]:
        """Where each turn begins, where the rendering of all before it with the generation prompt ends, and where its stop token is."""
        starts = [self._start(messages, ids, turn) for turn in turns]
        spans = []
        for turn, start, following in zip(turns, starts, [*starts, len(ids)][1:], strict=True):
            # A rendering that ends with this turn is no guide to its end: templates may print a last turn in another way.
            stops = [i for i in range(start, following) if ids[i] in self.stop_ids]
            inside = sum(i in self.stop_ids for i in self._tokens(messages[turn].content))
            if len(stops) <= inside:
                raise self._endless()
            spans.append((start, stops[inside]))
        return spans

    def _blocks(self, messages: Sequence[Message], ids: tuple[int, ...]) -> list[bool]:
        """Which tokens the template prints inside its ``{% generation %}`` blocks."""
        out = self.tokenizer.apply_chat_template(
            _dicts(messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        if tuple(out["input_ids"]) != ids:
            raise DataError("the chat template gives other tokens with its generation mask than without; its mask cannot be used")
        mask, places = [bool(counts) for counts in out["assistant_masks"]], out["offset_mapping"]
        # transformers ends a block with the first token of its last character; a character may take several.
        for i in range(1, len(ids)):
            mask[i] = mask[i] or (mask[i - 1] and places[i] == places[i - 1])
        return mask

    def _start(self, messages: Sequence[Message], ids: tuple[int, ...], turn: int) -> int:
        return _shared(self._tokens(self._render(messages[:turn], answer=True)), ids)

    def _endless(self) -> DataError:
        stops = ", ".join(self.tokenizer.convert_ids_to_tokens(list(self.stop_ids)))
        return DataError(
            f"the chat template does not end the assistant's turn with a stop token ({stops}), so the model would never learn to stop; "
            "set policy.chat_template: default, or name a file with a template that does"
        )

    def _render(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """The conversation as text; with ``answer``, up to where the assistant's next turn begins."""
        if not self._template:
            raise DataError(
                "the data holds conversations, but the model's tokenizer has no chat template; "
                "set policy.chat_template: default, or name a file that holds one"
            )
        if not messages:
            raise DataError("the conversation begins with the assistant's turn; a response needs something to answer")
        try:
            text: str = self.tokenizer.apply_chat_template(_dicts(messages), tokenize=False, add_generation_prompt=answer)
        except jinja2.TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(f"the chat template refuses the conversation ({roles}): {error}") from error
        return text

    def _tokens(self, text: str) -> tuple[int, ...]:
        # The chat template has written every special token already; the tokenizer would add a second BOS.
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)


def _template(tokenizer: Any) -> str | None:
    """The template of conversations. A tokenizer may have several by name; those for tools and documents are not for us."""
    found = tokenizer.chat_template
    if isinstance(found, dict) and "default" not in found:
        raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has the chat templates {sorted(found)} and none named default")
    template: str | None = found["default"] if isinstance(found, dict) else found
    return template


def _dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
