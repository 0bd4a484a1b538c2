"""Clients of OpenAI's API that are not of this environment, each in its own, against a real server of a tiny policy."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environments import missing
from tests.fakes import tiny_folder
from tests.serve.running import Running, running, until

CLIENTS = Path(__file__).parent / "clients"
PYTHON = os.environ.get("ALIGNKIT_CLIENTS_PYTHON")
NODE = os.environ.get("ALIGNKIT_CLIENTS_NODE")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_folder(), f"sqlite:///{tmp_path_factory.mktemp('store') / 'store.db'}") as started:
        yield started


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_langchain_and_litellm(server: Running) -> None:
    if PYTHON is None:
        missing("`make clients` makes an environment with langchain-openai and litellm; ALIGNKIT_CLIENTS_PYTHON names its interpreter")
    said = run(PYTHON, CLIENTS / "langchain_and_litellm.py", f"{server.url}/v1", server.key("infer"))
    assert said.splitlines()[-1] == "both got what they expect"


@pytest.mark.slow
def test_the_official_client_for_node(server: Running, tmp_path: Path) -> None:
    if NODE is None:
        missing("`make clients` installs openai's client for Node; ALIGNKIT_CLIENTS_NODE names the folder")
    # Node looks for packages beside the script.
    (tmp_path / "node_modules").symlink_to(Path(NODE).resolve() / "node_modules")
    shutil.copy(CLIENTS / "node" / "client.mjs", tmp_path)
    said = run("node", tmp_path / "client.mjs", f"{server.url}/v1", server.key("infer", max_inflight=3))
    assert said.splitlines()[-1] == "it got what it expects"
    until(lambda: server.service.roster.live().engine.figures()["rows"] == 0)
