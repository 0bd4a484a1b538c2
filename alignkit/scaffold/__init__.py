"""``alignkit new plugin NAME``: a package with a reward source, its tests and its metadata, ready to be changed."""

from __future__ import annotations

import keyword
import re
import sys
from importlib.resources import files
from pathlib import Path
from string import Template

from alignkit.errors import PluginError

_FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "{module}/__init__.py": "declaration.py",
    "{module}/py.typed": "py.typed",
    "tests/test_{module}.py": "test.py",
}
"""Where each template goes."""


def write_plugin(name: str, parent: Path) -> Path:
    """Write the package ``name`` (letters, digits, - and _) into a new folder of that name under ``parent``; returns the folder.

    The distribution is called ``name`` with dashes; the module, the entry point and the reward source's kind with underscores.
    Raises ``PluginError`` for a name that cannot be one, and when the folder is there already.
    """
    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*", name) or keyword.iskeyword(module):
        raise PluginError(f'"{name}" cannot name a package; allowed: lower-case letters, digits, - and _, such as acme-politeness')
    if module in sys.stdlib_module_names or module == "alignkit":
        raise PluginError(f'"{name}" would hide the Python module {module}; put your own or your project\'s name before it')
    folder = parent / name
    if folder.exists():
        raise PluginError(f"{folder} is there already; choose another name, or another place with --dir")
    words = {"name": module.replace("_", "-"), "module": module, "Class": module.title().replace("_", "")}
    for place, template in _FILES.items():
        path = folder / place.format(module=module)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = files(__name__).joinpath("templates", f"{template}.tmpl").read_text(encoding="utf-8")
        path.write_text(Template(text).substitute(words), encoding="utf-8")
    return folder
