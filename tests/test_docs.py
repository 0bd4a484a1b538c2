"""The code in the docs is real: marked blocks are run, and marked configs are checked.

``<!-- test -->`` before a Python block runs it (a document's blocks share one module); before a YAML block, checks it as a config.
``<!-- test: PATH -->`` names the file that a block stands for; the guide to plugins is tested as the package that it writes.
A Python block that asks http://127.0.0.1:8000 asks a server of a tiny policy, with a key in ALIGNKIT_API_KEY.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from alignkit.config import load_config
from alignkit.registry import find_plugins
from alignkit.scaffold import write_plugin
from tests.environments import make_environment
from tests.fakes import tiny_folder
from tests.serve.running import running

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^<!-- test(?:: (?P<place>\S+))? -->\n```(?P<language>python|yaml)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
SERVER = "http://127.0.0.1:8000"
"""Where documents say that a server is."""


@dataclass(frozen=True)
class Block:
    """A marked block: its language, the file it stands for ("" for none), its code, and the line where the code begins."""

    language: str
    place: str
    code: str
    line: int


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["place"] or "", found["code"], text.count("\n", 0, found.start("code")) + 1)
        for found in BLOCK.finditer(text)
    ]


@contextmanager
def served(found: list[Block], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Within, a server for the blocks that ask one, at the address given."""
    if not any(SERVER in block.code for block in found if block.language == "python"):
        yield SERVER
        return
    with running(tiny_folder(), f"sqlite:///{folder / 'alignkit.db'}") as server:
        monkeypatch.setenv("ALIGNKIT_API_KEY", server.key("infer", "feedback:write", "feedback:read", "export", "admin"))
        yield server.url


def test_marked_blocks_are_found(tmp_path: Path) -> None:
    document = tmp_path / "x.md"
    document.write_text(
        "a\n\n<!-- test -->\n```python\nx = 1\n```\n\n```python\nskipped\n```\n<!-- test: a/b.yaml -->\n```yaml\nk: 2\n```\n"
    )
    assert blocks(document) == [Block("python", "", "x = 1\n", 5), Block("yaml", "a/b.yaml", "k: 2\n", 13)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_in_a_document_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # paths in documents are those of a checkout
    # A real module: dataclasses look their annotations up in the module they were defined in.
    module = ModuleType(f"document_{document.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = [block for block in blocks(document) if not block.place]
    with served(found, tmp_path, monkeypatch) as url:
        for block in found:
            if block.language == "python":
                # The empty lines make a traceback show the document's own line.
                code = "\n" * (block.line - 1) + block.code.replace(SERVER, url)
                exec(compile(code, str(document), "exec"), vars(module))
            else:
                (tmp_path / "config.yaml").write_text(block.code, encoding="utf-8")
                load_config(tmp_path / "config.yaml", (), find_plugins())


@pytest.mark.slow
def test_the_guide_to_plugins_ends_with_a_plugin_that_works(tmp_path: Path) -> None:
    package = write_plugin("acme-politeness", tmp_path)
    written = {block.place: block.code for block in blocks(ROOT / "docs" / "write-a-plugin.md") if block.place}
    assert set(written) == {"acme_politeness/__init__.py", "tests/test_acme_politeness.py", "polite.yaml"}
    for place, code in written.items():
        (package / place).write_text(code, encoding="utf-8")
    (package / "prompts.jsonl").write_text('{"prompt": "Ask me for a pen."}\n', encoding="utf-8")
    environment = make_environment(tmp_path / "venv", with_checkout=True)
    environment.install(package)
    assert "9 passed" in environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", package, cwd=package).stdout
    assert "acme_politeness" in environment.alignkit("check", "polite.yaml", cwd=package).stdout
