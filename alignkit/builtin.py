"""The core's own parts, declared like any plugin's. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkit.api import Codec, Context, DataSpec, EvaluatorSpec, Policy, PolicySpec, RewardSource, RewardSpec, hookimpl
from alignkit.data.sources import DATA_SPECS
from alignkit.evaluate import TEXT_LOSS, WIN_RATE
from alignkit.models.config import CausalLMConfig, TinyLMConfig
from alignkit.rewards import MixConfig, PythonConfig


def _prepare_causal_lm(config: CausalLMConfig, folder: Path) -> Path:
    from alignkit.models.source import prepare

    return prepare(config, folder)


def _prepare_tiny_lm(config: TinyLMConfig, folder: Path) -> Path:
    from alignkit.models.tiny import prepare

    return prepare(config, folder)


def _load(config: CausalLMConfig | TinyLMConfig, folder: Path, trainable: bool, seed: int) -> Policy:
    from alignkit.models.causal_lm import load

    return load(folder, tuning=config.tuning, precision=config.precision, trainable=trainable, seed=seed, trust_remote_code=_trusts(config))


def _load_scalar(config: CausalLMConfig | TinyLMConfig, folder: Path, trainable: bool, seed: int) -> Any:
    from alignkit.models.scalar import load_scalar

    return load_scalar(folder, tuning=config.tuning, precision=config.precision, trainable=trainable, seed=seed)


def _trusts(config: CausalLMConfig | TinyLMConfig) -> bool:
    return isinstance(config, CausalLMConfig) and config.trust_remote_code


def _codec(config: CausalLMConfig | TinyLMConfig, folder: Path | None) -> Codec:
    from alignkit.models.source import codec_of_folder, codec_of_model
    from alignkit.models.tiny import byte_codec

    if folder is not None:
        return codec_of_folder(folder, trust_remote_code=_trusts(config))
    return codec_of_model(config) if isinstance(config, CausalLMConfig) else byte_codec()


@hookimpl
def register_policies() -> list[PolicySpec]:
    """Transformers models, and tiny random ones."""
    return [
        PolicySpec(
            kind="causal_lm",
            summary="a causal language model: a transformers folder, a hub id, or GGUF",
            config=CausalLMConfig,
            prepare=_prepare_causal_lm,
            load=_load,
            load_scalar=_load_scalar,
            codec=_codec,
        ),
        PolicySpec(
            kind="tiny_lm",
            summary="a tiny random model made from a seed, for tests",
            config=TinyLMConfig,
            prepare=_prepare_tiny_lm,
            load=_load,
            load_scalar=_load_scalar,
            codec=_codec,
        ),
    ]


@hookimpl
def register_data_sources() -> list[DataSpec]:
    """Files of rows."""
    return list(DATA_SPECS)


@hookimpl
def register_rewards() -> list[RewardSpec]:
    """Functions, and mixes of sources."""
    return [
        RewardSpec(kind="python", summary="a Python function, by its import path", config=PythonConfig, build=_build_python),
        RewardSpec(kind="mix", summary="a weighted sum of reward sources, each logged", config=MixConfig, build=_build_mix),
    ]


def _build_python(config: PythonConfig, context: Context) -> RewardSource:
    from alignkit.rewards import PythonReward

    return PythonReward(config)


def _build_mix(config: MixConfig, context: Context) -> RewardSource:
    from alignkit.rewards import MixedReward

    return MixedReward({part.name: (part.weight, context.build_reward(part.source)) for part in config.parts})


@hookimpl
def register_evaluators() -> list[EvaluatorSpec]:
    """Comparisons of finished stages."""
    return [WIN_RATE, TEXT_LOSS]
