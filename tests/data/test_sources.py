"""Files of rows: their order, where each row was, and one clear message for each way in which a file can be broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.data.records import fingerprint, rankings
from alignkit.data.sources import DATA_SPECS, DatasetsConfig, FileConfig
from alignkit.errors import DataError
from alignkit.interfaces import Row

SPECS = {spec.kind: spec for spec in DATA_SPECS}
ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}, {"prompt": "c", "n": 3}]


def read(kind: str, path: Path, **options: int | str) -> list[Row]:
    spec = SPECS[kind]
    return list(spec.build(spec.config(path=str(path), **options)).rows())


def jsonl(folder: Path, content: bytes) -> Path:
    (folder / "x.jsonl").write_bytes(content)
    return folder / "x.jsonl"


def test_json_lines_are_rows_with_their_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path, b'{"a": 1}\r\n\n  \n{"a": 2}')
    assert read("jsonl", path) == [Row({"a": 1}, f"{path}:1"), Row({"a": 2}, f"{path}:4")]


def test_a_byte_order_mark_and_a_line_separator_inside_a_text_are_no_trouble(tmp_path: Path) -> None:
    path = jsonl(tmp_path, '\ufeff{"a": "x\u2028y\u0085z"}\n'.encode())
    assert [row.values for row in read("jsonl", path)] == [{"a": "x\u2028y\u0085z"}]


def test_a_limit_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    path = jsonl(tmp_path, b'{"a": 1}\n{"a": 2}\nbroken\n')
    assert [row.values for row in read("jsonl", path, limit=2)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": }\n', 'x.jsonl:2:7: not JSON: Expecting value; the row is {"a": }'),
        (b'{"a": 1}\n{"a": "' + b"y" * 300 + b"\n", "x.jsonl:2:7: not JSON: Unterminated string starting at; the row is {"),
        (b"[1, 2]\n", 'x.jsonl:1: a row must be a JSON object, such as {"prompt": ...}; found [1, 2]'),
        (b"null\n", "x.jsonl:1: a row must be a JSON object"),
        (b'{"a": 1}\n\n{"a": "caf\xe9"}\n', 'x.jsonl:3: not UTF-8 text from byte 11 of the line on; the row is {"a": "caf\ufffd"}'),
        ('{"a": 1}\n'.encode("utf-16"), "x.jsonl:1: not UTF-8 text from byte 1 of the line on"),
        (b'{"a": "\\ud83d"}\n', r"x.jsonl:1: '\ud83d' is half of a surrogate pair, and no character by itself; the row is"),
        (b'{"a": ' + b"1" * 5000 + b"}\n", "x.jsonl:1: a number in it has more digits than can be read; the row is {"),
        (b'{"a": ' + b"[" * 200_000 + b"}\n", "x.jsonl:1: it is nested more deeply than can be read; the row is {"),
        (b"", "x.jsonl: there are no rows in it"),
        (b"\n \n", "x.jsonl: there are no rows in it"),
    ],
)
def test_a_broken_file_is_named_with_line_and_row(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read("jsonl", jsonl(tmp_path, content))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert len(str(caught.value)) < len(str(tmp_path)) + 320


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_a_file_that_is_not_there_is_an_error(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=str(tmp_path / "none")):
        read(kind, tmp_path / "none")


@pytest.mark.parametrize(("kind", "message"), [("jsonl", "Is a directory"), ("parquet", "Parquet"), ("datasets", "save_to_disk")])
def test_a_folder_of_something_else_is_an_error(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(kind, tmp_path)


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.Table.from_pylist(ROWS), path, row_group_size=2)
    assert read("parquet", path) == [Row(values, f"{path} row {i}") for i, values in enumerate(ROWS, start=1)]
    assert len(read("parquet", path, limit=1)) == 1


def test_parquet_text_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    text = arrow.Array.from_buffers(arrow.string(), 1, arrow.array([b"caf\xe9"], arrow.binary()).buffers())
    parquet.write_table(arrow.table({"prompt": text}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet row 1 or after: not UTF-8 text: .* byte 0xe9 in position 3"):
        read("parquet", tmp_path / "x.parquet")


def test_a_parquet_file_without_rows_is_an_error(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    parquet.write_table(arrow.table({"prompt": arrow.array([], arrow.string())}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: there are no rows in it"):
        read("parquet", tmp_path / "x.parquet")


def test_the_same_rows_are_the_same_records_and_fingerprint_in_every_kind_of_file(tmp_path: Path) -> None:
    import datasets
    import pyarrow as arrow
    from pyarrow import parquet

    ask, tell = {"role": "user", "content": "Q 🗼"}, {"role": "assistant", "content": "yes"}
    # No column is in all rows, nor is every key in all turns: a table fills the gaps with null.
    values: list[dict[str, Any]] = [
        {"prompt": [ask], "chosen": [tell], "rejected": [{**tell, "content": "no"}], "labeler": "kim", "margin": 0.5},
        {"id": "b", "chosen": [{**ask, "name": "Ada"}, tell], "rejected": [{**ask, "name": "Ada"}, {**tell, "content": "no"}]},
        {"prompt": [ask], "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "topic": {"name": "t", "page": 3}},
    ]
    columns = sorted({name for row in values for name in row})
    table = arrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in values])
    path = jsonl(tmp_path, "".join(json.dumps(row) + "\n" for row in values).encode())
    parquet.write_table(table, tmp_path / "x.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    found = [read("jsonl", path), read("parquet", tmp_path / "x.parquet"), read("datasets", tmp_path / "saved")]
    assert len({fingerprint(rows) for rows in found}) == 1
    lines, *others = (rankings(rows) for rows in found)
    assert others == [lines, lines]
    assert [ranking.responses for ranking in lines] == [("yes", "no"), ("yes", "no"), ("a", "b", "c")]
    assert lines[2].prompt.metadata == {"topic": {"name": "t", "page": 3}}


def test_what_is_not_parquet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be read as a Parquet file"):
        read("parquet", jsonl(tmp_path, b'{"prompt": "a"}\n' * 10))


def test_a_saved_dataset_is_read_with_its_split(tmp_path: Path) -> None:
    import datasets

    whole = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}]}])
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "two")
    b = {"messages": [{"role": "user", "content": "b"}]}
    assert read("datasets", tmp_path / "one")[1] == Row(b, f"{tmp_path}/one row 2")
    assert read("datasets", tmp_path / "two", split="test") == [Row(b, f"{tmp_path}/two row 1")]
    with pytest.raises(DataError, match='there is no split "dev"; it holds train, test'):
        read("datasets", tmp_path / "two", split="dev")


def test_the_kinds_and_their_configs() -> None:
    assert {kind: spec.config for kind, spec in SPECS.items()} == {"jsonl": FileConfig, "parquet": FileConfig, "datasets": DatasetsConfig}
