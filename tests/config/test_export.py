"""The schema told to others: JSON schema for editors, the reference for people, and what a run will take."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit.config import configuration_markdown, estimate, json_schema, load_config
from alignkit.registry import Registry, find_plugins

ROOT = Path(__file__).parents[2]
REGISTRY = find_plugins()
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": int | float,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value is valid by the part of JSON schema that the export uses."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    for many in ("anyOf", "oneOf"):
        if many in schema and sum(fits(value, option, root) for option in schema[many]) != 1:
            return False
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return False
    if "type" in schema and (not isinstance(value, TYPES[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean")):
        return False
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return False
    if isinstance(value, list):
        return all(fits(item, schema["items"], root) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        properties = schema["properties"]
        return set(schema["required"]) <= set(value) <= set(properties) and all(fits(value[k], properties[k], root) for k in value)
    return True


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_the_json_schema_takes_our_configs(config: Path) -> None:
    schema = json.loads(json.dumps(json_schema(REGISTRY)))
    values = yaml.safe_load(config.read_text())
    assert fits(values, schema, schema)
    assert not fits(values | {"sede": 1}, schema, schema)
    assert not fits(values | {"seed": "1"}, schema, schema)
    assert not fits(values | {"policy": {"kind": "nope"}}, schema, schema)


def test_the_json_schema_carries_ranges_defaults_and_meanings() -> None:
    seed = json_schema(REGISTRY)["properties"]["seed"]
    assert (seed["type"], seed["minimum"], seed["default"]) == ("integer", 0, 0)
    assert seed["description"]


def test_an_empty_registry_still_has_a_schema() -> None:
    assert json_schema(Registry(()))["$defs"]["Tracker"] == {"oneOf": []}


def test_the_configuration_reference_is_up_to_date() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == configuration_markdown(REGISTRY), "run `make docs`"


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in configuration_markdown(REGISTRY).splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert [row for row in rows if row.rstrip(" |").count("|") < 4] == []


def estimated(tmp_path: Path, model: str, *overrides: str) -> str:
    settings = ["policy.kind=causal_lm", f"policy.model={model}", *overrides]
    return str(estimate(load_config(ROOT / "configs" / "smoke.yaml", settings, REGISTRY)))


def safetensors(path: Path, *shapes: list[int]) -> None:
    header = json.dumps({"__metadata__": {}, **{f"w{i}": {"dtype": "F32", "shape": shape} for i, shape in enumerate(shapes)}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_the_weights_of_a_folder_are_counted_from_its_headers(tmp_path: Path) -> None:
    safetensors(tmp_path / "a.safetensors", [1000, 1000], [1000])
    safetensors(tmp_path / "b.safetensors", [99, 1000, 1000])
    text = estimated(tmp_path, str(tmp_path))
    assert "100 million parameters, float32, all weights" in text
    # 0.4 GB of weights: policy and critic at four times that, a reference and a reward model.
    assert "memory 4.0 GB in the largest stage (ppo: policy and critic" in text
    # Adapters are 2% of the weights, and the reference is the policy without them.
    assert "memory 1.2 GB" in estimated(tmp_path, str(tmp_path), "policy.tuning={kind: lora}")


@pytest.mark.parametrize("model", ["nowhere", "nowhere.gguf", "package:nope_nope/x.gguf", "package:__main__/x", "a" * 5000])
def test_a_model_that_cannot_be_read_has_no_estimate(model: str, tmp_path: Path) -> None:
    assert "unknown" in estimated(tmp_path, model)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 4) + b"{..}", struct.pack("<Q", 2) + b"[]"])
def test_a_broken_file_has_no_estimate(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert "unknown" in estimated(tmp_path, str(tmp_path))
