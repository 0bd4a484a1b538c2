"""Another policy takes over: through its gates, with nothing dropped, nothing stale, and a way back."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.checkpoint import save_artifact
from alignkit.files import sha256
from alignkit_serve.store import audit, inferences, policies
from tests.fakes import tiny_folder, tiny_policy
from tests.serve.running import Running, running, until

ASK: dict[str, Any] = {"model": "live", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 24, "seed": 5}


def make_stage(run: Path, name: str, seed: int) -> Path:
    """A stage with a policy of other weights for each seed, and the manifest that a run would write."""
    from alignkit.data.collate import collate
    from alignkit.types import TokenRow

    policy = tiny_policy("llama")
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.02)
    hashes = save_artifact(run / name / "policy", policy.save)
    ids = list(range(40, 60))
    batch = collate([TokenRow("0", tuple(ids), (False,) + (True,) * 19)])
    with torch.no_grad():
        logprobs = policy.score_tokens(batch).logprobs[0, 1:].tolist()
    manifest = {
        "stage": name,
        "makes": "policy",
        "template_hash": policy.codec.template_hash,
        "files": {file: {"sha256": one.sha256, "bytes": one.bytes} for file, one in hashes.items()},
        "probes": [{"ids": ids, "logprobs": logprobs}],
    }
    (run / name / "manifest.json").write_text(json.dumps(manifest))
    return run / name


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, name in enumerate(("first", "second")):
        make_stage(tmp_path / "runs" / "demo", name, seed)
    stages = [{"name": "first"}, {"name": "second"}]
    config = {"stages": stages, "policy": {"precision": "float32"}}
    (tmp_path / "runs" / "demo" / "run.json").write_text(json.dumps({"config": config, "choices": {}}))
    return tmp_path / "runs"


@pytest.fixture
def server(runs: Path, tmp_path: Path) -> Iterator[Running]:
    with running(runs / "demo" / "first", f"sqlite:///{tmp_path / 'store.db'}", models=runs) as started:
        yield started


def admin(server: Running, method: str, route: str, **body: Any) -> Any:
    with server.http("admin") as client:
        return client.request(method, f"/v1/admin/{route}", json=body or None)


def states(server: Running) -> dict[str, str]:
    return {one["name"].partition("@")[0]: one["state"] for one in admin(server, "GET", "policies").json()["data"]}


def test_a_warm_policy_can_be_asked_for_and_is_not_live(server: Running) -> None:
    staged = admin(server, "POST", "policies", path="demo/second").json()
    assert staged["state"] == "warm"
    assert states(server) == {"demo-first": "live", "demo-second": "warm"}
    with server.http() as client:
        live = client.post("/v1/chat/completions", json=ASK).json()
        pinned = client.post("/v1/chat/completions", json={**ASK, "model": "demo-second"}).json()
    assert live["model"].startswith("demo-first@")
    assert pinned["model"] == staged["name"]
    assert live["choices"][0]["message"] != pinned["choices"][0]["message"]


def test_under_load_nothing_is_dropped_and_nothing_is_stale(server: Running) -> None:
    """Every answer is word for word that of the version that it names, whichever was live when it came."""
    second = admin(server, "POST", "policies", path="demo/second").json()
    with server.http() as client:
        first = client.get("/v1/models").json()["data"][0]["alignkit"]["policy_version"]
        expected = {
            name: client.post("/v1/chat/completions", json={**ASK, "model": name}).json()["choices"][0]["message"]["content"]
            for name in (first, second["name"])
        }
    assert expected[first] != expected[second["name"]]
    stop = threading.Event()

    def keep_asking() -> list[tuple[int, str, str]]:
        seen = []
        with server.http() as client:
            while not stop.is_set():
                answer = client.post("/v1/chat/completions", json=ASK)
                seen.append((answer.status_code, answer.json()["model"], answer.json()["choices"][0]["message"]["content"]))
        return seen

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(keep_asking) for _ in range(6)]
        until(lambda: server.service.admission.answers >= 4)
        assert admin(server, "POST", f"policies/{second['id']}/promote").json()["state"] == "live"
        until(lambda: states(server)["demo-first"] == "retired")
        assert admin(server, "POST", "rollback").json()["name"] == first
        until(lambda: states(server)["demo-second"] == "retired")
        stop.set()
        seen = [one for each in asking for one in each.result()]
    assert {status for status, _, _ in seen} == {200}
    assert {name for _, name, _ in seen} == {first, second["name"]}
    assert all(text == expected[name] for _, name, text in seen)
    assert states(server) == {"demo-first": "live", "demo-second": "retired"}


def test_what_is_in_progress_finishes_on_the_policy_that_began_it(server: Running) -> None:
    client = server.openai()
    stream = client.chat.completions.create(**{**ASK, "max_tokens": 200}, stream=True)
    chunks = iter(stream)
    begun_by = next(chunks).model
    admin(server, "POST", "policies", path="demo/second", promote=True)
    assert states(server)["demo-second"] == "live"
    assert {chunk.model for chunk in chunks} == {begun_by}
    until(lambda: states(server)["demo-first"] == "retired")
    stored = server.store.read(lambda connection: inferences.listed(connection)[0])
    live = server.store.read(policies.live)
    assert live is not None
    assert stored[0].inference.policy_version_id != live.id


def test_a_changed_file_does_not_pass(server: Running, runs: Path) -> None:
    weights = runs / "demo" / "second" / "policy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused = admin(server, "POST", "policies", path="demo/second")
    assert refused.status_code == 400
    assert "model.safetensors is not what was written" in refused.json()["error"]["message"]
    assert states(server) == {"demo-first": "live"}


def test_numbers_that_are_not_the_trainers_do_not_pass(server: Running, runs: Path) -> None:
    path = runs / "demo" / "second" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["probes"][0]["logprobs"][7] += 0.01
    path.write_text(json.dumps(manifest))
    refused = admin(server, "POST", "policies", path="demo/second").json()["error"]["message"]
    assert "0.01 nats from the trainer's; allowed: 0.001" in refused


@pytest.mark.parametrize(("precision", "faster", "bound"), [("auto", True, "0.25"), ("auto", False, "0.001"), ("bfloat16", False, "0.25")])
def test_numbers_of_a_run_in_bfloat16_are_nearer_than_its_rounding(
    precision: str, faster: bool, bound: str, runs: Path, tmp_path: Path
) -> None:
    """``auto`` is what the trainer's machine was faster in, and float32 where a CPU serves."""
    run = runs / "demo" / "run.json"
    facts = json.loads(run.read_text())
    facts["config"]["policy"]["precision"] = precision
    run.write_text(json.dumps({**facts, "choices": {"kernels": {"bfloat16": faster}}}))
    path = runs / "demo" / "second" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["probes"][0]["logprobs"][7] += 0.5
    path.write_text(json.dumps(manifest))
    with running(runs / "demo" / "first", f"sqlite:///{tmp_path / 'store.db'}", models=runs) as server:
        refused = admin(server, "POST", "policies", path="demo/second").json()["error"]["message"]
        assert f"nats from the trainer's; allowed: {bound}." in refused
        manifest["probes"][0]["logprobs"][7] -= 0.45
        path.write_text(json.dumps(manifest))
        assert admin(server, "POST", "policies", path="demo/second").is_success == (bound == "0.25")


def test_another_template_does_not_pass(server: Running, runs: Path) -> None:
    path = runs / "demo" / "second" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["template_hash"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert "chat template" in admin(server, "POST", "policies", path="demo/second").json()["error"]["message"]


@pytest.mark.parametrize("path", ["../../etc", "/etc", "demo/../../.."])
def test_no_policy_comes_from_outside_of_the_folder_of_models(server: Running, path: str) -> None:
    refused = admin(server, "POST", "policies", path=path)
    assert refused.status_code == 400
    assert "outside of" in refused.json()["error"]["message"]


def test_there_is_nothing_to_go_back_to_at_first(server: Running) -> None:
    assert "no policy was live before" in admin(server, "POST", "rollback").json()["error"]["message"]


def test_every_change_is_in_the_audit(server: Running) -> None:
    admin(server, "POST", "policies", path="demo/second", promote=True)
    until(lambda: states(server)["demo-first"] == "retired")
    admin(server, "POST", "rollback")
    entries = admin(server, "GET", "audit").json()["data"]
    assert [entry["action"] for entry in entries] == ["promote", "stage", "promote", "stage", "serve", "promote"]
    assert entries[1]["detail"]["gates"]["probe_gap_nats"] < 1e-4
    assert entries[0]["actor"].startswith("key ")
    assert server.store.read(audit.verify) is None


def test_a_promotion_outlives_the_server_and_another_policy_named_at_the_start_does_not_wait_for_one(runs: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"

    def live_at_start_of(policy: str) -> str:
        with running(runs / policy, store, models=runs) as server:
            live = server.store.read(policies.live)
            assert live is not None
            return live.name.partition("@")[0]

    with running(runs / "demo" / "first", store, models=runs) as server:
        admin(server, "POST", "policies", path="demo/second", promote=True)
    assert live_at_start_of("demo/first") == "demo-second"
    assert live_at_start_of("demo/first") == "demo-second"
    shutil.copytree(tiny_folder("gpt2"), runs / "other")
    assert live_at_start_of("other") == "other"
    assert live_at_start_of("demo/first") == "demo-first"


def test_the_name_of_a_run_means_the_last_policy_it_made(runs: Path) -> None:
    from alignkit_serve.artifact import ArtifactError, locate

    assert locate(runs / "demo").name == "demo-second"
    assert locate(runs / "demo" / "first" / "policy").name == "demo-first"
    assert locate(runs / "demo").manifest_sha256 == sha256(runs / "demo" / "second" / "manifest.json")
    with pytest.raises(ArtifactError, match=r"is not there; allowed: a run's folder, one of its stages, or a transformers folder"):
        locate(runs / "nothing")
