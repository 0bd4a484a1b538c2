"""Where rows are: JSON lines, Parquet, and folders saved by the ``datasets`` library. Torch-free at import."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from alignkit.errors import DataError
from alignkit.interfaces import DataSpec, Row
from alignkit.settings import FilePath, setting


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """Rows of one file."""

    path: FilePath = setting(doc="the file")
    limit: int = setting(0, "only this many rows, from the top; 0: all", at_least=0)


@dataclass(frozen=True, kw_only=True)
class DatasetsConfig:
    """Rows of a folder written by ``datasets.save_to_disk``."""

    path: FilePath = setting(doc="the folder")
    split: str = setting("train", "which split, where the folder holds several")
    limit: int = setting(0, "only this many rows, from the top; 0: all", at_least=0)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows read anew each time they are asked for."""

    path: str
    limit: int
    read: Callable[[str], Iterator[Row]]

    def rows(self) -> Iterable[Row]:
        """At least one row, in the order of the file."""
        found = list(islice(self.read(self.path), self.limit or None))
        if not found:
            raise DataError(f"{self.path}: there are no rows in it")
        return found


def _jsonl(path: str) -> Iterator[Row]:
    try:
        # Split as bytes, and not by splitlines(): U+2028 and its like may stand inside a JSON string.
        lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Row(_object(line, f"{path}:{number}"), f"{path}:{number}")


def _object(line: bytes, origin: str) -> dict[str, Any]:
    """The JSON object on a line."""
    text = line.decode(errors="replace")
    try:
        values = json.loads(line.decode())
        # An escape such as \ud83d is half a character, which no tokenizer takes.
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 text from byte {error.start + 1} of the line on; the row is {shown(text)}") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DataError(f"{origin}: {half} is half of a surrogate pair, and no character by itself; the row is {shown(text)}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}:{error.colno}: not JSON: {error.msg}; the row is {shown(text)}") from error
    except ValueError as error:
        raise DataError(f"{origin}: a number in it has more digits than can be read; the row is {shown(text)}") from error
    except RecursionError as error:
        raise DataError(f"{origin}: it is nested more deeply than can be read; the row is {shown(text)}") from error
    if not isinstance(values, dict):
        raise DataError(f'{origin}: a row must be a JSON object, such as {{"prompt": ...}}; found {shown(text)}')
    return values


def parquet_rows(path: str) -> Iterator[Row]:
    """The rows of a Parquet file. Raises ``DataError`` for what is none."""
    import pyarrow as arrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path} row {number}")
    except UnicodeDecodeError as error:
        # A Parquet string is UTF-8 by definition, but writers do not check it and neither does the reader of the file.
        raise DataError(f"{path} row {number + 1} or after: not UTF-8 text: {error}") from error
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as a Parquet file: {shown(str(error))}") from error


def _datasets(config: DatasetsConfig) -> Callable[[str], Iterator[Row]]:
    def read(path: str) -> Iterator[Row]:
        import datasets

        try:
            loaded = datasets.load_from_disk(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a folder written by datasets.save_to_disk: {shown(str(error))}") from error
        if isinstance(loaded, datasets.DatasetDict):
            if config.split not in loaded:
                raise DataError(f'{path}: there is no split "{config.split}"; it holds {", ".join(loaded)}')
            loaded = loaded[config.split]
        for number, values in enumerate(loaded, start=1):
            yield Row(values, f"{path} row {number}")

    return read


def shown(text: str, width: int = 200) -> str:
    """Text for an error message: on one line, at most ``width`` characters of it."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[:width] + "..."


DATA_SPECS = (
    DataSpec(kind="jsonl", summary="JSON lines", config=FileConfig, build=lambda config: _Rows(config.path, config.limit, _jsonl)),
    DataSpec(
        kind="parquet", summary="a Parquet file", config=FileConfig, build=lambda config: _Rows(config.path, config.limit, parquet_rows)
    ),
    DataSpec(
        kind="datasets",
        summary="a folder of the datasets library",
        config=DatasetsConfig,
        build=lambda config: _Rows(config.path, config.limit, _datasets(config)),
    ),
)
