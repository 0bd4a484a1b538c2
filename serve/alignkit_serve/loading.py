"""From an artifact to a warm engine: hashes first, then the weights, then the numbers."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from alignkit.models import kernels
from alignkit.models.causal_lm import CausalPolicy, load, resolve_precision
from alignkit.models.config import Precision, TuningConfig
from alignkit_serve.artifact import Artifact, ArtifactError, check_template, locate, probe, read_content
from alignkit_serve.http_engine import HttpEngine
from alignkit_serve.roster import Warm
from alignkit_serve.store.policies import PolicyVersion
from alignkit_serve.torch_engine import TorchEngine


async def load_policy(path: Path, *, max_rows: int) -> Warm:
    """The policy that ``path`` means, loaded and through its gates. Raises ``AlignkitError``."""
    artifact = await asyncio.to_thread(locate, path)
    content = await asyncio.to_thread(read_content, artifact)
    with ThreadPoolExecutor(1) as apart:
        # In a thread that ends. Each thread that computes keeps helpers of its own, and where there are more of all of them than cores,
        # OpenMP puts every one to sleep after every product: decoding then takes nearly twice as long.
        policy, precision = await asyncio.get_running_loop().run_in_executor(apart, _load, artifact)
    check_template(artifact, policy.codec.template_hash)
    if policy.context_tokens is None:
        raise ArtifactError(f"the model of type {policy.architecture!r} does not say how long a text it can read (max_position_embeddings)")
    engine = await TorchEngine(policy, policy.codec, context_tokens=policy.context_tokens, max_rows=max_rows).started()
    try:
        gap = await probe(artifact, precision, engine.score)
    except BaseException:
        await engine.close()
        raise
    version = PolicyVersion(
        id=content.version,
        name=f"{artifact.name}@{content.version}",
        base_model=policy.architecture,
        path=str(artifact.folder),
        manifest_sha256=artifact.manifest_sha256,
        tokenizer_sha256=content.tokenizer_sha256,
        template_sha256=policy.codec.template_hash,
        created_at=datetime.now(UTC),
    )
    gates = {
        "files": "as the manifest says" if artifact.manifest else "hashed; there is no manifest to compare with",
        "template": "the trainer's" if artifact.manifest else "not compared",
        "probe_gap_nats": gap,
    }
    return Warm(version, engine, gates)


async def load_upstream(path: Path, *, url: str, key: str | None) -> Warm:
    """The model that another server calls ``path``. Raises ``AlignkitError`` where it has none of that name."""
    model = str(path.relative_to(Path.cwd()) if path.is_absolute() else path)
    version = hashlib.sha256(f"{url} {model}".encode()).hexdigest()[:12]
    engine = await HttpEngine(url, model, api_key=key, policy_version=version).started()
    named = PolicyVersion(
        id=version, name=f"{model}@{version}", base_model=model, path=model, template_sha256="", created_at=datetime.now(UTC)
    )
    return Warm(named, engine, {"files": "another server's", "template": "another server's", "probe_gap_nats": None})


def _load(artifact: Artifact) -> tuple[CausalPolicy, Precision]:
    # An answer must not depend on who else asks, where the library has products for that.
    kernels.use(kernels.for_serving())
    # As its run asked for; `auto` is float32 on a CPU, since in bfloat16 the products of many rows are not those of a few.
    precision = resolve_precision(artifact.precision)
    # Code that comes with a model is not run: whoever can name a folder here must not be able to run anything.
    return load(artifact.folder, tuning=TuningConfig(), precision=precision, trainable=False, seed=0), precision
