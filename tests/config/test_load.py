"""A config file and its overrides become values with origins; whatever is wrong is told with its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignkit.api import RewardSource, RewardSpec, hookimpl
from alignkit.config import LoadedConfig, explain, load_config
from alignkit.errors import ConfigError
from alignkit.registry import PluginFailure, Registry, find_plugins
from alignkit_ppo import PPOConfig

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
REGISTRY = find_plugins()

SMALL = """\
name: small
policy: {kind: tiny_lm}
stages:
  - name: sft
    optimizer:
      kind: sft
      learning_rate: 1e-4
    data: {kind: jsonl, path: rows.jsonl}
"""


@dataclass(frozen=True)
class NoSettings:
    """Nothing to set."""


def loaded(tmp_path: Path, text: str = SMALL, overrides: Sequence[str] = (), registry: Registry = REGISTRY) -> LoadedConfig:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    return load_config(tmp_path / "c.yaml", overrides, registry)


def problems(tmp_path: Path, text: str = SMALL, overrides: Sequence[str] = (), registry: Registry = REGISTRY) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text, overrides, registry)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def test_a_config_becomes_frozen_dataclasses_with_defaults_where_nothing_was_written(tmp_path: Path) -> None:
    run = loaded(tmp_path).run
    assert (run.name, run.seed, run.checkpoint.keep) == ("small", 0, 2)
    [stage] = run.stages
    assert stage.optimizer is not None
    assert (stage.optimizer.kind, stage.optimizer.config.learning_rate, stage.optimizer.config.epochs) == ("sft", 1e-4, 1)


def test_a_data_file_is_found_beside_the_config_and_made_absolute(tmp_path: Path) -> None:
    [stage] = loaded(tmp_path).run.stages
    assert stage.data is not None
    assert stage.data.config.path == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("text", "folder", "origin"),
    [(SMALL, "runs/small", "default"), (SMALL + 'dir: "out/${name}-${seed}"\nseed: 3\n', "out/small-3", "{}:9:6")],
)
def test_the_folder_follows_from_the_name(tmp_path: Path, text: str, folder: str, origin: str) -> None:
    config = loaded(tmp_path, text)
    assert config.run.dir == folder
    assert config.origins["dir"] == origin.format(tmp_path / "c.yaml")


def test_every_value_knows_who_wrote_it(tmp_path: Path) -> None:
    config = loaded(tmp_path, overrides=["sft.max_length=64", "sft.optimizer={kind: sft, epochs: 2}"])
    origins = {key: config.origins[key].replace(f"{tmp_path}/", "") for key in config.origins}
    assert origins["name"] == "c.yaml:1:7"
    assert origins["sft.data.path"] == "c.yaml:8:31"
    assert origins["sft.max_length"] == "override"
    assert origins["sft.optimizer.epochs"] == "override"
    assert origins["sft.optimizer.learning_rate"] == "default", "the file's value went with the mapping that the override replaced"
    assert origins["checkpoint.keep"] == "default"


def test_a_word_from_a_list_and_an_empty_list_are_resolved_like_any_value(tmp_path: Path) -> None:
    config = loaded(tmp_path, SMALL + "    overlong: drop\ntrackers: []\n")
    assert (config.resolved["stages"][0]["overlong"], config.resolved["trackers"]) == ("drop", [])
    assert config.origins["sft.overlong"].endswith("c.yaml:9:15")


def test_the_resolved_config_is_json_and_the_same_each_time() -> None:
    first, second = (json.dumps(load_config(SMOKE, (), REGISTRY).resolved, allow_nan=False) for _ in range(2))
    assert first == second
    assert list(json.loads(first))[:3] == ["name", "dir", "seed"]


def test_the_resolved_config_is_a_config_that_resolves_to_itself(tmp_path: Path) -> None:
    resolved = load_config(SMOKE, (), REGISTRY).resolved
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    for stage in resolved["stages"]:
        for part in ("data", "validation", "prompts"):
            if stage[part]:
                target = tmp_path / stage[part]["path"]
                target.parent.mkdir(exist_ok=True)
                target.touch()
    for name in ("prompts.heldout.jsonl", "ratings.heldout.jsonl"):
        (tmp_path / "smoke" / name).touch()
    assert load_config(tmp_path / "again.yaml", (), REGISTRY).resolved == resolved


def test_explain_shows_each_value_with_its_origin(tmp_path: Path) -> None:
    lines = [" ".join(line.split()) for line in explain(loaded(tmp_path, overrides=["seed=5"])).splitlines()]
    assert "seed: 5 # override" in lines
    assert "sft.optimizer.epochs: 1 # default" in lines
    assert f"sft.optimizer.learning_rate: 0.0001 # {tmp_path}/c.yaml:7:22" in lines


@pytest.mark.parametrize(
    ("written", "seed"), [("0", 0), ("1_000", 1000), ("+3", 3)]
)  # fmt: skip
def test_whole_numbers(tmp_path: Path, written: str, seed: int) -> None:
    assert loaded(tmp_path, SMALL + f"seed: {written}\n").run.seed == seed


@pytest.mark.parametrize("written", ["'3'", "yes", "true", "3.0", "017", "0x1f", "1:30", "2020-01-01", "[3]", "{a: 3}", "", "null", "-1"])
def test_whatever_else_is_no_whole_number(tmp_path: Path, written: str) -> None:
    [problem] = problems(tmp_path, SMALL + f"seed: {written}\n")
    assert problem.startswith("c.yaml:9:")
    assert "seed is " in problem
    assert "allowed: a whole number" in problem


def test_an_anchor_repeats_a_value(tmp_path: Path) -> None:
    assert loaded(tmp_path, SMALL.replace("name: small", "name: &a small") + "dir: *a\n").run.dir == "small"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: &a {kind: tiny_lm, tuning: *a}\n", "c.yaml:1:9: this alias stands inside what it repeats"),
        ("a: {<<: {b: 1}}\n", "c.yaml:1:5: the merge key << is not supported"),
        ("a: !!python/object:os.system 1\n", "c.yaml:1:4: the tag !!python/object:os.system is not supported"),
        ("a: !!int x\n", 'c.yaml:1:4: "x" cannot be read as !!int'),
        ("a: [" * 2000 + "]" * 2000, "nested too deeply"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply"),
        ('a: "\\ud800"\n', "c.yaml:1:4: the text holds a character"),
        ("a: 1\n---\nb: 2\n", "c.yaml:2:1: not YAML"),
        ("? [a]\n: 1\n", "c.yaml:1:3: a key must be a word"),
        ("a: \0\n", "not YAML"),
        ("- a\n", "c.yaml:1:1: a config is a mapping of keys to values; found a list"),
    ],
)
def test_yaml_that_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    assert message in problems(tmp_path, text)[0]


def test_aliases_of_aliases_cannot_exhaust_the_reader(tmp_path: Path) -> None:
    names = "abcdefghij"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"] + [f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]" for m, n in pairwise(names)]
    [problem] = problems(tmp_path, "\n".join(lines))
    assert "more than 50000 values" in problem


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = SMALL.replace("tiny_lm}", "tiny_lm, layers: 0}").replace("1e-4", "fast").replace("kind: jsonl", "kind: json") + "sede: 1\n"
    places = [problem.split(": ")[0] for problem in problems(tmp_path, text)]
    assert places == ["c.yaml:2:33", "c.yaml:7:22", "c.yaml:8:18", "c.yaml:9:1"]


def test_an_override_may_choose_another_kind_which_forgets_the_keys_of_the_old_one(tmp_path: Path) -> None:
    config = loaded(tmp_path, SMALL.replace("tiny_lm", "tiny_lm, layers: 3"), ["policy.kind=causal_lm", "policy.model=x"])
    assert config.run.policy.kind == "causal_lm"
    assert config.resolved["policy"]["model"] == "x"


def test_a_later_override_wins_and_mappings_come_into_being(tmp_path: Path) -> None:
    run = loaded(tmp_path, overrides=["seed=3", "seed=4", "checkpoint.keep=5", "stages.0.max_length=9"]).run
    assert (run.seed, run.checkpoint.keep, run.stages[0].max_length) == (4, 5, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("sft..x=3", "write it as key=value"),
        ("sfd.max_length=3", 'there is no stage or key "sfd" (did you mean "sft"?)'),
        ("sft=3", "names a whole stage"),
        ("stages.9.max_length=3", "stages has no entry 9; it has 1, counted from 0"),
        ("stages.x=3", "stages has no entry x"),
        ("stages.²=3", "stages has no entry ²"),
        ("name.x=3", "name is a single value and has no keys"),
        ("seed=[1", "value:1:3: not YAML"),
        ("seed={a: 1, a: 2}", "stands here a second time"),
        ("3=4", "3 is not a key"),
        ("policy.layers.x=3", "policy.layers is a mapping; allowed: a whole number"),
        ("trackers.0.kind=x", "trackers is a mapping; allowed: a list"),
        ("dir=${nowhere}", "cannot be resolved: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, text: str, message: str) -> None:
    found = problems(tmp_path, overrides=[text])
    assert found[0].startswith(f'override "{text}": ')
    assert message in found[0]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("${nam}", "Interpolation key 'nam' not found"),
        ("${", "cannot be resolved"),
        ("${dir}", "Recursive interpolation"),
        ("${policy}", "it refers to a mapping or a list"),
        ("${oc.env:ALIGNKIT_NOT_SET}", "ALIGNKIT_NOT_SET"),
        ("${no:x}", "Unsupported interpolation type no"),
    ],
)
def test_an_interpolation_that_leads_nowhere(tmp_path: Path, written: str, message: str) -> None:
    [problem] = problems(tmp_path, SMALL + f'dir: "{written}"\n')
    assert problem.startswith(f'c.yaml:9:6: dir is "{written}", which cannot be resolved: ')
    assert message in problem


def smoke_problems(old: str, new: str, tmp_path: Path) -> list[str]:
    text = SMOKE.read_text()
    assert old in text
    (tmp_path / "smoke").symlink_to(SMOKE.parent / "smoke")
    return problems(tmp_path, text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("init: reward", "init: rewrd", 'which is not a stage (did you mean "reward"?)'),
        ("init: reward", "init: compare", "which does not come before this one"),
        ("init: reward", "init: ppo", "which does not come before this one"),
        ("init: reward", "init: sft", "which makes a policy; allowed: an earlier stage that makes a reward model (reward)"),
        ("stage: reward", "stage: sft", 'ppo.reward.stage is "sft", which makes a policy'),
        ("candidate: ppo", "candidate: reward", "which makes a reward model; allowed: an earlier stage that makes a policy (sft, ppo)"),
        ("start: sft", "start: reward", "which does not come before this one"),
        (
            "{kind: reward_model, stage: reward}",
            "{kind: mix, parts: [{name: a, source: {kind: reward_model, stage: sft}}]}",
            "parts.0.source.stage is",
        ),
    ],
)
def test_a_stage_refers_to_an_earlier_one_that_makes_what_it_needs(old: str, new: str, message: str, tmp_path: Path) -> None:
    [problem] = smoke_problems(old, new, tmp_path)
    assert message in problem


def test_a_mistake_inside_a_stage_is_not_held_against_those_that_refer_to_it(tmp_path: Path) -> None:
    [problem] = smoke_problems("kind: reward_model, epochs: 3", "kind: reward_model, epochs: 0", tmp_path)
    assert "reward.optimizer.epochs is 0" in problem


@pytest.mark.parametrize("name", ["seed", "model", "a/b", "3a", "", "a.b", "x" * 65])
def test_a_stage_cannot_have_just_any_name(name: str, tmp_path: Path) -> None:
    assert f'"{name}"' in problems(tmp_path, SMALL.replace("name: sft", f'name: "{name}"'))[0]


def test_a_kind_whose_plugin_failed_to_load_shows_the_package_and_the_cause(tmp_path: Path) -> None:
    registry = Registry(REGISTRY.plugins, (PluginFailure("acme", "acme-align", "ImportError: no acme", "pip uninstall acme-align"),))
    [problem] = problems(tmp_path, SMALL.replace("kind: sft", "kind: acme"), registry=registry)
    assert problem.startswith("c.yaml:6:13: sft.optimizer.kind: ")
    assert "acme (package acme-align): ImportError: no acme" in problem


def test_a_kind_of_two_plugins_names_both(tmp_path: Path) -> None:
    def plugin(name: str) -> Any:
        spec = RewardSpec(kind="twice", summary=name, config=NoSettings, build=lambda config, context: None)
        return type(name, (), {"register_rewards": staticmethod(hookimpl(lambda: [spec], specname="register_rewards"))})

    both = Registry.of(plugin("AcmeOne"), plugin("AcmeTwo"))
    registry = Registry((*REGISTRY.plugins, *both.plugins))
    assert "twice" not in registry.specs(RewardSource)
    text = SMALL + "    reward: {kind: twice}\n"
    assert any("AcmeOne" in problem and "AcmeTwo" in problem for problem in problems(tmp_path, text, registry=registry))


VALID = yaml.safe_load(SMOKE.read_text())
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["sft", "ppo", "reward", "${name}", "${", "???", "kind"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(["kind", "name", "stage"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def places_of(value: Any, key: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [key, *(place for name, child in children for place in places_of(child, (*key, name)))]


def refusal(path: Path, overrides: Sequence[str]) -> tuple[str, ...] | None:
    """Why the config is refused, None if it is not. Whatever else is raised fails the test that asks."""
    try:
        load_config(path, overrides, REGISTRY)
    except ConfigError as error:
        return error.problems
    return None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_config_brings_anything_but_a_config_error(data: st.DataObject, tmp_path: Path) -> None:
    values = json.loads(json.dumps(VALID))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(places_of(values)[1:] or [("name",)]))
        around = values
        for part in key[:-1]:
            around = around[part]
        change = data.draw(st.sampled_from(["drop", "replace", "insert"]))
        if change == "drop" and key[-1] in (around if isinstance(around, dict) else range(len(around))):
            del around[key[-1]]
        elif change == "insert" and isinstance(around, dict):
            around[data.draw(st.text(max_size=8))] = data.draw(ANYTHING)
        else:
            around[key[-1]] = data.draw(ANYTHING)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="replace")
    overrides = data.draw(st.lists(st.text(max_size=12) | st.sampled_from(["ppo.x=1", "3=4", "stages.1=", "name=${"]), max_size=2))
    assert refusal(tmp_path / "c.yaml", overrides) != ()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 1200), text=st.text(max_size=6))
def test_no_text_brings_anything_but_a_config_error(cut: int, text: str, tmp_path: Path) -> None:
    source = SMOKE.read_text()
    (tmp_path / "c.yaml").write_text(source[:cut] + text + source[cut:], encoding="utf-8", errors="replace")
    assert refusal(tmp_path / "c.yaml", ()) != ()


@pytest.mark.parametrize("key", PPOConfig.refused)
def test_filters_that_would_falsify_ratios_are_refused_with_the_reason(key: str) -> None:
    problems = refusal(SMOKE, [f"ppo.optimizer.{key}=1"])
    assert problems is not None
    (problem,) = problems
    assert (
        f"ppo.optimizer.{key} is refused: responses must be drawn from the very distribution whose log-probabilities are trained" in problem
    )
