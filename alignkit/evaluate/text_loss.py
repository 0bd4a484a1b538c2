"""How well policies predict plain text that nothing was trained on: what their alignment has cost them (the alignment tax)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from alignkit.data.collate import collate, length_buckets
from alignkit.data.pretraining import encode_documents
from alignkit.data.records import documents
from alignkit.errors import DataError
from alignkit.evaluate.statistics import Floats, bootstrap_interval, without_nan
from alignkit.interfaces import Codec, Policy
from alignkit.types import Document, TokenRow

if TYPE_CHECKING:
    from alignkit.context import Context
    from alignkit.evaluate import TextLossConfig

TOKENS_AT_ONCE = 4096


class TextLoss:
    """Reads the same text with the policies of several stages."""

    def __init__(self, config: TextLossConfig, context: Context) -> None:
        self._config, self._context = config, context

    def evaluate(self) -> Mapping[str, Any]:
        """The figures, ready for ``evaluation.json``: one entry a policy, each compared with the first, document by document."""
        config, context = self._config, self._context
        records = documents(list(context.build_data(config.data).rows()))
        found = {name: self._read(name, records) for name in config.policies}
        first, tokens = found[config.policies[0]]
        entries = [
            without_nan({"policy": name, **self._mean("loss", losses, tokens), **self._mean("difference", losses - first, tokens)})
            for name, (losses, _) in found.items()
        ]
        return {"text_loss": entries, "documents": len(tokens), "tokens": int(tokens.sum()), "data": config.data.kind}

    def _read(self, name: str, records: Sequence[Document]) -> tuple[Floats, Floats]:
        """Nats per token [n] and tokens [n] of each document; a run has one tokenizer, so the tokens are the same for all its policies."""
        policy = self._context.load_policy(name, False)
        texts = scored_texts(policy.codec, records, self._config.max_length)
        tokens = np.array([sum(sum(chunk.loss_mask) for chunk in text) for text in texts], dtype=np.float64)
        nats = text_nats(policy, texts)
        self._context.say(f"{name}: {nats.sum() / tokens.sum():.4f} nats per token of {len(texts)} held-out documents")
        return nats / tokens, tokens

    def _mean(self, name: str, values: Floats, tokens: Floats) -> dict[str, float]:
        """The mean over all tokens of what documents have per token, with its interval over documents."""
        low, high = bootstrap_interval(values, resamples=self._config.bootstrap, seed=self._context.seed, weights=tokens)
        mean = float(np.average(values, weights=tokens))
        return {f"{name}_nats": mean, f"{name}_ci95_low_nats": low, f"{name}_ci95_high_nats": high}


def scored_texts(codec: Codec, records: Sequence[Document], max_length: int) -> list[tuple[TokenRow, ...]]:
    """The chunks of each document that has a token to score. Raises ``DataError`` where none has one."""
    texts = [chunks for record in records if (chunks := encode_documents(codec, [record], max_length=max_length))]
    if not texts:
        raise DataError(f"none of the {len(records)} documents has a token that follows another, so there is nothing to predict")
    return texts


@torch.no_grad()
def text_nats(policy: Policy, texts: Sequence[Sequence[TokenRow]]) -> Floats:
    """−Σ log p [n] over the scored tokens of each document, nats, in float64."""
    chunks = [(i, chunk) for i, text in enumerate(texts) for chunk in text]
    nats = np.zeros(len(texts))
    for bucket in length_buckets([len(chunk) for _, chunk in chunks], TOKENS_AT_ONCE):
        logprobs = policy.score_tokens(collate([chunks[i][1] for i in bucket])).logprobs
        sums = logprobs.double().sum(dim=1).cpu().numpy()
        np.subtract.at(nats, [chunks[i][0] for i in bucket], sums)
    return nats
