"""Who may import whom: the table, checked over every file, and what an import really brings along, checked in a fresh interpreter."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from alignkit.testing.imports import assert_light

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "alignkit").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
SERVE = sorted((ROOT / "serve").rglob("*.py"))
DECLARING = sorted(path.parent.name for folder in ("plugins", "serve") for path in (ROOT / folder).glob("*/__init__.py"))

LIGHT = [
    "types",
    "interfaces",
    "settings",
    "seeds",
    "checks",
    "errors",
    "hookspecs",
    "api",
    "context",
    "registry",
    "config",
    "listing",
    "scaffold",
    "builtin",
    "cli",
]
"""The core's modules that are torch-free at import."""

CONTRACT = {"api", "adamw"}
"""What a plugin's declaring module may import of the core."""

WORKSHOP = CONTRACT | {
    "ops",
    "loops",
    "learner",
    "models",
    "rollout",
    "data",
    "checkpoint",
    "checks",
    "seeds",
    "files",
    "average",
    "beside",
    "guards",
}
"""What a plugin may import of the core where the work is done."""

SERVING = {"api", "rollout", "models", "data", "evaluate", "guards", "registry", "config", "files", "threads", "alignkit"}
"""What the server may import of the core."""

OF_THE_CORE = {
    "ops": {"ops"},
    "types": set[str](),
    "settings": set[str](),
    "seeds": set[str](),
    "checks": {"errors", "interfaces", "types"},
    "errors": set[str](),
    "interfaces": {"types"},
    "hookspecs": {"interfaces"},
    "context": {"interfaces", "settings", "types"},
    "registry": {"hookspecs", "errors", "interfaces"},
    "config": {"config", "types", "interfaces", "settings", "errors", "registry"},
    "listing": {"registry"},
}
"""What the lowest modules may import of the core while they are imported."""

ONLY_IN = {"omegaconf": {"config"}, "click": {"cli"}, "pluggy": {"hookspecs", "registry"}, "pytest": set[str]()}
"""Libraries with one place of their own."""

When = Literal["import", "call", "typing"]


@dataclass(frozen=True)
class Import:
    """``module`` is imported in ``path`` at ``line``: with the file, when a function is called, or for the type checker only."""

    path: Path
    line: int
    module: str
    when: When

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"

    @property
    def package(self) -> str:
        """The top-level package."""
        return self.module.split(".")[0]

    @property
    def layer(self) -> str:
        """The part of the core: ``alignkit.models.tiny`` belongs to models."""
        return [*self.module.split("."), "alignkit"][1]


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT / "alignkit").parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[Import]:
    return walk(path, ast.parse(path.read_text(encoding="utf-8")), "import")


def walk(path: Path, node: ast.AST, when: When) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(path, child.lineno, alias.name, when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}:{child.lineno}: a relative import; write the full name"
            assert child.module is not None
            # `from alignkit import builtin` names a module; below the top, the module that is named decides the layer.
            names = [f"alignkit.{alias.name}" for alias in child.names] if child.module == "alignkit" else [child.module]
            yield from (Import(path, child.lineno, name, when) for name in names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from walk(path, child, "typing" if when == "typing" else "call")
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from walk(path, child, "typing")
        else:
            yield from walk(path, child, when)


def all_imports(paths: list[Path]) -> list[Import]:
    return [found for path in paths for found in imports_of(path)]


def is_standard(found: Import) -> bool:
    return found.package in sys.stdlib_module_names


def test_the_reader_of_imports_tells_when_each_happens(tmp_path: Path) -> None:
    source = "import torch\nfrom alignkit import builtin\nif TYPE_CHECKING:\n    import a\ndef f():\n    from alignkit.models import tiny\n"
    (tmp_path / "x.py").write_text(source)
    found = [(each.module, each.layer, each.when) for each in imports_of(tmp_path / "x.py")]
    assert found == [
        ("torch", "alignkit", "import"),
        ("alignkit.builtin", "builtin", "import"),
        ("a", "alignkit", "typing"),
        ("alignkit.models", "models", "call"),
    ]


def test_the_core_never_imports_a_plugin_or_the_server() -> None:
    assert [str(found) for found in all_imports(CORE) if found.package.startswith("alignkit_")] == []


def test_ops_imports_torch_only() -> None:
    found = [each for each in all_imports(CORE) if layer_of(each.path) == "ops" and not is_standard(each)]
    assert [str(each) for each in found if each.package != "torch" and each.layer != "ops"] == []


def test_the_lowest_modules_import_only_what_is_below_them() -> None:
    wrong = [
        str(found)
        for found in all_imports(CORE)
        if found.package == "alignkit" and found.when == "import" and layer_of(found.path) in OF_THE_CORE
        if found.layer not in {*OF_THE_CORE[layer_of(found.path)], "__version__", "alignkit"}
    ]
    assert wrong == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_has_one_place(library: str) -> None:
    assert [str(found) for found in all_imports(CORE) if found.package == library and layer_of(found.path) not in ONLY_IN[library]] == []


def test_a_plugin_imports_the_contract_and_in_its_workshop_the_tools_and_never_another_plugin() -> None:
    wrong = []
    for found in all_imports(PLUGINS):
        own = found.path.relative_to(ROOT / "plugins").parts[0]
        declares = found.path.name == "__init__.py" and found.when == "import"
        if found.package.startswith("alignkit_") and found.package != own:
            wrong.append(str(found))
        if found.package == "alignkit" and found.when != "typing" and found.layer not in (CONTRACT if declares else WORKSHOP):
            wrong.append(str(found))
    assert wrong == []


def test_the_server_imports_neither_runner_nor_loops_nor_plugins() -> None:
    wrong = [
        str(found)
        for found in all_imports(SERVE)
        if (found.package.startswith("alignkit_") and found.package != "alignkit_serve")
        or (found.package == "alignkit" and found.layer not in SERVING)
    ]
    assert wrong == []


def test_nothing_is_pickled() -> None:
    """Artifacts and checkpoints are safetensors and JSON."""
    found = all_imports([*CORE, *PLUGINS, *SERVE])
    assert [str(each) for each in found if each.package in {"pickle", "dill", "cloudpickle"}] == []


@pytest.mark.parametrize("module", LIGHT)
def test_the_core_is_light_at_import(module: str) -> None:
    assert_light([f"alignkit.{module}"])


@pytest.mark.parametrize("module", DECLARING)
def test_a_declaring_module_is_light_at_import(module: str) -> None:
    assert_light([module])
