"""A round as it is told to the server, once it is over."""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from alignkit_serve.judgements import Id
from alignkit_serve.store.rounds import Round

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
MetricName = Annotated[str, StringConstraints(max_length=128)]
_DEPTH = 8


def _finite(value: Any, depth: int = 0) -> Any:
    if depth > _DEPTH:
        raise ValueError(f"it is deeper than {_DEPTH} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number; leave it out, or send null")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        _finite(each, depth + 1)
    return value


class NewRound(BaseModel):
    """``POST /v1/rounds``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"\S")]
    config_sha256: Sha256
    git_sha: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{7,64}$")] | None = None
    parent_policy_id: Id
    child_policy_id: Id
    promote: bool
    exports: Annotated[list[Id], Field(max_length=64)]
    metrics: Annotated[dict[MetricName, Any], Field(max_length=256), AfterValidator(_finite)] = Field(
        description="what the gate found: finite numbers, strings, and objects of them"
    )
    started_at: Annotated[AwareDatetime, Field(strict=False)]
    finished_at: Annotated[AwareDatetime, Field(strict=False)]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.finished_at < self.started_at:
            raise ValueError("finished_at is before started_at")
        return self

    def round(self, id: str) -> Round:
        """As it is stored."""
        return Round(
            id=id,
            name=self.name,
            config_sha256=self.config_sha256,
            git_sha=self.git_sha,
            parent_policy_id=self.parent_policy_id,
            child_policy_id=self.child_policy_id,
            promoted=self.promote,
            metrics=self.metrics,
            started_at=self.started_at,
            finished_at=self.finished_at,
            exports=tuple(self.exports),
        )
