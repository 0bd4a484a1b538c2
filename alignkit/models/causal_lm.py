"""The policy: a transformers causal language model that scores tokens, trained in full or by adapters, or frozen."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.data.codec import TemplateCodec
from alignkit.errors import ModelError
from alignkit.interfaces import TokenBatch, TokenScores
from alignkit.models import adapters, kernels
from alignkit.models.attention import hidden_states, prepare
from alignkit.models.config import Precision, TuningConfig
from alignkit.models.decoding import Decoding, decoding
from alignkit.ops.logprobs import selective_logprobs


class CausalPolicy:
    """A causal language model with its codec.

    ``version`` counts the updates; whoever trains ``module`` raises it. Dropout is off, always: with it the ratio of PPO would not be 1.
    """

    def __init__(self, model: Any, codec: TemplateCodec, *, tuning: TuningConfig, precision: Precision) -> None:
        self._model = model
        self._tuning = tuning
        self._precision = resolve_precision(precision)
        self.codec = codec
        self.version = 0

    @property
    def module(self) -> nn.Module:
        """The transformers model; its trainable parameters are those with ``requires_grad``."""
        module: nn.Module = self._model
        return module

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def architecture(self) -> str:
        """What transformers calls this kind of model."""
        name: str = self._model.config.model_type
        return name

    @property
    def context_tokens(self) -> int | None:
        """The longest text that the model can read; None where it does not say."""
        config = self._model.config
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    def score_tokens(self, batch: TokenBatch, *, temperature: float = 1.0, entropy_gradient: bool = False) -> TokenScores:
        """Log-probabilities and entropies of the tokens under ``loss_mask`` [b t], given all that precedes them in their document.

        Padding is not computed, a beginning that documents share is computed once, and hidden states are projected onto the vocabulary
        only where a token is scored.
        """
        ids, loss_mask = batch.ids.to(self.device), batch.loss_mask.to(self.device)
        # Nothing comes before a document's first token, so it has no probability; a mask that counts it is a mask that does not.
        starts = torch.arange(ids.shape[1]) if batch.positions is None else batch.positions
        loss_mask = loss_mask & (starts > 0).to(self.device)
        with autocast(self._precision, self.device):
            hidden, line = hidden_states(self._model, batch)
            head = self._model.get_output_embeddings()
            scored = loss_mask[:, 1:]
            logprobs, entropy = selective_logprobs(
                hidden.index_select(0, line[:, :-1][scored]),
                head.weight,
                ids[:, 1:][scored],
                bias=head.bias,
                temperature=temperature,
                entropy_gradient=entropy_gradient,
            )
        return TokenScores(_scatter(logprobs, loss_mask), _scatter(entropy, loss_mask))

    @property
    def exact(self) -> bool:
        """Whether the arithmetic is float32: recorded log-probabilities then agree with the training forward."""
        return self._precision == "float32"

    def decoding(self) -> AbstractContextManager[Decoding]:
        """The model to generate with; what merging, casting and repacking its weights costs is paid on entering."""
        return decoding(self._model, adapters.merged_state(self._model), torch.float32 if self.exact else torch.bfloat16)

    def reference(self) -> CausalPolicy:
        """A frozen policy with the weights this one started from.

        Adapters share the base and are switched off; with full tuning it is a copy, so ask before the first update.
        """
        if self._tuning.kind == "lora":
            return _WithoutAdapters(self._model, self.codec, tuning=self._tuning, precision=self._precision)
        frozen = copy.deepcopy(self._model).requires_grad_(False)
        return CausalPolicy(frozen, self.codec, tuning=self._tuning, precision=self._precision)

    def save(self, folder: Path) -> None:
        """Write a plain transformers folder, adapters merged; the adapters alone are kept beside it in ``adapter/``."""
        folder.mkdir(parents=True, exist_ok=True)
        # Whoever generates with it stops where it was taught to stop.
        self._model.generation_config.eos_token_id = list(self.codec.stop_ids)
        self._model.save_pretrained(folder, state_dict=adapters.merged_state(self._model))
        self.codec.tokenizer.save_pretrained(folder)
        if self._tuning.kind == "lora":
            adapters.save_adapters(self._model, folder / "adapter")


class _WithoutAdapters(CausalPolicy):
    """The base under another policy's adapters."""

    def score_tokens(self, batch: TokenBatch, *, temperature: float = 1.0, entropy_gradient: bool = False) -> TokenScores:
        with adapters.adapters_off(self._model), torch.no_grad():
            return super().score_tokens(batch, temperature=temperature, entropy_gradient=entropy_gradient)


def load(
    folder: Path, *, tuning: TuningConfig, precision: Precision, trainable: bool, seed: int, trust_remote_code: bool = False
) -> CausalPolicy:
    """The policy in a transformers folder. A frozen one has no trainable weight, and no adapters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: not a transformers folder with safetensors weights: {str(error).strip().splitlines()[0]}") from error
    model = model.to(pick_device()).eval()
    prepare(model)
    if trainable:
        adapters.tune(model, tuning, seed)
    else:
        model.requires_grad_(False)
    codec = make_codec(tokenizer, model.config, model.generation_config)
    return CausalPolicy(model, codec, tuning=tuning if trainable else TuningConfig(), precision=precision)


def make_codec(tokenizer: Any, *configs: Any) -> TemplateCodec:
    """The codec of a model: every id that ends a turn is a stop id, the tokenizer's end-of-sequence first, then what ``configs`` name, the
    model's and that of its generation. Some models name the end of a chat's turn in the last one alone.
    """
    declared = (config.eos_token_id for config in configs)
    also = [i for found in declared for i in (found if isinstance(found, list) else [found])]
    stops = [i for i in (tokenizer.eos_token_id, *also) if i is not None]
    if not stops:
        raise ModelError(f"{tokenizer.name_or_path}: the tokenizer names no end-of-sequence token, so a response could never end")
    return TemplateCodec(tokenizer, tuple(dict.fromkeys(stops)))


def pick_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Precision) -> Precision:
    """``auto``: bfloat16 where it was found to be faster; of two processors that both have instructions for it, one may be and one not."""
    if precision != "auto":
        return precision
    return "bfloat16" if kernels.chosen().bfloat16 else "float32"


def autocast(precision: Precision, device: torch.device) -> Any:
    """Matrix products in bfloat16 with float32 masters, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` [n] put where ``mask`` [b t] is True; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
