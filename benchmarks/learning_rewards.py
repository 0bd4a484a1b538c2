"""The rewards of ``learning.py``, the same functions for alignkit and for its peer, which runs in another environment."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Sample(Protocol):
    """What both sides hand over: the text of a prompt and of the response to it."""

    @property
    def response(self) -> str: ...

    @property
    def prompt(self) -> Any: ...


def letters(samples: Sequence[Sample]) -> list[float]:
    """How often the letter e occurs, at most 10 times: a tenth each."""
    return [min(sample.response.lower().count("e"), 10) / 10 for sample in samples]


def sentiment(samples: Sequence[Sample]) -> list[float]:
    """VADER's compound sentiment of the response, from -1 to 1."""
    return [float(_vader().polarity_scores(sample.response)["compound"]) for sample in samples]


def rating(samples: Sequence[Sample]) -> list[float]:
    """The same on the scale of the people who rated the snippets, from -4 to 4: scores that vary by about 1, as critics expect."""
    return [4.0 * score for score in sentiment(samples)]


def trained(samples: Sequence[Sample]) -> list[float]:
    """The reward model in the folder that LEARNING_REWARD_MODEL names, read at the end-of-sequence token behind the text."""
    import torch

    tokenizer, backbone, head, facts = _reward_model(os.environ["LEARNING_REWARD_MODEL"])
    texts = [sample.prompt.messages[0].content + sample.response for sample in samples]
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    last = torch.tensor([len(row) - 1 for row in rows])
    with torch.no_grad():
        hidden = backbone(input_ids=ids).last_hidden_state[torch.arange(len(rows)), last]
        scores = (hidden @ head["weight"].T).squeeze(1) + head["bias"]
    scaled: list[float] = ((scores - facts["offset"]) * facts["gain"]).tolist()
    return scaled


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@functools.cache
def _reward_model(folder: str) -> tuple[Any, Any, dict[str, Any], dict[str, float]]:
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    facts = json.loads((Path(folder) / "reward_model.json").read_text())
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval(), load_file(f"{folder}/head.safetensors"), facts
