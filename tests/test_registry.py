"""Plugins are found, checked one by one, and explained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignkit.api import DataSource, DataSpec, RewardSource, RewardSpec, hookimpl
from alignkit.config import load_config
from alignkit.errors import ConfigError, PluginError
from alignkit.listing import describe_plugins
from alignkit.registry import PluginFailure, Registry, declared_specs, find_plugins


@dataclass(frozen=True)
class NoSettings:
    """Nothing to set."""


def reward_spec(kind: str, **changes: Any) -> RewardSpec:
    return RewardSpec(**{"kind": kind, "summary": f"about {kind}", "config": NoSettings, "build": lambda config, context: None, **changes})


def plugin(*specs: Any, hook: str = "register_rewards") -> SimpleNamespace:
    def register() -> list[Any]:
        return list(specs)

    return SimpleNamespace(**{hook: hookimpl(register, specname=hook)})


Install = Callable[..., None]

HEADER = """
from dataclasses import dataclass
from alignkit.api import RewardSpec, hookimpl

@dataclass(frozen=True)
class Config:
    pass

def spec(kind, **more):
    return RewardSpec(kind=kind, summary=f"about {kind}", config=Config, build=print, **more)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a distribution that importlib.metadata finds: one module, one entry point."""

    def install(package: str, source: str, version: str = "1.0") -> None:
        module = package.replace("-", "_")
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(HEADER + source)
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[alignkit]\n{module}_plugin = {module}\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    return install


def test_a_plugin_is_found_with_its_package_and_version(install: Install) -> None:
    install("zeta-short", "@hookimpl\ndef register_rewards():\n    return [spec('zeta_short')]\n", version="3.1")
    registry = find_plugins()
    assert registry.reward("zeta_short").summary == "about zeta_short"
    found = next(plugin for plugin in registry.plugins if plugin.package == "zeta-short")
    assert (found.name, found.version) == ("zeta_short_plugin", "3.1")
    assert "zeta_short" in registry.specs(RewardSource)
    assert "zeta_short" not in registry.specs(DataSource)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import module_that_is_not_there", "ModuleNotFoundError: No module named 'module_that_is_not_there'"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("x = (", "SyntaxError"),
        ("@hookimpl\ndef register_rewards():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
        ("@hookimpl\ndef register_rewards(app):\n    return []", "PluginValidationError"),
    ],
)
def test_a_broken_plugin_is_recorded_and_the_others_work(install: Install, source: str, error: str) -> None:
    install("zeta-broken", source)
    install("zeta-fine", "@hookimpl\ndef register_rewards():\n    return [spec('zeta_fine')]\n")
    registry = find_plugins()
    [failure] = [failure for failure in registry.failures if failure.package == "zeta-broken"]
    assert error in failure.error
    assert failure.name == "zeta_broken_plugin"
    assert "pip uninstall zeta-broken" in failure.remedy
    assert registry.reward("zeta_fine").kind == "zeta_fine"
    with pytest.raises(PluginError, match="zeta_broken_plugin \\(package zeta-broken\\)"):
        registry.reward("zeta_broken")


def test_a_kind_of_two_packages_belongs_to_neither(install: Install) -> None:
    for package in ("zeta-one", "zeta-two"):
        install(package, "@hookimpl\ndef register_rewards():\n    return [spec('zeta_twice')]\n")
    registry = find_plugins()
    assert "zeta_twice" not in registry.specs(RewardSource)
    [clash] = [failure for failure in registry.failures if "zeta_twice" in failure.error]
    assert clash.package == "zeta-one, zeta-two"
    with pytest.raises(PluginError, match=r'"zeta_twice" is declared by zeta-one 1\.0 .* and zeta-two 1\.0 .*; uninstall all but one'):
        registry.reward("zeta_twice")


def test_a_config_that_uses_a_clashing_kind_is_refused_with_both_packages(install: Install, tmp_path: Path) -> None:
    for package in ("zeta-one", "zeta-two"):
        install(package, "@hookimpl\ndef register_trackers():\n    from alignkit.api import TrackerSpec\n"
                "    return [TrackerSpec(kind='zeta_twice', summary='', config=Config, build=print)]\n")  # fmt: skip
    config = tmp_path / "clash.yaml"
    config.write_text("name: x\npolicy: {kind: tiny_lm}\nstages: []\ntrackers: [{kind: zeta_twice}]\n")
    with pytest.raises(ConfigError, match=r"clash\.yaml:4:.*zeta-one 1\.0 .* and zeta-two 1\.0"):
        load_config(config, (), find_plugins())


def test_the_core_does_not_win_against_a_package_that_takes_its_kind(install: Install) -> None:
    install("zeta-jsonl", "from alignkit.api import DataSpec\n@hookimpl\ndef register_data_sources():\n"
            "    return [DataSpec(kind='jsonl', summary='mine', config=Config, build=print)]\n")  # fmt: skip
    with pytest.raises(PluginError, match=r"declared by alignkit .* and zeta-jsonl"):
        find_plugins().data("jsonl")


def test_the_same_kind_under_two_interfaces_is_no_clash() -> None:
    data = DataSpec(kind="twin", summary="rows", config=NoSettings, build=lambda config: None)
    registry = Registry.of(plugin(reward_spec("twin")), plugin(data, hook="register_data_sources"))
    assert registry.failures == ()
    assert registry.reward("twin").summary == "about twin"
    assert registry.data("twin").summary == "rows"


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        (plugin(reward_spec("")), "`kind` is ''"),
        (plugin(reward_spec("a", api=2)), 'written for plugin API 2; alignkit .* speaks plugin API 1'),
        (plugin(reward_spec("a", config=dict)), "@dataclass\\(frozen=True\\)"),
        (plugin(reward_spec("a", config=dataclass(type("Loose", (), {})))), "@dataclass\\(frozen=True\\)"),
        (plugin(reward_spec("a"), reward_spec("a")), 'declares the kind "a" 2 times'),
        (plugin(reward_spec("a"), hook="register_optimizers"), "each item must be a OptimizerSpec"),
        (plugin("a"), "each item must be a RewardSpec"),
        (plugin(reward_spec("a"), hook="register_reward"), 'no hook "register_reward" \\(did you mean "register_rewards"'),
        (SimpleNamespace(register_rewards=lambda: []), "implements no hook"),
        (SimpleNamespace(register_rewards=hookimpl(lambda: reward_spec("a"), specname="register_rewards")), "a list of RewardSpec"),
    ],
)  # fmt: skip
def test_a_declaration_that_cannot_be_accepted_says_why(declaration: object, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        declared_specs(declaration)


def test_an_optional_hook_of_a_later_alignkit_is_left_alone() -> None:
    def register_later() -> list[Any]:
        return []

    later = SimpleNamespace(
        **vars(plugin(reward_spec("a"))), register_later=hookimpl(register_later, optionalhook=True)
    )  # fmt: skip
    assert [spec.kind for spec in declared_specs(later)[RewardSource]] == ["a"]


def test_an_unknown_kind_gets_a_suggestion_and_the_list() -> None:
    registry = Registry.of(plugin(reward_spec("lexicon"), reward_spec("mix")))
    with pytest.raises(PluginError) as caught:
        registry.reward("lexicom")
    assert str(caught.value) == 'there is no reward source of kind "lexicom" (did you mean "lexicon"?); installed: lexicon, mix'


def test_the_listing_names_kinds_packages_failures_and_remedies() -> None:
    registry = Registry.of(plugin(reward_spec("lexicon")))
    text = describe_plugins(Registry(registry.plugins, (PluginFailure("torn", "acme-torn", "ImportError: x", "pip uninstall acme-torn"),)))
    assert "reward sources\n  lexicon  SimpleNamespace unpackaged  about lexicon\n" in text
    assert "policies\n  none\n" in text
    assert text.endswith("failed to load\n  torn (package acme-torn): ImportError: x\n    to repair: pip uninstall acme-torn")
