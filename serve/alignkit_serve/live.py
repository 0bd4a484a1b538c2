"""``policy: {kind: live}``: a run that begins with whichever policy a server answers with. Torch-free; the run notes which one it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.api import Codec, DatabaseUrl, ModelError, Policy, PolicySpec, setting
from alignkit.models.config import Precision, TuningConfig


@dataclass(frozen=True, kw_only=True)
class LiveConfig:
    """The policy that is live when the run begins; later changes of the server's do not concern it."""

    store: DatabaseUrl = setting(doc="the server's store: sqlite:///FILE, or postgresql://HOST/NAME with the password in ~/.pgpass")
    tuning: TuningConfig = setting(TuningConfig(), "which weights are trained")
    precision: Precision = setting("auto", "of the arithmetic; masters are always float32. auto: bfloat16 where it is found to be faster")


def _prepare(config: LiveConfig, folder: Path) -> Path:
    from alignkit_serve.store import Store, policies

    with Store.open(config.store) as store:
        live = store.read(policies.live)
    if live is None:
        raise ModelError(f"no policy is live in {config.store}; serve one (alignkit serve RUN), or name the policy's own folder")
    path = Path(live.path)
    if not (path / "config.json").is_file():
        raise ModelError(f"the live policy {live.name} was in {path}, where it is not any more; put it back, or serve another")
    return path


def _load(config: LiveConfig, folder: Path, trainable: bool, seed: int) -> Policy:
    from alignkit.models.causal_lm import load

    return load(folder, tuning=config.tuning, precision=config.precision, trainable=trainable, seed=seed)


def _load_scalar(config: LiveConfig, folder: Path, trainable: bool, seed: int) -> Any:
    from alignkit.models.scalar import load_scalar

    return load_scalar(folder, tuning=config.tuning, precision=config.precision, trainable=trainable, seed=seed)


def _codec(config: LiveConfig, folder: Path | None) -> Codec:
    from alignkit.models.source import codec_of_folder

    return codec_of_folder(folder if folder is not None else _prepare(config, Path()))


LIVE_POLICY = PolicySpec(
    kind="live",
    summary="the policy that a server answers with",
    config=LiveConfig,
    prepare=_prepare,
    load=_load,
    load_scalar=_load_scalar,
    codec=_codec,
)
