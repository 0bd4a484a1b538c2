"""An export's rows as a Parquet file that ``datasets`` and TRL read as they are: what TRL knows first, what tells of the origin after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit_serve.dataset.filters import Form, Shape
from alignkit_serve.dataset.records import Made

_AT_ONCE = 10_000


def write(path: Path, shape: Shape, form: Form, rows: Sequence[Made]) -> None:
    """Write the file and wait until it is on the disk. The same rows make the same bytes."""
    from pyarrow import parquet

    from alignkit.files import sync_file

    schema = _schema(shape, form)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for begin in range(0, len(rows), _AT_ONCE):
            writer.write_batch(_batch([record(row) for row in rows[begin : begin + _AT_ONCE]], schema))
    sync_file(path)


def record(row: Made) -> dict[str, Any]:
    """A row with all its columns."""
    return {
        **row.values,
        "weight": row.weight,
        "origin": row.origin,
        "feedback_ids": sorted(row.feedback),
        "policies": sorted(row.policies),
        "inferences": sorted(row.inferences),
    }


def inferences(path: Path) -> Iterator[str]:
    """The inferences that the rows of a file are made of, each once."""
    from pyarrow import parquet

    seen: set[str] = set()
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["inferences"]):
            found = {id for ids in batch.column(0).to_pylist() for id in ids}
            yield from sorted(found - seen)
            seen |= found


def _batch(records: Sequence[Mapping[str, Any]], schema: Any) -> Any:
    import pyarrow

    return pyarrow.RecordBatch.from_pylist(list(records), schema=schema)


def _schema(shape: Shape, form: Form) -> Any:
    import pyarrow as arrow

    text, texts = arrow.string(), arrow.list_(arrow.string())
    said = text if form == "text" else arrow.list_(arrow.struct([("role", text), ("content", text)]))
    columns: dict[Shape, dict[str, Any]] = {
        "demonstrations": {"completion": said},
        "rankings": {
            "responses": texts,
            "ranks": arrow.list_(arrow.int64()),
            "labeler": text,
            "margin": arrow.float64(),
            "off_policy": arrow.bool_(),
        },
        "comparisons": {"chosen": said, "rejected": said, "margin": arrow.float64()},
        "labels": {"completion": said, "label": arrow.bool_()},
        "prompts": {},
    }
    origin = {"weight": arrow.float64(), "origin": text, "feedback_ids": texts, "policies": texts, "inferences": texts}
    return arrow.schema(list({"prompt": said, **columns[shape], **origin}.items()))
