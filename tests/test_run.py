"""The smoke config from end to end: what a run leaves behind, how it goes on, and what it refuses."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import alignkit
from alignkit.errors import CheckpointError, Interrupted, RunError
from alignkit.files import sha256
from alignkit.folder import choices_of
from alignkit.interfaces import TokenBatch
from alignkit.models import kernels
from alignkit.models.causal_lm import load
from alignkit.models.config import TuningConfig
from alignkit.models.kernels import Kernels
from alignkit.runner import run_config
from tests.data.chat import merging_codec
from tests.runs import ctrl_c, learnt, weights

SMOKE = Path(__file__).parent.parent / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    return alignkit.run(SMOKE, [f"dir={folder}"])


def test_every_stage_leaves_its_artifact_and_a_manifest_that_names_its_parents(finished: Path) -> None:
    manifests = {name: json.loads((finished / name / "manifest.json").read_text()) for name in ("sft", "reward", "ppo", "compare")}
    assert [manifest["makes"] for manifest in manifests.values()] == ["policy", "reward_model", "policy", "evaluation"]
    assert set(manifests["ppo"]["parents"]) == {"sft", "reward"}
    assert manifests["ppo"]["parents"]["sft"] == sha256(finished / "sft" / "manifest.json")
    assert set(manifests["compare"]["parents"]) == {"sft", "ppo"}
    for name, makes in (("sft", "policy"), ("reward", "reward_model"), ("ppo", "policy")):
        files = manifests[name]["files"]
        assert files
        assert all(sha256(finished / name / makes / file) == facts["sha256"] for file, facts in files.items())
    counts = manifests["sft"]["data"]["training"]
    assert counts["kept"] > 0
    assert counts["truncated"] == counts["dropped"] == 0
    assert not (finished / "ppo" / "checkpoints").exists()


def test_the_policy_is_a_plain_transformers_folder(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "ppo" / "policy")
    assert model.num_parameters() > 0


def test_the_manifests_probes_are_what_the_saved_policy_computes(finished: Path) -> None:
    probes = json.loads((finished / "ppo" / "manifest.json").read_text())["probes"]
    policy = load(finished / "ppo" / "policy", tuning=TuningConfig(), precision="float32", trainable=False, seed=0)
    for probe in probes:
        ids = torch.tensor([probe["ids"]])
        mask = torch.ones_like(ids, dtype=torch.bool)
        logprobs = policy.score_tokens(TokenBatch(ids, mask, mask)).logprobs[0, 1:]
        assert torch.allclose(logprobs, torch.tensor(probe["logprobs"]), atol=1e-5)


def test_metrics_are_complete_and_ppo_starts_where_it_should(finished: Path) -> None:
    steps = learnt(finished, "ppo")
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    first = steps[0]
    assert abs(first["kl/sequence_nats"]) < 1e-4  # policy and reference are the same before the first update
    assert first["reward/total_mean"] <= first["reward/score_mean"] + 1e-4
    assert steps[-1]["kl/sequence_nats"] != 0.0
    assert "validation/loss_nll_nats" in learnt(finished, "sft")[-1]
    assert "validation/reward_accuracy" in learnt(finished, "reward")[-1]


def test_the_evaluation_holds_what_is_promised(finished: Path) -> None:
    figures = json.loads((finished / "compare" / "evaluation.json").read_text())
    promised = ("win_rate", "ci95_low", "ci95_high", "judge_mean_before", "judge_mean_after", "kl_sequence_nats", "judge_accuracy")
    assert all(isinstance(figures[name], float | int) for name in promised)
    assert figures["ci95_low"] <= figures["win_rate"] <= figures["ci95_high"]
    assert "<svg" in (finished / "report.html").read_text()


def test_the_same_command_again_does_nothing_but_say_so(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = weights(finished)
    alignkit.run(SMOKE, [f"dir={finished}"])
    assert weights(finished) == before
    assert "ppo: done before" in capfd.readouterr().out


def test_a_run_done_again_is_the_same_to_the_bit(finished: Path, tmp_path: Path) -> None:
    again = alignkit.run(SMOKE, [f"dir={tmp_path / 'again'}"])
    assert weights(again) == weights(finished)
    assert learnt(again, "ppo") == learnt(finished, "ppo")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_that_was_stopped_goes_on_to_the_same_weights(finished: Path, tmp_path: Path, stage: str) -> None:
    run = tmp_path / "stopped"
    with ctrl_c(stage, 3), pytest.raises(Interrupted, match=f"stage {stage} is saved after step 3") as stopped:
        alignkit.run(SMOKE, [f"dir={run}"])
    assert stopped.value.exit_code == 130
    assert (run / stage / "checkpoints" / "step-00000003").is_dir()
    alignkit.run(SMOKE, [f"dir={run}"])
    assert weights(run) == weights(finished)
    assert learnt(run, stage) == learnt(finished, stage)


def test_a_run_multiplies_in_the_plain_way_where_its_config_says_so_and_else_in_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Kernels(decode="transposed")
    monkeypatch.setattr(kernels, "probe", lambda: other)
    monkeypatch.setattr(kernels, "_chosen", None)
    for way, wanted in (("plain", kernels.plain()), ("fastest", other)):
        run = tmp_path / way
        with ctrl_c("sft", 1), pytest.raises(Interrupted):
            alignkit.run(SMOKE, [f"dir={run}", f"kernels={way}"])
        assert Kernels(**choices_of(run)["kernels"]) == kernels.chosen() == wanted


def test_on_two_threads_where_policy_and_critic_learn_at_once_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, run = ([f"dir={tmp_path / name}", "threads=2"] for name in ("whole", "run"))
    try:
        wanted = alignkit.run(SMOKE, whole)
        with ctrl_c("ppo", 3), pytest.raises(Interrupted):
            alignkit.run(SMOKE, run)
        found = alignkit.run(SMOKE, run)
    finally:
        torch.set_num_threads(1)
    assert weights(found) == weights(wanted)
    assert learnt(found, "ppo") == learnt(wanted, "ppo")


def test_ctrl_c_saves_and_the_same_command_continues(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "alignkit", "run", str(SMOKE), f"dir={run}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("sft"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 130, rest
    assert "The same command continues it" in rest
    assert "Traceback" not in rest
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert weights(run) == weights(finished)


def test_another_config_in_the_same_folder_is_refused_with_the_difference(finished: Path) -> None:
    with pytest.raises(RunError, match=r"ppo\.optimizer\.kl\.coef: 0\.\d+ -> 0\.7"):
        alignkit.run(SMOKE, [f"dir={finished}", "ppo.optimizer.kl.coef=0.7"])


def test_what_changes_nothing_that_is_learnt_may_change(finished: Path) -> None:
    alignkit.run(SMOKE, [f"dir={finished}", "checks=off", "checkpoint.minutes=1", "checkpoint.keep=5"])


def test_a_second_process_in_the_same_folder_is_refused(finished: Path) -> None:
    import fcntl

    with (finished / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for fresh in (False, True):
            with pytest.raises(RunError, match="another process is running"):
                run_config(SMOKE, [f"dir={finished}"], fresh=fresh)


def test_fresh_starts_anew_and_keeps_the_old_run(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "ppo" / "manifest.json").unlink()
    run_config(SMOKE, [f"dir={run}"], fresh=True)
    assert not (tmp_path / "run.old-1" / "ppo" / "manifest.json").exists()
    assert weights(run) == weights(finished)


def test_the_reference_and_the_reward_model_are_not_touched_by_ppo(finished: Path, tmp_path: Path) -> None:
    before = {name: digest for name, digest in weights(finished).items() if name.startswith(("sft", "reward"))}
    manifests = {name: json.loads((finished / name / "manifest.json").read_text())["files"] for name in ("sft", "reward")}
    for name, digest in before.items():
        stage, _, file = name.split("/", 2)
        assert manifests[stage][file]["sha256"] == digest
    assert (
        load_file(finished / "sft" / "policy" / "model.safetensors").keys()
        == load_file(finished / "ppo" / "policy" / "model.safetensors").keys()
    )


def test_a_finished_run_may_be_moved_and_continued(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "elsewhere"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "ppo")
    shutil.rmtree(run / "sft")
    alignkit.run(SMOKE, [f"dir={run}"])
    assert weights(run) == weights(finished)


def test_an_artifact_that_changed_is_not_built_upon(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "ppo")
    weights_file = run / "sft" / "policy" / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"sft/policy is not what its stage wrote: model.safetensors is not what was written"):
        alignkit.run(SMOKE, [f"dir={run}"])
    assert '"event": "failed"' in (run / "events.jsonl").read_text()


def test_a_border_inside_a_token_is_said_before_anything_is_learnt_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, eos_token_id=0, bos_token_id=None, **shape))
    model.save_pretrained(tmp_path / "model")
    merging_codec().tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "is th", "completion": "e theme", "id": "merged"}, {"prompt": "is the", "completion": " theme", "id": "clean"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"name": "sft", "optimizer": {"kind": "sft", "batch": 2}, "data": {"kind": "jsonl", "path": str(tmp_path / "data.jsonl")}}
    policy = {"kind": "causal_lm", "model": str(tmp_path / "model"), "precision": "float32"}
    config = {"name": "run", "dir": str(tmp_path / "run"), "policy": policy, "stages": [stage]}
    (tmp_path / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    run = alignkit.run(tmp_path / "run.yaml")
    assert "sft: in 1 of 2 rows the end of the prompt and the beginning of the completion are one token" in capsys.readouterr().out
    assert json.loads((run / "sft" / "manifest.json").read_text())["data"]["training"]["merged_ids"] == ["merged"]
