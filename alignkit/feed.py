"""What feeds a stage's optimizer: rows read, checked, encoded and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.config.schema import StageConfig
from alignkit.data.encode import Encoded, encode_demonstrations, encode_prompts, encode_rankings
from alignkit.data.records import demonstrations, fingerprint, prompts, rankings
from alignkit.errors import DataError
from alignkit.interfaces import DataSource
from alignkit.settings import Component

if TYPE_CHECKING:
    from alignkit.registry import Registry

# By what an optimizer is fed with: from rows to records, and from records to token rows.
_FORMS: dict[str, tuple[Callable[[Any], Any], Callable[..., Encoded[Any]]]] = {
    "demonstrations": (demonstrations, encode_demonstrations),
    "rankings": (rankings, encode_rankings),
    "rollouts": (prompts, encode_prompts),
}


@dataclass(frozen=True, slots=True)
class Feed:
    """Encoded rows, held-out rows of the same form, and what the manifest says about both."""

    rows: Sequence[Any]
    validation: Sequence[Any]
    report: dict[str, Any]

    def hashes(self) -> dict[str, str]:
        """The sha256 of the rows."""
        return {f"{name}_sha256": report["sha256"] for name, report in self.report.items()}


def read_feed(registry: Registry, stage: StageConfig, form: str, codec: Any) -> Feed:
    """Everything the stage learns from. Raises ``DataError`` naming the file and line of what cannot be used."""
    source = stage.prompts if form == "rollouts" else stage.data
    assert source is not None
    rows, report = _read(registry, stage, form, source, codec)
    validation, held_out = _read(registry, stage, form, stage.validation, codec) if stage.validation else ((), None)
    return Feed(rows, validation, {"training": report} | ({"validation": held_out} if held_out else {}))


def _read(
    registry: Registry, stage: StageConfig, form: str, source: Component[DataSource], codec: Any
) -> tuple[Sequence[Any], dict[str, Any]]:
    to_records, encode = _FORMS[form]
    found = list(registry.data(source.kind).build(source.config).rows())
    encoded = encode(codec, to_records(found), max_length=stage.max_length, overlong=stage.overlong)
    if not encoded.rows:
        raise DataError(f"stage {stage.name}: none of the {len(found)} rows of its {form} can be used; look at max_length and overlong")
    return encoded.rows, {"kind": source.kind, "sha256": fingerprint(found), **encoded.report.as_json()}
