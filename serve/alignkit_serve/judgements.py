"""Feedback as it is sent: nine kinds, each with its own value. What is not known is refused, and so is whatever would say who speaks."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from alignkit_serve.schemas import Number
from alignkit_serve.store.annotators import Author
from alignkit_serve.store.feedback import Kind, Opinion, TargetType
from alignkit_serve.store.metrics import Level, Metric, Type

Id = Annotated[str, StringConstraints(min_length=1, max_length=128)]
IdempotencyKey = Annotated[str, StringConstraints(min_length=1, max_length=255)]
Remark = Annotated[str, StringConstraints(max_length=10_000)]
Words = Annotated[str, StringConstraints(max_length=100_000, pattern=r"\S")]
"""An answer: something must be in it."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]

Flag = Literal[
    "fails_instruction",
    "inappropriate_for_assistant",
    "hallucination",
    "breaks_constraint",
    "sexual",
    "violent",
    "encourages_violence",
    "denigrates_protected_class",
    "harmful_advice",
    "opinion",
    "moral_judgement",
]
"""What InstructGPT's labellers noted of an answer (Ouyang et al. 2022, table 3), each as a complaint."""


def _past(at: datetime) -> datetime:
    if not datetime(2000, 1, 1, tzinfo=UTC) <= at <= datetime.now(UTC) + timedelta(minutes=5):
        raise ValueError("it is no time in this century that has passed")
    return at


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Presentation(_Strict):
    """How it was shown to the one who judged."""

    slots: Annotated[list[Id], Field(max_length=16)] | None = Field(None, description="completion ids, in the order in which they stood")
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    ui_version: Annotated[str, StringConstraints(max_length=64)] | None = None
    dwell_ms: Annotated[int, Field(ge=0, lt=1 << 53)] | None = Field(None, description="how long it was looked at")


class _Judgement(_Strict):
    rationale: Remark | None = None
    presentation: Presentation | None = None
    occurred_at: Annotated[AwareDatetime, Field(strict=False), AfterValidator(_past)] | None = None


class ThumbValue(_Judgement):
    """Good or not."""

    kind: Literal["thumb"]
    value: Literal["up", "down"]


class RatingValue(_Judgement):
    """How good, 1 to 7."""

    kind: Literal["rating"]
    value: Annotated[int, Field(ge=1, le=7)]


class MetricValue(_Judgement):
    """A value of a metric that an admin defined."""

    kind: Literal["metric"]
    value: bool | Annotated[int, Field(gt=-(1 << 53), lt=1 << 53)] | Number | Annotated[str, StringConstraints(max_length=64)]


class Choice(_Strict):
    """Which of two completions is the better one; ``strength``: how much."""

    a: Id
    b: Id
    choice: Literal["a", "b", "tie", "both_bad"]
    strength: Annotated[int, Field(ge=1, le=3)] | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.a == self.b:
            raise ValueError("a and b are the same completion")
        if self.strength is not None and self.choice not in ("a", "b"):
            raise ValueError(f"{self.choice} has no strength; leave it out")
        return self


class PreferenceValue(_Judgement):
    """Two completions compared."""

    kind: Literal["preference"]
    value: Choice


def _ranks(tiers: list[list[str]]) -> list[list[str]]:
    ids = [id for tier in tiers for id in tier]
    if not 2 <= len(ids) <= 9:
        raise ValueError(f"{len(ids)} completions are ranked; allowed: 2 to 9")
    if len(set(ids)) < len(ids):
        raise ValueError("a completion is ranked twice")
    return tiers


class RankingValue(_Judgement):
    """Completions from the best to the worst; those in one list are equally good."""

    kind: Literal["ranking"]
    value: Annotated[
        list[Annotated[list[Id], Field(min_length=1, max_length=9)]], Field(min_length=1, max_length=9), AfterValidator(_ranks)
    ]


class CorrectionValue(_Judgement):
    """What the answer should have been."""

    kind: Literal["correction"]
    value: Words


class DemonstrationValue(_Judgement):
    """What a good answer would be, whatever was answered."""

    kind: Literal["demonstration"]
    value: Words


class CommentValue(_Judgement):
    """Something for people to read."""

    kind: Literal["comment"]
    value: Annotated[str, StringConstraints(max_length=10_000, pattern=r"\S")]


class FlagValue(_Judgement):
    """Something is wrong with it."""

    kind: Literal["flag"]
    value: Flag


class Thumb(ThumbValue):
    """A thumb on something."""

    target_type: Literal["completion", "inference", "episode"]
    target_id: Id


class Rating(RatingValue):
    """A rating of something."""

    target_type: Literal["completion", "inference", "episode"]
    target_id: Id


class Measured(MetricValue):
    """A metric's value for something of the metric's level."""

    metric: Name
    version: Annotated[int, Field(ge=1, lt=1 << 53)] | None = Field(None, description="the newest")
    target_type: TargetType
    target_id: Id


class Preference(PreferenceValue):
    """Two completions of one group, or of one inference, compared."""

    target_type: Literal["group", "inference"]
    target_id: Id


class Ranking(RankingValue):
    """Completions of one group, or of one inference, ranked."""

    target_type: Literal["group", "inference"]
    target_id: Id


class Correction(CorrectionValue):
    """A completion corrected."""

    target_type: Literal["completion"]
    target_id: Id


class Demonstration(DemonstrationValue):
    """An answer to the prompt of an inference, or of a group."""

    target_type: Literal["inference", "group"]
    target_id: Id


class Comment(CommentValue):
    """A comment on anything."""

    target_type: TargetType
    target_id: Id


class Flagged(FlagValue):
    """A completion, or a whole inference, flagged."""

    target_type: Literal["completion", "inference"]
    target_id: Id


Judgement = Annotated[
    Thumb | Rating | Measured | Preference | Ranking | Correction | Demonstration | Comment | Flagged, Field(discriminator="kind")
]
"""``POST /v1/feedback``."""

Revision = Annotated[
    ThumbValue
    | RatingValue
    | MetricValue
    | PreferenceValue
    | RankingValue
    | CorrectionValue
    | DemonstrationValue
    | CommentValue
    | FlagValue,
    Field(discriminator="kind"),
]
"""``PATCH /v1/feedback/{id}``: the new opinion, of the same kind and on the same target."""

KINDS: tuple[Kind, ...] = ("thumb", "rating", "metric", "preference", "ranking", "correction", "demonstration", "comment", "flag")


class Batch(_Strict):
    """``POST /v1/feedback:batch``: what each item is, is looked at one by one, so that a wrong one does not keep the others out."""

    items: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=500)] = Field(
        description="as for POST /v1/feedback, each with its idempotency_key"
    )


class MetricDefinition(_Strict):
    """``POST /v1/feedback/metrics``: a metric, or a new version of one."""

    name: Name
    type: Type
    level: Level
    lo: Number | None = None
    hi: Number | None = None
    categories: Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=64)]], Field(max_length=64)] | None = None
    optimize: Literal["max", "min"] | None = None

    def metric(self, id: str) -> Metric:
        """As it is stored."""
        return Metric(id=id, **self.model_dump())


class TokenRequest(_Strict):
    """``POST /v1/feedback/tokens``: for whose browser, and for which of the key's answers."""

    inference_id: Id
    user: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = Field(
        None, description="your name for the end user; without one, whom the inference was asked for"
    )
    seconds: Annotated[int, Field(ge=1, le=24 * 3600)] = Field(3600, description="how long it is good for")


def opinion(said: Any, author: Author, within: str | None, idem_key: str | None, **about: Any) -> Opinion:
    """What a ``Judgement`` says, and who says it. ``about``: its target, for a ``Revision``, which names none."""
    value = said.value.model_dump(exclude_none=True) if isinstance(said, PreferenceValue) else said.value
    target: Mapping[str, Any] = about or {"target_type": said.target_type, "target_id": said.target_id}
    return Opinion(
        author=author,
        within=within,
        idem_key=idem_key,
        kind=said.kind,
        value=value,
        metric=(said.metric, said.version) if isinstance(said, Measured) else None,
        rationale=said.rationale,
        presentation=said.presentation.model_dump(exclude_none=True) if said.presentation else None,
        occurred_at=said.occurred_at,
        **target,
    )
