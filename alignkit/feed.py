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
    """Encoded rows, held-out rows of the same form, what the manifest says about both, and the template that they were encoded with."""

    rows: Sequence[Any]
    validation: Sequence[Any]
    report: dict[str, Any]
    template_hash: str

    def hashes(self) -> dict[str, str]:
        """The sha256 of the rows, and the template's."""
        return {f"{name}_sha256": report["sha256"] for name, report in self.report.items()} | {"template_hash": self.template_hash}

    def border(self) -> str | None:
        """What to say where a prompt and what follows share a token; None where none does."""
        if not (merged := self.report["training"]["merged"]):
            return None
        return (
            f"in {merged} of {len(self.rows)} rows the end of the prompt and the beginning of the completion are one token, which no "
            "rollout will hold; let completions begin with the blank (the manifest names the rows)"
        )


def read_feed(registry: Registry, stage: StageConfig, form: str, codec: Any) -> Feed:
    """Everything the stage learns from. Raises ``DataError`` naming the file and line of what cannot be used."""
    source = stage.prompts if form == "rollouts" else stage.data
    assert source is not None
    rows, report = _read(registry, stage, form, source, codec)
    validation, held_out = _read(registry, stage, form, stage.validation, codec) if stage.validation else ((), None)
    reports = {"training": report} | ({"validation": held_out} if held_out else {})
    return Feed(rows, validation, reports, codec.template_hash)


def _read(
    registry: Registry, stage: StageConfig, form: str, source: Component[DataSource], codec: Any
) -> tuple[Sequence[Any], dict[str, Any]]:
    to_records, encode = _FORMS[form]
    found = list(registry.data(source.kind).build(source.config).rows())
    encoded = encode(codec, to_records(found), max_length=stage.max_length, overlong=stage.overlong)
    if not encoded.rows:
        raise DataError(f"stage {stage.name}: none of the {len(found)} rows of its {form} can be used; look at max_length and overlong")
    return encoded.rows, {"kind": source.kind, "sha256": fingerprint(found), **encoded.report.as_json()}
